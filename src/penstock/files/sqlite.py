"""Output as rows of a table, in the database that also holds the journal: data and progress in one transaction.

A table that penstock made takes every row that gets as far as SQLite, so rows wait in memory for the transaction of
their commit, and the database is locked to other writers for no longer than that takes. A table that the user made may
refuse rows by rules of its own (constraints, types, indexes, triggers), which only SQLite can judge: there each write
inserts its rows at once, and the transaction is held open until the commit.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from penstock.errors import CannotEncode, ForeignOutput, OutputRejected, PlanError, WriteFailed
from penstock.files.rows import cell, each_row
from penstock.flow.contract import Delta, Origin
from penstock.flow.database import Tables, connect, has_table, read_only, reported
from penstock.flow.journal import Journal, letters_identity
from penstock.flow.letters import tables_prefix
from penstock.flow.output import ELSEWHERE, START_OVER, Output

__all__ = ["SqliteOutput"]

_INT_BOUND = 1 << 63
_LONGEST = 1_000_000_000  # bytes of a value: SQLite's own bound


class SqliteOutput(Output):
    """Rows of one table."""

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
        self._has_rules = False

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
        desk = self._opened()
        columns = self._columns

        def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
            nonlocal columns
            if columns is None:
                if not row or (self.key is not None and self.key not in row):
                    raise CannotEncode(self.path, "row", f"it has no {self.key or 'columns'}")
                columns = self._new_columns(row)
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
        if not self._has_rules:
            self._waiting.extend(rows)
        elif rows:
            owners = [index for index, (_, values) in enumerate(outputs) for _ in values]
            rejected = await desk.call(self._guarded, self._insert_now, rows, owners)
            if rejected:
                raise OutputRejected(rejected)

    def _new_columns(self, row: Mapping[str, Any]) -> list[str]:
        """The columns of the table that the first row makes. Raises CannotEncode if SQLite can't make one with them."""
        import apsw

        columns = [str(name) for name in row]
        try:
            with closing(apsw.Connection(":memory:")) as connection:
                connection.execute(self._creation(columns))
        except (apsw.SQLError, UnicodeEncodeError) as error:
            raise CannotEncode(self.path, "row", f"no table can be made with its columns: {error}") from None
        return columns

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
            raise ForeignOutput(self.path, "is not a regular file", ELSEWHERE)
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
            raise ForeignOutput(self.path, f"has lost its table {self.table!r}, which its journal knows", START_OVER)
        self._has_rules = self._columns is not None and not self._is_plain(journal.connection, self._columns)

    def _is_plain(self, connection: Any, columns: list[str]) -> bool:
        """Whether the table is as penstock makes it, with no index or trigger besides. Raises PlanError for one into
        which no row can be inserted."""
        import apsw

        with reported(self.real):
            try:
                connection.execute(f"EXPLAIN {self._insertion(columns)}", [None] * len(columns))
            except apsw.SQLError as error:
                problem = f"{self!r}: no row can be inserted into table {self.table!r}: {error}"
                raise PlanError(problem, "Give another table, or another key=") from None
            made = connection.execute(
                "SELECT sql FROM sqlite_schema WHERE tbl_name = ? COLLATE NOCASE AND sql IS NOT NULL", (self.table,)
            ).fetchall()
        return bool(made == [(self._creation(columns),)])

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
        if not self._is_there:
            connection.execute(self._creation(self._columns))
        connection.executemany(self._insertion(self._columns), rows)

    def _insert_now(self, rows: list[tuple[Any, ...]], owners: Sequence[int]) -> list[tuple[int, Exception]]:
        """Insert rows ahead of the commit, in its transaction. If the table refuses some, none is inserted, and the
        outputs that own those are returned with the reason."""
        connection = self._journal.connection
        self._journal.hold()
        rejected: dict[int, Exception] = {}
        with reported(self.real):
            connection.execute("SAVEPOINT rows")
            if self._refusal(rows) is not None:
                connection.execute("ROLLBACK TO rows")
                for row, owner in zip(rows, owners, strict=True):
                    reason = self._refusal([row])
                    if reason is not None:
                        rejected.setdefault(owner, CannotEncode(self.path, "row", reason))
                connection.execute("ROLLBACK TO rows")
            connection.execute("RELEASE rows")
        return sorted(rejected.items(), key=lambda one: one[0])

    def _refusal(self, rows: list[tuple[Any, ...]]) -> str | None:
        """Insert rows; why the table refuses them, if it does: some may be inserted then."""
        import apsw

        try:
            self._insert(rows)
        except (apsw.ConstraintError, apsw.MismatchError, apsw.SQLError, apsw.TooBigError) as error:
            if not self._journal.connection.in_transaction:
                reason = f"table {self.table!r} undoes the whole transaction when it refuses a row ({error})"
                raise WriteFailed(self.path, reason) from error
            return f"table {self.table!r} refuses it: {error}"
        return None

    def _creation(self, columns: list[str]) -> str:
        names = [_quoted(name) + " PRIMARY KEY" * (name == self.key) for name in columns]
        return f"CREATE TABLE {_quoted(self.table)}({', '.join(names)})"

    def _insertion(self, columns: list[str]) -> str:
        names = [_quoted(name) for name in columns]
        marks = ", ".join("?" * len(names))
        insert = f"INSERT INTO {_quoted(self.table)}({', '.join(names)}) VALUES ({marks})"
        if self.key is None:
            return insert
        values = ", ".join(f"{name} = excluded.{name}" for name in names)
        return f"{insert} ON CONFLICT({_quoted(self.key)}) DO UPDATE SET {values}"

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
    size = len(value) if type(value) is bytes else 0
    if type(value) is str:
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            raise CannotEncode(target, "str", f"column {column!r}: {error}") from None
    if size > _LONGEST:
        raise CannotEncode(target, type(value).__name__, f"column {column!r}: SQLite takes at most {_LONGEST:,} bytes")
    return value
