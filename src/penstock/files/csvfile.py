"""Output as comma-separated values."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.errors import CannotEncode, PlanError, ResumeMismatch
from penstock.files.rows import cell, each_row, fits
from penstock.files.stream import StreamOutput
from penstock.flow.contract import Delta, Origin
from penstock.flow.progress import Positions

__all__ = ["CsvOutput"]


class CsvOutput(StreamOutput):
    """A header and one row for each output."""

    kind = "csv"

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> None:
        if columns is not None and (isinstance(columns, str) or not columns):
            raise PlanError(f"write.csv(columns={columns!r})", "Give a list of the columns' names")
        super().__init__(path)
        self._asked = list(columns) if columns is not None else None
        self._columns: list[str] | None = None

    def _encode(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> bytes:
        columns = self._columns or self._asked

        def cells(row: Mapping[str, Any]) -> list[Any]:
            nonlocal columns
            if columns is None:
                if not row:
                    raise CannotEncode(self.path, "row", "it has no columns")
                columns = [str(key) for key in row]
            fits(row, columns, self.path)
            return [_text(row[column], self.path) for column in columns]

        rows = each_row(outputs, self.path, cells)
        if not rows:
            return b""
        if self._columns is None:
            assert columns is not None
            rows.insert(0, columns)
            self._columns = columns
        return _lines(rows)

    async def commit(self, delta: Delta) -> Positions:
        """Make what was written, and ``delta``, durable and counted, a table without rows too. As for all outputs."""
        if delta.finished and self._columns is None and self._asked is not None:
            self._waiting.append(_lines([self._asked]))
            self._columns = self._asked
        return await super().commit(delta)

    def _details(self) -> dict[str, Any]:
        return {"columns": self._columns}

    def _remember(self, state: dict[str, Any]) -> None:
        self._columns = state.get("columns")
        if self._columns and self._asked and self._columns != self._asked:
            raise ResumeMismatch(
                self.path,
                f"its columns are {', '.join(self._columns)}, and columns= asks for {', '.join(self._asked)}",
            )


def _lines(rows: list[list[Any]]) -> bytes:
    r"""Rows that end with ``\n``. The writer is told ``\r\n``, since it quotes only what would end its own rows."""
    lines = _Lines()
    csv.writer(lines, lineterminator="\r\n").writerows(rows)
    return "".join(lines).encode()


class _Lines(list[str]):
    """The file that csv writes to, a row at a time."""

    def write(self, row: str, /) -> None:
        self.append(row.removesuffix("\r\n") + "\n")


def _text(value: Any, target: str) -> Any:
    value = cell(value, target)
    if isinstance(value, bytes):
        raise CannotEncode(target, "bytes", "CSV holds text; decode it first")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CannotEncode(target, "str", str(error)) from None
    return value
