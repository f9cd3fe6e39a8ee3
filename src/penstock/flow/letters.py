"""Reading a journal from outside: dead letters and the reports of past runs, also while a job writes it."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from penstock.errors import JournalError, MissingInput, PlanError
from penstock.flow.codec import unpack
from penstock.flow.contract import Failed
from penstock.flow.database import Tables, read_only, reported
from penstock.flow.journal import journal_path, letters_identity

__all__ = ["PREFIX", "JournalReader", "find_journal", "tables_in", "tables_prefix"]

PREFIX = "_penstock_"
"""What the names of a journal's tables begin with in a user's database; then the name of the output's table."""


def tables_prefix(table: str) -> str:
    """The prefix of the journal that belongs to one table of a database.

    >>> tables_prefix("outputs")
    '_penstock_outputs_'
    """
    return f"{PREFIX}{table}_"


def find_journal(output: str, table: str | None = None) -> tuple[str, str | None]:
    """Where the journal of ``output`` is: its file, and the table of the database it belongs to, if it is in one.

    ``table`` is needed for a database with the journals of several outputs.
    Raises MissingInput if there is none, PlanError if it is unclear which is meant.
    """
    beside = journal_path(output)
    if os.path.exists(beside):
        return beside, None
    if not os.path.isfile(output):
        raise MissingInput(beside)
    real = os.path.realpath(output)
    try:
        found = tables_in(real)
    except JournalError:  # no database at all
        raise MissingInput(beside) from None
    if table is not None:
        if table not in found:
            raise PlanError(f"{output} has no journal for a table {table!r}", f"It has one for: {', '.join(found)}")
        return real, table
    if len(found) > 1:
        raise PlanError(f"{output} holds the outputs of several jobs", f"Say table=, one of: {', '.join(found)}")
    if not found:
        raise MissingInput(beside)
    return real, found[0]


def tables_in(database: str) -> list[str]:
    """The tables that have a journal in this database, and in the file of a log its jobs. Raises JournalError."""
    connection = read_only(database)
    try:
        with reported(database, "read"):
            names = connection.execute(
                "SELECT name FROM sqlite_schema WHERE type = 'table' AND name GLOB ? ORDER BY name",
                (f"{PREFIX}*_meta",),
            ).fetchall()
    finally:
        connection.close()
    return [name[len(PREFIX) : -len("_meta")] for (name,) in names]


class JournalReader:
    """Reads the journal of an output: a connection of its own, each question a short look at what is committed.

    Raises MissingInput if the output has no journal, JournalError if that can't be read. Close it after use.
    """

    def __init__(self, output: str, table: str | None = None) -> None:
        self.path, self.table = find_journal(output, table)
        self.identity = letters_identity(output, self.table)
        self._connection = read_only(self.path)
        self._tables = Tables("" if self.table is None else tables_prefix(self.table))
        try:
            with reported(self.path, "read"):
                if not self._tables.exist(self._connection):
                    raise JournalError(self.path, "it holds no journal")
                self.id: str = self._connection.execute(f"SELECT value FROM {self._tables.meta} WHERE name = 'id'").get
                """Differs between a journal and one that replaced it."""
        except BaseException:
            self._connection.close()
            raise

    def job(self) -> str:
        """The name of the job; empty before its first commit."""
        return self._ask(f"SELECT value FROM {self._tables.meta} WHERE name = 'name'") or ""

    def last_letter(self) -> int:
        """The number of the newest letter; 0 if there is none."""
        return self._ask(f"SELECT max(letter) FROM {self._tables.dead}") or 0

    def letters(self, after: int, last: int, limit: int) -> list[tuple[int, Failed]]:
        """The first ``limit`` letters with numbers in (after, last], and their numbers."""
        with reported(self.path, "read"):
            rows = self._connection.execute(
                f"SELECT letter, item, partition, place, stage, reason, error, attempts FROM {self._tables.dead} "
                "WHERE letter > ? AND letter <= ? ORDER BY letter LIMIT ?",
                (after, last, limit),
            ).fetchall()
        return [
            (letter, Failed(unpack(item), (partition, place), stage, reason, error, attempts))
            for letter, item, partition, place, stage, reason, error, attempts in rows
        ]

    def counts(self) -> dict[str, int]:
        """What became of all source items so far: delivered, filtered, skipped, dead."""
        with reported(self.path, "read"):
            return dict(self._connection.execute(f"SELECT name, amount FROM {self._tables.counts}"))

    def runs(self) -> list[dict[str, Any]]:
        """The reports of the last hundred runs, oldest first."""
        with reported(self.path, "read"):
            rows = self._connection.execute(f"SELECT report FROM {self._tables.runs} ORDER BY run").fetchall()
        return [msgspec.json.decode(report) for (report,) in rows]

    def close(self) -> None:
        self._connection.close()

    def _ask(self, query: str) -> Any:
        with reported(self.path, "read"):
            return self._connection.execute(query).get
