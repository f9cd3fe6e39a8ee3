"""Deliveries to a group, for loops written by hand: what is claimed, handed over, and said of it.

A subscription is *joined* (an owner of its group, with a lease) from entering to leaving. What it claims waits here
until it is asked for; of each key one delivery is out at a time, the later ones wait behind it. A delivery is *out*
until one thing is said of it: acknowledged, to be tried again, dead, or given back.

One task fills: it claims what was asked for in the last few milliseconds, waits where there is nothing, and joins again
when the lease was lost. Nobody who asks for a delivery claims by himself, so cancelling the asking leaves everything as
it was: what was claimed meanwhile is handed to who asks next. Leaving cancels the filling, which a claim under way
survives, and gives back what is left, out or not; what is said of that later is refused (LeaseLost).

A suspect, an event whose holder died before, is claimed alone: while it is out nothing else is claimed, for a second at
the most, since one that takes longer is slow and not deadly.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

from penstock.errors import DecodeError, LeaseLost, LogError, PlanError
from penstock.events.clock import loop_time
from penstock.events.event import Event, moment
from penstock.events.groups import Claimed, Letter, Row
from penstock.events.reader import Reader
from penstock.flow.commit import uninterrupted
from penstock.flow.demand import Demand
from penstock.flow.failing import reason_of, story_of
from penstock.place.loop import clock_of

if TYPE_CHECKING:
    from penstock.events.topic import Topic

__all__ = ["ALONE", "MOST_CLAIMED", "Delivery", "Subscription"]

T = TypeVar("T")

logger = logging.getLogger("penstock")

ALONE = 1.0  # seconds that a suspect is out by itself
MOST_CLAIMED = 1024
_LONGEST_BACKOFF = 60.0


class Delivery(Generic[T]):
    """An event in hand: ``async with delivery as value`` acknowledges it at the end and has it tried again on an error.

    ``value``, ``position``, ``key``, ``id``, ``headers``, ``time``: the event's. ``attempt``: which one this is, from
    1.

    What raises WriteFailed leaves it in hand: it may be said again. It is given back when the subscription is left.

    In the block, an ``Exception`` is logged and the event delivered again, after a while; after ``max_attempts`` it
    goes to the dead letters with its traceback. A cancellation gives it back, and the attempt doesn't count. Instead,
    one of ``ack``, ``retry`` and ``dead`` may be called, in the block or without one.
    """

    __slots__ = ("_owner", "_row", "_subscription", "event", "settled")

    def __init__(self, subscription: Subscription[T], row: Row, event: Event[T], owner: int) -> None:
        self._subscription = subscription
        self._row = row
        self._owner = owner
        self.event = event
        self.settled = False

    def __repr__(self) -> str:
        return f"<Delivery {self.position}, attempt {self.attempt}: {self.value!r:.60}>"

    @property
    def value(self) -> T:
        return self.event.value

    @property
    def position(self) -> int:
        return self.event.position

    @property
    def key(self) -> str | None:
        return self.event.key

    @property
    def id(self) -> str | None:
        return self.event.id

    @property
    def headers(self) -> Any:
        return self.event.headers

    @property
    def time(self) -> datetime:
        return self.event.time

    @property
    def attempt(self) -> int:
        return self._row.attempt

    async def ack(self) -> None:
        """Done with: it isn't delivered again. Raises LeaseLost if it is no longer this reader's own.

        Cancelling doesn't keep it from being acknowledged.
        """
        if self._settle():
            reader = self._subscription.reader
            if await self._said(reader.acknowledge_one(self._owner, self._row.seq)):
                raise LeaseLost(reader.group)

    async def retry(self, delay: float | None = None) -> None:
        """Deliver it again after ``delay`` seconds (default: a backoff that doubles), to this reader or another.

        Those of its key wait behind it. Raises LeaseLost.
        """
        if delay is not None and not 0 <= delay < 1e9:
            raise PlanError(f"retry(delay={delay!r})", "Give seconds from 0")
        await self._give_back(self._subscription.backoff(self.attempt) if delay is None else delay, unused=False)

    async def release(self) -> None:
        """Give it back unused: the attempt doesn't count. Raises LeaseLost."""
        await self._give_back(0.0, unused=True)

    async def _give_back(self, delay: float, *, unused: bool) -> None:
        if self._settle():
            subscription = self._subscription
            due = loop_time(asyncio.get_running_loop()) + delay if delay else 0.0
            if await self._say(subscription.give_back(self._row, self._owner, due, unused=unused)):
                raise LeaseLost(subscription.reader.group)

    async def dead(self, reason: str, error: str = "") -> None:
        """Give it up for good: it goes to the dead letters, and those of its key go on. Raises LeaseLost."""
        if self._settle():
            reader = self._subscription.reader
            letter = Letter(self._row.seq, self.attempt, "", str(reason), str(error))
            if await self._say(reader.bury(self._owner, [letter])):
                raise LeaseLost(reader.group)

    async def extend(self, seconds: float) -> None:
        """Keep it for so many seconds at least, also where the process can't renew the lease. Raises LeaseLost."""
        if self.settled or not await self._subscription.reader.extend(self._owner, seconds):
            raise LeaseLost(self._subscription.reader.group)

    def _settle(self) -> bool:
        first, self.settled = not self.settled, True
        return first

    async def _say(self, saying: Any) -> Any:
        return await self._said(uninterrupted(saying))

    async def _said(self, saying: Any) -> Any:
        """What came of saying it. What couldn't be written leaves it in hand, and may be said again."""
        try:
            said = await saying
        except asyncio.CancelledError:
            self._subscription.returned(self._row)
            raise
        except Exception:
            self.settled = False
            raise
        self._subscription.returned(self._row)
        return said

    async def __aenter__(self) -> T:
        return self.value

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if self.settled:
            return False
        try:
            if error is None:
                await self.ack()
            elif not isinstance(error, Exception):
                await self.release()
            else:
                await self._failed(error)
        except LeaseLost as lost:
            logger.warning("topic %r, event %d: %s", self._subscription.topic.name, self.position, lost)
        return isinstance(error, Exception)

    async def _failed(self, error: Exception) -> None:
        subscription = self._subscription
        reader = subscription.reader
        last = self.attempt >= reader.max_attempts
        logger.warning(
            "topic %r, group %r, event %d, attempt %d of %d: %s",
            subscription.topic.name,
            reader.group,
            self.position,
            self.attempt,
            reader.max_attempts,
            "to the dead letters" if last else "to be tried again",
            exc_info=error,
        )
        if last:
            await self.dead(reason_of(error), story_of(error) or str(error))
        else:
            await self.retry()


class Subscription(Generic[T]):
    """Deliveries to a group, made by ``Topic.subscribe``: ``async with`` it, then ``async for`` over it.

    Several tasks may iterate over one subscription. ``drain()`` ends the iteration: what is out may still be finished.
    Leaving gives back what is left.
    """

    def __init__(
        self,
        topic: Topic[T],
        group: str,
        *,
        lease: float,
        max_attempts: int,
        backoff: float,
        in_flight: int,
        start: int | Literal["earliest", "latest"],
        until: Literal["drained"] | None,
    ) -> None:
        if isinstance(backoff, bool) or not isinstance(backoff, (int, float)) or backoff < 0:
            raise PlanError(f"backoff={backoff!r}", "Give seconds from 0")
        if not isinstance(in_flight, int) or in_flight < 1:
            raise PlanError(f"in_flight={in_flight!r}", "Give a number from 1")
        if until not in (None, "drained"):
            raise PlanError(f"until={until!r}", 'Give "drained", or leave it out')
        self.topic = topic
        self.reader = Reader(topic, group, lease=lease, max_attempts=max_attempts, start=start)
        self._backoff = float(backoff)
        self._in_flight = in_flight
        self._until = until
        self._ready: deque[tuple[Row, Event[T], int]] = deque()
        self._lanes: dict[str, deque[tuple[Row, Event[T], int]]] = {}
        self._out = 0
        self._suspects: dict[int, float] = {}
        self._asked = 0
        self._filling: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._freed: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._in_order = asyncio.Lock()  # of claims and what is given back: none of a key is claimed meanwhile
        self._entered = self._over = False

    def backoff(self, attempt: int) -> float:
        """Seconds before the attempt after this one."""
        return min(_LONGEST_BACKOFF, self._backoff * 2.0 ** min(attempt - 1, 30))

    async def __aenter__(self) -> Self:
        """Join the group. Raises GroupInUse, Closed, LogError. Cancelling leaves it unjoined."""
        if self._entered:
            raise PlanError("a subscription was entered a second time", "Call topic.subscribe() again")
        self._entered = True
        self._loop = asyncio.get_running_loop()
        self._demand = Demand(clock_of(self._loop), 1, MOST_CLAIMED)
        try:
            await self.reader.join()
        except BaseException:
            await uninterrupted(self.reader.leave())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give back what is left, and leave the group. Cancelling waits for that."""
        self.drain()
        await uninterrupted(self._leave())

    async def _leave(self) -> None:
        filling = self._filling
        if filling is not None:
            filling.cancel()
            await asyncio.wait([filling])
        self._ready.clear()
        self._lanes.clear()
        await self.reader.leave()

    def drain(self) -> None:
        """Take no more: whoever iterates comes to an end."""
        self._over = True
        self._wake()

    def __aiter__(self) -> AsyncIterator[Delivery[T]]:
        return self

    async def __anext__(self) -> Delivery[T]:
        """The next delivery. Raises Closed, LogError, WriteFailed. Cancelling loses none."""
        if not self._entered:
            raise PlanError("a subscription is entered first", "Use: async with topic.subscribe(...) as deliveries")
        while not self._over:
            if self._failure is not None:
                raise self._failure
            if self._ready and self._out < self._in_flight:
                row, event, owner = self._ready.popleft()
                self._out += 1
                self._asked += 1
                if len(self._ready) < self._demand.size // 2 or (self._waiting and not self._ready):
                    self._fill()
                return Delivery(self, row, event, owner)
            if not self._ready:
                self._fill()
            waiter = self._loop.create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()  # it may have been woken for what another can take
                raise
        raise StopAsyncIteration

    def _wake(self) -> None:
        """Wake as many as there is something for; all, if it is the end."""
        if self._over or self._failure is not None:
            count = len(self._waiting)
        else:
            count = max(1, min(len(self._ready), self._in_flight - self._out))
        while count > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    # -- what deliveries say ----------------------------------------------------------------------------------------

    async def give_back(self, row: Row, owner: int, due: float, *, unused: bool) -> bool:
        """Give back a delivery, and what this owner claimed behind it for its key; whether it was no longer its own."""
        async with self._in_order:
            lane = self._lanes.get(row.key, deque()) if row.key is not None else deque()
            behind = [(later.seq, 0.0, True) for later, _, its in lane if its == owner]
            refused = await self.reader.release(owner, [(row.seq, due, unused), *behind])
            others = [waiting for waiting in lane if waiting[2] != owner]
            lane.clear()
            lane.extend(others)
            return bool(refused)

    def returned(self, row: Row) -> None:
        """A delivery isn't out any more: the next of its key is ready."""
        self._out -= 1
        if self._suspects.pop(row.seq, None) is not None:
            self._free()
        if row.key is not None and row.key in self._lanes:
            lane = self._lanes[row.key]
            if lane:
                self._ready.append(lane.popleft())
            else:
                del self._lanes[row.key]
        if self._until == "drained" and not self._out and self.topic.log.is_open:
            self.topic.log.store.wake({self.reader.number})
        self._wake()

    # -- claiming ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Have more claimed, unless it is being done or enough waits behind what is out: what returns asks again."""
        if self._filling is not None or sum(map(len, self._lanes.values())) >= MOST_CLAIMED:
            return
        self._filling = self._loop.create_task(self._claim(), name=f"penstock claims {self.topic.name}")
        self._filling.add_done_callback(self._filled)

    def _filled(self, filling: asyncio.Task[None]) -> None:
        self._filling = None
        if not filling.cancelled() and (error := filling.exception()) is not None:
            self._failure = error
        self._wake()

    async def _claim(self) -> None:
        """Claim until something came, or nothing more will."""
        store = self.topic.log.store
        while not self._over:
            await self._until_alone_is_over()
            seen = store.look(self.reader.number)
            asked, self._asked = self._asked, 0
            most = self._demand.note(asked)
            try:
                async with self._in_order:
                    claimed = await uninterrupted(self._claimed(most))
            except LeaseLost:
                logger.warning("topic %r: the lease in group %r was lost", self.topic.name, self.reader.group)
                self._forget()
                await self.reader.join()
                continue
            if claimed.rows:
                return
            if claimed.drained and self._until == "drained" and not (self._out or self._ready):
                self.drain()
                return
            await store.changed(self.reader.number, seen, self.reader.pause(claimed))

    async def _until_alone_is_over(self) -> None:
        """Wait while nothing is to be claimed beside a suspect that is out."""
        until = max(self._suspects.values(), default=0.0)
        while until > self._loop.time() and self._suspects:
            self._freed = self._loop.create_future()
            timer = self._loop.call_at(until, self._free)
            try:
                await self._freed
            finally:
                timer.cancel()

    def _free(self) -> None:
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)

    def _forget(self) -> None:
        """What was claimed under a lease that is lost is no longer ours; what is out finds that out."""
        self._suspects.clear()
        for row, _, _ in self._ready:
            if row.key is not None:
                self._lanes.pop(row.key, None)
        self._ready.clear()
        for lane in self._lanes.values():
            lane.clear()

    async def _claimed(self, most: int) -> Claimed:
        """Claim, and keep what came: nobody may be cancelled between the two."""
        owner = self.reader.owner
        claimed = await self.reader.claim(most)
        bad: list[Letter] = []
        for row in claimed.rows:
            try:
                value = self.topic.codec.unpack(row.body, row.seq, self.topic.log.address)
            except (DecodeError, LogError) as error:
                bad.append(Letter(row.seq, row.attempt, "", type(error).__name__, str(error)))
                continue
            headers = self.topic.codec.headers(row.headers)
            event = Event(value, row.seq, moment(row.time), row.key, row.id, headers)
            if row.suspect:
                self._suspects[row.seq] = self._loop.time() + ALONE
            if row.key is not None:
                lane = self._lanes.get(row.key)
                if lane is not None:
                    lane.append((row, event, owner))
                    continue
                self._lanes[row.key] = deque()
            self._ready.append((row, event, owner))
        if bad:
            logger.warning("topic %r: %d events can't be read, the first: %s", self.topic.name, len(bad), bad[0].error)
            await self.reader.bury(owner, bad)
        return claimed
