"""A group of a topic as the source of a flow, and what one run reads of it.

A reading is *joined* from its first claim to ``close``. What it has claimed and nobody has settled is its own, under
the owner it was claimed by; an owner whose lease was lost is followed by another, under which events stand at other
positions (the partition says which), so that what the run still says of the old ones has no effect.

The run reads in a task that it cancels to stop; a claim under way is finished all the same, and what it brought stays
with the owner until ``close`` gives it back. A suspect (see ``subscription``) is claimed alone, and nothing else until
it is settled, for a second at the most.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from penstock.errors import DecodeError, LeaseLost, LogError, PlanError
from penstock.events.groups import Letter, Ranges, settle_earlier
from penstock.events.reader import Reader
from penstock.events.sink import JoinedSink, TopicSink
from penstock.events.subscription import ALONE, MOST_CLAIMED
from penstock.events.transaction import Transaction
from penstock.flow.commit import uninterrupted
from penstock.flow.contract import Failed, GivenUp, Sink, Unreadable, Until
from penstock.flow.demand import Demand
from penstock.flow.progress import Position, Positions, Progress
from penstock.place.loop import clock_of

if TYPE_CHECKING:
    from penstock.events.topic import Topic

__all__ = ["GroupReading", "GroupSource"]

logger = logging.getLogger("penstock")


class GroupSource:
    """What ``topic.flow(group)`` reads, a ``Subscribed``. ``exclusive``: None for what exactly once needs."""

    replayable = True  # by the group: what isn't acknowledged comes again
    total = None

    def __init__(
        self,
        topic: Topic[Any],
        group: str,
        *,
        lease: float,
        max_attempts: int,
        start: int | str,
        exclusive: bool | None,
    ) -> None:
        if exclusive not in (None, True, False):
            raise PlanError(f"exclusive={exclusive!r}", "Give True or False, or leave it out")
        self.topic = topic
        self.group = group
        self.lease = lease
        self.max_attempts = max_attempts
        self.start = start
        self.exclusive = exclusive
        self._reader(alone=False)  # which checks all of it

    @property
    def identity(self) -> str:
        return f"log:{self.topic.log.identity}#{self.topic.name}@{self.group}"

    def _reader(self, *, alone: bool) -> Reader:
        return Reader(
            self.topic,
            self.group,
            lease=self.lease,
            max_attempts=self.max_attempts,
            start=self.start,
            alone=alone,
            what="a flow",
        )

    def _joins(self, sink: Any) -> bool:
        return isinstance(sink, TopicSink) and sink.topic.log.is_same(self.topic.log)

    def is_alone(self, sink: Sink[Any] | None) -> bool:
        """Whether a job into that sink reads the group alone."""
        if self.exclusive is None:
            return sink is not None and sink.exactly_once and not self._joins(sink)
        return self.exclusive

    def guarantee(self, sink: Sink[Any], *, one_by_one: bool) -> tuple[bool, str]:
        """Whether outputs in that sink are exactly once, and why. ``one_by_one``: some may be committed while others of
        their event are still to come."""
        group = f"the group {self.group!r}"
        if self._joins(sink):
            if one_by_one:
                return False, "at least once: flat_map(whole=False) publishes outputs before the event is acknowledged"
            return True, f"exactly once: outputs and acknowledgements of {group} are one transaction of the log"
        if not sink.exactly_once:
            return False, "at least once: a function can't commit together with the acknowledgement"
        if not self.is_alone(sink):
            return False, f"at least once: others may read {group}, and {sink.identity} isn't in the log"
        return True, (
            f"exactly once: {sink.identity} commits what is to be acknowledged together with the data, and no other "
            f"job reads {group} meanwhile"
        )

    def begin(self, sink: Sink[Any], *, until: Until) -> tuple[GroupReading, Sink[Any]]:
        """A reading for one run, and the sink as that run uses it."""
        reading = GroupReading(self, self._reader(alone=self.is_alone(sink)), until=until)
        if self._joins(sink):
            assert isinstance(sink, TopicSink)
            return reading, JoinedSink(sink, reading)
        return reading, sink

    async def snapshot(self) -> Any:
        return None

    async def changed(self, before: Any) -> str | None:
        return None


class GroupReading:
    """What one run reads of a group."""

    replayable = True
    total = None

    def __init__(self, source: GroupSource, reader: Reader, *, until: Until) -> None:
        self.source = source
        self.topic = source.topic
        self.identity = source.identity
        self.reader = reader
        self._until = until
        self._owners: dict[str, int] = {}
        self._taken: dict[tuple[str, int], tuple[int, str | None]] = {}  # attempt and key
        self._suspect: tuple[tuple[str, int], float] | None = None
        self._settled = asyncio.Event()
        self._opened = False

    async def snapshot(self) -> Any:
        return None

    async def changed(self, before: Any) -> str | None:
        return None

    def joins(self, sink: Any) -> bool:
        return isinstance(sink, JoinedSink)

    # -- reading ----------------------------------------------------------------------------------------------------

    async def read(self, after: Progress) -> AsyncIterator[Sequence[tuple[tuple[str, int], Any]]]:
        """The events of the group as they are claimed, until it is drained if that was asked for.

        Raises GroupInUse, Closed, LogError, WriteFailed. Cancelling loses none.
        """
        loop = asyncio.get_running_loop()
        log = self.topic.log
        await log.open()
        self._opened = True
        await self._join()
        if after.settled:  # what a run committed that ended before it could say so
            ranges = [range_ for intervals in after.settled.partitions.values() for range_ in intervals]
            await log.ask(settle_earlier, *self.reader.name[:2], ranges)
        demand = Demand(clock_of(loop), 1, MOST_CLAIMED)
        taken = 0
        while True:
            await self._until_alone_is_over(loop)
            seen = log.store.look(self.reader.number)
            ends = self._ends()
            try:
                claimed = await uninterrupted(self.reader.claim(demand.note(taken)))
            except LeaseLost:
                if self.reader.alone:  # another may have read meanwhile, and the sink knows nothing of that
                    raise
                logger.warning("topic %r: the lease in group %r was lost", self.topic.name, self.reader.group)
                await self._join()
                continue
            taken = len(claimed.rows)
            if claimed.rows:
                yield self._items(claimed.rows, loop.time())
                continue
            if claimed.drained and ends:
                return
            await self._changed(seen, self.reader.pause(claimed))

    def _ends(self) -> bool:
        """Whether to end when nothing is left."""
        return self._until.done() if isinstance(self._until, asyncio.Future) else self._until is not None

    async def _changed(self, seen: Any, timeout: float | None) -> None:
        """Wait until there may be something to claim, or until what it reads for is done. Cancelling leaves nothing."""
        change = self.topic.log.store.changed(self.reader.number, seen, timeout)
        if not isinstance(self._until, asyncio.Future) or self._until.done():
            await change
            return
        waiting = asyncio.ensure_future(change)
        try:
            await asyncio.wait({waiting, self._until}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            await asyncio.wait([waiting])
        if not waiting.cancelled():
            waiting.result()

    async def _join(self) -> None:
        await self.reader.join()
        name = self.topic.name
        self._owners[f"{name}#{len(self._owners) + 1}" if self._owners else name] = self.reader.owner

    def _items(self, rows: Sequence[Any], now: float) -> list[tuple[tuple[str, int], Any]]:
        partition = next(reversed(self._owners))
        items: list[tuple[tuple[str, int], Any]] = []
        for row in rows:
            position = (partition, row.seq)
            self._taken[position] = (row.attempt, row.key)
            if row.suspect:
                self._suspect = (position, now + ALONE)
                self._settled.clear()
            try:
                value = self.topic.codec.unpack(row.body, row.seq, self.topic.log.address)
            except (DecodeError, LogError) as error:
                value = Unreadable(row.body, error)
            items.append((position, value))
        return items

    async def _until_alone_is_over(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._suspect is not None:
            timer = loop.call_at(self._suspect[1], self._settled.set)
            try:
                await self._settled.wait()
            finally:
                timer.cancel()
            self._suspect = None

    # -- what became of it ------------------------------------------------------------------------------------------

    def by_owner(self, positions: Positions) -> list[tuple[str, int, Ranges]]:
        """Positions by the partition and the owner they were claimed by."""
        return [
            (partition, self._owners[partition], list(intervals))
            for partition, intervals in positions.partitions.items()
            if partition in self._owners
        ]

    def owner_of(self, partition: str) -> int:
        """By whom the events of a partition were claimed."""
        return self._owners[partition]

    def key_of(self, position: Position) -> str | None:
        """The key of an event that was taken and isn't settled."""
        return self._taken[position][1]

    def held(self, transaction: Transaction) -> set[str]:
        """The partitions whose owner still has its lease."""
        owns = "SELECT 1 FROM owners WHERE owner = ?"
        return {name for name, owner in self._owners.items() if transaction.connection.execute(owns, (owner,)).get}

    def letters(self, dead: Sequence[Failed]) -> list[tuple[int, Letter]]:
        """Dead letters, with the owner each was claimed by."""
        found = []
        for failed in dead:
            partition, seq = failed.position
            attempts = max(failed.attempts, self._taken.get(failed.position, (1, None))[0])
            story = failed.traceback if isinstance(failed, GivenUp) else ""
            letter = Letter(seq, attempts, failed.stage, failed.reason, story or failed.error)
            found.append((self._owners[partition], letter))
        return found

    def forget(self, positions: Positions) -> None:
        """These are settled."""
        for partition, intervals in positions.partitions.items():
            for start, stop in intervals:
                for seq in range(start, stop):
                    self._taken.pop((partition, seq), None)
        if self._suspect is not None and self._suspect[0] in positions:
            self._settled.set()

    async def settle(self, positions: Positions) -> None:
        """Acknowledge. What is no longer this reading's own was given to others: it is done again."""
        for _, owner, ranges in self.by_owner(positions):
            refused = await self.reader.acknowledge(owner, ranges)
            if refused:
                logger.warning("topic %r: %d events are with others by now", self.topic.name, len(refused))
        self.forget(positions)

    async def dead(self, letters: Sequence[Failed]) -> None:
        """To the dead letters of the topic."""
        for owner, letter in self.letters(letters):
            await self.reader.bury(owner, [letter])
        buried = Positions()
        for failed in letters:
            buried.add(failed.position)
        self.forget(buried)

    async def give_back(self, positions: Positions, delay: float = 0, reason: str | None = None) -> None:
        """``close`` gives everything back."""

    async def close(self) -> None:
        """Give back what is left, and leave the group."""
        if self._opened:
            self._opened = False
            try:
                await self.reader.leave()
            finally:
                await self.topic.log.close()
