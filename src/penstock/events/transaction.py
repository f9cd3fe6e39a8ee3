"""One transaction of a log: what all that is done in it shares, and how events are appended.

Events of all requests gather here and are inserted together, right before the commit or before anything looks at them.
A topic's next number, its last time and its size are read once and written once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

from penstock.events.clock import calendar
from penstock.events.schema import SPAN

__all__ = ["Appended", "Transaction", "is_intact"]


class Appended(NamedTuple):
    """One event to be appended. ``due``: microseconds since 1970, or None for at once."""

    body: bytes
    key: str | None = None
    id: str | None = None
    headers: str | None = None
    due: int | None = None


_numbers = struct.Struct("<qqq").pack


def _checksum(place: int, time: int, due: int | None, key: str | None, id: str | None, headers: str | None) -> int:
    """Of all of an event but its body, to be continued with that."""
    crc = crc32(_numbers(place, time, -1 if due is None else due))
    if key is None and id is None and headers is None:
        return crc
    return crc32(f"{key!a} {id!a} {headers!a}".encode(), crc)  # ASCII: what repr escapes depends on Python's version


def is_intact(stored: Sequence[Any]) -> bool:
    """Whether an event (place, time, due, key, id, headers, body, crc) is what was published: a bit that was flipped
    may change a value or its type."""
    place, time, due, key, name, headers, body, crc = stored
    try:
        if key is None and name is None and headers is None and due is None:  # as _checksum: for most, and quicker
            return bool(crc32(body, crc32(_numbers(place, time, -1))) == crc)
        return bool(crc32(body, _checksum(place, time, due, key, name, headers)) == crc)
    except (struct.error, TypeError):
        return False


class _Head:
    """Where a topic goes on."""

    __slots__ = ("bytes", "next", "time")

    def __init__(self, next: int, time: int, bytes: int) -> None:
        self.next = next
        self.time = time
        self.bytes = bytes


_COLUMNS = 8
_AT_ONCE = tuple(
    (rows * _COLUMNS, f"INSERT INTO events VALUES {', '.join(['(?, ?, ?, ?, ?, ?, ?, ?)'] * rows)}")
    for rows in (256, 64, 16, 4, 1)
)


def _insert(connection: Any, values: list[Any]) -> None:
    """Insert events by few statements: after each, the interpreter's lock must be waited for."""
    at = 0
    for count, statement in _AT_ONCE:
        while len(values) - at >= count:
            connection.execute(statement, values[at : at + count])
            at += count


class Transaction:
    """``connection`` is in a transaction. ``changed``: topics with something new to deliver."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._heads: dict[int, _Head] = {}
        self._values: list[Any] = []  # of the rows to be inserted, one after the other
        self._ids: dict[tuple[int, str], int] = {}
        self.changed: set[int] = set()
        self._now = 0

    @property
    def connection(self) -> Any:
        """To look at or change what is there, the events appended so far included."""
        self.flush()
        return self._connection

    def append(self, topic: int, events: list[Appended]) -> list[int]:
        """Append to a topic; the numbers the events have got. One whose ``id`` is there already isn't appended
        again."""
        head = self._heads.get(topic)
        if head is None:
            head = self._heads[topic] = self._head(topic)
        now = self._now = self._now or calendar()
        head.time = time = max(head.time, now)
        seq, size = head.next, head.bytes
        base = topic * SPAN
        numbers = []
        values = self._values
        for body, key, name, headers, due in events:
            if name is not None:
                if (known := self._known(topic, name)) is not None:
                    numbers.append(known)
                    continue
                self._ids[topic, name] = seq
            place = base + seq
            if key is None and name is None and headers is None and due is None:
                crc = crc32(body, crc32(_numbers(place, time, -1)))  # as _checksum: for most, and quicker
            else:
                crc = crc32(body, _checksum(place, time, due, key, name, headers))
            values += (place, time, due, key, name, headers, body, crc)
            numbers.append(seq)
            size += len(body)
            seq += 1
        if seq != head.next:
            head.next, head.bytes = seq, size
            self.changed.add(topic)
        return numbers

    def _head(self, topic: int) -> _Head:
        row = self._connection.execute("SELECT next, time, bytes FROM topics WHERE topic = ?", (topic,)).fetchone()
        return _Head(*row)

    def _known(self, topic: int, id: str) -> int | None:
        """The number of the event with this id, if it is still there."""
        found = self._ids.get((topic, id))
        if found is None:
            place = self._connection.execute(
                f"SELECT place FROM events WHERE place / {SPAN} = ? AND id = ?", (topic, id)
            ).get
            found = None if place is None else place % SPAN
        return found

    def flush(self) -> None:
        """Insert what was appended."""
        if self._values:
            values, self._values = self._values, []
            _insert(self._connection, values)
        for topic, head in self._heads.items():
            self._connection.execute(
                "UPDATE topics SET next = ?, time = ?, bytes = ? WHERE topic = ?",
                (head.next, head.time, head.bytes, topic),
            )
        self._heads.clear()
        self._ids.clear()
