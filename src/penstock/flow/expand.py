"""Compressed data, expanded in steps of bounded size: a few bytes may stand for a gigabyte.

A decoder gives its output piece by piece, and whoever takes it can stop before the next is made. So a bomb is noticed
while it is small, however much one received chunk would expand to.

Not the libraries' own file readers: zstd's takes a frame that is cut for the end of the data, and gzip's loses what it
had read of one.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Any, Protocol

__all__ = ["Corrupt", "Decoder", "Deflate", "Gzip", "Zstd"]

_PIECE = 256 * 1024
_ZSTD_STEP = 256  # a block of 128 KB may take four bytes, and zstandard expands all it is given at once


class Corrupt(ValueError):
    """The data isn't what it should be, or ends too early."""


class Decoder(Protocol):
    """Expands one stream of data."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The output that these bytes add, in pieces of bounded size. Raises Corrupt."""

    def finish(self) -> None:
        """The data has ended: raises Corrupt if what it holds hasn't."""


class _Frames(ABC):
    """Frames (gzip calls them members) one after the other are one stream; zeros may follow each, as on tapes."""

    def __init__(self) -> None:
        self._machine: Any = None
        self._started = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._machine is None:
                data = data.lstrip(b"\0") if self._started else data
                if not data:
                    return
                self._machine = self._make(data)
                self._started = True
            data = yield from self._expand(self._machine, data)
            if self._machine.eof:
                self._machine = None

    def finish(self) -> None:
        if self._machine is not None:
            raise Corrupt("the compressed data ends too early")

    @abstractmethod
    def _make(self, data: bytes) -> Any:
        """A machine for the frame that begins with ``data``."""

    @abstractmethod
    def _expand(self, machine: Any, data: bytes) -> Generator[bytes, None, bytes]:
        """Yields what ``data`` adds to the frame, and returns what follows the frame. Raises Corrupt."""


class Gzip(_Frames):
    """gzip, of any number of members."""

    def _make(self, data: bytes) -> Any:
        return zlib.decompressobj(16 + zlib.MAX_WBITS)

    def _expand(self, machine: Any, data: bytes) -> Generator[bytes, None, bytes]:
        try:
            piece = machine.decompress(data, _PIECE)
            while piece:
                yield piece
                piece = b"" if machine.eof else machine.decompress(machine.unconsumed_tail, _PIECE)
        except zlib.error as error:
            raise _damaged(error) from None
        rest: bytes = machine.unused_data
        return rest


class Deflate(Gzip):
    """What HTTP calls deflate: zlib's format, or the bare stream that some servers send. What follows it is dropped."""

    def _make(self, data: bytes) -> Any:
        return zlib.decompressobj(zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS)

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._started and self._machine is None:
            return
        self._machine = self._machine or self._make(data)
        self._started = True
        yield from self._expand(self._machine, data)
        if self._machine.eof:
            self._machine = None


class Zstd(_Frames):
    """zstd, of any number of frames. ``most_window``: of a larger window, which is memory, it is Corrupt."""

    def __init__(self, zstandard: Any, most_window: int = 0) -> None:
        super().__init__()
        self._error = zstandard.ZstdError
        self._begin = zstandard.ZstdDecompressor(max_window_size=most_window).decompressobj

    def _make(self, data: bytes) -> Any:
        return self._begin()

    def _expand(self, machine: Any, data: bytes) -> Generator[bytes, None, bytes]:
        for start in range(0, len(data), _ZSTD_STEP):
            stop = start + _ZSTD_STEP
            try:
                piece = machine.decompress(data[start:stop])
            except self._error as error:
                raise _damaged(error) from None
            if piece:
                yield piece
            if machine.eof:
                rest: bytes = machine.unused_data + data[stop:]
                return rest
        return b""


def _damaged(error: Exception) -> Corrupt:
    return Corrupt(f"the compressed data is damaged ({error})")
