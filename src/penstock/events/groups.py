"""What a group's readers do to its deliveries, each a step of a transaction: join, claim, acknowledge, give back, bury.

A reader is an *owner*: it has a lease, and the deliveries it holds are its own only while its row stands. When the
lease runs out, or its process is found to have ended, the row goes and what it held is given to others; whatever the
old owner then says of them has no effect, since they aren't its own any more. So an acknowledgement can't come too
late.

An attempt is counted when a delivery is claimed, and given back when it is released unused. Deliveries whose holder
died are *suspects*: each is claimed alone, so that an event that ends its process is found, and takes no others with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from penstock.errors import GroupInUse, LeaseLost
from penstock.events.clock import boot_time, calendar
from penstock.events.schema import HELD, PARKED, READY, SPAN
from penstock.events.transaction import Transaction, is_intact
from penstock.flow.progress import Intervals

__all__ = [
    "MOST_PARKED",
    "Claimed",
    "Letter",
    "Ranges",
    "Row",
    "acknowledge",
    "acknowledge_each",
    "bury",
    "claim",
    "extend",
    "is_held",
    "join",
    "leave",
    "release",
    "settle_earlier",
]

MOST_PARKED = 10_000
"""Deliveries of a group that may wait behind others of their key; then it reads on when some have been settled."""

_FREED = f"CASE WHEN key IS NULL THEN {READY} ELSE {PARKED} END"
Ranges = Sequence[tuple[int, int]]


class Row(NamedTuple):
    """A delivery as claimed. ``body`` is None where what is stored isn't what was published."""

    seq: int
    time: int
    key: str | None
    id: str | None
    headers: str | None
    body: bytes | None
    attempt: int
    suspect: bool


class Claimed(NamedTuple):
    """What was claimed; if nothing, when to look again: ``due``, by the time that delays run by, and ``lease_end``,
    when another owner's lease may end (``boot_time``). ``drained``: nothing is left to be done by anybody else."""

    rows: list[Row]
    due: float | None = None
    lease_end: float | None = None
    drained: bool = False


class Letter(NamedTuple):
    """Why a delivery is given up for good."""

    seq: int
    attempts: int
    stage: str
    reason: str
    error: str


def join(
    transaction: Transaction,
    group: tuple[int, int, str],
    session: str,
    lease: float,
    most: int,
    alone: bool,
    what: str,
    is_alive: Callable[[str], bool],
) -> int:
    """Become an owner of a group (its number, topic and name). ``most``: attempts; ``alone``: nobody else may be one.

    Raises GroupInUse if somebody else is one who mustn't be.
    """
    number, topic, name = group
    connection = transaction.connection
    _expire(transaction, number, topic, is_alive)
    for other, its in connection.execute("SELECT what, alone FROM owners WHERE grp = ?", (number,)):
        if alone or its:
            raise GroupInUse(name, other)
    connection.execute(
        "INSERT INTO owners(grp, session, expires, most, alone, what) VALUES (?, ?, ?, ?, ?, ?)",
        (number, session, boot_time() + lease, most, alone, what),
    )
    owner: int = connection.last_insert_rowid()
    return owner


def leave(transaction: Transaction, group: int, topic: int, owner: int) -> None:
    """Stop being an owner; what it still holds is given back, with its attempts."""
    seqs = [seq for (seq,) in transaction.connection.execute(
        f"SELECT seq FROM pending WHERE grp = ? AND state = {HELD} AND owner = ?", (group, owner)
    )]  # fmt: skip
    release(transaction, group, topic, owner, [(seq, 0.0, True) for seq in seqs])
    transaction.connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))


def _expire(transaction: Transaction, group: int, topic: int, is_alive: Callable[[str], bool] | None) -> float | None:
    """Take from owners whose lease is over, or whose process has ended; returns when the next lease ends."""
    connection = transaction.connection
    now = boot_time()
    next_end: float | None = None
    for owner, session, expires, most in connection.execute(
        "SELECT owner, session, expires, most FROM owners WHERE grp = ?", (group,)
    ).fetchall():
        if expires > now and (is_alive is None or is_alive(session)):
            next_end = expires if next_end is None else min(next_end, expires)
            continue
        held = connection.execute(
            f"SELECT seq, attempt, suspect FROM pending WHERE grp = ? AND state = {HELD} AND owner = ?", (group, owner)
        ).fetchall()
        poison = [(seq, attempt) for seq, attempt, suspect in held if suspect and attempt >= most]
        letters = [
            Letter(seq, attempt, "", "died", f"the process that held it ended, at attempt {attempt} of at most {most}")
            for seq, attempt in poison
        ]
        bury(transaction, group, topic, owner, letters)
        freed = connection.execute(
            f"UPDATE pending SET state = {_FREED}, owner = NULL, suspect = 1 WHERE grp = ? AND state = {HELD} "
            "AND owner = ? RETURNING key",
            (group, owner),
        ).fetchall()
        connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))
        _unpark(transaction, group, topic, freed, freed=True)
    return next_end


def claim(
    transaction: Transaction,
    group: tuple[int, int, str],
    owner: int,
    most: int,
    now: float,
    today: int,
    is_alive: Callable[[str], bool],
) -> Claimed:
    """Claim up to so many deliveries, in their order, or one suspect. ``now``: the time that delays run by, and
    ``today`` what the calendar shows then.

    Raises LeaseLost.
    """
    number, topic, name = group
    connection = transaction.connection
    lease_end = _expire(transaction, number, topic, None)  # of this owner, too
    if connection.execute("SELECT 1 FROM owners WHERE owner = ?", (owner,)).get is None:
        raise LeaseLost(name)
    rows = _ready(connection, number, topic, owner, 1, now, suspect=1)
    if not rows:
        rows = _ready(connection, number, topic, owner, most, now, suspect=0)
        if len(rows) < most:
            rows += _new(transaction, number, topic, owner, most - len(rows), now, today)
    if rows:
        return Claimed(rows)
    others = "SELECT count(*) FROM owners WHERE grp = ?"
    before = connection.execute(others, (number,)).get
    if before > 1:
        lease_end = _expire(transaction, number, topic, is_alive)
        if connection.execute(others, (number,)).get != before:  # there may be something now
            return claim(transaction, group, owner, most, now, today, is_alive)
    due = connection.execute(
        f"SELECT min(due) FROM pending WHERE grp = ? AND state = {READY} AND due > ?", (number, now)
    ).get
    drained = _is_drained(connection, number, topic, owner, today)
    return Claimed([], due, lease_end if before > 1 else None, drained)


_COLUMNS = "event.place, event.time, event.due, event.key, event.id, event.headers, event.body, event.crc"


def _row(found: tuple[Any, ...], attempt: int, suspect: bool) -> Row:
    place, time, _, key, name, headers, body, _ = found
    return Row(place % SPAN, time, key, name, headers, body if is_intact(found) else None, attempt, suspect)


def _ready(connection: Any, group: int, topic: int, owner: int, most: int, now: float, *, suspect: int) -> list[Row]:
    """Claim what is ready, and what waits right behind it for its key."""
    found = connection.execute(
        f"SELECT seq, key, attempt FROM pending WHERE grp = ? AND state = {READY} AND suspect = ? AND due <= ? "
        "ORDER BY seq LIMIT ?",
        (group, suspect, now, most),
    ).fetchall()
    if found and not suspect and len(found) < most:
        for key in {key for _, key, _ in found if key is not None}:
            if len(found) >= most:
                break
            found += connection.execute(
                f"SELECT seq, key, attempt FROM pending WHERE grp = ? AND key = ? AND state = {PARKED} AND due <= ? "
                "AND suspect = 0 AND seq < coalesce((SELECT min(seq) FROM pending AS late WHERE late.grp = pending.grp "
                f"AND late.key = pending.key AND late.state = {PARKED} AND (late.due > ? OR late.suspect)), {SPAN}) "
                "ORDER BY seq LIMIT ?",
                (group, key, now, now, most - len(found)),
            ).fetchall()
    found.sort()
    base = topic * SPAN
    rows = []
    for seq, _, attempt in found:
        connection.execute(
            f"UPDATE pending SET state = {HELD}, owner = ?, due = 0, attempt = attempt + 1 WHERE grp = ? AND seq = ?",
            (owner, group, seq),
        )
        event = connection.execute(f"SELECT {_COLUMNS} FROM events AS event WHERE place = ?", (base + seq,)).fetchone()
        rows.append(_row(event, attempt + 1, bool(suspect)))
    return rows


def _new(transaction: Transaction, group: int, topic: int, owner: int, most: int, now: float, today: int) -> list[Row]:
    """Read on from the cursor: claim what is free, park what waits for its key or its time."""
    connection = transaction.connection
    cursor: int = connection.execute("SELECT cursor FROM groups WHERE grp = ?", (group,)).get
    began = cursor
    base = topic * SPAN
    rows: list[Row] = []
    parked: int = connection.execute(f"SELECT count(*) FROM pending WHERE grp = ? AND state = {PARKED}", (group,)).get
    while len(rows) < most and parked < MOST_PARKED:
        found = connection.execute(
            f"SELECT {_COLUMNS} FROM events AS event WHERE place >= ? AND place < ? ORDER BY place LIMIT ?",
            (base + cursor, base + SPAN, most - len(rows)),
        ).fetchall()
        if not found:
            break
        following = found[-1][0] - base + 1
        if all(event[3] is None and event[2] is None for event in found):  # nothing waits, for its key or its time
            connection.execute(
                f"INSERT INTO pending SELECT ?, place - ?, NULL, {HELD}, ?, 0.0, 1, 0 FROM events "
                "WHERE place >= ? AND place < ?",
                (group, base, owner, base + cursor, base + following),
            )
            rows += [_row(event, 1, False) for event in found]
            cursor = following
            continue
        blocked = _blocked(connection, group, owner, found)
        pending: list[tuple[Any, ...]] = []
        for event in found:
            place, _, due, key, *_ = event
            seq = place - base
            starts = 0.0
            if due is not None and is_intact(event):
                starts = max(0.0, now + (due - today) / 1e6)
            if key is not None and key in blocked:
                parked += 1
                pending.append((group, seq, key, PARKED, None, starts, 0, 0))
            elif starts > now:
                pending.append((group, seq, key, READY, None, starts, 0, 0))
                if key is not None:
                    blocked.add(key)
            else:
                pending.append((group, seq, key, HELD, owner, 0.0, 1, 0))
                rows.append(_row(event, 1, False))
        cursor = following
        connection.executemany("INSERT INTO pending VALUES (?, ?, ?, ?, ?, ?, ?, ?)", pending)
    if cursor != began:
        connection.execute("UPDATE groups SET cursor = ? WHERE grp = ?", (cursor, group))
    return rows


def _blocked(connection: Any, group: int, owner: int, found: Iterable[tuple[Any, ...]]) -> set[str]:
    """The keys among these events that have a delivery which isn't this owner's own."""
    keys = {event[3] for event in found if event[3] is not None}
    if not keys:
        return set()
    theirs = "SELECT 1 FROM pending WHERE grp = ? AND key = ? AND owner IS NOT ? LIMIT 1"
    return {key for key in keys if connection.execute(theirs, (group, key, owner)).get is not None}


def _is_drained(connection: Any, group: int, topic: int, owner: int, today: int) -> bool:
    """Whether nothing is left to do for anybody but this owner, but what is published for later."""
    if connection.execute(
        "SELECT 1 FROM events, groups WHERE grp = ? AND place >= ? + cursor AND place < ? LIMIT 1",
        (group, topic * SPAN, (topic + 1) * SPAN),
    ).get:
        return False
    left = connection.execute(
        "SELECT 1 FROM pending JOIN events ON place = ? + seq WHERE grp = ? AND owner IS NOT ? "
        "AND (events.due IS NULL OR events.due <= ?) LIMIT 1",
        (topic * SPAN, group, owner, today),
    ).get
    return left is None


def extend(transaction: Transaction, owner: int, seconds: float) -> bool:
    """Let a lease last for so long from now at the least; whether it still does."""
    connection = transaction.connection
    connection.execute("UPDATE owners SET expires = max(expires, ?) WHERE owner = ?", (boot_time() + seconds, owner))
    return bool(connection.changes())


def settle_earlier(transaction: Transaction, group: int, topic: int, ranges: Ranges) -> None:
    """These were done with by a run that ended before it could say so; nobody holds them."""
    connection = transaction.connection
    gone: list[tuple[str | None]] = []
    for start, stop in ranges:
        gone += connection.execute(
            "DELETE FROM pending WHERE grp = ? AND seq >= ? AND seq < ? RETURNING key", (group, start, stop)
        ).fetchall()
    _unpark(transaction, group, topic, gone, freed=False)


def acknowledge(transaction: Transaction, group: int, topic: int, owner: int, ranges: Ranges) -> list[int]:
    """These deliveries are done with; returns the numbers of those that weren't this owner's own."""
    connection = transaction.connection
    refused: list[int] = []
    gone: list[tuple[str | None]] = []
    mine = f"FROM pending WHERE grp = ? AND seq >= ? AND seq < ? AND state = {HELD} AND owner = ?"
    for start, stop in ranges:
        given = (group, start, stop, owner)
        if stop - start > 1:  # most have no key that anything waits for, and then it is enough to count them
            whole = connection.execute(f"SELECT count(*), count(key) {mine}", given).fetchone()
            if whole == (stop - start, 0):
                connection.execute(f"DELETE {mine}", given)
                continue
        done = connection.execute(f"DELETE {mine} RETURNING key, seq", given).fetchall()
        gone += done
        if len(done) != stop - start:
            refused += sorted(set(range(start, stop)).difference(seq for _, seq in done))
    _unpark(transaction, group, topic, gone, freed=False)
    return refused


def acknowledge_each(transaction: Transaction, group: int, topic: int, owner: int, seqs: Sequence[int]) -> list[bool]:
    """``acknowledge`` for single deliveries; whether each wasn't this owner's own."""
    ranges = Intervals()
    for seq in sorted(seqs):
        ranges.add(seq)
    refused = acknowledge(transaction, group, topic, owner, list(ranges))
    return [seq in refused for seq in seqs] if refused else [False] * len(seqs)


def is_held(transaction: Transaction, group: int, seq: int, owner: int) -> bool:
    """Whether a delivery is this owner's own."""
    query = f"SELECT 1 FROM pending WHERE grp = ? AND seq = ? AND state = {HELD} AND owner = ?"
    return transaction.connection.execute(query, (group, seq, owner)).get is not None


def release(
    transaction: Transaction, group: int, topic: int, owner: int, given: Iterable[tuple[int, float, bool]]
) -> list[int]:
    """Give back (number, from when on, whether unused); returns those that weren't this owner's own."""
    connection = transaction.connection
    refused = []
    freed: list[tuple[str | None]] = []
    for seq, due, unused in given:
        found = connection.execute(
            f"UPDATE pending SET state = {_FREED}, owner = NULL, due = ?, attempt = attempt - ? "
            f"WHERE grp = ? AND seq = ? AND state = {HELD} AND owner = ? RETURNING key",
            (due, unused, group, seq, owner),
        ).fetchone()
        if found is None:
            refused.append(seq)
        else:
            freed.append(found)
    _unpark(transaction, group, topic, freed, freed=True)
    return refused


def bury(transaction: Transaction, group: int, topic: int, owner: int, letters: Iterable[Letter]) -> list[int]:
    """Give up for good: they go to the dead letters; returns the numbers of those that weren't this owner's own."""
    connection = transaction.connection
    refused = []
    gone: list[tuple[str | None]] = []
    for letter in letters:
        found = connection.execute(
            f"DELETE FROM pending WHERE grp = ? AND seq = ? AND state = {HELD} AND owner = ? RETURNING key",
            (group, letter.seq, owner),
        ).fetchone()
        if found is None:
            refused.append(letter.seq)
            continue
        gone.append(found)
        connection.execute(
            "INSERT OR REPLACE INTO dead(grp, seq, attempts, stage, reason, error, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (group, letter.seq, letter.attempts, letter.stage, letter.reason, letter.error, calendar()),
        )
    _unpark(transaction, group, topic, gone, freed=False)
    return refused


def _unpark(
    transaction: Transaction, group: int, topic: int, gone: Iterable[tuple[str | None, ...]], *, freed: bool
) -> None:
    """Deliveries with these keys (first in each tuple) were settled, or ``freed``: what waits behind nothing is
    ready."""
    connection = transaction.connection
    keys = {one[0] for one in gone}
    changed = freed and None in keys
    if connection.execute(f"SELECT 1 FROM pending WHERE grp = ? AND state = {PARKED} LIMIT 1", (group,)).get:
        for key in keys:
            if key is not None:
                connection.execute(
                    f"UPDATE pending SET state = {READY} WHERE grp = ? AND seq = (SELECT min(seq) FROM pending "
                    f"WHERE grp = ? AND key = ?) AND state = {PARKED}",
                    (group, group, key),
                )
                changed = changed or bool(connection.changes())
    if changed or (not freed and _is_last(connection, group)):
        transaction.changed.add(topic)


def _is_last(connection: Any, group: int) -> bool:
    """Whether nothing is left in hand, which other readers may wait for."""
    if connection.execute("SELECT 1 FROM pending WHERE grp = ? LIMIT 1", (group,)).get:
        return False
    return bool(connection.execute("SELECT count(*) > 1 FROM owners WHERE grp = ?", (group,)).get)
