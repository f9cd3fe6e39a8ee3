"""Sources over tables: rows of CSV and of Parquet, as dicts by column."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

import msgspec

from penstock.errors import DecodeError, PlanError
from penstock.files.arrow import arrow, parquet_module
from penstock.files.lines import MAX_LINE, BadLine, read_lines
from penstock.files.paths import FileSet, partition_of
from penstock.files.source import BATCH, BATCH_BYTES, Batch, FileSource, Unsettled, aside
from penstock.files.text import BOM, checked_encoding
from penstock.flow.codec import converter
from penstock.flow.contract import Unreadable

__all__ = ["CsvSource", "ParquetSource"]

_OPEN = "unexpected end of data"  # what the csv module says of a row in which a quote is still open


class CsvSource(FileSource):
    """Each row below the header as a dict of strings, or as a type."""

    def __init__(self, files: FileSet, kind: Any, delimiter: str, encoding: str) -> None:
        if not isinstance(delimiter, str) or len(delimiter) != 1:
            raise PlanError(f"read.csv(delimiter={delimiter!r})", "Give a single character, such as ',' or '\\t'")
        super().__init__(files)
        self._delimiter = delimiter
        self._encoding = checked_encoding(encoding)
        self._convert = converter(kind, text=True) if kind is not None else None

    async def changed(self, before: Any) -> str | None:
        """As for all files; and a row that was open, by a quote, when its file ended is another one when that grew."""
        return await super().changed(before) or await aside(self._continued, before)

    def _continued(self, before: Any) -> str | None:
        for path, size in self.files.grown(before):
            rows = _rows(_TextLines(path, self._encoding, size), self._delimiter)
            if any(isinstance(row, csv.Error) and str(row) == _OPEN for row in rows):
                return (
                    f"{partition_of(path)} ended within a quoted field and was appended to, which changes its last row"
                )
        return None

    def _of_file(self, path: str, limit: int | None, unsettled: Unsettled) -> Iterator[Batch]:
        partition = partition_of(path)
        if csv.field_size_limit() < MAX_LINE:  # the module's own limit is 128 KB, for the whole process
            csv.field_size_limit(MAX_LINE)
        lines = _TextLines(path, self._encoding, limit)
        header: list[str] | None = None
        record = 0
        batch: Batch = []
        size = 0
        for row in _rows(lines, self._delimiter):
            if header is None:
                wrong = _wrong_header(row)
                if wrong is not None:
                    if unsettled.wanted(0, 1):
                        yield [((partition, 0), Unreadable(lines.text, DecodeError(partition, 1, wrong)))]
                    return
                assert isinstance(row, list)
                header = row
                continue
            if unsettled.wanted(record, record + 1):
                batch.append(((partition, record), self._item(partition, header, row, lines)))
                size += lines.size
                if len(batch) >= BATCH or size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            record += 1
        if batch:
            yield batch

    def _item(self, partition: str, header: list[str], row: list[str] | Exception, lines: _TextLines) -> Any:
        if isinstance(row, Exception):
            reason = str(row)
        elif len(row) != len(header):
            reason = f"the row has {len(row)} fields, and the header {len(header)}"
        else:
            item = dict(zip(header, row, strict=True))
            if self._convert is None:
                return item
            try:
                return self._convert(item)
            except (msgspec.ValidationError, ValueError, TypeError) as error:
                reason = str(error)
        return Unreadable(lines.text, DecodeError(partition, lines.first, reason))


def _wrong_header(row: list[str] | Exception) -> str | None:
    """Why the rows below this one can't be read; None if they can."""
    if isinstance(row, Exception):
        return f"the header can't be read: {row}"
    twice = sorted({name for name in row if row.count(name) > 1})
    return f"the header names {', '.join(map(repr, twice))} more than once" if twice else None


class _TextLines:
    """Lines for the csv module, which remembers those of the current row.

    An iterator of its own, not a generator: what is raised for one bad line leaves the next ones readable.
    """

    def __init__(self, path: str, encoding: str, limit: int | None) -> None:
        self._blocks = read_lines(path, limit)
        self._lines: Iterator[bytes | BadLine] = iter(())
        self._encoding = encoding
        self._number = 0
        self._row: list[str] = []

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self._lines = iter(next(self._blocks))
            line = next(self._lines)
        self._number += 1
        if isinstance(line, BadLine):
            self._row.append(line.raw.decode(errors="replace"))
            raise ValueError(line.reason)
        if self._number == 1:
            line = line.removeprefix(BOM)
        try:
            text = str(line, self._encoding)
        except ValueError:
            self._row.append(line.decode(errors="replace"))
            raise
        self._row.append(text)
        return text + "\n"

    def begin(self) -> None:
        """A new row begins with the next line."""
        self._row.clear()

    @property
    def first(self) -> int:
        """The number, from 1, of the line on which the current row begins."""
        return self._number - len(self._row) + 1

    @property
    def text(self) -> str:
        return "\n".join(self._row)

    @property
    def size(self) -> int:
        return sum(map(len, self._row))


def _rows(lines: _TextLines, delimiter: str) -> Iterator[list[str] | Exception]:
    """The rows, without blank lines; the error where one can't be read."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        try:
            row = next(reader)
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            yield error
            continue
        if row:
            yield row


class ParquetSource(FileSource):
    """Each row as a dict, or as a type."""

    def __init__(self, files: FileSet, kind: Any) -> None:
        parquet_module()
        super().__init__(files)
        self._convert = converter(kind) if kind is not None else None

    def _of_file(self, path: str, limit: int | None, unsettled: Unsettled) -> Iterator[Batch]:
        partition = partition_of(path)
        try:
            file = parquet_module().ParquetFile(path)
        except (arrow().ArrowException, OSError) as error:
            yield from _damaged(partition, 0, unsettled, error, "it is no intact Parquet file")
            return
        with file:
            group_start = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if not unsettled.passes_over(group_start, group_start + count):
                    yield from self._of_group(partition, file, group, group_start, unsettled)
                group_start += count

    def _of_group(self, partition: str, file: Any, group: int, start: int, unsettled: Unsettled) -> Iterator[Batch]:
        tables = file.iter_batches(batch_size=BATCH, row_groups=[group])
        while True:
            try:
                table = next(tables, None)
            except (arrow().ArrowException, OSError) as error:
                yield from _damaged(partition, start, unsettled, error, "the Parquet data is damaged")
                return
            if table is None:
                return
            for first, stop in unsettled.wanted(start, start + table.num_rows):
                rows = _rows_of(table.slice(first - start, stop - first))
                yield [((partition, first + at), self._item(partition, first + at, row)) for at, row in enumerate(rows)]
            start += table.num_rows

    def _item(self, partition: str, record: int, row: dict[str, Any] | Exception) -> Any:
        if isinstance(row, Exception):
            return Unreadable(partition, DecodeError(partition, record + 1, str(row), "row"))
        if self._convert is None:
            return row
        try:
            return self._convert(row)
        except (msgspec.ValidationError, ValueError, TypeError) as error:
            return Unreadable(row, DecodeError(partition, record + 1, str(error), "row"))


def _rows_of(table: Any) -> list[dict[str, Any] | Exception]:
    """The rows of a table; the error where one holds what Python has no value for, such as a date after 9999."""
    try:
        rows: list[dict[str, Any] | Exception] = table.to_pylist()
    except (ValueError, OverflowError) as error:
        if table.num_rows == 1:
            return [error]
        return [row for at in range(table.num_rows) for row in _rows_of(table.slice(at, 1))]
    return rows


def _damaged(partition: str, record: int, unsettled: Unsettled, error: Exception, what: str) -> Iterator[Batch]:
    """Stands for all records of a file, or of a row group from ``record`` on, that can't be read. Raises what isn't
    the file's fault."""
    if isinstance(error, OSError) and error.errno is not None:  # codecs raise theirs without a number
        raise error
    if unsettled.wanted(record, record + 1):
        yield [
            ((partition, record), Unreadable(partition, DecodeError(partition, record + 1, f"{what} ({error})", "row")))
        ]
