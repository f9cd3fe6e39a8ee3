"""Reading files as bytes, decompressed by their suffix, with an error where compressed data ends early."""

from __future__ import annotations

import io
import os
import zlib
from abc import ABC, abstractmethod
from typing import Any, Protocol, Self

from penstock.errors import MissingDependency

__all__ = ["ByteReader", "is_compressed", "open_bytes", "zstandard"]

_PIECE = 16 << 10  # what is decompressed at once: small, since zstd may make ten thousand times as much of it


class ByteReader(Protocol):
    """What ``open_bytes`` returns. ``read`` returns up to ``size`` bytes (zstd: what a piece holds), b"" at the end."""

    def read(self, size: int, /) -> bytes: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> object: ...


def is_compressed(path: str) -> bool:
    """Whether the suffix says gzip or zstd.

    >>> is_compressed("a.jsonl.gz"), is_compressed("a.jsonl")
    (True, False)
    """
    return os.path.splitext(path)[1] in (".gz", ".zst")


def open_bytes(path: str, limit: int | None = None) -> ByteReader:
    """Open a file to be read in blocks, decompressing ``.gz`` and ``.zst``.

    ``limit``: as if the file had only so many bytes. ``read`` raises EOFError, whose text says what is wrong, for
    compressed data that is damaged or ends early. Raises MissingDependency for ``.zst`` without zstandard.
    """
    suffix = os.path.splitext(path)[1]
    if suffix == ".zst":
        zstandard()
    raw: Any = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by the reader
    if limit is not None:
        raw = _Head(raw, limit)
    if suffix == ".gz":
        return _Gzip(raw)
    if suffix == ".zst":
        return _Zstd(raw)
    reader: ByteReader = raw
    return reader


def zstandard() -> Any:
    """The zstandard package, or MissingDependency."""
    try:
        import zstandard as package
    except ImportError:
        raise MissingDependency("zstandard", "a file with the suffix .zst", "zstd") from None
    return package


class _Head(io.RawIOBase):
    """The first bytes of a file, as a file."""

    def __init__(self, raw: io.RawIOBase, limit: int) -> None:
        self._raw = raw
        self._left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._raw.read(min(self._left, len(buffer))) or b""
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Frames(ABC):
    """Reads compressed frames (gzip calls them members) one after the other.

    Not the libraries' own readers: zstd's takes a cut frame for the end of the file, and gzip's loses what it had
    read of one.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._frame: Any = None
        self._rest = b""
        self._is_first = True

    def read(self, size: int, /) -> bytes:
        while True:
            piece = self._rest or self._raw.read(_PIECE)
            self._rest = b""
            if self._frame is None:
                if not self._is_first:
                    piece = piece.lstrip(b"\0") or self._skip_padding()
                if not piece:
                    return b""
                self._frame = self._begin()
                self._is_first = False
            try:
                data = self._decompress(piece, size)
            except self.errors as error:
                raise EOFError(f"the compressed data is damaged: {error}") from None
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
            elif not piece and not data:
                raise EOFError("the compressed data ends early: the file is cut short")
            if data:
                return data

    def _skip_padding(self) -> bytes:
        """What comes after the zeros that may follow a frame, as on tapes."""
        while piece := self._raw.read(_PIECE):
            if rest := piece.lstrip(b"\0"):
                found: bytes = rest
                return found
        return b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._raw.close()

    errors: type[Exception]

    @abstractmethod
    def _begin(self) -> Any:
        """A decompressor for the next frame."""

    @abstractmethod
    def _decompress(self, piece: bytes, size: int) -> bytes:
        """What a piece of the frame holds; what is left of the piece goes to ``_rest``."""


class _Gzip(_Frames):
    errors = zlib.error

    def _begin(self) -> Any:
        return zlib.decompressobj(31)

    def _decompress(self, piece: bytes, size: int) -> bytes:
        data: bytes = self._frame.decompress(piece, size)
        self._rest = self._frame.unconsumed_tail
        return data


class _Zstd(_Frames):
    def __init__(self, raw: Any) -> None:
        super().__init__(raw)
        self.errors = zstandard().ZstdError
        self._decompressor = zstandard().ZstdDecompressor()

    def _begin(self) -> Any:
        return self._decompressor.decompressobj()

    def _decompress(self, piece: bytes, size: int) -> bytes:
        data: bytes = self._frame.decompress(piece) if piece else b""
        return data
