"""How a journal is opened: an SQLite file with its tables, in a mode where a commit is on the disk.

A journal is a file of its own beside the output, or tables with a prefix in the user's database, where it commits
together with their rows. Reading it is possible at any time, from any process, also while a job writes (WAL).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

from penstock.errors import JournalError, WriteFailed

__all__ = ["Tables", "connect", "has_table", "opened_tables", "read_only", "refusal", "reported"]

_VERSION = 1
_TIMEOUT = 30_000
_ELSEWHERE = "Move it away, or write to another output"

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
CREATE TABLE {states}(stage TEXT, key TEXT, value BLOB, PRIMARY KEY(stage, key)) WITHOUT ROWID;
CREATE TABLE {runs}(run INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, report BLOB);
"""
_NAMES = ("meta", "progress", "children", "unfinished", "taken", "counts", "ids", "dead", "states", "runs")


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
    states: str
    runs: str
    met: str
    """The keys that this run has met: a temporary table."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        for name in (*_NAMES, "met"):
            setattr(self, name, '"' + f"{prefix}{name}".replace('"', '""') + '"')

    def create(self, connection: Any) -> None:
        connection.execute(_SCHEMA.format(**{name: getattr(self, name) for name in _NAMES}))
        connection.execute(f"INSERT INTO {self.meta} VALUES ('version', ?), ('id', ?)", (_VERSION, os.urandom(8).hex()))

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
            raise JournalError(connection.filename, f"its table {name!r} isn't a journal's", _ELSEWHERE)
        if version > _VERSION:
            raise JournalError(
                connection.filename,
                f"a newer penstock wrote it (format {version}; this one reads up to {_VERSION})",
                "Upgrade penstock, or write to another output",
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
            ).fetchall()  # or it would stop at the first statement that answers
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
                reason = f"it is a database without a journal (it holds {other!r})"
                raise JournalError(connection.filename, reason, _ELSEWHERE)
            tables.create(connection)
    return tables


def read_only(path: str) -> Any:
    """Open the database at ``path`` to read from it, also while a job writes it. The file must exist.

    Reading in WAL mode goes by an index beside the database, which a reader makes if it isn't there and it may write
    there. If it may not, and there is no log either, the database lies still: it is read as it is. Raises JournalError
    where it can't be read.
    """
    import apsw

    uri = f"file:{quote(path)}?immutable=1"
    ways = [(path, apsw.SQLITE_OPEN_READWRITE), (path, apsw.SQLITE_OPEN_READONLY)]
    with reported(path, "read"):
        while True:
            name, flags = ways.pop(0)
            try:
                return _opened_to_read(name, flags)
            except (apsw.CantOpenError, apsw.ReadOnlyError, apsw.PermissionsError):
                if not ways and name != uri and os.access(path, os.R_OK) and not os.path.exists(f"{path}-wal"):
                    ways.append((uri, apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI))
                if not ways:
                    raise


def _opened_to_read(name: str, flags: int) -> Any:
    import apsw

    connection = apsw.Connection(name, flags=flags)
    try:
        connection.set_busy_timeout(_TIMEOUT)
        connection.execute("PRAGMA query_only = ON")
        with suppress(apsw.NotADBError, apsw.CorruptError):  # for whoever asks it something
            connection.execute("SELECT 1 FROM sqlite_schema")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def reported(path: str, doing: str = "write") -> Iterator[None]:
    """Turn what SQLite raises into penstock's errors, which name the file. ``doing``: ``"read"`` or ``"write"``."""
    import apsw

    try:
        yield
    except (apsw.NotADBError, apsw.CorruptError, apsw.FormatError) as error:
        raise JournalError(path, f"it is no intact SQLite database ({error})") from error
    except apsw.Error as error:
        if doing == "write":
            raise WriteFailed(path, refusal(error)) from error
        raise JournalError(path, refusal(error), "Look whether you may read it, and its directory") from error


def refusal(error: Exception) -> str:
    """Why SQLite refused, in words: it has failed, is held by another program, or its tables were changed."""
    import apsw

    if isinstance(error, (apsw.BusyError, apsw.LockedError)):
        return f"another program holds it locked ({error})"
    return str(error)
