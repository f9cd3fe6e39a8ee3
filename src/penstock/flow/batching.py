"""Batches: ``map_batches``, which works on lists and leaves items single, and ``batch``, which makes lists of them.

Items wait in the input channel, which remembers when each came, until a batch can go: it is full, or its oldest item
has waited ``max_wait``, or the input has ended. A batch that isn't full also waits for a free worker, and grows
meanwhile. One timer stands for the oldest item; nothing polls.

A batch is one task of the pool, whose ``tag`` lists the tasks of its members. The members are in the window; the batch
isn't. If a batch fails in whatever way (an exception, a timeout, a dead worker), it is halved and both halves are
tried again, until only the guilty items fail by themselves: those go by the stage's retry and ``on_error``. Halves go
before new batches. In threads, a batch that was over time is tried item by item: a thread can't be ended, and halving
would leave behind another one at each step with the same guilty item in it. A result of another length is the
function's fault: all items of the batch fail, and none is tried again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from penstock.errors import BatchMismatch
from penstock.flow.failing import DEAD_LETTER, KEEP_IT, RAISE, RETRY
from penstock.flow.origin import Merged, positions_of
from penstock.flow.segment import READY, SKIPPED_TAG, Runner, WorkSegment
from penstock.place.base import FAILED, OK, TIMED_OUT, Task

__all__ = ["BatchRunner", "BatchSegment", "Deadline"]


class Deadline:
    """The timer of the oldest item: calls ``due`` when it has waited for ``max_wait`` seconds."""

    def __init__(self, runner: Runner, max_wait: float | None) -> None:
        self._runner = runner
        self._max_wait = max_wait
        self._timer: asyncio.TimerHandle | None = None

    def passed(self) -> bool:
        """Whether a batch must go though it isn't full; if not, the timer is set for when it must."""
        source = self._runner.source
        if source.closed or self._runner.ledger.paused:
            return True
        if self._max_wait is None or not source.items:
            return False
        host = self._runner.host
        left = source.oldest + self._max_wait - host.clock()
        if left <= 0:
            return True
        if self._timer is None:
            self._timer = host.loop.call_later(left, self._due)
        return False

    def _due(self) -> None:
        self._timer = None
        self._runner.pump()

    def cancel(self) -> None:
        """No batch waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class BatchSegment(WorkSegment):
    """A ``map_batches`` stage."""

    def __init__(self, *args: Any, batch_size: int, max_wait: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._size = self.merges = batch_size
        self._deadline = Deadline(self, max_wait)
        self._halves: deque[Task] = deque()
        self._hangs = self.meter.first.place == "thread"  # what is over time there goes on, and can't be ended

    async def close(self) -> None:
        self._deadline.cancel()
        await super().close()

    async def abort(self) -> None:
        self._deadline.cancel()
        await super().abort()

    def _turn(self) -> None:
        self._hand_on()
        wanting = self._feed()
        self._note_state(wanting)
        if self.source.ended and not self._inflight:
            self._deadline.cancel()
            self.sink.close()

    def _feed(self) -> bool:
        """Send the batches that can go; False if no more could be taken."""
        while self._halves:
            self._submit([self._halves.popleft()])
        while self.pool.room() > 0:
            if self._inflight >= 2 * self.ceiling * self._size:
                return False
            waiting = len(self.source)
            if not waiting:
                break
            if waiting < self._size and (self._in_pool >= self.ceiling or not self._deadline.passed()):
                break
            members = self.source.take(self._size)
            self._inflight += len(members)
            self.meter.first.taken += len(members)
            if self.ordered:
                self._exit.extend(members)
            self._send(members)
        return True

    def _send(self, members: list[Task]) -> None:
        self.meter.first.calls += 1
        self._submit([Task([member.value for member in members], members[0].origin, tag=members)])

    def _done(self, tasks: list[Task]) -> None:
        self._in_pool -= len(tasks)
        if self.stopped:
            return
        for batch in tasks:
            members: list[Task] = batch.tag
            if batch.seconds is not None:
                self.meter.add_samples(0, batch.seconds)
            if batch.outcome == OK:
                mismatch = self._mismatch(batch, members)
                if mismatch is not None:
                    batch.outcome = FAILED
                    for member in members:
                        batch.error = BatchMismatch(*mismatch.args)  # each its own: it will say which item's it is
                        self._resolve(member, batch)
                    continue
                policy = self.policies[0]
                policy.tried += sum(id(member) not in self.tries for member in members)
                for member, value in zip(members, batch.value, strict=True):
                    member.value = value
                    member.outcome = OK
                    self._ready(member, READY)
            elif len(members) > 1:
                most = 1 if batch.outcome == TIMED_OUT and self._hangs else -(-len(members) // 2)
                for start in range(0, len(members), most):
                    part = members[start : start + most]
                    self.meter.first.calls += 1
                    values = [member.value for member in part]
                    self._halves.append(Task(values, part[0].origin, tag=part))
            else:
                self._resolve(members[0], batch)
        self.pump()

    def _ready(self, member: Task, tag: Any) -> None:
        member.tag = tag
        if self.tries:
            self.tries.pop(id(member), None)
        if not self.ordered:
            self._exit.append(member)

    def _mismatch(self, batch: Task, members: Sequence[Task]) -> BatchMismatch | None:
        """The function is wrong, not an item of it: halving would only hide it."""
        result = batch.value
        if isinstance(result, (str, bytes, dict, set)) or not hasattr(result, "__len__"):
            returned = f"a {type(result).__name__}"
        elif len(result) != len(members):
            returned = f"{len(result)} results"
        else:
            return None
        return BatchMismatch(self.names[0], len(members), returned)

    def _resolve(self, member: Task, batch: Task) -> None:
        """A single item failed by itself."""
        member.outcome, member.error = batch.outcome, batch.error
        if id(member) not in self.tries:
            self.policies[0].tried += 1
        verdict = self.policies[0].judge(member)
        if verdict.kind == RETRY:
            self._retry(member, verdict.delay, lambda: self._send([member]))
        elif verdict.kind == RAISE:
            if self._raise(member, verdict.error):
                self._ready(member, member.tag)
        elif verdict.kind == KEEP_IT:
            member.value = verdict.failed
            member.outcome = OK
            self._ready(member, READY)
        else:
            self._ready(member, verdict.failed if verdict.kind == DEAD_LETTER else SKIPPED_TAG)


class BatchRunner(Runner):
    """A ``batch`` stage: one list of many items; its origin is all of theirs."""

    def __init__(
        self, *args: Any, size: int, max_wait: float | None, apart: Callable[[str], Any] | None = None
    ) -> None:
        super().__init__(*args)
        self._size = self.merges = size
        self._deadline = Deadline(self, max_wait)
        self._apart = apart

    async def close(self) -> None:
        self._deadline.cancel()

    async def abort(self) -> None:
        self._deadline.cancel()
        await super().abort()

    def _turn(self) -> None:
        out: list[Task] = []
        while self.sink.room > len(out) and self.source.items:
            most = self._size if self._apart is None else self._together(self._apart)
            if len(self.source) < most and not self._deadline.passed():
                break
            members = self.source.take(most)
            self.meter.first.taken += len(members)
            out.append(Task([member.value for member in members], Merged([member.origin for member in members])))
        self.meter.first.emitted += len(out)
        self.sink.put(out)
        if self.source.ended:
            self._deadline.cancel()
            self.sink.close()

    def _together(self, apart: Callable[[str], Any]) -> int:
        """How many items the next batch may have: no more than come before one that is to be apart from the first."""
        first: Any = None
        for number, task in enumerate(islice(self.source.items, self._size)):
            group = apart(positions_of(task.origin)[0][0])
            if number and group != first:
                return number
            first = group
        return self._size
