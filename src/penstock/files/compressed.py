"""Reading files as bytes, decompressed by their suffix, with an error where compressed data ends early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

from penstock.errors import MissingDependency
from penstock.flow.expand import Corrupt, Decoder, Gzip, Zstd

__all__ = ["is_compressed", "open_bytes", "zstandard"]

_BLOCK = 1 << 18  # about what is read at once
_PIECE = 16 << 10  # of compressed data


def is_compressed(path: str) -> bool:
    """Whether the suffix says gzip or zstd.

    >>> is_compressed("a.jsonl.gz"), is_compressed("a.jsonl")
    (True, False)
    """
    return os.path.splitext(path)[1] in (".gz", ".zst")


def open_bytes(path: str, limit: int | None = None) -> _Reader:
    """Open a file to be read in blocks, decompressing ``.gz`` and ``.zst``.

    ``limit``: as if the file had only so many bytes. Raises MissingDependency for ``.zst`` without zstandard.
    """
    suffix = os.path.splitext(path)[1]
    decoder: Decoder | None = None
    if suffix == ".gz":
        decoder = Gzip()
    elif suffix == ".zst":
        decoder = Zstd(zstandard())
    return _Reader(open(path, "rb", buffering=0), limit, decoder)  # closed by the reader


def zstandard() -> Any:
    """The zstandard package, or MissingDependency."""
    try:
        import zstandard as package
    except ImportError:
        raise MissingDependency("zstandard", "a file with the suffix .zst", "zstd") from None
    return package


class _Reader:
    """An open file, to be iterated over in blocks of about 256 KB of what it holds.

    What came before the data breaks off is yielded first; then EOFError, whose text says what is wrong, is raised: for
    compressed data that is damaged or ends early, and where the file is shorter than the limit.
    """

    def __init__(self, raw: Any, limit: int | None, decoder: Decoder | None) -> None:
        self._raw: BinaryIO = raw
        self._left = limit
        self._decoder = decoder

    def __iter__(self) -> Iterator[bytes]:
        if self._decoder is None:
            while data := self._read(_BLOCK):
                yield data
            return
        pieces: list[bytes] = []
        size = 0
        try:
            for piece in self._expanded(self._decoder):
                pieces.append(piece)
                size += len(piece)
                if size >= _BLOCK:
                    yield b"".join(pieces)
                    pieces, size = [], 0
        except EOFError:
            if pieces:
                yield b"".join(pieces)
            raise
        if pieces:
            yield b"".join(pieces)

    def _expanded(self, decoder: Decoder) -> Iterator[bytes]:
        try:
            while data := self._read(_PIECE):
                yield from decoder.feed(data)
            decoder.finish()
        except Corrupt as error:
            raise EOFError(str(error)) from None

    def _read(self, size: int) -> bytes:
        """The next bytes of the file within the limit."""
        if self._left is None:
            return self._raw.read(size)
        data = self._raw.read(min(size, self._left))
        self._left -= len(data)
        if not data and self._left:
            raise EOFError(f"the file was cut short while it was read: {self._left:,} bytes are gone")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._raw.close()
