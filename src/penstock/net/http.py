"""HTTP over aiohttp: connections, and what can go wrong with them. Imported when the first URL is fetched.

Of one exchange: ``send`` sets a *passage* in its context, which the connector finds there: the guard notes what it
refused, the connector whether the connection is new and when it stands. (Tasks that aiohttp starts to connect inherit
the context.) There is no timer here but the caller's watch. Whatever goes wrong, also a cancellation at any await,
aborts the connection at once: closed politely it would linger until the other side has read what was written.

Two sessions, since what may be connected to differs: directly, only what the guard admits; to a proxy, whatever the
environment names. The second is made when a proxy is first needed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import string
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any, TypeVar
from urllib.parse import quote_from_bytes

import aiohttp
from yarl import URL

import penstock
from penstock.net.address import Guard
from penstock.net.decoding import accepted_encodings
from penstock.net.names import Lookup, Resolver
from penstock.net.proxy import Proxies
from penstock.net.request import basic_login
from penstock.net.timing import Watch
from penstock.net.transport import Answer, Broken, Outgoing, Receive

__all__ = ["HttpTransport"]

T = TypeVar("T")

_MOST_KEPT = 256
"""Hosts whose connections are kept open while they idle: beyond, a crawl over many hosts would run out of files."""

_NAMES_KEPT = 60  # seconds that an address is remembered
_PIECE = 65_536
_NO_BODY = frozenset({204, 304})
_PERMANENT_DNS = tuple(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_FAIL") if hasattr(socket, name)
)


class _Passage:
    """What is known of one exchange while it is under way."""

    __slots__ = ("admitted", "answered", "fresh", "refused", "transport", "watch")

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.fresh = False
        self.transport: asyncio.Transport | None = None
        self.refused: list[str] = []
        self.admitted = False
        self.answered = False

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
            self.transport = None


_passage: ContextVar[_Passage] = ContextVar("penstock_passage")


class _Connector(aiohttp.TCPConnector):
    """Tells the passage what happens to it, and keeps a bounded number of connections."""

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        connection = await super().connect(req, traces, timeout)
        passage = _passage.get()
        passage.transport = connection.transport
        passage.watch.expect_bytes()
        return connection

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:
        passage = _passage.get()
        passage.fresh = True
        passage.watch.expect_connection()
        return await super()._create_connection(req, traces, timeout)

    def _release(self, key: Any, protocol: Any, *, should_close: bool = False) -> None:
        full = len(self._conns) >= _MOST_KEPT and key not in self._conns
        super()._release(key, protocol, should_close=should_close or full)


class HttpTransport:
    """Exchanges over sockets. Made inside the loop that uses it, and closed there.

    ``patience``: seconds that a name may wait to be looked up, where many are.
    """

    def __init__(self, guard: Guard, lookup: Lookup | None = None, patience: float | None = None) -> None:
        self._guard = guard
        self._proxies = Proxies()
        self._resolver = Resolver(lookup, patience)
        self._no_bounds = aiohttp.ClientTimeout()
        self._headers = {
            "User-Agent": f"penstock/{penstock.__version__}",
            "Accept-Encoding": accepted_encodings(),
        }
        self._direct = self._session(self._guarded)
        self._proxied: aiohttp.ClientSession | None = None

    def _session(self, make_socket: Callable[[Any], socket.socket] | None) -> aiohttp.ClientSession:
        connector = _Connector(
            limit=0,  # the stage's ceiling is the bound
            resolver=self._resolver,
            ttl_dns_cache=_NAMES_KEPT,
            socket_factory=make_socket,
        )
        session = aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._no_bounds,
            auto_decompress=False,
        )
        session._retry_connection = False  # the client decides what is sent twice
        return session

    def _guarded(self, info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        host = str(address[0])
        passage = _passage.get()
        if self._guard.refuses(host):
            passage.refused.append(host)
            raise OSError(f"{host} is refused")
        passage.admitted = True
        return socket.socket(family, kind, protocol)

    async def send(self, outgoing: Outgoing, watch: Watch, receive: Receive[T]) -> T:
        """See ``Transport.send``."""
        passage = _Passage(watch)
        _passage.set(passage)
        session, options = self._way(outgoing)
        body = _body(outgoing, passage)
        try:
            response = await session.request(
                outgoing.method,
                outgoing.url,
                headers=outgoing.headers or None,
                data=body,
                allow_redirects=False,
                **options,
            )
        except Exception as error:
            passage.abort()
            raise _before_answer(error, passage) from None
        except BaseException:
            passage.abort()
            raise
        passage.answered = True
        watch.rest()
        content = response.content
        try:
            headers = {name.lower(): value for name, value in response.headers.items()}
            if len(headers) != len(response.headers):
                headers = {name: ", ".join(response.headers.getall(name)) for name in headers}
            for name, value in headers.items():
                if not value.isascii():
                    headers[name] = _readable(name, value)
            connection = response.connection
            protocol = connection.protocol if connection is not None else None

            async def read() -> bytes:
                try:
                    if content.is_eof():
                        data = content.read_nowait()
                    else:
                        watch.expect_bytes()
                        data = await content.readany()
                        watch.rest()
                except Exception as error:
                    watch.rest()
                    raise _in_body(error, protocol) from None
                if not data and protocol is not None and "content-length" not in headers:
                    _check_end(protocol)
                return data

            status = response.status
            bodiless = outgoing.method == "HEAD" or status in _NO_BODY
            phrase = _readable("", response.reason or "")
            return await receive(Answer(status, phrase, headers, bodiless), read)
        finally:
            if content.is_eof():
                response.release()  # the connection may serve another request already: whatever came of this one
            else:
                passage.abort()
                response.close()

    def _way(self, outgoing: Outgoing) -> tuple[aiohttp.ClientSession, dict[str, Any]]:
        """The session for a request, and what it is told of a proxy."""
        url: URL = outgoing.url
        proxy = self._proxies.of(url.scheme, url.raw_host or "", url.port) if self._proxies.any else None
        if proxy is None:
            return self._direct, {}
        try:
            address = URL(proxy)
        except ValueError:
            address = URL()
        if address.scheme not in ("http", "https") or not address.raw_host:
            raise Broken(
                "connect",
                "the proxy that the environment names is no http:// URL. Correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY",
                sent=False,
                retryable=False,
            )
        if self._proxied is None:
            self._proxied = self._session(None)
        options: dict[str, Any] = {"proxy": address.with_user(None)}
        if address.raw_user is not None:
            login = {"Proxy-Authorization": basic_login(address.user or "", address.password or "")}
            if url.scheme == "https":
                options["proxy_headers"] = login
            else:
                outgoing.headers = {**outgoing.headers, **login}
        return self._proxied, options

    async def close(self) -> None:
        """Close every connection. Cancelling it leaves the rest to the loop's end."""
        for session in (self._direct, self._proxied):
            if session is not None:
                await session.close()
        await self._resolver.close()
        await asyncio.sleep(0)  # a transport lets go of its socket in the turn after it was closed


def _body(outgoing: Outgoing, passage: _Passage) -> Any:
    """The body; a large one in pieces, each of which is a sign of life when it is taken."""
    body = outgoing.body
    if body is None or len(body) <= _PIECE:
        return body
    outgoing.headers = {**outgoing.headers, "Content-Length": str(len(body))}
    return _pieces(body, passage)


async def _pieces(body: bytes, passage: _Passage) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _PIECE):
        yield body[start : start + _PIECE]
        if not passage.answered:
            passage.watch.expect_bytes()


def _readable(name: str, value: str) -> str:
    """A header's value as text: those bytes that aren't UTF-8 as Latin-1, or quoted where they are part of a URL."""
    data = value.encode("utf-8", "surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return quote_from_bytes(data, string.punctuation) if name == "location" else data.decode("latin-1")


def _words(error: BaseException) -> str:
    """An operating system's error in words, without what a library adds: that may hold a URL."""
    inner = getattr(error, "os_error", error)
    number = getattr(inner, "errno", None)
    if isinstance(number, int) and number > 0 and not isinstance(inner, socket.gaierror):
        return os.strerror(number)
    text = getattr(inner, "strerror", None)
    return str(text) if text else type(inner).__name__


def _before_answer(error: Exception, passage: _Passage) -> Broken:
    """Why there is no answer."""
    sent = passage.transport is not None or not passage.fresh
    if passage.refused and not passage.admitted:
        return Broken("blocked", "", sent=False, retryable=False, refused=", ".join(dict.fromkeys(passage.refused)))
    if isinstance(error, Broken):
        return error
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        known = getattr(error.os_error, "errno", None) in _PERMANENT_DNS
        return Broken("dns", f"its name can't be resolved ({_words(error)})", sent=False, retryable=not known)
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError)):
        return Broken("tls", _tls_words(error), sent=False, retryable=False)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return Broken("connect", f"the proxy answered {error.status}", sent=False, retryable=error.status >= 500)
    if isinstance(error, aiohttp.ClientConnectorError):
        where = "the proxy" if isinstance(error, aiohttp.ClientProxyConnectionError) else "it"
        return Broken("connect", f"{where} can't be connected to ({_words(error)})", sent=False)
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientConnectionError)):
        lost = "closed the connection without an answer"
        if isinstance(error, aiohttp.ClientOSError):
            lost = f"lost the connection before an answer came ({_words(error)})"
        return Broken("connect", f"the server {lost}", sent=sent, stale=not passage.fresh)
    if isinstance(error, aiohttp.InvalidURL):
        return Broken("dns", "its host can't be read as a name or an address", sent=False, retryable=False)
    if isinstance(error, aiohttp.ClientResponseError):
        return Broken("decode", f"what came back isn't HTTP ({_first_line(error.message)})")
    if isinstance(error, OSError):
        return Broken("connect", f"the connection failed ({_words(error)})", sent=sent)
    if isinstance(error, RuntimeError) and passage.fresh and passage.transport is None:
        return Broken("connect", f"it can't be connected to ({error})", sent=False)  # what uvloop says at times
    if isinstance(error, (aiohttp.ClientError, ValueError)):
        return Broken("decode", f"what came back can't be read ({type(error).__name__})")
    raise error


def _in_body(error: Exception, protocol: Any) -> Broken:
    """Why a body didn't come whole: the connection was lost, or it was closed too early or badly framed."""
    lost = protocol.exception() if protocol is not None else None
    if isinstance(lost, OSError):
        return Broken("connect", f"the connection was lost half way through the body ({_words(lost)})")
    if isinstance(error, OSError):
        return Broken("connect", f"the connection was lost half way through the body ({_words(error)})")
    cause = error.__cause__ if error.__cause__ is not None else error
    words = _first_line(getattr(cause, "message", "") or str(cause)) or type(cause).__name__
    return Broken("decode", f"its body ended too early or isn't framed as HTTP wants it ({words})")


def _check_end(protocol: Any) -> None:
    """A body whose end is the connection's end: it is whole only if the connection ended properly."""
    lost = protocol.exception()
    if isinstance(lost, OSError):
        raise Broken("connect", f"the connection was lost half way through the body ({_words(lost)})")


def _tls_words(error: aiohttp.ClientConnectorError | Exception) -> str:
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
    verdict = getattr(inner, "verify_message", None) or getattr(inner, "reason", None) or type(error).__name__
    return (
        f"no secure connection ({verdict}). If its certificate is your own, add the authority to the system's "
        "trust store, or name it in SSL_CERT_FILE"
    )


def _first_line(text: Any) -> str:
    line = str(text).strip().split("\n")[0].rstrip(": ")
    return line[:100]
