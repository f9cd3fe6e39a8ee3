"""Compressed bodies, expanded in steps of bounded size: a few bytes may stand for a gigabyte.

A decoder gives its output piece by piece, and each piece is counted before the next is made. So a bomb is noticed
while it is small, however much one received chunk would expand to.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Protocol

__all__ = ["ACCEPTED", "Corrupt", "Decoder", "accepted_encodings", "make_decoder"]

_PIECE = 256 * 1024
_ZSTD_STEP = 256  # a block of 128 KB may take four bytes, and zstandard expands all it is given at once
_ZSTD_WINDOW = 8 * 1024 * 1024  # what a decoder must accept; a larger window is memory that the sender chooses


class Corrupt(ValueError):
    """A body isn't what its Content-Encoding says, or ends too early."""


class Decoder(Protocol):
    """Expands one body."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The output that these bytes add, in pieces of bounded size. Raises Corrupt."""

    def finish(self) -> None:
        """The body has ended: raises Corrupt if the compressed data hasn't."""


class _Zlib:
    """gzip and deflate; several gzip members one after the other are one body."""

    def __init__(self, gzip: bool) -> None:
        self._gzip = gzip
        self._machine: Any = None
        self._started = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._machine is None:
                if self._started and not data.strip(b"\0"):
                    return  # padding behind the last member
                self._machine = self._make(data)
                self._started = True
            machine = self._machine
            try:
                piece = machine.decompress(data, _PIECE)
                while piece:
                    yield piece
                    piece = machine.decompress(machine.unconsumed_tail, _PIECE) if not machine.eof else b""
            except zlib.error as error:
                raise Corrupt(f"its compressed data is broken ({error})") from None
            data = machine.unused_data if machine.eof else b""
            if machine.eof:
                self._machine = None
                if not self._gzip:
                    return

    def _make(self, data: bytes) -> Any:
        if self._gzip:
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        # "deflate" means zlib's format, and some servers send the bare stream: the first byte tells which
        return zlib.decompressobj(zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS)

    def finish(self) -> None:
        if self._machine is not None:
            raise Corrupt("its compressed data ends too early")


class _Zstd:
    """zstd, by the package zstandard; several frames one after the other are one body."""

    def __init__(self, zstandard: Any) -> None:
        self._error = zstandard.ZstdError
        self._make = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
        self._machine: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_STEP):
            step = data[start : start + _ZSTD_STEP]
            while step:
                machine = self._machine = self._machine or self._make()
                try:
                    piece = machine.decompress(step)
                except self._error as error:
                    raise Corrupt(f"its compressed data is broken ({error})") from None
                step = b""
                if machine.eof:
                    step = machine.unused_data
                    self._machine = None
                if piece:
                    yield piece

    def finish(self) -> None:
        if self._machine is not None:
            raise Corrupt("its compressed data ends too early")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard


ACCEPTED = "gzip, deflate"
"""What can always be expanded; zstd too where the package zstandard is installed."""


def accepted_encodings() -> str:
    """What ``Accept-Encoding`` says."""
    return ACCEPTED if _zstandard() is None else f"{ACCEPTED}, zstd"


def make_decoder(encoding: str) -> Decoder | None:
    """The decoder for a Content-Encoding; None where nothing is to be done. Raises Corrupt for one that isn't known."""
    names = [name for name in encoding.lower().replace(" ", "").split(",") if name and name != "identity"]
    if not names:
        return None
    if len(names) == 1:
        name = names[0]
        if name in ("gzip", "x-gzip", "deflate"):
            return _Zlib(name != "deflate")
        if name == "zstd":
            zstandard = _zstandard()
            if zstandard is not None:
                return _Zstd(zstandard)
    raise Corrupt(f"its Content-Encoding is {encoding!r}, which wasn't asked for and can't be expanded")
