"""What must never be shown: the values of headers and query fields whose names say so, and a URL's user and password.

Hiding too much costs a reader a moment, hiding too little costs somebody an account: so names are judged by
their words, and whatever looks like a credential is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "HIDDEN",
    "hide_values",
    "is_secret_field",
    "is_secret_header",
    "redact",
    "redact_headers",
    "redact_url",
    "secrets_in_url",
]

HIDDEN = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ENDINGS = ("key", "token", "secret", "signature", "password", "passwd", "credential", "credentials", "passphrase")
_WHOLE = frozenset({"sig", "auth", "pwd", "pass", "jwt", "sid", "session", "authorization"})
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "cookie2", "set-cookie"})
_HARMLESS_HEADERS = frozenset({"idempotency-key", "sec-websocket-key"})
_LEAST_SECRET = 4  # shorter values would be found everywhere in a text


def is_secret_field(name: str) -> bool:
    """Whether a query field (or a header) of this name holds a credential.

    >>> [is_secret_field(name) for name in ("apiKey", "APIKey", "X-Amz-Signature", "sig", "keyword", "page")]
    [True, True, True, True, False, False]
    """
    words = _WORD.findall(name)
    return any(word in _WHOLE or word.endswith(_ENDINGS) for word in map(str.lower, [*words, "".join(words)]))


def is_secret_header(name: str) -> bool:
    """Whether a header of this name holds a credential.

    >>> [is_secret_header(name) for name in ("Authorization", "x-api-key", "Accept", "Idempotency-Key")]
    [True, True, False, False]
    """
    lowered = name.lower()
    return lowered in _SECRET_HEADERS or (lowered not in _HARMLESS_HEADERS and is_secret_field(name))


def redact_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers, with ``***`` in place of credentials."""
    return {name: HIDDEN if is_secret_header(name) else value for name, value in headers.items()}


def redact_url(text: str) -> str:
    """A URL without its user and password, and with ``***`` for query values whose names say that they are secret.

    Works on any text, and never raises: what isn't a URL comes back as it is.

    >>> redact_url("https://me:hunter2@example.com/a?page=2&api_key=abc#top")
    'https://***@example.com/a?page=2&api_key=***#top'
    """
    start, slashes, rest = text.partition("//")
    if slashes:
        authority = re.match(r"[^/?#\\]*", rest)
        length = authority.end() if authority is not None else 0
        _, at, host = rest[:length].rpartition("@")
        text = f"{start}//{HIDDEN}@{host}{rest[length:]}" if at else text
    return _FIELD.sub(_hide_field, text)


_FIELD = re.compile(r"([?&;#])([^=&;#?]*)=([^&;#]*)")


def _hide_field(found: re.Match[str]) -> str:
    mark, name, value = found.groups()
    return f"{mark}{name}={HIDDEN if value and is_secret_field(name) else value}"


_FIELD_IN_TEXT = re.compile(r"([?&;#])([^=&;#?\s'\"]*)=([^&;#\s'\"]*)")
_LOGIN = re.compile(r"(?<=://)[^\s/?#'\"@]+@")


def redact(value: Any) -> Any:
    """An item as it may be kept and shown: the URLs in it, at any depth of dicts and lists, without credentials.

    >>> redact({"id": 7, "pages": ["https://me:hunter2@example.com/?sig=abc"]})
    {'id': 7, 'pages': ['https://***@example.com/?sig=***']}
    """
    kind = type(value)
    if kind is str:
        return _FIELD_IN_TEXT.sub(_hide_field, _LOGIN.sub(f"{HIDDEN}@", value)) if "://" in value else value
    if kind is dict:
        return {key: redact(one) for key, one in value.items()}
    if kind is list or kind is tuple:
        return kind(map(redact, value))
    return value


def secrets_in_url(text: str) -> list[str]:
    """What ``redact_url`` would hide: the user and password, and the secret query values."""
    found = [value for _, name, value in _FIELD.findall(text) if is_secret_field(name)]
    authority = re.match(r"[^/]*//([^/?#\\]*)@", text)
    if authority is not None:
        found += [authority[1], *authority[1].split(":", 1)]
    return found


def hide_values(text: str, secrets: Iterable[str]) -> str:
    """A text that somebody else wrote, without the secrets that were sent to them and may be echoed in it.

    >>> hide_values("bad key sk-12345", ["Bearer sk-12345"])
    'bad key ***'
    """
    parts = {part for secret in secrets for part in (secret, *secret.split())}
    for part in sorted(parts, key=len, reverse=True):
        if len(part) >= _LEAST_SECRET and part.lower() not in ("bearer", "basic", "token"):
            text = text.replace(part, HIDDEN)
    return text
