"""What a task came of: its origin, by which the accounts of a run know which source items it stands for.

- a position: the usual case, one output for one item;
- ``Family``: an output of a whole ``flat_map`` (or ``unbatch``);
- ``Child``: an output of ``flat_map(whole=False)``;
- ``Merged``: a list made by ``batch``;
- ``Stated``: any of these, after a ``map_state``;
- ``Passed``: any of these, after a ``take``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from penstock.flow.contract import Failed
from penstock.flow.progress import Intervals, Position
from penstock.place.base import Task

__all__ = [
    "FILTERED",
    "Child",
    "Family",
    "Lane",
    "Merged",
    "Passed",
    "Stated",
    "Stream",
    "family_of",
    "has_passed",
    "positions_of",
    "stated_of",
]

FILTERED = 0
"""The least of the fates that an item may have."""


class Family:
    """The outputs of one whole expansion, until the last of them has arrived or was dropped.

    ``pending``: outputs on their way; when there are none, the family is complete, and ends now or when it is written.
    ``admitted``: how many of those on their way passed each ``take``; ``passed``: how many that have ended did, which
    counts when the family ends. An expansion after a ``take`` is a family of its own, whose root is an output of this
    one: it counts as one here, and leaves its outputs and its counts here when it ends. ``made``: all outputs so far of
    the outermost family and of those within it. ``turns``: the families within it that are to end in their order.
    """

    __slots__ = (
        "admitted", "failed", "fate", "made", "outermost", "outputs", "passed", "pending", "root", "total", "turns"
    )  # fmt: skip

    def __init__(self, root: Any, total: int) -> None:
        self.root = root
        self.pending = total
        self.total = total
        outer = family_of(root)
        self.outermost: Family = self if outer is None else outer.outermost
        self.made = total
        self.outputs: list[Any] = []
        self.fate = FILTERED
        self.failed: Failed | None = None
        self.admitted: dict[int, int] = {}
        self.passed: dict[int, int] = {}
        self.turns: deque[Family] = deque()


class Stream:
    """One expansion whose outputs settle one by one: which of them have, and whether more will come."""

    __slots__ = ("cursor", "ended", "fate", "known", "live", "position", "root", "seen")

    def __init__(self, root: Any, position: Position, known: Intervals | None, fate: int) -> None:
        self.root = root
        self.position = position
        self.known = known
        self.cursor = 0
        self.seen = 0
        self.live = 0
        self.ended = False
        self.fate = fate

    def children(self, outputs: Sequence[Any]) -> list[Task]:
        """Tasks for those of the next outputs that aren't known from an earlier attempt or run."""
        tasks = []
        for output in outputs:
            index = self.cursor
            self.cursor += 1
            if index < self.seen or (self.known is not None and index in self.known):
                continue
            self.seen = index + 1
            self.live += 1
            tasks.append(Task(output, Child(self, index)))
        return tasks

    def again(self) -> None:
        """The expansion starts over: what it already gave is dropped."""
        self.cursor = 0


class Child:
    """One output of a Stream."""

    __slots__ = ("index", "stream")

    def __init__(self, stream: Stream, index: int) -> None:
        self.stream = stream
        self.index = index


class Merged:
    """A batch as one item: the origins of all its members."""

    __slots__ = ("members",)

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = members


class Lane:
    """The state of one key at one ``map_state``, and the items that have changed it and not settled, in their order.

    ``value``: after the last of them; ``packed``: the same as bytes. ``entries``: those that haven't left;
    ``unsettled``: those that have, before them. ``dirty``: it changed since the last commit. ``users``: chunks of items
    that are about to change it.
    """

    __slots__ = ("dirty", "entries", "key", "packed", "partition", "stage", "unsettled", "users", "value")

    def __init__(self, stage: str, partition: str, key: str, value: Any, packed: bytes) -> None:
        self.stage = stage
        self.partition = partition
        self.key = key
        self.value = value
        self.packed = packed
        self.entries: deque[Stated] = deque()
        self.unsettled: deque[Stated] = deque()
        self.dirty = False
        self.users = 0

    @property
    def is_at_rest(self) -> bool:
        """Whether it can be read again where it is kept."""
        return not (self.entries or self.unsettled or self.dirty or self.users)


class Stated:
    """An origin that has changed the state of a key: it leaves, and settles, after those that changed it before.

    ``packed``: the state after it. ``leave``: what is to be done with it once its turn has come. ``left``: it has.
    ``settle``: what settles it, once those before it are settled.
    """

    __slots__ = ("lane", "leave", "left", "origin", "packed", "settle")

    def __init__(self, origin: Any, lane: Lane, packed: bytes) -> None:
        self.origin = origin
        self.lane = lane
        self.packed = packed
        self.leave: Callable[[], None] | None = None
        self.left = False
        self.settle: Callable[[], None] | None = None


class Passed:
    """An origin that was counted by the ``take`` stage of this number."""

    __slots__ = ("number", "origin")

    def __init__(self, origin: Any, number: int) -> None:
        self.origin = origin
        self.number = number


def family_of(origin: Any) -> Family | None:
    """The family whose output this is, whatever ``take`` it passed."""
    while isinstance(origin, (Passed, Stated)):
        origin = origin.origin
    return origin if isinstance(origin, Family) else None


def stated_of(origin: Any) -> Stated | None:
    """What has changed a state and hasn't left, in this origin or in what was expanded into it."""
    while isinstance(origin, (Passed, Family, Stated)):
        if isinstance(origin, Stated) and not origin.left:
            return origin
        origin = origin.root if isinstance(origin, Family) else origin.origin
    return None


def has_passed(origin: Any, number: int) -> bool:
    """Whether what this came of has passed the ``take`` of this number."""
    while isinstance(origin, (Passed, Stated)):
        if isinstance(origin, Passed) and origin.number == number:
            return True
        origin = origin.origin
    if isinstance(origin, Merged):
        return any(has_passed(member, number) for member in origin.members)
    return isinstance(origin, Family) and has_passed(origin.root, number)


def positions_of(origin: Any) -> tuple[Position, ...]:
    """The source positions that an origin stands for."""
    if type(origin) is tuple:
        return (origin,)
    if isinstance(origin, Merged):
        return tuple(position for member in origin.members for position in positions_of(member))
    if isinstance(origin, (Passed, Stated)):
        return positions_of(origin.origin)
    if isinstance(origin, Child):
        return (origin.stream.position,)
    assert isinstance(origin, Family)
    return positions_of(origin.root)
