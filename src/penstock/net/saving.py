"""Where a body goes: into memory, or into a file that appears under its name when it is whole.

A saved body is written to a temporary file beside its target (``.name.….part``) and renamed. What is promised: a file
that has its name is complete, also after a kill or a power cut (its data is on the disk before it is renamed; the
newest names may be missing after a power cut). An attempt that fails or is cancelled leaves no temporary file; one
that is killed may. Writing happens in a thread, a megabyte at a time, and the body isn't read on meanwhile.

Cancelling: a thread can't be cancelled, so every await here waits for the thread first and is cancelled then. So
nothing is written behind ``discard``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from penstock.errors import PlanError, WriteFailed
from penstock.flow.commit import uninterrupted
from penstock.flow.disk import put_in_place, write_whole
from penstock.flow.redact import is_secret_header
from penstock.net.request import Request

__all__ = ["FileSink", "Gathered", "MemorySink", "SaveTo", "Sink", "as_saver", "file_name"]

SaveTo = str | os.PathLike[str] | Callable[[Any], str | os.PathLike[str]]
"""A directory, or a function that gives an item's path."""

_HELD = 1 << 20
_LARGE = 1 << 20
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_STEM = 80
_LONGEST_SUFFIX = 16


class Sink(Protocol):
    """Takes one body."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes."""

    async def finish(self) -> tuple[bytes, str | None]:
        """The body is whole: returns it, or the path of the file it is in."""

    async def discard(self) -> None:
        """The body won't become whole: nothing of it stays."""


class Gathered:
    """A body in memory that comes in pieces; ``announced``: its size as the other side says, -1 if it doesn't.

    A large one is put together while it comes: each piece is free again when the next is received, where pieces kept
    to be joined at the end take the memory twice, and most of the time goes into fresh pages. There is room for all of
    it only once a quarter has come, so that an announcement alone takes no memory.
    """

    __slots__ = ("_announced", "_pieces", "_whole", "size")

    def __init__(self, announced: int) -> None:
        self.size = 0
        self._announced = announced
        self._pieces: list[bytes] = []
        self._whole: BytesIO | None = None

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self._whole is not None:
            self._whole.write(data)
            return
        self._pieces.append(data)
        if _LARGE <= self._announced <= 4 * self.size:
            whole = self._whole = BytesIO()
            whole.seek(self._announced - 1)
            whole.write(b"\0")
            whole.seek(0)
            whole.writelines(self._pieces)
            self._pieces.clear()

    def body(self) -> bytes:
        """All that was added."""
        if self._whole is None:
            return b"".join(self._pieces)
        self._whole.truncate(self.size)
        return self._whole.getvalue()  # which copies nothing


class MemorySink:
    """Keeps the body in memory."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    async def write(self, data: bytes) -> None:
        self._pieces.append(data)

    async def finish(self) -> tuple[bytes, str | None]:
        return b"".join(self._pieces), None

    async def discard(self) -> None:
        self._pieces.clear()


class FileSink:
    """Writes the body to a file."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._part = target.with_name(f".{target.name[:100]}.{uuid4().hex[:12]}.part")
        self._descriptor = -1
        self._is_there = False  # the part, on the disk
        self._held: list[bytes] = []
        self._size = 0

    async def write(self, data: bytes) -> None:
        self._held.append(data)
        self._size += len(data)
        if self._size >= _HELD:
            await self._in_thread(self._write)

    async def finish(self) -> tuple[bytes, str | None]:
        await self._in_thread(self._finish)
        return b"", str(self._target)

    async def discard(self) -> None:
        self._held.clear()
        if self._is_there:
            await self._in_thread(self._discard)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await uninterrupted(asyncio.get_running_loop().run_in_executor(None, self._named, work))

    def _named(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise WriteFailed(str(self._target), error.strerror or str(error)) from error

    def _write(self) -> None:
        if self._descriptor < 0:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._is_there = True
        for data in self._held:
            write_whole(self._descriptor, data)
        self._held.clear()
        self._size = 0

    def _finish(self) -> None:
        try:
            self._write()
            self._close()
            put_in_place(str(self._part), str(self._target))
            self._is_there = False
        except BaseException:
            self._discard()
            raise

    def _close(self) -> None:
        """Let go of the number first: once closed, it may be another file's at any moment."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _discard(self) -> None:
        with suppress(OSError):
            self._close()
        if self._is_there:
            self._is_there = False
            self._part.unlink(missing_ok=True)


def as_saver(save_to: Any) -> Callable[[Any, Request | Path], Path] | None:
    """The function that gives a source's path; None to keep bodies in memory. Raises PlanError."""
    if save_to is None:
        return None
    if callable(save_to):
        function: Callable[[Any], Any] = save_to

        def named(source: Any, request: Request | Path) -> Path:
            path = function(source)
            if not isinstance(path, (str, os.PathLike)):
                raise PlanError(f"save_to= gave a {type(path).__name__} for an item", "Let it return the file's path")
            return Path(path)

        return named
    if not isinstance(save_to, (str, os.PathLike)):
        raise PlanError(f"save_to={save_to!r}", "Give a directory, or a function that gives an item's path")
    directory = Path(save_to)
    return lambda source, request: directory / file_name(request)


def file_name(request: Request | Path) -> str:
    """A name for what a request brings: readable, safe in any directory, and the same for the same request.

    Credentials don't count, nor does an ``Idempotency-Key``.

    >>> file_name(Request("https://example.com/a/../../etc/passwd?x=1"))
    'passwd-e488f310ef5e'
    """
    if isinstance(request, Path):
        last, identity = request.name, os.path.abspath(request)
    else:
        parts = urlsplit(request.url)
        last, identity = unquote(parts.path).rstrip("/").rpartition("/")[2] or (parts.hostname or ""), request.url
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=6)
    if isinstance(request, Request):
        if request.method != "GET" or request.body():
            digest.update(request.method.encode() + b"\0" + (request.body() or b""))
        for name, value in sorted((name.lower(), value) for name, value in request.headers.items()):
            if name != "idempotency-key" and not is_secret_header(name):
                digest.update(f"\0{name}: {value}".encode())
    safe = _UNSAFE.sub("-", last).strip(".-")
    stem, dot, suffix = safe.rpartition(".")
    if not dot or len(suffix) > _LONGEST_SUFFIX:
        stem, suffix = safe, ""
    return f"{stem[:_LONGEST_STEM] or 'file'}-{digest.hexdigest()}{dot if suffix else ''}{suffix}"
