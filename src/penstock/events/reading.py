"""What is only looked at, or tidied: topics, groups, events by position and time, dead letters, trimming."""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock.errors import PlanError
from penstock.events.groups import settle_earlier
from penstock.events.schema import READY, SPAN
from penstock.events.transaction import Transaction, is_intact

__all__ = [
    "GroupInfo",
    "Stored",
    "TopicInfo",
    "find_topic",
    "forget_group",
    "groups_of",
    "letters",
    "open_group",
    "open_topic",
    "requeue",
    "seek",
    "stored",
    "topics",
    "trim",
]


class TopicInfo(NamedTuple):
    """A topic as it stands: ``events`` from position ``first`` up to but not including ``next``; ``bytes`` of
    payload."""

    name: str
    events: int
    first: int
    next: int
    bytes: int
    groups: int
    dead: int


class GroupInfo(NamedTuple):
    """A group as it stands. ``behind``: events it hasn't read; ``held``: in hand; ``waiting``: to be delivered again,
    or later, or behind another of their key; ``dead``: its dead letters; ``readers``: who reads it now."""

    name: str
    behind: int
    held: int
    waiting: int
    dead: int
    readers: int


class Stored(NamedTuple):
    """An event as it is stored; ``body`` is None where that isn't what was published."""

    seq: int
    time: int
    key: str | None
    id: str | None
    headers: str | None
    body: bytes | None


def open_topic(transaction: Transaction, name: str) -> int:
    """The number of a topic, which is created if it isn't there."""
    connection = transaction.connection
    found: int | None = connection.execute("SELECT topic FROM topics WHERE name = ?", (name,)).get
    if found is None:
        connection.execute("INSERT INTO topics(name, first, next, time, bytes) VALUES (?, 0, 0, 0, 0)", (name,))
        found = connection.last_insert_rowid()
    return found


def find_topic(connection: Any, name: str) -> int | None:
    """The number of a topic, if it is there."""
    found: int | None = connection.execute("SELECT topic FROM topics WHERE name = ?", (name,)).get
    return found


def open_group(transaction: Transaction, topic: int, name: str, start: int | str) -> int:
    """The number of a group. A new one begins at ``start``: a position, "earliest" or "latest"."""
    connection = transaction.connection
    found: int | None = connection.execute("SELECT grp FROM groups WHERE topic = ? AND name = ?", (topic, name)).get
    if found is None:
        first, following = connection.execute("SELECT first, next FROM topics WHERE topic = ?", (topic,)).fetchone()
        at = {"earliest": first, "latest": following}.get(start, start) if isinstance(start, str) else start
        if not isinstance(at, int):
            raise PlanError(f"start={start!r}", 'Give "earliest", "latest" or a position')
        connection.execute(
            "INSERT INTO groups(topic, name, cursor) VALUES (?, ?, ?)", (topic, name, max(first, min(at, following)))
        )
        found = connection.last_insert_rowid()
    return found


def forget_group(transaction: Transaction, topic: int, name: str) -> bool:
    """Remove a group with all it has; whether there was one."""
    connection = transaction.connection
    group = connection.execute("SELECT grp FROM groups WHERE topic = ? AND name = ?", (topic, name)).get
    if group is None:
        return False
    for table in ("pending", "dead", "states", "owners", "groups"):
        connection.execute(f"DELETE FROM {table} WHERE grp = ?", (group,))
    return True


def topics(connection: Any) -> list[TopicInfo]:
    """All topics, by name."""
    rows = connection.execute(
        "SELECT name, next - first, first, next, bytes, "
        "(SELECT count(*) FROM groups WHERE groups.topic = topics.topic), "
        "(SELECT count(*) FROM dead JOIN groups USING (grp) WHERE groups.topic = topics.topic) "
        "FROM topics ORDER BY name"
    )
    return [TopicInfo(*row) for row in rows]


def groups_of(connection: Any, topic: int) -> list[GroupInfo]:
    """The groups of a topic, by name."""
    rows = connection.execute(
        "SELECT groups.name, next - cursor, "
        "(SELECT count(*) FROM pending WHERE grp = groups.grp AND state = 0), "
        "(SELECT count(*) FROM pending WHERE grp = groups.grp AND state != 0), "
        "(SELECT count(*) FROM dead WHERE grp = groups.grp), "
        "(SELECT count(*) FROM owners WHERE grp = groups.grp) "
        "FROM groups JOIN topics USING (topic) WHERE topic = ? ORDER BY groups.name",
        (topic,),
    )
    return [GroupInfo(*row) for row in rows]


_COLUMNS = "place, time, due, key, id, headers, body, crc"


def _stored(row: tuple[Any, ...]) -> Stored:
    place, time, _, key, name, headers, body, _ = row
    return Stored(place % SPAN, time, key, name, headers, body if is_intact(row) else None)


def stored(connection: Any, topic: int, start: int, most: int) -> list[Stored]:
    """Up to so many events from a position on."""
    base = topic * SPAN
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM events WHERE place >= ? AND place < ? ORDER BY place LIMIT ?",
        (base + start, base + SPAN, most),
    )
    return [_stored(row) for row in rows]


def seek(connection: Any, topic: int, time: int) -> int:
    """The position of the first event that isn't older than ``time``. The times of a topic never fall."""
    low, high = connection.execute("SELECT first, next FROM topics WHERE topic = ?", (topic,)).fetchone()
    base = topic * SPAN
    while low < high:
        middle = (low + high) // 2
        found = connection.execute(
            "SELECT place, time FROM events WHERE place >= ? AND place < ? ORDER BY place LIMIT 1",
            (base + middle, base + high),
        ).fetchone()
        if found is None or found[1] >= time:
            high = middle
        else:
            low = found[0] - base + 1
    return int(low)


def letters(
    connection: Any, topic: int, group: str | None, after: int, most: int
) -> list[tuple[int, str, int, str, str, str, int, Stored]]:
    """Dead letters of a topic, or of one of its groups, by number from ``after`` on."""
    rows = connection.execute(
        "SELECT letter, groups.name, attempts, stage, reason, error, dead.time, "
        "place, events.time, due, key, id, headers, body, crc "
        f"FROM dead JOIN groups USING (grp) JOIN events ON place = groups.topic * {SPAN} + seq "
        "WHERE topic = ? AND (? IS NULL OR groups.name = ?) AND letter > ? ORDER BY letter LIMIT ?",
        (topic, group, group, after, most),
    )
    return [(*row[:7], _stored(row[7:])) for row in rows]


def requeue(transaction: Transaction, topic: int, group: str | None, positions: list[int] | None) -> int:
    """Deliver dead letters again, as new attempts and without their place in the order; how many there were."""
    connection = transaction.connection
    found = connection.execute(
        "SELECT letter, grp, seq FROM dead JOIN groups USING (grp) WHERE topic = ? AND (? IS NULL OR groups.name = ?)",
        (topic, group, group),
    ).fetchall()
    chosen = [row for row in found if positions is None or row[2] in set(positions)]
    for letter, number, seq in chosen:
        # Without its key: it is behind nothing and blocks nothing, since its place in the order is gone.
        connection.execute(f"INSERT INTO pending VALUES (?, ?, NULL, {READY}, NULL, 0, 0, 0)", (number, seq))
        connection.execute("DELETE FROM dead WHERE letter = ?", (letter,))
    if chosen:
        transaction.changed.add(topic)
    return len(chosen)


def trim(
    transaction: Transaction,
    topic: int,
    before: int | None,
    keep: int | None,
    most_bytes: int | None,
    force: bool,
) -> int:
    """Remove the oldest events; how many. ``before``: a position; ``keep``: so many events; ``most_bytes``: so
    much payload. Never what a group still needs, or a dead letter, unless ``force``."""
    connection = transaction.connection
    first, following, size = connection.execute(
        "SELECT first, next, bytes FROM topics WHERE topic = ?", (topic,)
    ).fetchone()
    base = topic * SPAN
    goal = first
    if before is not None:
        goal = max(goal, before)
    if keep is not None:
        goal = max(goal, following - keep)
    if most_bytes is not None and size > most_bytes:
        left = size
        for place, length in connection.execute(
            "SELECT place, length(body) FROM events WHERE place >= ? AND place < ? ORDER BY place",
            (base + first, base + following),
        ):
            if left <= most_bytes:
                break
            left -= length
            goal = max(goal, place - base + 1)
    goal = min(goal, following)
    if not force:
        for query in (
            "SELECT min(cursor) FROM groups WHERE topic = ?",
            "SELECT min(seq) FROM pending JOIN groups USING (grp) WHERE topic = ?",
            "SELECT min(seq) FROM dead JOIN groups USING (grp) WHERE topic = ?",
        ):
            needed = connection.execute(query, (topic,)).get
            goal = goal if needed is None else min(goal, needed)
    if goal <= first:
        return 0
    gone = connection.execute(
        "SELECT coalesce(sum(length(body)), 0) FROM events WHERE place >= ? AND place < ?", (base + first, base + goal)
    ).get
    connection.execute("DELETE FROM events WHERE place >= ? AND place < ?", (base + first, base + goal))
    connection.execute("UPDATE topics SET first = ?, bytes = bytes - ? WHERE topic = ?", (goal, gone, topic))
    if force:
        connection.execute("UPDATE groups SET cursor = max(cursor, ?) WHERE topic = ?", (goal, topic))
        for (group,) in connection.execute("SELECT grp FROM groups WHERE topic = ?", (topic,)).fetchall():
            settle_earlier(transaction, group, topic, [(0, goal)])
            connection.execute("DELETE FROM dead WHERE seq < ? AND grp = ?", (goal, group))
    connection.execute("PRAGMA incremental_vacuum").fetchall()
    return int(goal - first)
