"""``Request``: one HTTP request, checked when it is made, and never shown with its credentials."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

from penstock.errors import PlanError
from penstock.flow.codec import encode_json
from penstock.flow.redact import HIDDEN, redact_headers, redact_url
from penstock.net.row import Row

__all__ = ["Request", "basic_login", "check_url", "has_blank", "is_http", "login_of"]

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_HTTP = ("http://", "https://")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FORBIDDEN = re.compile(r"[\r\n\0]")
_BLANK = re.compile(r"[\x00-\x20\x7f]")
_LOGIN = re.compile(r"[^/?#]*//([^/?#\\]*)@")
_FRAMING = ("content-length", "transfer-encoding", "connection", "host")
_EMPTY: Mapping[str, str] = MappingProxyType({})


class Request(Row):
    """One HTTP request, for ``ps.fetch``: as a source, or as what ``request=`` makes of a row.

    ``url``: http or https; a user and password in it are sent as basic authorization. ``method``: any.
    ``headers``: added to those that every request has. ``json``: a value to send as JSON. ``data``: bytes, text, or a
    dict to send as a form. ``idempotent``: whether sending it twice does no harm, so that it may be tried again; by
    default that is so for GET, HEAD, OPTIONS, PUT and DELETE, and where an ``Idempotency-Key`` header is sent.

    A request can't be changed. Its repr, its row and its pickled form show ``***`` in place of credentials; one that
    was read back from such a form is refused when it is sent. Where credentials must outlive the process, make the
    request from a row by ``request=``.

    Raises PlanError for what can't be sent: another scheme, a line break in a header, both ``json`` and ``data``.

    >>> import penstock as ps
    >>> ps.Request("https://api.example.com/v1?key=abc", headers={"Authorization": "Bearer abc"}, json={"n": 1})
    Request('https://api.example.com/v1?key=***', method='POST', headers={'Authorization': '***'}, json={'n': 1})
    """

    __slots__ = ("_body", "data", "headers", "idempotent", "json", "method", "url")

    url: str
    method: str
    headers: Mapping[str, str]
    json: Any
    data: bytes | str | Mapping[str, Any] | None
    idempotent: bool

    def __init__(
        self,
        url: str,
        method: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        data: bytes | str | Mapping[str, Any] | None = None,
        idempotent: bool | None = None,
    ) -> None:
        check_url(url)
        if json is not None and data is not None:
            raise PlanError("Request() was given both json= and data=", "A request has one body: give one of them")
        if method is None:
            method = "GET" if json is None and data is None else "POST"
        if not isinstance(method, str) or not _TOKEN.fullmatch(method):
            raise PlanError(f"Request(method={method!r})", 'Give a method such as "GET" or "POST"')
        if data is not None and not isinstance(data, (bytes, str, Mapping)):
            raise PlanError(
                f"Request(data=...) was given a {type(data).__name__}",
                "Give bytes, text, or a dict to send as a form; json= takes any value",
            )
        if idempotent is not None and not isinstance(idempotent, bool):
            raise PlanError(f"Request(idempotent={idempotent!r})", "Give True, False, or None for the usual")
        named = _checked(headers)
        method = method.upper()
        if idempotent is None:
            idempotent = method in _IDEMPOTENT or any(name.lower() == "idempotency-key" for name in named)
        set_ = object.__setattr__
        set_(self, "url", url)
        set_(self, "method", method)
        set_(self, "headers", MappingProxyType(named) if named else _EMPTY)
        set_(self, "json", json)
        set_(self, "data", data)
        set_(self, "idempotent", idempotent)
        set_(self, "_body", None)

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError(f"a Request can't be changed: {name}. Make another one")

    __delattr__ = __setattr__

    def body(self) -> bytes | None:
        """What is sent as the body. Raises CannotEncode for a ``json`` that JSON has no form for."""
        if self._body is None:
            object.__setattr__(self, "_body", self._encoded())
        return self._body

    _body: bytes | None

    def _encoded(self) -> bytes | None:
        if self.json is not None:
            return encode_json(self.json, "the body of a Request")
        if isinstance(self.data, str):
            return self.data.encode()
        if isinstance(self.data, Mapping):
            return urlencode(self.data, doseq=True).encode()
        return self.data

    def sent_headers(self) -> dict[str, str]:
        """The headers that go out with the request, beyond those that every request has."""
        sent = dict(self.headers)
        names = {name.lower() for name in sent}
        if "content-type" not in names:
            if self.json is not None:
                sent["Content-Type"] = "application/json"
            elif isinstance(self.data, Mapping):
                sent["Content-Type"] = "application/x-www-form-urlencoded"
            elif isinstance(self.data, str):
                sent["Content-Type"] = "text/plain; charset=utf-8"
        login = login_of(self.url)
        if login is not None and "authorization" not in names:
            sent["Authorization"] = login
        return sent

    @property
    def is_redacted(self) -> bool:
        """Whether its credentials were removed, so that it can't be sent."""
        return HIDDEN in self.headers.values() or f"//{HIDDEN}@" in self.url or f"={HIDDEN}" in self.url

    def redacted(self) -> Request:
        """A copy with ``***`` in place of credentials: secret headers, the URL's user, secret query values."""
        copy: Request = object.__new__(Request)
        for name in Request.__slots__:
            object.__setattr__(copy, name, getattr(self, name))
        object.__setattr__(copy, "url", redact_url(self.url))
        object.__setattr__(copy, "headers", MappingProxyType(redact_headers(self.headers)))
        return copy

    def as_row(self) -> dict[str, Any]:
        """The request as outputs write it, without credentials."""
        return {
            "url": redact_url(self.url),
            "method": self.method,
            "headers": redact_headers(self.headers),
            "json": self.json,
            "data": self.data,
        }

    def __repr__(self) -> str:
        parts = [repr(redact_url(self.url))]
        if self.method != "GET":
            parts.append(f"method={self.method!r}")
        if self.headers:
            parts.append(f"headers={redact_headers(self.headers)}")
        for name in ("json", "data"):
            value = getattr(self, name)
            if value is not None:
                text = repr(value)
                parts.append(f"{name}={text if len(text) <= 80 else text[:77] + '...'}")
        return f"Request({', '.join(parts)})"

    def _parts(self) -> tuple[Any, ...]:
        return self.url, self.method, dict(self.headers), self.json, self.data, self.idempotent

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Request) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash((self.url, self.method))

    def __copy__(self) -> Request:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Request:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        shown = self.redacted()
        return _restored, (shown.url, self.method, dict(shown.headers), self.json, self.data, self.idempotent)


def _restored(url: str, method: str, headers: dict[str, str], json: Any, data: Any, idempotent: bool) -> Request:
    return Request(url, method, headers=headers, json=json, data=data, idempotent=idempotent)


def login_of(url: str) -> str | None:
    """The Authorization header that the user and password in a URL make; None if there are none."""
    found = _LOGIN.match(url)
    if found is None:
        return None
    name, _, password = found[1].partition(":")
    return basic_login(unquote(name), unquote(password))


def basic_login(user: str, password: str) -> str:
    """The value of an Authorization header that a user and a password make."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def is_http(text: str) -> bool:
    """Whether a text begins as an http or https URL."""
    return text.startswith(_HTTP) or text[:8].lower().startswith(_HTTP)


def has_blank(url: str) -> bool:
    """Whether a URL holds a blank or a control character."""
    return _BLANK.search(url) is not None


def check_url(url: Any) -> None:
    """Refuse what is no http or https URL with a host. Raises PlanError, which shows no credentials."""
    if not isinstance(url, str):
        raise PlanError(f"a URL was given as {type(url).__name__}", "Give it as text: https://…")
    if not is_http(url):
        raise PlanError(f"{redact_url(url)[:200]!r} is no http or https URL", "Give it in full: https://…")
    if has_blank(url):
        raise PlanError(
            f"the URL {redact_url(url)[:200]!r} contains a blank or a control character",
            "Quote it: urllib.parse.quote makes a blank %20",
        )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise PlanError(f"the URL {redact_url(url)[:200]!r} can't be read: {error}", "Correct it") from None
    if not host:
        raise PlanError(f"the URL {redact_url(url)[:200]!r} names no host", "Give it in full: https://host/path")


def _checked(headers: Mapping[str, str] | None) -> dict[str, str]:
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise PlanError(f"Request(headers=...) was given a {type(headers).__name__}", "Give a dict: {name: value}")
    for name, value in headers.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise PlanError(f"the header name {name!r} can't be sent", "Names are letters, digits and hyphens")
        if not isinstance(value, str):
            raise PlanError(f"the value of the header {name} is a {type(value).__name__}", "Give it as text")
        if _FORBIDDEN.search(value) or not _encodable(value):
            raise PlanError(
                f"the value of the header {name} contains a line break, a NUL or what UTF-8 can't hold",
                "Remove it: it would end the header and begin another one",
            )
        if name.lower() in _FRAMING:
            raise PlanError(f"the header {name} can't be given", "It follows from the URL and the body")
    return dict(headers)


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
