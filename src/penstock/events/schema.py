"""The tables of a log file, and how it is opened: what it must be, and what makes a commit safe.

An event stands at ``(topic, seq)``: one integer, ``topic * SPAN + seq``, so that appending to a topic goes to the end
of its part of one b-tree. A number is never given twice: a topic keeps its next one. Of a group, one number says how
far it has read (``cursor``); only deliveries that are in hand, parked, waiting or to be tried again are rows of
``pending``.

The states of a pending delivery: HELD by an owner; READY for anyone, from its ``due`` time on; PARKED behind an earlier
unsettled event of its key. Of each key in a group, the rows are, by ``seq``: first those HELD, all by one owner, or one
READY; then the PARKED. ``suspect``: its owner's process ended while it held it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock.errors import LogError, WriteFailed
from penstock.events.clock import boot_id, boot_time, calendar
from penstock.flow.database import refusal

__all__ = ["HELD", "MARK", "PARKED", "READY", "SPAN", "connect", "prepare", "reported", "unrecoverable"]

_FORMAT = 1
SPAN = 1 << 40
HELD, READY, PARKED = 0, 1, 2
MARK = 0x70656E73
"""SQLite's application id of a log: "pens"."""

_TABLES = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE topics(topic INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, first INTEGER NOT NULL,
    next INTEGER NOT NULL, time INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE events(place INTEGER PRIMARY KEY, time INTEGER NOT NULL, due INTEGER, key TEXT, id TEXT, headers TEXT,
    body BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE UNIQUE INDEX events_by_id ON events(place / 1099511627776, id) WHERE id IS NOT NULL;
CREATE TABLE groups(grp INTEGER PRIMARY KEY AUTOINCREMENT, topic INTEGER NOT NULL, name TEXT NOT NULL,
    cursor INTEGER NOT NULL, UNIQUE(topic, name));
CREATE TABLE owners(owner INTEGER PRIMARY KEY AUTOINCREMENT, grp INTEGER NOT NULL, session TEXT NOT NULL,
    expires REAL NOT NULL, most INTEGER NOT NULL, alone INTEGER NOT NULL, what TEXT NOT NULL);
CREATE TABLE pending(grp INTEGER, seq INTEGER, key TEXT, state INTEGER NOT NULL, owner INTEGER, due REAL NOT NULL,
    attempt INTEGER NOT NULL, suspect INTEGER NOT NULL, PRIMARY KEY(grp, seq)) WITHOUT ROWID;
CREATE INDEX pending_by_key ON pending(grp, key, seq) WHERE key IS NOT NULL;
CREATE INDEX pending_ready ON pending(grp, suspect, due, seq) WHERE state = 1;
CREATE INDEX pending_parked ON pending(grp, key, seq) WHERE state = 2;
CREATE TABLE dead(letter INTEGER PRIMARY KEY AUTOINCREMENT, grp INTEGER NOT NULL, seq INTEGER NOT NULL,
    attempts INTEGER NOT NULL, stage TEXT NOT NULL, reason TEXT NOT NULL, error TEXT NOT NULL, time INTEGER NOT NULL,
    UNIQUE(grp, seq));
CREATE TABLE states(grp INTEGER, stage TEXT, key TEXT, value BLOB NOT NULL, PRIMARY KEY(grp, stage, key)) WITHOUT ROWID;
"""


def connect(path: str, durability: str) -> Any:
    """Open the database at ``path``. ``durability``: "disk", "process" or "none" (in memory).

    Raises LogError for a database of something else, which is left as it is, and WriteFailed.
    """
    import apsw

    with reported(path):
        connection = apsw.Connection(path)
        try:
            connection.set_busy_timeout(10_000)
            if connection.pragma("application_id") != MARK:
                found = connection.execute("SELECT name FROM sqlite_schema LIMIT 1").get
                if found is not None:
                    reason = f"it is a database of something else (it holds {found!r})"
                    raise LogError(path, reason, "Give another path")
            synchronous = {"disk": "FULL", "process": "NORMAL", "none": "OFF"}[durability]
            connection.execute(
                "PRAGMA journal_mode = WAL; PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON; "
                f"PRAGMA synchronous = {synchronous}; PRAGMA journal_size_limit = 67108864; PRAGMA mmap_size = 0; "
                "PRAGMA cache_size = -65536; PRAGMA wal_autocheckpoint = 4000; PRAGMA temp_store = MEMORY"
            ).fetchall()  # or it would stop at the first statement that answers
        except BaseException:
            connection.close()
            raise
        return connection


def prepare(connection: Any, path: str) -> None:
    """Make the tables of a new file, check those of an old one, and end what belongs to an earlier boot.

    Raises LogError for one of a newer format. To be called with the lock held.
    """
    with reported(path):
        if connection.pragma("application_id") != MARK:
            connection.execute(
                "PRAGMA auto_vacuum = INCREMENTAL; VACUUM; "
                f"BEGIN IMMEDIATE; PRAGMA application_id = {MARK}; {_TABLES} "
                f"INSERT INTO meta VALUES ('format', {_FORMAT}); COMMIT"
            )
        version = connection.execute("SELECT value FROM meta WHERE name = 'format'").get
        if version is None or version > _FORMAT:
            raise LogError(
                path,
                f"a newer penstock wrote it (format {version}; this one reads up to {_FORMAT})",
                "Upgrade penstock",
            )
        if connection.execute("SELECT value FROM meta WHERE name = 'boot'").get != boot_id():
            with connection:
                connection.execute("UPDATE owners SET expires = -1")
                connection.execute(
                    "UPDATE pending SET due = coalesce((SELECT ? + (event.due - ?) / 1e6 FROM events AS event, groups "
                    f"WHERE groups.grp = pending.grp AND event.place = groups.topic * {SPAN} + pending.seq), 0)",
                    (boot_time(), calendar()),
                )
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('boot', ?)", (boot_id(),))


def unrecoverable(error: BaseException) -> bool:
    """Whether this connection must be closed and opened anew: the disk or the file failed under it."""
    import apsw

    return isinstance(error, (apsw.FullError, apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError))


@contextmanager
def reported(path: str, doing: str = "write") -> Iterator[None]:
    """Turn what SQLite raises into penstock's errors, which name the file. ``doing``: ``"read"`` or ``"write"``."""
    import apsw

    try:
        yield
    except (apsw.NotADBError, apsw.CorruptError, apsw.FormatError) as error:
        raise LogError(
            path,
            f"it is no intact log ({error})",
            "Restore it from a copy, or move it away; sqlite3's .recover reads what is left",
        ) from error
    except apsw.CantOpenError as error:
        folder = os.path.dirname(path) or "."
        hint = "the directory isn't there" if not os.path.isdir(folder) else str(error)
        raise LogError(path, f"it can't be opened: {hint}", "Give a path that can be written to") from error
    except apsw.Error as error:
        if doing == "write":
            raise WriteFailed(path, refusal(error)) from error
        raise LogError(path, f"it can't be read: {refusal(error)}", "Try again, or look who uses it") from error
