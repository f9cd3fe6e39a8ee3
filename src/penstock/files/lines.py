"""A file as lines of bytes, in bounded memory: what can't be a line is handed on as such, in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.files.compressed import open_bytes

__all__ = ["MAX_LINE", "BadLine", "read_lines"]

MAX_LINE = 64 << 20
"""The most bytes of a line; a longer one is skipped and handed on as a BadLine."""

_SHOWN = 1000


@dataclass(frozen=True, slots=True)
class BadLine:
    """Stands where no line can be read: the beginning of what is there, and why not."""

    raw: bytes
    reason: str

    def __len__(self) -> int:
        return len(self.raw)


def read_lines(path: str, limit: int | None = None, longest: int = MAX_LINE) -> Iterator[list[bytes | BadLine]]:
    r"""The lines of a file in lists, decompressed by suffix, without their ``\n``; the last one needs none.

    ``limit``: as if the file had only so many bytes. A line longer than ``longest`` is a BadLine; so is, at the end,
    what follows where compressed data, or a file that has become shorter than ``limit``, breaks off.
    """
    pieces: list[bytes] = []  # of the line that is not yet complete
    length = 0
    with open_bytes(path, limit) as file:
        try:
            for block in file:
                first, newline, after = block.partition(b"\n")
                pieces.append(first)
                length += len(first)
                if length > longest:
                    pieces = [b"".join(pieces)[:_SHOWN]]
                if not newline:
                    continue
                lines: list[bytes | BadLine] = [*after.split(b"\n")]
                rest = lines.pop()
                yield [_line(pieces, length, longest), *lines]
                assert isinstance(rest, bytes)
                pieces, length = [rest], len(rest)
        except EOFError as error:
            yield [BadLine(b"".join(pieces)[:_SHOWN], str(error))]
            return
    if length:
        yield [_line(pieces, length, longest)]


def _line(pieces: list[bytes], length: int, longest: int) -> bytes | BadLine:
    line = b"".join(pieces)
    if length > longest:
        return BadLine(line[:_SHOWN], f"the line has {length:,} bytes, and at most {longest:,} are read")
    return line
