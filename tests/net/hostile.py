"""A server on loopback that does everything a server may do wrong, with raw sockets. The path says what.

On the virtual clock its waits take no time. ``seen`` holds the requests that came, ``open`` how many connections are.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import struct
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

from penstock.errors import FetchError
from penstock.net.fetcher import Fetcher

BOMB = 64 * 1024 * 1024
FOREVER = 1e6


@dataclass
class Seen:
    """A request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    host: str = ""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


Behaviour = Callable[["Hostile", Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]
"""Answers a request; True keeps the connection."""


def answer(
    body: bytes = b"", status: str = "200 OK", headers: Mapping[str, str] | None = None, length: int | None = None
) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, as a crashed machine or a firewall does."""
    connection: Any = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass
class Hostile:
    """``async with Hostile() as server``: listens on ``host``; ``routes`` are tried before the usual behaviours."""

    host: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    routes: dict[str, Behaviour] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    peak: int = 0
    at_work: int = 0

    async def __aenter__(self) -> Self:
        self._talks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()
        self._server = await asyncio.start_server(self._talk, self.host, 0, ssl=self.tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for talk in self._talks:
            talk.cancel()
        if self._talks:
            await asyncio.wait(self._talks)

    async def until(self, ready: Callable[[], object]) -> None:
        """Wait until something is so that changes when requests or connections come and go."""
        while not ready():
            self._changed.clear()
            await self._changed.wait()

    def url(self, path: str = "/ok", host: str | None = None) -> str:
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{host or self.host}:{self.port}{path}"

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        self.connections += 1
        self.open += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._changed.set()
            self._talks.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()
            with suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Seen(method, target, headers, body, headers.get("host", ""))
        self.seen.append(request)
        self._changed.set()
        name = request.path.strip("/").split("/")[0]
        behave = self.routes.get(name) or BEHAVIOURS.get(name) or ok
        self.at_work += 1
        self.peak = max(self.peak, self.at_work)
        try:
            kept = await behave(self, request, reader, writer)
        finally:
            self.at_work -= 1
        await writer.drain()
        return kept


async def ok(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    body = b"ok " + request.target.encode()
    content = b"" if request.method == "HEAD" else body
    writer.write(answer(content, headers={"Content-Type": "text/plain"}, length=len(body)))
    return True


async def status(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """/status/404"""
    code = request.path.split("/")[2]
    bodiless = code in ("204", "304") or request.method == "HEAD"
    writer.write(answer(b"" if bodiless else b"sorry", f"{code} So", {"Content-Type": "text/plain"}, length=5))
    return True


async def silent(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    await asyncio.sleep(FOREVER)
    return False


async def late(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """The first byte comes after 20 seconds."""
    await asyncio.sleep(20)
    return await ok(server, request, reader, writer)


async def drip(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """A byte a second, for as many as the path says: /drip/30"""
    count = int(request.path.split("/")[2])
    writer.write(answer(b"", length=count))
    for _ in range(count):
        await asyncio.sleep(1)
        writer.write(b".")
        await writer.drain()
    return True


async def stall(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """Half a body, and then nothing."""
    writer.write(answer(b"x" * 10, length=20))
    await asyncio.sleep(FOREVER)
    return False


async def reset_half_way(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(answer(b"x" * 10, length=20))
    await writer.drain()
    reset(writer)
    return False


async def reset_unframed(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """A body that ends with the connection, which ends with a reset."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf of it")
    await writer.drain()
    await asyncio.sleep(1)
    reset(writer)
    return False


async def unframed(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    return False


async def reset_at_once(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    reset(writer)
    return False


async def hang_up(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """The connection is closed without a word."""
    return False


async def short(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(answer(b"x" * 10, length=20))
    return False


async def long(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """More than the length says: the rest is no answer to anything."""
    writer.write(answer(b"x" * 20, length=10))
    return True


async def endless(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        await writer.drain()


async def endless_head(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-More: " + b"x" * 1000 + b"\r\n")
        await writer.drain()


async def huge(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """Says that it has a terabyte."""
    writer.write(answer(b"x" * 10, length=10**12))
    await asyncio.sleep(FOREVER)
    return False


async def bomb(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """64 MB of zeros in some 64 KB: /bomb/gzip, /bomb/deflate, /bomb/zstd"""
    kind = request.path.split("/")[2]
    writer.write(answer(bombs(kind), headers={"Content-Encoding": kind}))
    return True


@cache
def bombs(kind: str, size: int = BOMB) -> bytes:
    if kind == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=19).compress(bytes(size))
    return gzip.compress(bytes(size)) if kind == "gzip" else zlib.compress(bytes(size))


async def bad_chunks(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\nworld\r\n0\r\n\r\n")
    return False


async def cut_chunks(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    return False


async def not_http(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(b"220 mail.example ESMTP\r\n\r\n")
    return False


async def not_gzip(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(answer(b"this was never compressed", headers={"Content-Encoding": "gzip"}))
    return True


async def cut_gzip(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(answer(gzip.compress(b"a" * 1000)[:-8], headers={"Content-Encoding": "gzip"}))
    return True


async def odd_encoding(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    writer.write(answer(b"?", headers={"Content-Encoding": "rot13"}))
    return True


async def encoded(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """/encoded/gzip and its like: a thousand letters."""
    kind = request.path.split("/")[2]
    plain = b"a" * 1000
    if kind == "raw":  # deflate without zlib's frame, which some servers send
        machine = zlib.compressobj(wbits=-15)
        body, kind = machine.compress(plain) + machine.flush(), "deflate"
    elif kind == "members":
        body, kind = gzip.compress(plain[:400]) + gzip.compress(plain[400:]), "gzip"
    elif kind == "zstd":
        import zstandard

        body = zstandard.compress(plain)
    else:
        body = gzip.compress(plain) if kind == "gzip" else zlib.compress(plain)
    writer.write(answer(body, headers={"Content-Encoding": kind}))
    return True


async def around(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """Redirects for ever."""
    step = int(request.path.split("/")[2])
    writer.write(answer(b"", "302 Found", {"Location": f"/around/{step + 1}"}))
    return True


async def throttle(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """/throttle/429?Retry-After=5"""
    code = request.path.split("/")[2]
    name, _, value = request.target.partition("?")[2].partition("=")
    value = value.replace("%20", " ").replace("%2C", ",")
    writer.write(answer(b"slowly", f"{code} So", {name: value} if name else {}))
    return True


async def store(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
    """A large body: /store/1000000"""
    size = int(request.path.split("/")[2])
    writer.write(answer(b"", length=size))
    for start in range(0, size, 65536):
        writer.write(b"s" * min(65536, size - start))
        await writer.drain()
    return True


BEHAVIOURS: dict[str, Behaviour] = {
    name.replace("_", "-"): behaviour
    for name, behaviour in list(globals().items())
    if asyncio.iscoroutinefunction(behaviour)
}


def redirect(to: str, code: int = 302) -> Behaviour:
    async def behave(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(b"", f"{code} Moved", {"Location": to}))
        return True

    return behave


def failing_first(times: int, by: Behaviour) -> Behaviour:
    """Does ``by`` for the first requests of each path, and then answers."""
    counts: dict[str, int] = {}

    async def behave(server: Hostile, request: Seen, reader: Any, writer: asyncio.StreamWriter) -> bool:
        counts[request.target] = counts.get(request.target, 0) + 1
        if counts[request.target] <= times:
            return await by(server, request, reader, writer)
        return await ok(server, request, reader, writer)

    return behave


async def attempt(item: Any, **options: Any) -> Any:
    """One attempt at one item: what it gives, or the error that it raises."""
    fetcher = Fetcher(**options)
    try:
        return await fetcher(item)
    except FetchError as error:
        return error
    finally:
        await fetcher.close()
