"""Output as rows of a table, in the database that also holds the journal: data and progress in one transaction."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from penstock.errors import CannotEncode, ForeignOutput, PlanError
from penstock.files.output import Output
from penstock.files.rows import cell, each_row
from penstock.flow.contract import Delta, Origin
from penstock.flow.database import Tables, connect, has_table, read_only, reported
from penstock.flow.journal import Journal, letters_identity
from penstock.flow.letters import tables_prefix

__all__ = ["SqliteOutput"]

_INT_BOUND = 1 << 63


class SqliteOutput(Output):
    """Rows of one table. They wait in memory until the commit, whose transaction inserts them."""

    kind = "sqlite"

    def __init__(self, path: str | os.PathLike[str], table: str = "outputs", key: str | None = None) -> None:
        super().__init__(path)
        if not isinstance(table, str) or not table or table.startswith(("sqlite_", "_penstock_")):
            raise PlanError(f"write.sqlite(table={table!r})", "Give a table's name, other than SQLite's own")
        self.table = table
        self.key = key
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._columns: list[str] | None = None
        self._is_there = False

    @property
    def identity(self) -> str:
        return f"sqlite:{self.path}#{self.table}"

    @property
    def letters(self) -> str:
        """The identity of the source that reads this output's dead letters: a job over it redoes them here."""
        return letters_identity(self.path, self.table)

    @property
    def journal(self) -> str:
        return os.path.realpath(self.path)

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        """Take these outputs; they count at the next commit. Raises OutputRejected."""
        self._opened()
        columns = self._columns

        def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
            nonlocal columns
            if columns is None:
                if not row or (self.key is not None and self.key not in row):
                    raise CannotEncode(self.path, "row", f"it has no {self.key or 'columns'}")
                columns = [str(name) for name in row]
            further = [str(name) for name in row if name not in columns]
            if further:
                raise CannotEncode(
                    self.path, "row", f"table {self.table!r} has no column {', '.join(further)} ({', '.join(columns)})"
                )
            if self.key is not None and row.get(self.key) is None:
                raise CannotEncode(self.path, "row", f"its key {self.key!r} is missing or null")
            return tuple(_value(row.get(name), name, self.path) for name in columns)

        rows = each_row(outputs, self.path, cells)
        self._columns = columns
        self._waiting.extend(rows)

    def _make_journal(self) -> Journal:
        return Journal(self.journal, output=self.path, letters=self.letters, prefix=tables_prefix(self.table))

    def _prepare(self, *, fresh: bool) -> None:
        if not os.path.exists(self.real):
            return
        if not self._is_database():
            if not fresh:
                raise ForeignOutput(self.path, "is no SQLite database")
            os.unlink(self.real)
            return
        tables = Tables(tables_prefix(self.table))
        with closing(connect(self.real) if fresh else read_only(self.real)) as connection, reported(self.real):
            if fresh:
                with connection:
                    tables.drop(connection)
                    connection.execute(f"DROP TABLE IF EXISTS {_quoted(self.table)}")
            elif not tables.exist(connection) and self._has_rows(connection):
                raise ForeignOutput(self.path, f"has rows in its table {self.table!r} and no journal of them")

    def _is_database(self) -> bool:
        if not os.path.isfile(self.real):
            raise ForeignOutput(self.path, "is not a regular file")
        import apsw

        # Asked through SQLite: closing a descriptor of our own would drop the locks that this process holds on it.
        with closing(read_only(self.real)) as connection:
            try:
                connection.execute("SELECT 1 FROM sqlite_schema")
            except apsw.NotADBError:
                return False
        return True

    def _has_rows(self, connection: Any) -> bool:
        if not has_table(connection, self.table):
            return False
        return connection.execute(f"SELECT 1 FROM {_quoted(self.table)} LIMIT 1").get is not None

    def _recover(self, journal: Journal) -> None:
        self._waiting.clear()
        with reported(self.real):
            found = journal.connection.execute("SELECT name FROM pragma_table_info(?)", (self.table,)).fetchall()
        self._is_there = bool(found)
        self._columns = [name for (name,) in found] or None
        if self._columns and self.key is not None and self.key not in self._columns:
            raise PlanError(
                f"write.sqlite(key={self.key!r}): table {self.table!r} has no such column",
                f"It has: {', '.join(self._columns)}",
            )
        if journal.state and not found:
            raise ForeignOutput(self.path, f"has lost its table {self.table!r}, which its journal knows")

    def _commit(self, delta: Delta) -> None:
        rows = list(self._waiting)
        # Rows that were written by an earlier commit count in the state, so that a lost table is noticed.
        state = {"table": self.table} if rows or self._is_there else None
        self._journal.transaction(delta, state, lambda: self._insert(rows))
        self._is_there = self._is_there or bool(rows)
        self._waiting.clear()

    def _insert(self, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        assert self._columns is not None
        connection = self._journal.connection
        table = _quoted(self.table)
        names = [_quoted(name) for name in self._columns]
        if not self._is_there:
            columns = [f"{name} PRIMARY KEY" if name == _quoted(self.key or "") else name for name in names]
            connection.execute(f"CREATE TABLE {table}({', '.join(columns)})")
        marks = ", ".join("?" * len(names))
        insert = f"INSERT INTO {table}({', '.join(names)}) VALUES ({marks})"
        if self.key is not None:
            values = ", ".join(f"{name} = excluded.{name}" for name in names)
            insert += f" ON CONFLICT({_quoted(self.key)}) DO UPDATE SET {values}"
        connection.executemany(insert, rows)

    def _undo(self) -> bool:
        self._waiting.clear()
        return True

    def _free(self) -> None:
        """The journal's connection is all there is."""


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _value(value: Any, column: str, target: str) -> Any:
    if isinstance(value, bool):
        return int(value)
    value = cell(value, target)
    if type(value) is int and not -_INT_BOUND <= value < _INT_BOUND:
        raise CannotEncode(target, "int", f"column {column!r}: SQLite's integers have 64 bits")
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CannotEncode(target, "str", f"column {column!r}: {error}") from None
    return value
