"""One attempt at one request: redirects, credentials, sizes, decompression and sinks, over any transport.

An attempt starts no tasks. Each of its awaits is in the transport, which closes the connection whatever ends the await
but success, or in a sink, which is discarded then. So an attempt may be cancelled anywhere and leaves nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from yarl import URL

from penstock.errors import FetchError
from penstock.flow.expand import Corrupt
from penstock.flow.redact import hide_values, is_secret_header, redact_url, secrets_in_url
from penstock.net.address import canonical_host
from penstock.net.decoding import make_decoder
from penstock.net.fetched import decode_text, is_text
from penstock.net.request import Request, login_of
from penstock.net.saving import Gathered, MemorySink, Sink
from penstock.net.timing import Watch
from penstock.net.transport import Answer, Broken, Outgoing, Read, Transport

__all__ = ["Attempt"]

_MOST_REDIRECTS = 10

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
_EXCERPT = 4096
_SHOWN = 200
_WHOLE = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]*(?:%[0-9A-Fa-f]{2}[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]*)*")
_DOTS = re.compile(r"/\.\.?(?:[/?#]|$)")
_NO_HEADERS: dict[str, str] = {}


class Attempt:
    """What one attempt knows: where it is, and what it got. ``request``: a Request, or the URL of a plain GET.

    ``hops``: redirects followed. ``status``: of the last answer; 0 before there is one. Raises FetchError for a URL
    that can't be read.
    """

    __slots__ = (
        "_make_sink",
        "_max_bytes",
        "body",
        "headers",
        "hops",
        "host",
        "idempotent",
        "listed",
        "outgoing",
        "path",
        "status",
        "url",
    )

    def __init__(self, request: Request | str, max_bytes: int, make_sink: Callable[[], Sink] | None) -> None:
        self._max_bytes = max_bytes
        self._make_sink = make_sink
        self.hops = 0
        self.status = 0
        self.headers = _NO_HEADERS
        self.body = b""
        self.path: str | None = None
        if isinstance(request, str):
            self.listed = request
            self.idempotent = True
            url = self.url = _parsed(request)
            login = login_of(request) if "@" in request else None
            self.outgoing = Outgoing("GET", url, _NO_HEADERS if login is None else {"Authorization": login}, None)
        else:
            self.listed = request.url
            self.idempotent = request.idempotent
            url = self.url = _parsed(request.url)
            self.outgoing = Outgoing(request.method, url, request.sent_headers(), request.body())
        self.host: str = url.raw_host or ""

    @property
    def shown_url(self) -> str:
        """The URL of the answer: as it was listed, if there was no redirect; without its user."""
        return str(self.url) if self.hops or "@" in self.listed else self.listed

    async def run(self, transport: Transport, watch: Watch) -> None:
        """Send and receive until there is an answer that redirects nowhere. Raises FetchError or Broken."""
        while True:
            try:
                location = await transport.send(self.outgoing, watch, self._receive)
            except Broken as broken:
                if broken.stale and self.idempotent:
                    continue  # each time one dead connection leaves the pool, so this ends with a new one
                raise
            if location is None:
                return
            self._redirect(location)

    async def _receive(self, answer: Answer, read: Read) -> str | None:
        """Take an answer in; returns where it redirects to."""
        status = self.status = answer.status
        headers = self.headers = answer.headers
        if status >= 300:
            if status in _REDIRECTS and headers.get("location"):
                return headers["location"]
            if status >= 400 or status in _REDIRECTS:
                raise await self._refusal(answer, read)
        if answer.bodiless:
            await read()
            return None
        length = headers.get("content-length")
        size = int(length) if length is not None and length.isdecimal() else -1
        if size > self._max_bytes:
            raise self._too_big(f"its body has {size:,} bytes")
        if self._make_sink is None and "content-encoding" not in headers:
            data = await read()
            self.body = data if len(data) == size else await self._plain(data, read, size)
            return None
        sink = MemorySink() if self._make_sink is None else self._make_sink()
        try:
            await self._pour(read, headers.get("content-encoding", ""), sink)
            self.body, self.path = await sink.finish()
        except Corrupt as error:
            await sink.discard()
            raise Broken("decode", str(error), retryable=False) from None
        except BaseException:
            await sink.discard()
            raise
        return None

    async def _plain(self, data: bytes, read: Read, announced: int) -> bytes:
        """A body that is kept as it comes; ``data`` is its beginning."""
        gathered = Gathered(announced)
        while data:
            gathered.add(data)
            if gathered.size > self._max_bytes:
                raise self._too_big(f"its body has more than {self._max_bytes:,} bytes")
            data = b""  # free for what comes next
            data = await read()
        return gathered.body()

    async def _pour(self, read: Read, encoding: str, sink: Sink) -> None:
        decoder = make_decoder(encoding)
        wire = size = 0
        while data := await read():
            wire += len(data)
            if wire > self._max_bytes:
                raise self._too_big(f"its body has more than {self._max_bytes:,} bytes")
            if decoder is None:
                await sink.write(data)
                continue
            for piece in decoder.feed(data):
                if size:
                    await asyncio.sleep(0)  # expanding takes long, and others wait for the loop
                size += len(piece)
                if size > self._max_bytes:
                    raise self._too_big(f"its body expands to more than {self._max_bytes:,} bytes")
                await sink.write(piece)
        if decoder is not None:
            decoder.finish()

    def _too_big(self, problem: str) -> FetchError:
        return FetchError(
            redact_url(str(self.url)),
            "too_big",
            f"{problem}, and max_bytes={self._max_bytes:,}. Raise max_bytes=, and give save_to= for large bodies",
            self.status,
            self.headers,
        )

    async def _refusal(self, answer: Answer, read: Read) -> FetchError:
        """The error for a status of 400 or more, with the beginning of what the server says about it."""
        status, headers = answer.status, answer.headers
        text = await self._excerpt(answer, read)
        throttled = status == 429 or (status == 503 and "retry-after" in headers)
        phrase = f"{status} {answer.phrase}".strip()
        return FetchError(
            redact_url(str(self.url)),
            "throttled" if throttled else "status",
            f"{phrase}: {text}" if text else phrase,
            status,
            headers,
            retryable=status in _RETRYABLE and (self.idempotent or status == 429),
        )

    async def _excerpt(self, answer: Answer, read: Read) -> str:
        """What the body says, if that is for people to read; a server may echo what it was sent."""
        data = b""
        length = answer.headers.get("content-length", "")
        try:
            while len(data) < _EXCERPT and (piece := await read()):
                data += piece
            if length.isdigit() and len(data) < int(length) <= 4 * _EXCERPT:
                while await read():  # the rest, so that the connection can be kept
                    pass
            decoder = make_decoder(answer.headers.get("content-encoding", ""))
            if decoder is not None:
                data = next(decoder.feed(data), b"")
        except (Broken, Corrupt):
            pass  # the status says enough
        kind = answer.headers.get("content-type", "")
        if "html" in kind or not is_text(data, kind):
            return ""
        headers = self.outgoing.headers
        secrets = [value for name, value in headers.items() if is_secret_header(name)]
        text = " ".join(hide_values(decode_text(data, kind), [*secrets, *secrets_in_url(self.listed)]).split())
        text = redact_url(text)
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."

    def _redirect(self, location: str) -> None:
        """Turn to where an answer redirects."""
        self.hops += 1
        if self.hops > _MOST_REDIRECTS:
            raise FetchError(
                redact_url(self.listed),
                "status",
                f"more than {_MOST_REDIRECTS} redirects, the last to {redact_url(location)[:_SHOWN]}",
                self.status,
                self.headers,
            )
        before = self.outgoing
        try:
            target = self.url.join(_as_written(location))
            found = target.scheme in ("http", "https") and bool(target.raw_host) and target.port is not None
        except (ValueError, UnicodeError):
            raise Broken(
                "decode", f"it redirects to what is no URL: {redact_url(repr(location))[:_SHOWN]}", retryable=False
            ) from None
        if not found:
            raise Broken(
                "blocked",
                f"it redirects to {redact_url(location)[:_SHOWN]}, and only http and https are followed",
                retryable=False,
            )
        target = _canonical(target.with_user(None))
        method, headers, body = before.method, dict(before.headers), before.body
        if (self.status == 303 and method != "HEAD") or (self.status in (301, 302) and method == "POST"):
            method, body = "GET", None
            headers = {name: value for name, value in headers.items() if not name.lower().startswith("content-")}
        if target.origin() != self.url.origin():
            headers = {name: value for name, value in headers.items() if not is_secret_header(name)}
        self.url = target
        self.outgoing = Outgoing(method, target, headers, body)


def _parsed(text: str) -> URL:
    """The URL as it is sent: without its user, its fragment, and odd forms of an address."""
    try:
        url = _as_written(text)
    except (ValueError, UnicodeError) as error:
        raise FetchError(redact_url(text), "dns", f"it can't be read as a URL ({error})") from None
    if "@" in text and url.raw_user is not None:
        url = url.with_user(None)
    return _canonical(url)


def _as_written(text: str) -> URL:
    """The URL with the escapes it has, where it is one by RFC 3986: servers may sign it byte for byte."""
    dots = "/." in text and _DOTS.search(text) is not None  # ".." and the like, which somebody has to resolve
    url = URL(text, encoded=not dots and _WHOLE.fullmatch(text) is not None)
    _ = url.port  # raises ValueError where it is none
    return url


def _canonical(url: URL) -> URL:
    """With the usual form of its host."""
    host = url.raw_host or ""
    usual = canonical_host(host) if host[:1].isdigit() else host.lower()
    return url if usual is None or usual == host else url.with_host(usual)
