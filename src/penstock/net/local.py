"""Files as sources: paths and ``file://`` URLs. They are read in a thread, and only where the user listed them."""

from __future__ import annotations

import asyncio
import mimetypes
import os
import stat
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from penstock.errors import FetchError, PlanError
from penstock.flow.commit import uninterrupted
from penstock.net.saving import Sink

__all__ = ["LocalFile", "path_of_url", "read_file"]

_PIECE = 1 << 20
_NOT_THERE = (FileNotFoundError, NotADirectoryError)


class LocalFile(NamedTuple):
    """What was read: the headers a server would send with it, and where its body went."""

    headers: dict[str, str]
    body: bytes
    path: str | None


def path_of_url(url: str) -> Path:
    """The path that a ``file:`` URL names. Raises PlanError for one on another machine.

    >>> str(path_of_url("file:///tmp/a%20b.txt"))
    '/tmp/a b.txt'
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise PlanError(f"the URL {url!r} names a file on another machine", "Write file:///path, with three slashes")
    path = unquote(parts.path)
    if not path or "\0" in path:
        raise PlanError(f"the URL {url!r} names no file", "Write file:///path")
    return Path(path)


async def read_file(path: Path, sink: Sink, max_bytes: int) -> LocalFile:
    """Read a file into ``sink``. Raises FetchError: a missing file is status 404, an unreadable one 403.

    Cancelling waits for the read that is under way (a megabyte at most), and leaves nothing open.
    """
    loop = asyncio.get_running_loop()
    name = str(path)
    descriptor = -1

    def start() -> bytes:
        nonlocal descriptor
        # without O_NONBLOCK, opening a pipe waits for somebody who writes to it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FetchError(name, "status", "403: it is no regular file", 403)
        if found.st_size > max_bytes:
            raise FetchError(name, "too_big", _too_big(found.st_size, max_bytes))
        return more()

    def more() -> bytes:
        """A piece; a shorter one is the last. One read may give less than there is."""
        piece = bytearray()
        while len(piece) < _PIECE and (data := os.read(descriptor, _PIECE - len(piece))):
            piece += data
        return bytes(piece)

    size = 0
    try:
        data = await uninterrupted(loop.run_in_executor(None, start))
        while data:
            size += len(data)
            if size > max_bytes:  # it grew while it was read
                raise FetchError(name, "too_big", _too_big(size, max_bytes))
            await sink.write(data)
            data = await uninterrupted(loop.run_in_executor(None, more)) if len(data) == _PIECE else b""
        body, saved = await sink.finish()
    except FetchError:
        raise
    except _NOT_THERE:
        hint = "" if "/" in name or os.sep in name else ". A URL is given in full: https://…"
        raise FetchError(name, "status", f"404: there is no such file{hint}", 404) from None
    except OSError as error:
        if isinstance(error, PermissionError) or descriptor < 0:
            raise FetchError(name, "status", f"403: it can't be opened ({error.strerror})", 403) from None
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    kind, encoding = mimetypes.guess_type(path.name)
    headers = {"content-length": str(size)}
    if kind is not None and encoding is None:
        headers["content-type"] = kind
    return LocalFile(headers, body, saved)


def _too_big(size: int, bound: int) -> str:
    return f"it has {size:,} bytes, and max_bytes={bound:,}. Raise max_bytes=, and give save_to= for large files"
