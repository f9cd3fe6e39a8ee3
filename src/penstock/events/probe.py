"""Whether a file is an event log: looked at without opening it as one, which would make it one."""

from __future__ import annotations

import os
from contextlib import closing

from penstock.events.schema import MARK

__all__ = ["is_log"]

_MAGIC = b"SQLite format 3\0"


def is_log(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is the file of an event log. Nothing is created; what isn't there or can't be read is none.

    Not for a log that this process has open: closing the file would take the locks away that SQLite holds on it.
    """
    name = os.fspath(path)
    try:
        if not os.path.isfile(name):
            return False
        with open(name, "rb") as file:
            head = file.read(100)
    except OSError:
        return False
    if len(head) < 100 or not head.startswith(_MAGIC):
        return False
    if int.from_bytes(head[68:72], "big") == MARK:
        return True
    try:  # a new log stands in the file beside it until that is folded in
        return os.path.getsize(f"{name}-wal") > 0 and _asked(name) == MARK
    except OSError:
        return False


def _asked(path: str) -> int:
    """What SQLite itself says, which reads the file beside it too; 0 if it can't."""
    import apsw

    try:
        with closing(apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)) as connection:
            return int(connection.pragma("application_id"))
    except apsw.Error:
        return 0
