"""Chains: fused ``map``, ``filter`` and ``flat_map`` stages, whose items each are one task of one pool.

Two things are added to what every segment does. *Lanes*: with ``key=``, only one item of a key is in the pool (or
waiting to retry), and the others of that key wait in their lane, in order. *Expansions*: a whole one comes back as a
list, which becomes a family in the ledger; one with ``whole=False`` comes in parts, before its task is done, and the
worker that makes them waits until they are handed on.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from penstock.errors import ExpansionTooLarge
from penstock.flow.contract import Failed
from penstock.flow.failing import DEAD_LETTER, KEEP_IT, RAISE, RETRY
from penstock.flow.ledger import DEAD, SKIPPED
from penstock.flow.origin import FILTERED, Stream
from penstock.flow.segment import READY, SKIPPED_TAG, WorkSegment
from penstock.place.base import DROPPED, FAILED, OK, PENDING, SPREAD, SPREAD_BOUND, Task

__all__ = ["ChainSegment"]

_THROUGH = (OK, DROPPED)


class ChainSegment(WorkSegment):
    """Fused ``map``, ``filter`` and ``flat_map`` stages: one task an item, one pool."""

    def __init__(
        self,
        *args: Any,
        key: Callable[[Any], Any] | None = None,
        verb: int,
        streams: bool,
        gate: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._key = key
        self._spreads = self.expands = verb == SPREAD
        self._streaming = streams
        self._gate = gate  # the first whole expansion of the flow: it pauses while too many outputs are held
        self._lanes: dict[Any, deque[Task]] = {}
        self._lane_of: dict[int, Any] = {}
        self._streams: dict[int, Stream] = {}
        self._parts: deque[tuple[Task, list[Any]]] = deque()
        self._counts = any(policy.budget is not None for policy in self.policies)
        self._counted: dict[int, int] = {}  # by the id() of a task that will come again: stages that have counted it

    def _turn(self) -> None:
        if self._streaming and not self._hand_on_parts():
            self._note_state(False)
            return
        self._hand_on()
        wanting = self._feed()
        self._note_state(wanting)
        if self.source.ended and not self._inflight:
            self.sink.close()

    def _feed(self) -> bool:
        """Take as many new tasks as the window and the pool have room for; False if it could take no more."""
        want = self.pool.room()
        wanted = self._in_pool + want
        self.source.capacity = max(self._capacity, wanted)  # short work crosses in larger chunks
        if self._streaming and self.ordered:
            window = 1  # outputs of the next item mustn't overtake those of one that waits to be tried again
        else:
            window = 2 * self.ceiling if wanted <= 2 * self.ceiling else 2 * wanted
        take = min(want, window - self._inflight)
        if take <= 0 or (self._gate and self._held_up()):
            return False
        if not self.source.items:
            return True
        tasks = self.source.take(take)
        self._inflight += len(tasks)
        self.meter.first.taken += len(tasks)
        if self._key is not None:
            tasks = self._into_lanes(tasks)
        elif self.ordered:
            self._exit.extend(tasks)
        if tasks and not self.stopped:  # a key that can't be found has stopped the run
            self._submit(tasks)
        return len(tasks) < take

    def _submit(self, tasks: Sequence[Task]) -> None:
        if self._streaming:
            for task in tasks:
                self._stream_of(task)
        super()._submit(tasks)

    def _done(self, tasks: list[Task]) -> None:
        self._in_pool -= len(tasks)
        if self.stopped:
            return
        spreads, ordered, tries = self._spreads, self.ordered, self.tries
        if ordered and not spreads and not self._streaming and not tries and not self._counts:
            tasks = self._pass_through(tasks)
        for task in tasks:
            outcome = task.outcome
            if self._counts:
                self._count(task)
            if task.seconds is not None:
                came_to = len(self.policies) if outcome == OK else max(task.at, task.stopped) + 1
                self.meter.add_samples(came_to - len(task.seconds), task.seconds)
                task.seconds = None
            if spreads and outcome == OK:
                self._check_size(task)
                outcome = task.outcome
            if outcome in _THROUGH:
                task.tag = READY
                if tries:
                    tries.pop(id(task), None)
            elif not self._resolve(task):
                continue
            if not ordered:
                self._exit.append(task)
            if self._lane_of:
                self._next_in_lane(task)
        self.pump()

    def _pass_through(self, tasks: list[Task]) -> list[Task]:
        """Hand on at once what came in order and needs no more thought: nearly everything; returns what does."""
        ready, count = self._exit, len(tasks)
        if count > self.sink.room or list(islice(ready, count)) != tasks:
            return tasks
        if any([task.outcome != OK or task.at for task in tasks]):  # noqa: C419  # a list is faster here
            return tasks
        for task in [task for task in tasks if task.seconds is not None]:
            self.meter.add_samples(0, task.seconds or ())
            task.seconds = None
        popleft = ready.popleft
        for _ in tasks:
            popleft()
        self._inflight -= count
        self.meter.passed(count)
        self.sink.put(tasks)
        return []

    def _count(self, task: Task) -> None:
        """A budget of failures is held against the items that were tried: count this one at the stages it came to."""
        last = len(self.policies) - 1 if task.outcome == OK else max(task.at, task.stopped)
        for policy in self.policies[self._counted.pop(id(task), 0) : last + 1]:
            policy.tried += 1

    def _returns(self, task: Task, step: int) -> None:
        """The task will come back, having been counted up to this step."""
        if self._counts:
            self._counted[id(task)] = step + 1

    def _resolve(self, task: Task) -> bool:
        """Decide on a failed task; True if its end is known, False if it will be tried again or stops the run."""
        step = max(task.at, task.stopped)
        task.stopped = 0
        verdict = self.policies[step].judge(task)
        if verdict.kind == RETRY:
            stream = self._streams.get(id(task))
            if stream is not None:
                stream.again()
                self._parts = deque(part for part in self._parts if part[0] is not task)  # they will come again
            self._returns(task, step)
            self._retry(task, verdict.delay, lambda: self._submit([task]))
            return False
        task.at = step
        if verdict.kind == RAISE:
            return self._raise(task, verdict.error)
        assert verdict.failed is not None
        self.meter.stopped(0, step)
        if verdict.kind == KEEP_IT:
            return self._keep(task, verdict.failed)
        task.tag = verdict.failed if verdict.kind == DEAD_LETTER else SKIPPED_TAG
        return True

    def _keep(self, task: Task, failed: Failed) -> bool:
        """The Failed takes the item's place, and goes through the stages that remain."""
        last = len(self.policies) - 1
        if task.at < last:
            self._returns(task, task.at)
            task.value = failed
            task.at += 1
            task.outcome = PENDING
            self._submit([task])
            return False
        task.outcome = OK
        if self._streaming:
            stream = self._stream_of(task)
            coming = sum(len(outputs) for owner, outputs in self._parts if owner is task)
            given = max([stream.seen, *(stop for _, stop in stream.known or ())])
            already = given - stream.cursor - coming  # given by an earlier attempt or run, and not by this one
            self._parts.append((task, [None] * already + [failed]))
            task.value = None
        else:
            task.value = [failed] if self._spreads else failed
        task.tag = READY
        return True

    def _held_up(self) -> bool:
        """Whether so much of unfinished expansions is held that no other may start; batches then go unfilled."""
        paused = self.ledger.expanded >= SPREAD_BOUND
        if paused and not self.ledger.paused:
            self.host.hurry()
        self.ledger.paused = paused
        return paused

    # -- expansions -------------------------------------------------------------------------------------------------

    def _check_size(self, task: Task) -> None:
        """Expansions within an expansion that are too large together fail: what the stage was given is gone by then."""
        if not self.ledger.fits(task.origin, len(task.value), SPREAD_BOUND):
            task.outcome = FAILED
            task.at = len(self.policies) - 1
            task.error = ExpansionTooLarge(self.names[-1], SPREAD_BOUND)
            task.value = None

    def _spread(self, task: Task, out: list[Task]) -> None:
        outputs = task.value
        origin = self.ledger.expand(task.origin, len(outputs))
        out.extend([Task(output, origin) for output in outputs])
        self.meter.passed(1, outputs=len(outputs))

    def _stream_of(self, task: Task) -> Stream:
        stream = self._streams.get(id(task))
        if stream is None:
            stream = self._streams[id(task)] = self.ledger.stream(task.origin)
        return stream

    def _part(self, task: Task, outputs: list[Any]) -> None:
        if not self.stopped:
            self._parts.append((task, outputs))
            self.pump()

    def _hand_on_parts(self) -> bool:
        """Move streamed outputs on; False if the output is full and parts remain."""
        while self._parts:
            if self.sink.room <= 0:
                return False
            task, outputs = self._parts.popleft()
            children = self._stream_of(task).children(outputs)
            self.meter.last.emitted += len(children)
            self.sink.put(children)
            self.pool.grant(task)
        return True

    def _settle(self, task: Task) -> None:
        stream = self._streams.pop(id(task), None)
        if stream is None:
            super()._settle(task)
        elif isinstance(task.tag, Failed):
            self.ledger.stream_ended(stream, task.tag, DEAD)
        else:
            self.ledger.stream_ended(stream, fate=SKIPPED if task.tag is SKIPPED_TAG else FILTERED)

    def _hand_on(self) -> bool:
        if not self._streaming:
            return super()._hand_on()
        while self._exit and self._exit[0].tag is not None:
            self._inflight -= 1
            self._settle(self._exit.popleft())
        return self.sink.room > 0

    # -- keys -------------------------------------------------------------------------------------------------------

    def _into_lanes(self, tasks: list[Task]) -> list[Task]:
        """Those that can start now; the others wait behind the item of their key that is at work."""
        starting = []
        assert self._key is not None
        for task in tasks:
            try:
                key = self._key(task.value)
                lane = self._lanes.get(key)
            except (Exception, CancelledError) as error:
                task.outcome = FAILED
                if self._resolve_key(task, error):
                    self._exit.append(task)
                continue
            self._lane_of[id(task)] = key
            if lane is None:
                self._lanes[key] = deque()
                starting.append(task)
            else:
                lane.append(task)
        return starting

    def _resolve_key(self, task: Task, error: BaseException) -> bool:
        """An item whose key can't be told fails at once: asking again would say the same."""
        self.policies[0].tried += 1
        verdict = self.policies[0].give_up(task.value, task.origin, error, 1)
        if verdict.kind == RAISE:
            return self._raise(task, verdict.error)
        assert verdict.failed is not None
        if verdict.kind == KEEP_IT:
            return self._keep(task, verdict.failed)
        task.tag = verdict.failed if verdict.kind == DEAD_LETTER else SKIPPED_TAG
        return True

    def withdraw(self, task: Task) -> bool:
        lane = self._lanes.get(self._lane_of.get(id(task), self))
        if lane is not None and task in lane:
            lane.remove(task)
            del self._lane_of[id(task)]
            self._inflight -= 1
            return True
        if not super().withdraw(task):
            return False
        self._counted.pop(id(task), None)
        self._next_in_lane(task)
        return True

    def _next_in_lane(self, task: Task) -> None:
        """The item of a key has ended: the next of that key starts."""
        key = self._lane_of.pop(id(task), self)
        if key is self:
            return
        lane = self._lanes[key]
        if lane:
            self._submit([lane.popleft()])
        else:
            del self._lanes[key]
