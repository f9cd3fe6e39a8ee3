"""Sources over text: lines, and lines of JSON."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from penstock.errors import DecodeError, PlanError
from penstock.files.lines import BadLine, read_lines
from penstock.files.paths import FileSet, partition_of
from penstock.files.source import BATCH, BATCH_BYTES, Batch, FileSource, Unsettled
from penstock.flow.codec import decoder
from penstock.flow.contract import Unreadable

__all__ = ["BOM", "JsonLinesSource", "LineSource", "checked_encoding"]

BOM = codecs.BOM_UTF8


class LineSource(FileSource):
    """Each line as a string."""

    skips_blank = False

    def __init__(self, files: FileSet, encoding: str) -> None:
        super().__init__(files)
        self._encoding = checked_encoding(encoding)

    def _decoder(self) -> Callable[[bytes], Any]:
        encoding = self._encoding
        return lambda line: str(line, encoding).removesuffix("\r")

    def _of_file(self, path: str, limit: int | None, unsettled: Unsettled) -> Iterator[Batch]:
        partition = partition_of(path)
        decode = self._decoder()
        record = 0  # the number of the next record
        before = 0  # lines before these
        batch: Batch = []
        size = 0
        for lines in read_lines(path, limit):
            if before == 0 and isinstance(lines[0], bytes):
                lines[0] = lines[0].removeprefix(BOM)
            places = [at for at, line in enumerate(lines) if not _is_blank(line)] if self.skips_blank else None
            count = len(lines) if places is None else len(places)
            for start, stop in unsettled.wanted(record, record + count):
                for index in range(start, stop):
                    at = index - record if places is None else places[index - record]
                    line = lines[at]
                    try:
                        item = decode(line)  # type: ignore[arg-type]  # a BadLine raises TypeError
                    except _UNDECODABLE as error:
                        item = _unreadable(partition, before + at + 1, line, error)
                    batch.append(((partition, index), item))
                    size += len(line)
                    if len(batch) >= BATCH or size >= BATCH_BYTES:
                        yield batch
                        batch, size = [], 0
            record += count
            before += len(lines)
        if batch:
            yield batch


class JsonLinesSource(LineSource):
    """Each line that isn't blank as a JSON value, of a type if one is given."""

    skips_blank = True

    def __init__(self, files: FileSet, kind: Any) -> None:
        super().__init__(files, "utf-8")
        self._kind = kind
        decoder(kind)  # a type that can't be decoded is refused here

    def _decoder(self) -> Callable[[bytes], Any]:
        return decoder(self._kind)


_UNDECODABLE = (ValueError, TypeError, RecursionError, msgspec.MsgspecError)


def _unreadable(path: str, number: int, line: bytes | BadLine, error: Exception) -> Unreadable:
    if isinstance(line, BadLine):
        return Unreadable(line.raw.decode(errors="replace"), DecodeError(path, number, line.reason))
    return Unreadable(line.decode(errors="replace"), DecodeError(path, number, str(error)))


def _is_blank(line: bytes | BadLine) -> bool:
    return isinstance(line, bytes) and (not line or line.isspace())


def checked_encoding(encoding: str) -> str:
    """The encoding, if lines can be told apart before decoding. Raises PlanError."""
    try:
        if codecs.lookup(encoding).name == "utf-8-sig":
            return "utf-8"  # the mark at the beginning is passed over anyway
        if "\n".encode(encoding) == b"\n":
            return encoding
        problem = "lines can't be told apart in it"
    except LookupError:
        problem = "Python doesn't know it"
    raise PlanError(f"encoding={encoding!r}: {problem}", "Convert the file to UTF-8 (with iconv, say)")
