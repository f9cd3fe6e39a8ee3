"""Output as a directory of Parquet files, which appear when they count.

A part is written under a name with a dot, which readers of a directory pass over, and synced. The journal counts it;
then it is renamed. Opening finishes the renames of the last commit and deletes parts that were never counted.
"""

from __future__ import annotations

import base64
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from penstock.errors import CannotEncode, ForeignOutput, OutputRejected, PlanError, ResumeMismatch
from penstock.files.arrow import arrow, parquet_module
from penstock.files.columns import columns_of, infer, refusal, retyped
from penstock.files.rows import each_row
from penstock.flow.contract import Delta, Origin
from penstock.flow.disk import make_directory, sync_directory, sync_file, write_whole
from penstock.flow.journal import Journal, remove_journal
from penstock.flow.output import START_OVER, Output
from penstock.flow.progress import Positions

__all__ = ["ParquetOutput"]

_PART_BYTES = 64 << 20
_HIDDEN = re.compile(r"\.part-(\d{5,})\.parquet")


class ParquetOutput(Output):
    """Rows, collected into parts of at most ``rows`` rows or about 64 MB."""

    kind = "parquet"

    def __init__(
        self, path: str | os.PathLike[str], schema: Any = None, rows: int = 100_000, max_age: float = 5.0
    ) -> None:
        pa = arrow()
        super().__init__(path)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise PlanError(f"write.parquet(rows={rows!r})", "Give the most rows of a part, at least 1")
        if isinstance(max_age, bool) or not isinstance(max_age, (int, float)) or not 0 <= max_age < inf:
            raise PlanError(f"write.parquet(max_age={max_age!r})", "Give the seconds between commits, from 0")
        if schema is not None and not isinstance(schema, pa.Schema):
            raise PlanError(f"write.parquet(schema={schema!r:.60})", "Give a pyarrow.Schema")
        if schema is not None and (reason := refusal(schema)):
            raise PlanError(f"write.parquet(schema=): Parquet can't hold it: {reason}", "Give another schema")
        self.rows = rows
        self.pace = max_age
        self._asked = schema
        self._schema: Any = None
        self._parts = self._written = 0
        # Filled on the loop, emptied on the desk: see StreamOutput. One list of columns for each write.
        self._waiting: deque[list[Any]] = deque()

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        """Take these outputs; they count at the next commit, also if this call is cancelled. Raises OutputRejected."""
        desk = self._opened()
        rows: list[Mapping[str, Any]] = each_row(outputs, self.path, lambda row: row)
        if not rows:
            return
        owners = [index for index, (_, values) in enumerate(outputs) for _ in values]
        schema = self._schema_for(rows, owners)
        columns = columns_of(rows, owners, schema, self.path)
        self._schema = schema
        self._waiting.append(columns)
        self._count += len(rows)
        self._bytes += sum(column.nbytes for column in columns)
        if self._count >= self.rows or self._bytes >= _PART_BYTES:
            everything = self._bytes >= _PART_BYTES
            self._begin_parts()
            await desk.call(self._guarded, self._write_parts, everything)

    async def commit(self, delta: Delta) -> Positions:
        """Make what was written, and ``delta``, durable and counted, and end the part. As for all outputs."""
        if self._waiting:
            self._begin_parts()
        return await super().commit(delta)

    def _begin_parts(self) -> None:
        """From now on the schema is fixed."""
        self._is_fixed = True
        self._count = self._bytes = 0

    def _schema_for(self, rows: Sequence[Mapping[str, Any]], owners: Sequence[int]) -> Any:
        if self._is_fixed:
            return self._schema
        schema = infer(rows, self._schema)
        if schema == self._schema:
            return schema
        if not self._holds_what_waits(schema):
            schema = infer(rows, self._schema, widening=False)
        reason = refusal(schema) if schema.names else "it has no columns"
        if reason:
            error = CannotEncode(self.path, "row", reason)
            raise OutputRejected([(index, error) for index in sorted(set(owners))])
        return schema

    def _holds_what_waits(self, schema: Any) -> bool:
        """Whether no integer among the rows that wait is too large for a column that becomes one of floats."""
        try:
            for batch in self._waiting:
                for column, kind in zip(batch, schema.types, strict=True):
                    retyped(column, kind)
        except arrow().ArrowInvalid:
            return False
        return True

    def _prepare(self, *, fresh: bool) -> None:
        self._parts = self._written = 0
        is_file = os.path.lexists(self.real) and not os.path.isdir(self.real)
        if fresh:
            remove_journal(self.journal)
            if is_file:
                os.unlink(self.real)
            elif os.path.isdir(self.real):
                for name in os.listdir(self.real):
                    if name.endswith(".parquet"):
                        os.unlink(os.path.join(self.real, name))
        elif is_file:
            raise ForeignOutput(self.path, "is a file; this output is a directory of parts")
        elif not os.path.exists(self.journal) and os.path.isdir(self.real) and os.listdir(self.real):
            raise ForeignOutput(self.path, "is a directory that isn't empty and has no journal beside it")
        make_directory(self.real)

    def _recover(self, journal: Journal) -> None:
        state = journal.state
        self._parts = self._written = state.get("parts", 0)  # counted; on the disk, counted or not
        self._waiting.clear()
        self._rest: list[list[Any]] = []
        self._count = self._bytes = 0
        self._begun = False
        self._settle_schema(state.get("schema"))
        there = set(os.listdir(self.real))
        for number in range(state.get("renaming", 0), self._parts):
            if _hidden(number) in there:
                self._reveal(number)
                there.add(_shown(number))
        counted = {_shown(number) for number in range(self._parts)}
        lost = sorted(counted - there)
        if lost:
            reason = f"has lost {lost[0]}, which its journal counts ({len(lost)} in all)"
            raise ForeignOutput(self.path, reason, START_OVER)
        further = sorted(name for name in there - counted if name.endswith(".parquet") and not name.startswith("."))
        if further:
            raise ForeignOutput(self.path, f"holds {further[0]}, which its journal doesn't count")
        for name in there:
            found = _HIDDEN.fullmatch(name)
            if found and int(found[1]) >= self._parts:
                os.unlink(os.path.join(self.real, name))
        sync_directory(self.real)

    def _settle_schema(self, stored: str | None) -> None:
        pa = arrow()
        self._is_fixed = stored is not None or self._asked is not None
        if stored is None:
            self._schema = self._asked
            return
        self._schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored)))
        if self._asked is not None and not self._asked.equals(self._schema):
            raise ResumeMismatch(self.path, "its parts have another schema than schema= asks for")

    def _write_parts(self, everything: bool) -> None:
        """Write full parts of what waits, and with ``everything`` the rest too."""
        pa = arrow()
        batches = self._rest
        while self._waiting:
            batches.append(self._waiting.popleft())
        if not batches:
            return
        columns = [
            pa.chunked_array([retyped(batch[at], field.type) for batch in batches], type=field.type)
            for at, field in enumerate(self._schema)
        ]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        start = 0
        while table.num_rows - start >= self.rows or (everything and start < table.num_rows):
            self._write_part(table.slice(start, self.rows))
            start += self.rows
        rest = table.slice(start).combine_chunks()
        self._rest = [[column.chunk(0) for column in rest.columns]] if rest.num_rows else []

    def _write_part(self, table: Any) -> None:
        if not self._begun:
            self._journal.begin()
            self._begun = True
        stream = arrow().BufferOutputStream()
        parquet_module().write_table(table, stream)
        path = os.path.join(self.real, _hidden(self._written))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._written += 1
        try:
            write_whole(descriptor, stream.getvalue())
            sync_file(descriptor)
        finally:
            os.close(descriptor)

    def _commit(self, delta: Delta) -> None:
        self._write_parts(everything=True)
        if self._written > self._parts:
            sync_directory(self.real)
        state: dict[str, Any] = {"parts": self._written, "renaming": self._parts}
        if self._written:
            state["schema"] = base64.b64encode(self._schema.serialize()).decode()
        self._journal.transaction(delta, state)
        self._begun = True
        first, self._parts = self._parts, self._written
        for number in range(first, self._written):
            self._reveal(number)
        if first < self._written:
            sync_directory(self.real)

    def _reveal(self, number: int) -> None:
        os.rename(os.path.join(self.real, _hidden(number)), os.path.join(self.real, _shown(number)))

    def _undo(self) -> bool:
        for number in range(self._parts, self._written):
            os.unlink(os.path.join(self.real, _hidden(number)))
        return True

    def _free(self) -> None:
        """No file stays open between two calls."""
        self._waiting.clear()
        self._rest = []


def _shown(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _hidden(number: int) -> str:
    return f".part-{number:05d}.parquet"
