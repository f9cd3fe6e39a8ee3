"""How a journal is opened: an SQLite file with its tables, in a mode where a commit is on the disk.

A journal is a file of its own beside the output, or tables with a prefix in the user's database, where it commits
together with their rows. Reading it is possible at any time, from any process, also while a job writes (WAL).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock.errors import JournalError, WriteFailed

__all__ = ["VERSION", "Tables", "connect", "has_table", "opened_tables", "read_only", "reported"]

VERSION = 1
_TIMEOUT = 30_000

# AUTOINCREMENT: the number of a letter that was settled is never given to another one.
_SCHEMA = """
CREATE TABLE {meta}(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE {progress}(partition TEXT, start INTEGER, stop INTEGER, PRIMARY KEY(partition, start)) WITHOUT ROWID;
CREATE TABLE {children}(partition TEXT, item, start INTEGER, stop INTEGER,
    PRIMARY KEY(partition, item, start)) WITHOUT ROWID;
CREATE TABLE {unfinished}(partition TEXT, item, fate INTEGER, digest BLOB,
    PRIMARY KEY(partition, item)) WITHOUT ROWID;
CREATE TABLE {taken}(stage INTEGER PRIMARY KEY, amount INTEGER);
CREATE TABLE {counts}(name TEXT PRIMARY KEY, amount INTEGER) WITHOUT ROWID;
CREATE TABLE {ids}(key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE {dead}(letter INTEGER PRIMARY KEY AUTOINCREMENT, slot TEXT UNIQUE, partition TEXT, place INTEGER,
    item BLOB, stage TEXT, reason TEXT, error TEXT, attempts INTEGER, time REAL);
CREATE TABLE {runs}(run INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, report BLOB);
"""
_NAMES = ("meta", "progress", "children", "unfinished", "taken", "counts", "ids", "dead", "runs")


class Tables:
    """The quoted names of a journal's tables, by what they hold."""

    meta: str
    progress: str
    children: str
    unfinished: str
    taken: str
    counts: str
    ids: str
    dead: str
    runs: str

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        for name in _NAMES:
            setattr(self, name, '"' + f"{prefix}{name}".replace('"', '""') + '"')

    def create(self, connection: Any) -> None:
        connection.execute(_SCHEMA.format(**{name: getattr(self, name) for name in _NAMES}))
        connection.execute(f"INSERT INTO {self.meta} VALUES ('version', ?), ('id', ?)", (VERSION, os.urandom(8).hex()))

    def drop(self, connection: Any) -> None:
        for name in _NAMES:
            connection.execute(f"DROP TABLE IF EXISTS {getattr(self, name)}")

    def exist(self, connection: Any) -> bool:
        """Whether they are there. Raises JournalError if a newer version made them."""
        name = f"{self.prefix}meta"
        if not has_table(connection, name):
            return False
        version = connection.execute(f"SELECT value FROM {self.meta} WHERE name = 'version'").get
        if not isinstance(version, int):
            raise JournalError(connection.filename, f"its table {name!r} isn't a journal's")
        if version > VERSION:
            raise JournalError(
                connection.filename,
                f"a newer penstock wrote it (format {version}; this one reads up to {VERSION}); upgrade penstock",
            )
        return True


def has_table(connection: Any, name: str) -> bool:
    found = connection.execute("SELECT 1 FROM sqlite_schema WHERE type IN ('table', 'view') AND name = ?", (name,)).get
    return found is not None


def connect(path: str) -> Any:
    """Open or create the database at ``path`` for a job: WAL, each commit on the disk when it returns."""
    import apsw

    with reported(path):
        connection = apsw.Connection(path)
        try:
            connection.set_busy_timeout(_TIMEOUT)
            connection.execute(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA fullfsync = ON; "
                "PRAGMA checkpoint_fullfsync = ON; PRAGMA journal_size_limit = 4194304"
            )
        except BaseException:
            connection.close()
            raise
        return connection


def opened_tables(connection: Any, prefix: str) -> Tables:
    """The journal's tables in this database; made if there are none yet.

    Raises JournalError if the file is no journal: without a prefix, it may hold nothing else.
    """
    tables = Tables(prefix)
    with reported(connection.filename), connection:
        if not tables.exist(connection):
            other = connection.execute("SELECT name FROM sqlite_schema LIMIT 1").get
            if other is not None and not prefix:
                raise JournalError(connection.filename, f"it is a database without a journal (it holds {other!r})")
            tables.create(connection)
    return tables


def read_only(path: str) -> Any:
    """Open the database at ``path`` to read from it, also while a job writes it. The file must exist."""
    import apsw

    with reported(path):
        try:
            # Not SQLITE_OPEN_READONLY: reading a WAL database needs its shared index, which may have to be made.
            connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE)
        except (apsw.CantOpenError, apsw.ReadOnlyError):
            connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(_TIMEOUT)
        connection.execute("PRAGMA query_only = ON")
        return connection


@contextmanager
def reported(path: str) -> Iterator[None]:
    """Turn what SQLite raises into penstock's errors, which name the file."""
    import apsw

    try:
        yield
    except (apsw.NotADBError, apsw.CorruptError, apsw.FormatError) as error:
        raise JournalError(path, f"it is no intact SQLite database ({error})") from error
    except (apsw.FullError, apsw.IOError) as error:
        raise WriteFailed(path, str(error)) from error
    except (apsw.BusyError, apsw.LockedError) as error:
        raise WriteFailed(path, f"another program holds it locked ({error})") from error
    except (apsw.CantOpenError, apsw.PermissionsError, apsw.ReadOnlyError) as error:
        raise JournalError(path, f"it can't be opened for writing ({error})") from error
