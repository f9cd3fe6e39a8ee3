"""The accounts of a run: where each source item is, and what the next commit has to say about it.

A source item is *issued* when it enters the first channel and settles exactly once, as delivered, filtered, skipped or
dead; what is left when the run ends is released. Law 1 holds at every moment, because ``open`` is counted by itself
and not derived.

What a task came of is its *origin* (``penstock.flow.origin``). The outputs of a whole expansion wait here until the
last of them arrived or was dropped; then the item goes to the sink with all of them, or dies with none. An output of
``flat_map(whole=False)`` is settled by itself.

One fate per source item: dead > delivered > skipped > filtered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace

from penstock.flow.contract import Delta, Failed
from penstock.flow.origin import (
    FILTERED,
    Child,
    Family,
    Lane,
    Passed,
    Stated,
    Stream,
    family_of,
    has_passed,
    positions_of,
    stated_of,
)
from penstock.flow.progress import Intervals, Position, Positions
from penstock.flow.redact import redact
from penstock.place.base import Task

__all__ = ["DEAD", "DELIVERED", "FATES", "SKIPPED", "Ledger"]

SKIPPED, DELIVERED, DEAD = range(FILTERED + 1, FILTERED + 4)
FATES = ("filtered", "skipped", "delivered", "dead")


class Ledger:
    """``holds``: outputs of a family wait for each other (a sink commits them together). ``commits``: settled
    positions are collected for the sink. ``keeps_items``: the source's items are kept for the dead letters.
    ``in_turn``: families end in the order they began, for a stage within them that keeps the order of each key."""

    def __init__(self, *, holds: bool, commits: bool, keeps_items: bool, in_turn: bool = False) -> None:
        self.holds = holds
        self.in_turn = in_turn and holds
        self._turns: deque[Family] = deque()
        self.commits = commits
        self.keeps_items = keeps_items
        self.issued = 0
        self.open = 0
        self.left = 0
        self.released = 0
        self.retried = 0
        self.fates = [0, 0, 0, 0]
        self.expanded = 0
        self.paused = False
        self.delta = Delta()
        self.uncommitted = 0
        self._others: dict[Position, int] = {}  # what is settled in the delta and wasn't delivered, with its fate
        self._committing: dict[Position, int] = {}
        self.entries: list[tuple[Any, Sequence[Any]]] = []
        self.unfinished = Positions()  # issued, and not settled and committed: few, however many there were
        self.items: dict[Position, Any] = {}
        self.keys: dict[Position, str] = {}
        self.digests: dict[Position, bytes] = {}
        self.known: dict[Position, tuple[Intervals, int]] = {}
        self.lanes: dict[tuple[str, str, str], Lane] = {}
        self.forgets = False  # states are kept by the sink: what is committed and at rest can be read again
        self.changed: Callable[[], None] = lambda: None
        self.freed: Callable[[], None] = lambda: None
        self.on_left: Callable[[], None] | None = None  # set while somebody waits for it: settling is nobody's call

    @property
    def ahead(self) -> int:
        """Items that were issued and are still on their way: not handed over, not written, not given up."""
        return self.issued - self.left

    # -- items come in ----------------------------------------------------------------------------------------------

    def issue(self, tasks: Sequence[Task]) -> None:
        """These items enter the first channel."""
        self.issued += len(tasks)
        self.open += len(tasks)
        if self.commits:
            _add_all(self.unfinished, [task.origin for task in tasks])
        if self.keeps_items:
            for task in tasks:
                self.items[task.origin] = task.value

    # -- items become many, or one ----------------------------------------------------------------------------------

    def fits(self, origin: Any, count: int, bound: int) -> bool:
        """Whether ``count`` outputs more of this item stay within the bound; if so, they count from now on."""
        family = family_of(origin)
        if family is None:
            return count <= bound
        if family.outermost.made + count > bound:
            return False
        family.outermost.made += count
        return True

    def expand(self, origin: Any, count: int) -> Any:
        """An item became ``count`` outputs; returns the origin they share. None left: it is filtered."""
        if isinstance(origin, Family):  # an expansion within an expansion: one family still
            origin.pending += count - 1
            origin.total += count
            self.expanded += count
            if not count and not origin.pending:
                self._complete(origin)
            return origin
        family = Family(origin, count)
        self.expanded += count
        if not count:
            self._complete(family)
        elif self.in_turn:
            self._turns_of(family).append(family)
        return family

    def _turns_of(self, family: Family) -> deque[Family]:
        outer = family_of(family.root)
        return self._turns if outer is None else outer.turns

    def admit(self, task: Task, number: int) -> list[Family]:
        """The ``take`` of this number lets a task pass; returns the families that it is the first of, inner first."""
        families = []
        family = family_of(task.origin)
        while family is not None:
            first = number not in family.admitted
            family.admitted[number] = family.admitted.get(number, 0) + 1
            if not first:
                break
            families.append(family)
            family = family_of(family.root)
        task.origin = Passed(task.origin, number)
        return families

    def cut(self, families: Iterable[Family], number: int) -> None:
        """The ``take`` of this number lets no more pass: these families are complete with those it admitted."""
        self._turns = self._still_to_come(self._turns, number)
        for family in families:
            if family.pending:
                family.pending = min(family.pending, family.admitted[number])  # a later take may have cut it before
                if not family.pending:
                    self._complete(family)
        self._take_turns(self._turns)

    def _still_to_come(self, turns: deque[Family], number: int) -> deque[Family]:
        """Without the families that this ``take`` has cut off: nobody is to wait for them."""
        left: deque[Family] = deque()
        for family in turns:
            if not family.pending or number in family.admitted or has_passed(family.root, number):
                family.turns = self._still_to_come(family.turns, number)
                left.append(family)
        return left

    def stream(self, origin: Any) -> Stream:
        """An item starts to be expanded one by one."""
        position = positions_of(origin)[0]
        known, fate = self.known.pop(position, (None, FILTERED))
        return Stream(origin, position, known, fate)

    def stream_ended(self, stream: Stream, failed: Failed | None = None, fate: int = FILTERED) -> None:
        """No more outputs will come of this item."""
        stream.ended = True
        self._worsen(stream, fate, failed)
        if not stream.live:
            self._end_stream(stream)

    # -- items settle -----------------------------------------------------------------------------------------------

    def settle(self, origin: Any, fate: int, failed: Failed | None = None) -> None:
        """Nothing more will come of this origin; ``failed`` goes with DEAD."""
        if type(origin) is tuple:
            self._settle_position(origin, fate, failed)
        elif isinstance(origin, Passed):
            number, family = origin.number, family_of(origin)
            counts = self.delta.taken if family is None else family.passed
            counts[number] = counts.get(number, 0) + 1
            if family is not None:
                family.admitted[number] -= 1
            self.settle(origin.origin, fate, failed)
        elif isinstance(origin, Stated):
            if origin.left:
                self._settle_stated(origin, lambda: self.settle(origin.origin, fate, failed))
            else:
                self._in_its_turn(origin, lambda: self.settle(origin, fate, failed))
        elif isinstance(origin, Family):
            if not origin.pending:  # complete, and written or refused by now
                self._end_family(origin, fate, failed)
                return
            if fate == DEAD:
                origin.failed = origin.failed or failed
            origin.fate = max(origin.fate, fate)
            origin.pending -= 1
            if not origin.pending:
                self._complete(origin)
        elif isinstance(origin, Child):
            self._settle_child(origin, fate, failed)
        else:
            for member in origin.members:
                self.settle(member, fate, failed)

    def arrive(self, tasks: Iterable[Task]) -> None:
        """These outputs reached the end; what is complete is added to ``entries``, to be written."""
        entries = self.entries
        for task in tasks:
            origin = task.origin
            if type(origin) is tuple:
                entries.append((origin, (task.value,)))
                continue
            family = family_of(origin)
            if family is not None and self.holds:
                family.outputs.append(task.value)
                self.settle(origin, DELIVERED)
            else:
                self._enter(origin, (task.value,))

    def _enter(self, origin: Any, values: Sequence[Any]) -> None:
        """These outputs are to be written, after those that changed the same state before."""
        stated = stated_of(origin)
        if stated is None:
            self.entries.append((origin, values))
        else:
            self._in_its_turn(stated, lambda: self._enter(origin, values))

    def _in_its_turn(self, stated: Stated, leave: Callable[[], None]) -> None:
        """Leave once all that changed the same state before have left."""
        stated.leave = leave
        lane = stated.lane
        while lane.entries and lane.entries[0].leave is not None:
            first = lane.entries.popleft()
            first.left, doing, first.leave = True, first.leave, None
            lane.unsettled.append(first)
            if doing is not None:
                doing()
        self.changed()

    def _settle_stated(self, stated: Stated, settle: Callable[[], None]) -> None:
        """Settle once all that changed the same state before are settled; the state after it counts with it."""
        stated.settle = settle
        lane = stated.lane
        while lane.unsettled and (doing := lane.unsettled[0].settle) is not None:
            first = lane.unsettled.popleft()
            lane.dirty = True
            self.delta.states[lane.stage, lane.partition, lane.key] = first.packed
            doing()

    def delivered(self, entries: Sequence[tuple[Any, Sequence[Any]]]) -> None:
        """These entries were written (or handed to the caller)."""
        positions = [origin for origin, _ in entries if type(origin) is tuple]
        if positions and len(positions) == len(entries):
            self._deliver(positions)
            return
        for origin, _ in entries:
            self.settle(origin, DELIVERED)

    @contextmanager
    def as_committed(self) -> Iterator[None]:
        """Counts as they will be when the next commit counts, and it is the last."""
        before = self.fates, self.open, self.released
        self.fates = [self.fates[fate] + self.delta.counts.get(name, 0) for fate, name in enumerate(FATES)]
        self.released = self.open - sum(self.fates) + sum(before[0])
        self.open = 0
        try:
            yield
        finally:
            self.fates, self.open, self.released = before

    def deliver_plain(self, count: int) -> None:
        """``count`` single items were handed to the caller, and nobody keeps their positions."""
        self.fates[DELIVERED] += count
        self.open -= count
        self._leave(count)

    def withdraw(self, count: int) -> None:
        """``count`` items were taken back before anything was done with them."""
        self.released += count
        self.open -= count
        self._leave(count)

    def _leave(self, count: int) -> None:
        self.left += count
        if self.on_left is not None:
            self.on_left()

    def _complete(self, family: Family) -> None:
        """The last output of a family arrived or was dropped."""
        turns = self._turns_of(family)
        if family in turns:
            self._take_turns(turns)
        else:
            self._finish(family)

    def _take_turns(self, turns: deque[Family]) -> None:
        while turns and not turns[0].pending:
            self._finish(turns.popleft())

    def _finish(self, family: Family) -> None:
        self.expanded -= family.total
        outer = family_of(family.root)
        if outer is None and family.fate == DELIVERED and self.holds:
            self._enter(family, family.outputs)
            self.changed()
        else:
            if outer is not None and family.fate == DELIVERED:
                outer.outputs += family.outputs
            self._end_family(family, family.fate, family.failed)
        self.freed()

    def _end_family(self, family: Family, fate: int, failed: Failed | None) -> None:
        outer = family_of(family.root)
        counts = self.delta.taken if outer is None else outer.passed
        for number, count in family.passed.items():
            counts[number] = counts.get(number, 0) + count
        if outer is not None:
            for number in family.admitted:
                outer.admitted[number] -= 1
        self.settle(family.root, fate, failed)

    def _settle_child(self, child: Child, fate: int, failed: Failed | None) -> None:
        stream = child.stream
        stream.live -= 1
        self._worsen(stream, fate, failed)
        if self.commits:
            children = self.delta.children.setdefault(stream.position, Intervals())
            children.add(child.index)
            self.delta.fates[stream.position] = stream.fate
            self.uncommitted += 1
            key = self.keys.get(stream.position)
            if key is not None:
                self.delta.keys[stream.position] = key
                self.delta.digests[key] = self.digests[stream.position]
        if stream.ended and not stream.live:
            self._end_stream(stream)
        else:
            self.changed()

    def _end_stream(self, stream: Stream) -> None:
        self.delta.children.pop(stream.position, None)
        self.delta.fates.pop(stream.position, None)
        self.settle(stream.root, stream.fate)

    def _worsen(self, stream: Stream, fate: int, failed: Failed | None) -> None:
        """The first death is told to the sink together with the fate: a later run knows of it only from there."""
        if failed is not None and stream.fate < DEAD and self.commits:
            for position in positions_of(stream.root):
                self._letter(position, self.items.get(position), failed)
                if position in self.keys:
                    self.delta.keys[position] = self.keys[position]
            self.delta.fates[stream.position] = fate
        stream.fate = max(stream.fate, fate)

    def _letter(self, position: Position, item: Any, failed: Failed) -> None:
        self.delta.dead.append(replace(failed, item=redact(item), position=position))

    def _deliver(self, positions: list[Position]) -> None:
        """``_settle_position`` for many that are delivered."""
        count = len(positions)
        for kept in (self.items, self.digests):
            if kept:
                for position in positions:
                    kept.pop(position, None)
        if not self.commits:
            self.deliver_plain(count)
            return
        delta = self.delta
        if self.keys:
            delta.keys.update((position, self.keys.pop(position)) for position in positions if position in self.keys)
        self.uncommitted += count
        name = FATES[DELIVERED]
        delta.counts[name] = delta.counts.get(name, 0) + count
        _add_all(delta.settled, positions)
        self._leave(count)
        self.changed()

    def _settle_position(self, position: Position, fate: int, failed: Failed | None) -> None:
        item = self.items.pop(position, None)
        self._leave(1)
        if not self.commits:
            self.open -= 1
            self.fates[fate] += 1
            return
        delta = self.delta
        self.uncommitted += 1
        name = FATES[fate]
        delta.counts[name] = delta.counts.get(name, 0) + 1
        delta.settled.add(position)
        if fate != DELIVERED:
            self._others[position] = fate
        key = self.keys.pop(position, None)
        if key is not None:
            delta.keys[position] = key
            self.digests.pop(position, None)
        if fate == DEAD and failed is not None:
            self._letter(position, item, failed)
        self.changed()

    # -- commits ----------------------------------------------------------------------------------------------------

    def take_delta(self) -> Delta:
        """What the next commit is to record; a new account begins."""
        delta, self.delta = self.delta, Delta()
        self._committing, self._others = self._others, {}
        self.uncommitted = 0
        return delta

    def committed(self, delta: Delta, fenced: Positions) -> None:
        """The sink made this delta count, but for what was ``fenced``: that is done by whoever has it now."""
        for fate, name in enumerate(FATES):
            self.fates[fate] += delta.counts.get(name, 0)
            self.open -= delta.counts.get(name, 0)
        self.unfinished.remove(delta.settled)
        for known in delta.states:
            lane = self.lanes.get(known)
            if lane is not None:
                lane.dirty = known in self.delta.states
                self.leave_lane(lane)
        for partition, intervals in fenced.partitions.items():
            for start, stop in intervals:
                self.released += stop - start
                for index in range(start, stop):
                    self.fates[self._committing.get((partition, index), DELIVERED)] -= 1

    def leave_lane(self, lane: Lane) -> None:
        """Forget a state that is at rest, if it is kept elsewhere."""
        if self.forgets and lane.is_at_rest:
            self.lanes.pop((lane.stage, lane.partition, lane.key), None)

    def release(self) -> None:
        """The run is over: what is still open is given back."""
        self.released += self.open
        self.open = 0


def _add_all(positions: Positions, added: Sequence[Position]) -> None:
    """Add many positions, which mostly follow one another."""
    partition: str | None = None
    start = stop = 0
    for name, index in added:
        if name == partition and index == stop:
            stop += 1
            continue
        if partition is not None:
            positions.partitions.setdefault(partition, Intervals()).add_range(start, stop)
        partition, start, stop = name, index, index + 1
    if partition is not None:
        positions.partitions.setdefault(partition, Intervals()).add_range(start, stop)
