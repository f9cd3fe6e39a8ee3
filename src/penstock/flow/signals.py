"""What an answer says about the server behind it: whether it was too much, how long to wait, what was used.

The controllers (``limit``, ``search``) learn from the outcome of every attempt, and most attempts go through somebody
else's SDK. So the outcome is read where SDKs keep such things: a status and headers on the exception, on its
``response``, or on what it was raised from (one level). A result is read the same way if it looks like a response,
with an integer status *and* headers; all else is the user's data and means nothing, whatever its keys are called.

Four kinds:

- OK: the server did the work.
- THROTTLED: it asks for fewer requests (429; 503 with ``Retry-After``; error codes like ``ThrottlingException``). The
  pace learns from it.
- OVERLOADED: it can't cope with so many at once (502, 503, 504, 529, resets, timeouts). The concurrency search learns.
- UNKNOWN: any other failure, which is about the item and teaches nothing. A quota that is spent for good is one of
  these, though it comes as a 429 (``insufficient_quota``): waiting won't help.

Strangers' objects can do anything (properties that raise, statuses that are texts), and reading them must never fail an
item that has succeeded. So every access is guarded, and what isn't understood is as if it weren't there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from math import isfinite
from typing import Any, NamedTuple

__all__ = ["OK", "OVERLOADED", "THROTTLED", "UNKNOWN", "Quota", "Rates", "Signal", "read_signal"]

OK, THROTTLED, OVERLOADED, UNKNOWN = range(4)

_TOO_MANY = 429
_OVERLOADED_STATUS = frozenset({408, 502, 503, 504, 522, 524, 529})
_STATUS_NAMES = ("status_code", "status", "http_status", "code")

# Compared without case, underscores, dashes, dots and spaces.
_THROTTLED_CODES = (
    "ratelimit",
    "throttl",
    "toomanyrequests",
    "requestlimitexceeded",
    "resourceexhausted",
    "provisionedthroughputexceeded",
    "slowdown",
)
_OVERLOADED_CODES = ("overloaded", "serviceunavailable", "deadlineexceeded")
_SPENT_CODES = ("insufficientquota", "billing")

# By name, for importing an SDK to recognize its errors would load it for everybody.
_THROTTLED_NAMES = frozenset({"RateLimitError", "TooManyRequests", "ResourceExhausted"})
_OVERLOADED_NAMES = frozenset(
    {
        "APIConnectionError",  # openai, anthropic; timeouts are a kind of it
        "TransportError",  # httpx
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "HTTPClientError",  # botocore
        "Timeout",  # requests
    }
)
# Of the same families, but the caller's fault: fewer at once wouldn't help.
_CALLERS_NAMES = frozenset(
    {
        "UnsupportedProtocol",
        "LocalProtocolError",
        "ClientSSLError",
        "ClientConnectorDNSError",
        "APIResponseValidationError",
    }
)

_DATA = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None), list, tuple, set, frozenset})
_MOST_HEADERS = 200

_NUMBER = re.compile(r"[-+]?\d{1,18}(\.\d{0,18})?|[-+]?\.\d{1,18}", re.ASCII)
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+", re.ASCII)
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?", re.ASCII)
_PARAMETER = re.compile(r"\b(limit|remaining|reset|[rtqw])\s*=\s*(\d{1,18})", re.ASCII)
_EPOCH = 1e9  # a reset this large is a date, not a duration
_EPOCH_MILLISECONDS = 1e12
_MINUTE = 60.0


class Quota(NamedTuple):
    """What headers say of one quota: ``remaining`` of ``limit`` are left, and in ``reset`` seconds it is whole again.

    ``window`` is the seconds that ``limit`` is for, where it is known. ``refills``: it comes back evenly and not all at
    once, as the reset of OpenAI and Anthropic is meant.
    """

    limit: float | None = None
    remaining: float | None = None
    reset: float | None = None
    window: float | None = None
    refills: bool = False


class Rates(NamedTuple):
    """The quotas that an answer's headers tell of."""

    requests: Quota | None = None
    tokens: Quota | None = None


class Signal(NamedTuple):
    """What one outcome says: its ``kind``, how many seconds to wait, the tokens it really used, and the quotas.

    >>> Signal(THROTTLED, retry_after=2.0)
    Signal(kind=1, retry_after=2.0, tokens=None, rates=None)
    """

    kind: int = OK
    retry_after: float | None = None
    tokens: float | None = None
    rates: Rates | None = None


_PLAIN = Signal()
_UNKNOWN = Signal(UNKNOWN)


def read_signal(error: BaseException | None, result: object = None) -> Signal:
    """Read the outcome of one attempt: an exception, or else a result. Never raises.

    >>> read_signal(TimeoutError()).kind == OVERLOADED
    True
    >>> read_signal(None, {"status": 429}).kind == OK  # a row, not a response
    True
    >>> read_signal(None, {"usage": {"total_tokens": 12}}).tokens
    12.0
    """
    if error is None:
        kind = type(result)
        if kind in _DATA:
            return _PLAIN
        try:
            if kind is dict:
                usage = result.get("usage")  # type: ignore[attr-defined]  # a dict
                return _PLAIN if usage is None else Signal(tokens=_used(usage))
            return _read_result(result)
        except Exception:
            return _PLAIN
    try:
        return _read_error(error)
    except Exception:
        return _UNKNOWN


_TELLING = re.compile("retry-after|ratelimit|rate-limit", re.IGNORECASE)


def _read_result(result: object) -> Signal:
    headers = _get(result, "headers")
    usage = _get(result, "usage")
    if headers is None:
        return _PLAIN if usage is None else Signal(tokens=_used(usage))
    tokens = None if usage is None else _used(usage)
    for name in ("status_code", "status"):
        status = _get(result, name)
        if isinstance(status, int):
            if status < 400 and isinstance(headers, Mapping) and not _TELLING.search("\n".join(map(str, headers))):
                break  # the usual answer: it is only to be seen that it says nothing
            known = _normal(headers)
            kind = _kind_of(status, known) if status >= 400 else OK
            return Signal(kind, _retry_after(known), tokens, _rates(known))
    return Signal(tokens=tokens)


def _read_error(error: BaseException) -> Signal:
    found = _read_one(error)
    if found is None:
        cause = error.__cause__
        found = _read_one(cause) if cause is not None else None
    return found or _UNKNOWN


def _read_one(error: BaseException) -> Signal | None:
    """What this very exception says; None if it says nothing."""
    response = _get(error, "response")
    headers: dict[str, str] = {}
    for holder in (response, error):
        headers = headers or _normal(_get(holder, "headers"))
    status, codes = _status_of(error, response), _codes_of(error, response)
    if isinstance(response, dict):  # botocore
        metadata = response.get("ResponseMetadata")
        if isinstance(metadata, dict):
            headers = headers or _normal(metadata.get("HTTPHeaders"))
            status = status or _whole(metadata.get("HTTPStatusCode"))
    names = {kind.__name__ for kind in type(error).__mro__}
    kind: int | None = None
    if _matches(codes, _SPENT_CODES):
        kind = UNKNOWN
    elif _matches(codes, _THROTTLED_CODES) or (status is None and names & _THROTTLED_NAMES):
        kind = THROTTLED
    elif _matches(codes, _OVERLOADED_CODES) or "unavailable" in codes:
        kind = OVERLOADED
    elif status is not None:
        kind = _kind_of(status, headers)
    elif isinstance(error, (ConnectionError, TimeoutError)) or names & _OVERLOADED_NAMES:
        kind = UNKNOWN if names & _CALLERS_NAMES else OVERLOADED
    elif "FetchError" in names and _get(error, "reason") in ("connect", "timeout"):
        kind = OVERLOADED
    if kind is None:
        return None
    return Signal(kind, _retry_after(headers), None, _rates(headers))


def _kind_of(status: int, headers: Mapping[str, str]) -> int:
    if status == _TOO_MANY or (status == 503 and _retry_after(headers) is not None):
        return THROTTLED
    return OVERLOADED if status in _OVERLOADED_STATUS else UNKNOWN


def _status_of(error: BaseException, response: Any) -> int | None:
    for holder in (error, response):
        if holder is not None:
            for name in _STATUS_NAMES:
                status = _whole(_get(holder, name))
                if status is not None and 100 <= status < 600:
                    return status
    return None


def _codes_of(error: BaseException, response: Any) -> list[str]:
    """Error codes that are words: of the exception, and of the body that it carries."""
    found = [_get(error, "code"), _get(error, "type")]
    if callable(found[0]) and type(error).__module__.startswith("grpc"):
        found[0] = found[0]()
    bodies = [_get(error, "body"), response]
    for body in bodies:
        if isinstance(body, dict):
            for inside in (body, body.get("error"), body.get("Error")):
                if isinstance(inside, dict):
                    found += [inside.get("code"), inside.get("type"), inside.get("Code")]
    texts = [code if isinstance(code, str) else _get(code, "name") for code in found if code is not None]
    return [re.sub(r"[_\-. ]", "", text[:200]).lower() for text in texts if isinstance(text, str)]


def _matches(codes: Iterable[str], marks: Iterable[str]) -> bool:
    return any(mark in code for code in codes for mark in marks)


def _get(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:
        return None


def _whole(value: Any) -> int | None:
    """A status: a whole number, or the text of one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 6:
        return int(value)
    return None


def _used(usage: Any) -> float | None:
    """The tokens that a usage block counts, an object or a dict."""

    def count(name: str) -> float | None:
        value = usage.get(name) if isinstance(usage, dict) else _get(usage, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
            return None
        return float(value)

    total = count("total_tokens")
    if total is not None:
        return total
    for taken, given in (("input_tokens", "output_tokens"), ("prompt_tokens", "completion_tokens")):
        one, other = count(taken), count(given)
        if one is not None or other is not None:
            return (one or 0.0) + (other or 0.0)
    return None


# -- headers -----------------------------------------------------------------------------------------------------------


def _normal(headers: Any) -> dict[str, str]:
    """Headers of any make as a dict with names in lower case; the first of several wins."""
    if headers is None:
        return {}
    try:
        pairs = headers.items() if hasattr(headers, "items") else headers
        found: dict[str, str] = {}
        for name, value in islice(pairs, _MOST_HEADERS):
            found.setdefault(_text(name).lower(), _text(value))
        return found
    except Exception:
        return {}


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _number(text: str | None) -> float | None:
    text = (text or "").strip()
    return float(text) if _NUMBER.fullmatch(text) else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, at least 0; None if the server doesn't say, or not understandably."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return max(0.0, milliseconds / 1000)
    text = headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is None:
        at = _http_date(text)
        seconds = None if at is None else at - _answered(headers)
    return None if seconds is None else max(0.0, seconds)


def _http_date(text: str | None) -> float | None:
    if not text:
        return None
    try:
        at = parsedate_to_datetime(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _answered(headers: Mapping[str, str]) -> float:
    """When the answer was given, by the server's own clock if it shows it: ours may differ."""
    at = _http_date(headers.get("date"))
    return time.time() if at is None else at


def _reset(text: str | None, headers: Mapping[str, str]) -> float | None:
    """Seconds until a quota is whole again: a number, a duration like 6m0s, a date, or a Unix time."""
    text = (text or "").strip()
    if not text:
        return None
    seconds = _number(text)
    if seconds is not None:
        if seconds >= _EPOCH:
            seconds = (seconds / 1000 if seconds >= _EPOCH_MILLISECONDS else seconds) - _answered(headers)
        return max(0.0, seconds)
    parts = _DURATION.fullmatch(text.lower())
    if parts:
        days, hours, minutes, whole, thousandths = (float(part or 0) for part in parts.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + whole + thousandths / 1000
    try:
        at = datetime.fromisoformat(text)
        return max(0.0, (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - _answered(headers))
    except (ValueError, OverflowError):
        at_date = _http_date(text)
        return None if at_date is None else max(0.0, at_date - _answered(headers))


def _rates(headers: Mapping[str, str]) -> Rates | None:
    """The quotas in any of the spellings: OpenAI's, Anthropic's, and the plain ones."""
    if not any("ratelimit" in name or "rate-limit" in name for name in headers):
        return None
    requests = _family(headers, "requests") or _plain(headers)
    tokens = _family(headers, "tokens") or _family(headers, "input-tokens")
    return Rates(requests, tokens) if requests or tokens else None


def _family(headers: Mapping[str, str], what: str) -> Quota | None:
    for shape in (f"x-ratelimit-{{}}-{what}", f"anthropic-ratelimit-{what}-{{}}"):
        limit, remaining = (_count(headers.get(shape.format(field))) for field in ("limit", "remaining"))
        if limit is not None or remaining is not None:
            reset = _reset(headers.get(shape.format("reset")), headers)
            return Quota(limit, remaining, reset, _MINUTE, refills=True)
    return None


def _plain(headers: Mapping[str, str]) -> Quota | None:
    policy = dict(_PARAMETER.findall(headers.get("ratelimit-policy", "")))
    told = dict(_PARAMETER.findall(headers.get("ratelimit", "")))
    limit = _count(told.get("limit") or told.get("q") or policy.get("q"))
    remaining = _count(told.get("remaining") or told.get("r"))
    reset = _count(told.get("reset") or told.get("t"))
    window = _count(policy.get("w"))
    for prefix in ("x-ratelimit-", "ratelimit-", "x-rate-limit-"):
        text = headers.get(prefix + "limit", "")
        limit = _count(text) if limit is None else limit
        window = _count(dict(_PARAMETER.findall(text)).get("w")) if window is None else window
        remaining = _count(headers.get(prefix + "remaining")) if remaining is None else remaining
        reset = _reset(headers.get(prefix + "reset"), headers) if reset is None else reset
    if limit is None and remaining is None:
        return None
    return Quota(limit, remaining, reset, window or None)


def _count(text: str | None) -> float | None:
    """A count, of which ``100, 100;w=60`` and ``100;w=60`` have one in front; ``1,000`` is one too."""
    text = (text or "").strip()
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else re.split(r"[,;]", text, maxsplit=1)[0]
    value = _number(text)
    return None if value is None else max(0.0, value)
