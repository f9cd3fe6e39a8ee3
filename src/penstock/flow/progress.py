"""What is settled: sets of positions as watermarks and intervals, and the progress of a job made of them.

A set of positions costs memory by its gaps, not by its members: items settle nearly in order, so a job over
10⁹ rows holds a few intervals a partition.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["IdIndex", "Intervals", "Known", "Position", "Positions", "Progress", "StateIndex"]

Position = tuple[str, int]
"""(partition, index): where a source item stands. The index counts 0, 1, 2 … within its partition (a file's path)."""


class Intervals:
    """A set of non-negative integers, held as sorted, disjoint, non-adjacent half-open intervals.

    >>> done = Intervals()
    >>> for index in (0, 1, 4, 2):
    ...     _ = done.add(index)
    >>> list(done)
    [(0, 3), (4, 5)]
    >>> 3 in done, len(done), done.watermark
    (False, 4, 3)
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self, ranges: list[tuple[int, int]] | None = None) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges or ():
            self.add_range(start, stop)

    def add(self, index: int) -> bool:
        """Add one member; False if it was there."""
        stops = self._stops
        if stops and stops[-1] == index:  # in order: the common case
            stops[-1] = index + 1
            return True
        if index in self:
            return False
        self.add_range(index, index + 1)
        return True

    def add_range(self, start: int, stop: int) -> None:
        """Add start … stop - 1."""
        if start >= stop:
            return
        starts, stops = self._starts, self._stops
        low = bisect_right(stops, start - 1)  # the first interval that touches [start, stop)
        high = bisect_right(starts, stop)  # one past the last that does
        if low < high:
            start = min(start, starts[low])
            stop = max(stop, stops[high - 1])
        starts[low:high] = [start]
        stops[low:high] = [stop]

    def update(self, other: Intervals) -> None:
        """Add every member of another set."""
        for start, stop in other:
            self.add_range(start, stop)

    def remove_range(self, start: int, stop: int) -> None:
        """Remove those of start … stop - 1 that are members."""
        starts, stops = self._starts, self._stops
        low = bisect_right(stops, start)  # the first interval that ends after start
        high = bisect_left(starts, stop)  # one past the last that begins before stop
        if low >= high or start >= stop:
            return
        before, after = starts[low], stops[high - 1]
        left = ([(before, start)] if before < start else []) + ([(stop, after)] if stop < after else [])
        starts[low:high] = [first for first, _ in left]
        stops[low:high] = [last for _, last in left]

    def __contains__(self, index: int) -> bool:
        at = bisect_right(self._starts, index) - 1
        return at >= 0 and index < self._stops[at]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervals) and self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # a mutable set

    def __repr__(self) -> str:
        return f"Intervals({list(iter(self))})"  # list(self) would make room for every member

    @property
    def watermark(self) -> int:
        """All of 0 … watermark - 1 are members."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0


class Positions:
    """A set of positions: Intervals by partition.

    >>> done = Positions()
    >>> done.add(("a.jsonl", 0)), done.add(("a.jsonl", 0)), done.add(("b.jsonl", 7))
    (True, False, True)
    >>> ("b.jsonl", 7) in done, len(done)
    (True, 2)
    """

    __slots__ = ("partitions",)

    def __init__(self, partitions: dict[str, Intervals] | None = None) -> None:
        self.partitions: dict[str, Intervals] = partitions if partitions is not None else {}

    def add(self, position: Position) -> bool:
        """Add one position; False if it was there."""
        partition, index = position
        intervals = self.partitions.get(partition)
        if intervals is None:
            intervals = self.partitions[partition] = Intervals()
        return intervals.add(index)

    def update(self, other: Positions) -> None:
        """Add every position of another set."""
        for partition, intervals in other.partitions.items():
            mine = self.partitions.get(partition)
            if mine is None:
                mine = self.partitions[partition] = Intervals()
            mine.update(intervals)

    def remove(self, other: Positions) -> None:
        """Remove every position of another set."""
        for partition, intervals in other.partitions.items():
            mine = self.partitions.get(partition)
            if mine is not None:
                for start, stop in intervals:
                    mine.remove_range(start, stop)
                if not mine:
                    del self.partitions[partition]

    def of(self, partition: str) -> Intervals:
        """The members of one partition; an empty set if it has none."""
        return self.partitions.get(partition) or Intervals()

    def __contains__(self, position: Position) -> bool:
        intervals = self.partitions.get(position[0])
        return intervals is not None and position[1] in intervals

    def __len__(self) -> int:
        return sum(len(intervals) for intervals in self.partitions.values())

    def __bool__(self) -> bool:
        return any(self.partitions.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Positions) and self.partitions == other.partitions

    __hash__ = None  # type: ignore[assignment]  # a mutable set

    def __repr__(self) -> str:
        return f"Positions({self.partitions})"


@dataclass(slots=True)
class Known:
    """What an earlier run committed of one item under ``id=``.

    ``key`` identifies the item: as asked for, or with an occurrence number if this run met the key before
    (``repeated``). ``done``: settled. Otherwise ``children`` are the outputs of an unfinished
    ``flat_map(whole=False)`` that are committed, and ``digest`` that of the row they came from.
    """

    key: str
    repeated: bool = False
    done: bool = False
    children: Intervals | None = None
    fate: int = 0
    digest: bytes | None = None


class IdIndex(Protocol):
    """The ids a job has settled, on disk, as its sink keeps them."""

    async def look_up(self, keys: list[str]) -> list[Known]:
        """What is known of each key, in order; remembers on disk that this run met them."""


class StateIndex(Protocol):
    """The states of keys that earlier commits left, as a sink keeps them."""

    async def load_states(self, stage: str, keys: list[str]) -> dict[str, bytes]:
        """Those that there are of a ``map_state``."""


@dataclass(slots=True)
class Progress:
    """What earlier runs of a job committed: the answer of ``Sink.open``.

    ``settled``: source positions. ``children``: for each source item whose ``flat_map(whole=False)`` was cut
    short, which of its outputs are committed, and in ``fates`` the best of their fates. ``taken``: items that passed
    each ``take`` stage, by the stage's number. ``counts``: delivered, filtered, skipped, dead so far. ``snapshot`` and
    ``plan``: what the source and the plan were like (for ``Source.read``: what the source was like when this run
    began, None in a run that keeps no progress). ``finished``: the source ended, and all that was in it is settled
    (what a ``take`` left isn't). ``ids``: the index under ``id=``, in which case ``settled`` and ``children`` stay
    empty. ``states``: where the states of ``map_state`` are, if they are kept.
    """

    settled: Positions = field(default_factory=Positions)
    children: dict[Position, Intervals] = field(default_factory=dict)
    fates: dict[Position, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    snapshot: Any = None
    plan: str | None = None
    finished: bool = False
    ids: IdIndex | None = None
    states: StateIndex | None = field(default=None, compare=False)

    def left(self, takes: dict[int, int]) -> dict[int, int]:
        """How many items each of these ``take`` stages may still let pass, both by the stage's number."""
        return {number: max(0, count - self.taken.get(number, 0)) for number, count in takes.items()}
