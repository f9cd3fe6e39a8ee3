"""Segments at run time: each takes tasks from one channel, has them worked on, and puts them into the next.

There is no task or coroutine here. A segment is *pumped*: by its input when something came, by its output when there is
room, by its pool when tasks are done, by a timer when a retry is due. A pump does all that can be done now, in this
order: hand finished tasks on, then feed new ones. Pumps of neighbours call each other; a pump that is called while it
runs notes it and goes round once more, so the stack stays as deep as the flow is long.

States of a task inside a segment: *in its lane* (a keyed stage works on an earlier item of the key), *in the pool*,
*waiting to retry* (a timer holds it, no worker does), *ready* (its end is known; ordered, it waits for those before
it; or the output is full). All of them count against the window: at most about twice the ceiling, or, for work so
short that it crosses in chunks, twice what the pool wants. Nothing here is awaited, so nothing here can be
cancelled half way: ``abort`` stops the timers and the pool, and what was inside stays open in the ledger.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from penstock.flow.channel import Channel
from penstock.flow.contract import Failed
from penstock.flow.failing import Policy, Tries
from penstock.flow.ledger import DEAD, SKIPPED, Ledger
from penstock.flow.meter import BLOCKED_HEAD, BLOCKED_OUTPUT, BUSY, HELD, OVER, WAITING_INPUT, SegmentMeter
from penstock.flow.origin import FILTERED
from penstock.place.base import OK, PENDING, Pool, Task

__all__ = ["READY", "SKIPPED_TAG", "Host", "MakePool", "Runner", "WorkSegment", "appetite_of", "open_all"]

READY = True
SKIPPED_TAG = "skipped"


class Host(Protocol):
    """What a segment needs of its run."""

    ledger: Ledger
    clock: Callable[[], float]
    loop: asyncio.AbstractEventLoop
    ended: bool
    segments: list[Runner]

    def fail(self, error: BaseException) -> None:
        """Stop the run with this exception."""

    def refuse(self, origin: Any, error: BaseException) -> bool:
        """Whether somebody waits for this very item and takes its error, so that the run goes on."""

    def hurry(self) -> None:
        """Something waits for room that partial batches could make."""

    def satisfied(self, segment: Runner) -> None:
        """A ``take`` has all it wants: stop everything before it."""


MakePool = Callable[..., Pool]


class Runner(ABC):
    """What all segments share: two channels, a meter, and the pump."""

    def __init__(self, host: Host, names: Sequence[str], source: Channel, sink: Channel, meter: SegmentMeter) -> None:
        self.host = host
        self.ledger = host.ledger
        self.names = names
        self.source = source
        self.sink = sink
        self.meter = meter
        self._pumping = False
        self._again = False
        self.stopped = False
        self.merges = 1  # items that one of its outputs, or one of its calls, is made of
        source.on_items = self.pump
        sink.on_room = self.pump

    def pump(self) -> None:
        """Do everything that can be done now."""
        if self._pumping:
            self._again = True
            return
        if self.stopped:
            return
        self._pumping = True
        try:
            self._turn()
            while self._again and not self.stopped:
                self._again = False
                self._turn()
        except Exception as error:
            self.host.fail(error)
        finally:
            self._pumping = False
            self._again = False

    @property
    def appetite(self) -> int:
        """How many items of its input it needs to be busy, with as many again so that it never waits for them."""
        return 2 * self.merges if self.merges > 1 else 0

    @abstractmethod
    def _turn(self) -> None:
        """Hand on, feed, and close the output when the end is reached."""

    async def open(self) -> None:  # noqa: B027  # not every segment has workers
        """Start the workers. Cancelling leaves nothing running."""

    async def close(self) -> None:  # noqa: B027  # not every segment has workers
        """End the workers, after the last task."""

    def halt(self) -> None:
        """Start nothing more; ``abort`` or ``close`` follows."""
        self.stopped = True

    async def abort(self) -> None:
        """Stop at once: when it returns, nothing of the segment runs any more."""
        self.stopped = True


def appetite_of(segments: Sequence[Runner]) -> Callable[[], int]:
    """How many items of the source all of them need, together: fewer could leave a batch waiting for ever."""
    counted: list[tuple[int, Runner]] = []
    items = 1
    for segment in segments:
        counted.append((items, segment))
        if not isinstance(segment, WorkSegment):
            items *= segment.merges
    return lambda: sum([items * segment.appetite for items, segment in counted])


async def open_all(segments: Sequence[Runner], over: asyncio.Future[None]) -> None:
    """Open them all at once. When one fails, or ``over`` is set meanwhile, the others are cancelled and awaited."""
    opening = [asyncio.ensure_future(segment.open()) for segment in segments]
    pending: set[asyncio.Future[None]] = set(opening)
    while pending:
        done, _ = await asyncio.wait({*pending, over}, return_when=asyncio.FIRST_COMPLETED)
        pending -= done
        if over.done() or any(task.cancelled() or task.exception() for task in opening if task.done()):
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)
            break
    for task in opening:
        if not task.cancelled():
            task.result()


class WorkSegment(Runner):
    """A segment with a pool: retries, policies and the window, for chains and for batches alike."""

    def __init__(
        self,
        host: Host,
        names: Sequence[str],
        source: Channel,
        sink: Channel,
        meter: SegmentMeter,
        policies: Sequence[Policy],
        tries: Tries,
        *,
        ordered: bool,
        ceiling: int,
    ) -> None:
        super().__init__(host, names, source, sink, meter)
        self.policies = policies
        self.tries = tries
        self.ordered = ordered
        self.ceiling = ceiling
        self.pool: Pool
        self._capacity = source.capacity
        self._exit: deque[Task] = deque()
        self._inflight = 0
        self._in_pool = 0
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._over = False
        self.gated = False

    def connect(self, make_pool: MakePool, chain: Any) -> None:
        """Give the segment its pool."""
        self.pool = make_pool(chain, self.ceiling, done=self._guarded, failed=self.host.fail, part=self._part)

    @property
    def appetite(self) -> int:
        at_once = self._in_pool + self.pool.room() if self.gated else self.ceiling  # at a gate, more may wait to start
        return 2 * at_once * self.merges

    def behind(self) -> int:
        """How many of its tasks wait, done, for the consumer; what waits for the head of the window doesn't."""
        if self.ordered and (not self._exit or self._exit[0].tag is None):
            return 0
        return max(0, len(self._exit) - (self._in_pool if self.ordered else 0))

    def pump(self) -> None:
        super().pump()
        if self.gated and not self.stopped:
            self.pool.resume()

    async def open(self) -> None:
        await self.pool.open()

    def halt(self) -> None:
        super().halt()
        self.pool.halt()

    async def close(self) -> None:
        self.stopped = True
        if not self._over:
            self._over = True
            await self.pool.close()

    async def abort(self) -> None:
        self.stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if not self._over:
            self._over = True
            await self.pool.abort()

    def _guarded(self, tasks: list[Task]) -> None:
        """Whatever goes wrong here stops the run: a lost task would hang it."""
        try:
            self._done(tasks)
        except Exception as error:
            self.host.fail(error)

    @abstractmethod
    def _done(self, tasks: list[Task]) -> None: ...

    def _part(self, task: Task, outputs: list[Any]) -> None:
        raise AssertionError(f"segment {self.names[0]!r} has no streaming step")

    def _submit(self, tasks: Sequence[Task]) -> None:
        self._in_pool += len(tasks)
        self.pool.submit(tasks)

    def _retry(self, task: Task, delay: float, submit: Callable[[], None]) -> None:
        """Call ``submit`` when the wait is over; until then the task holds no worker."""

        def due() -> None:
            del self._timers[id(task)]
            if not self.stopped:
                task.outcome = PENDING
                task.error = None
                submit()

        self.ledger.retried += 1
        self._timers[id(task)] = self.host.loop.call_later(delay, due)

    def _raise(self, task: Task, error: BaseException) -> bool:
        """An error that nothing took: True if it was one caller's alone, and the run goes on."""
        if self.host.refuse(task.origin, error):
            task.tag = SKIPPED_TAG
            return True
        self.host.fail(error)
        return False

    def withdraw(self, task: Task) -> bool:
        """Take back a task that isn't at work yet; only of an unordered segment. False if it is, or has been."""
        if not self.pool.withdraw(task):
            return False
        self.tries.pop(id(task), None)
        self._in_pool -= 1
        self._inflight -= 1
        self.pump()
        return True

    def _hand_on(self) -> bool:
        """Move what is ready to the output, while there is room; False if the output is full."""
        ready = self._exit
        room = self.sink.room
        out: list[Task] = []
        append, popleft = out.append, ready.popleft
        plain = 0
        while ready and len(out) < room:
            task = ready[0]
            tag = task.tag
            if tag is None:
                break
            popleft()
            self._inflight -= 1
            if tag is READY and task.outcome == OK:
                plain += 1
                task.tag = None
                task.at = 0
                append(task)
                if self._spreads:
                    plain -= 1
                    out.pop()
                    self._spread(task, out)
            else:
                self._settle(task)
        if plain:
            self.meter.passed(plain)
        if out:
            self.sink.put(out)
        return self.sink.room > 0

    _spreads = False

    def _spread(self, task: Task, out: list[Task]) -> None:
        raise AssertionError(f"segment {self.names[0]!r} has no expanding step")

    def _settle(self, task: Task) -> None:
        """A task ends here: dropped by a filter, skipped or dead."""
        tag = task.tag
        if tag is SKIPPED_TAG:
            self.ledger.settle(task.origin, SKIPPED)
        elif isinstance(tag, Failed):
            self.ledger.settle(task.origin, DEAD, tag)
        else:
            self.meter.stopped(0, task.at)
            self.ledger.settle(task.origin, FILTERED)

    def _note_state(self, wanting: bool) -> None:
        """Tell the meter what the segment is doing; ``wanting``: it could take more items."""
        meter = self.meter
        if self.pool.held_back:
            state = HELD
        elif self._in_pool >= self.ceiling or self.pool.backlog or self.pool.room() <= 0:
            state = BUSY
        elif self._exit and self.sink.room <= 0:
            state = BLOCKED_OUTPUT
        elif self.source.items and not wanting:
            state = BLOCKED_HEAD if self.ordered else BUSY
        elif not self.source.items:
            state = OVER if self.source.closed else WAITING_INPUT
        else:
            state = BUSY
        if state != meter.state:
            meter.set_state(state, self.host.clock())
        meter.first.in_progress = self.pool.in_progress
