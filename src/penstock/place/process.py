"""Processes as a place: worker processes that start afresh, and what waits for them.

*What is where.* A task that was submitted waits in ``_waiting`` until a worker may have it; then its value is
frozen into a chunk, and the task stays in that ``Link.tasks`` until its result is heard, in the order in which the
worker takes them. So at any moment each task is in exactly one of these, and what a dead worker had is known.

*Chunks* carry about a slice of work by the moving mean of service time, at most 512 tasks, about a megabyte, and no
more than a fair share of what waits. A worker has the chunk it runs and at most one more; none ahead when a task
takes 5 ms or the running chunk has been silent for so long, because what is sent can't be given to another.

*A worker's end.* Everything it had sent is heard first. If it had stamped a task that isn't back, that one is
charged: DIED, or what it was condemned for (its timeout, a part that can't be read). All others return to the front
of ``_waiting``: those it hadn't started, and those it had finished but not sent, which run again. (A stream's task
that handed over parts is never taken back: it is charged too.) A new worker takes the number. Workers that end by
themselves while their objects are being built, or three times in a row, before any result came back and with nothing
stamped, make the pool fail. Who is killed (SIGKILL, by whomever) has done nothing wrong, but ten in a row are too many.

*Timeouts.* One timer a worker, set for the earliest instant at which the step it may be in could be over time. When
it fires, the stamp says what the worker does and since when; then the worker is killed or the timer set again.

*Who cancels what.* ``abort`` kills every worker and waits for their ends; it calls nothing back. ``open`` and
``close`` cancelled half way abort first. ``abort`` cancelled half way: the workers are killed already, their
threads reap them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from penstock.errors import StageTimeout, WorkerDied
from penstock.place.base import (
    DIED,
    DROPPED,
    FAILED,
    GRACE,
    OK,
    PARTS_OUT,
    PENDING,
    SLICE,
    TIMED_OUT,
    Chain,
    Pool,
    Task,
    outside,
)
from penstock.place.link import Link, environment, what_to_start
from penstock.place.remote import FrozenError, refusal, thaw_error
from penstock.place.wire import CLOSE, DONE, GRANT, PART, READY, RESULTS, START, TASKS, Delivery, Parcel

__all__ = ["ProcessPool"]

_MOST = 512
"""Tasks in a chunk, at most."""

_HEAVY = 1024 * 1024
"""Bytes after which a chunk takes no further task."""

_SLOW = 0.005
"""Seconds of service, or of silence, from which nothing is sent ahead."""

_DEATHS = 3
_KILLS = 10
_log = logging.getLogger("penstock")


class ProcessPool(Pool):
    """``workers`` processes, started afresh: no fork, and the user's ``__main__`` isn't run again.

    A timeout runs from the moment the worker starts the step; for a STREAM step it runs anew for each output.
    TIMED_OUT and DIED tasks are as they were submitted: what steps in between had made of their value is gone with
    the worker; ``error`` of TIMED_OUT is a StageTimeout that names the step. A FAILED task returns to where it was
    submitted, too, if the value its step was given can't travel back.
    """

    def __init__(
        self,
        chain: Chain,
        workers: int,
        *,
        done: Callable[[list[Task]], None],
        failed: Callable[[BaseException], None],
        part: Callable[[Task, list[Any]], None] | None = None,
    ) -> None:
        super().__init__(chain, workers, done=done, failed=failed, part=part)
        self._links: list[Link] = []
        self._alive: set[Link] = set()
        self._waiting: deque[Task] = deque()
        self._out = 0
        self._counted = 0
        # Of the service time, in seconds: the geometric mean, which a few outliers hardly move.
        self._mean = _SLOW / 2
        self._log_mean = math.log(self._mean)
        self._deaths = 0
        self._opening: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._closing = False
        self._aborted = False
        self._broken = False
        self._close_error: BaseException | None = None
        self._shortest = min((step.timeout for step in chain.steps if step.timeout is not None), default=math.inf)
        self._start: tuple[Any, ...] = ()
        self._sent: dict[type, str] = {}
        self._environment: dict[str, str] = {}

    @property
    def in_progress(self) -> int:
        return sum(1 for link in self._links if link.tasks)

    @property
    def pids(self) -> list[int]:
        """The process numbers of the workers that run now."""
        return [link.pid for link in self._alive if link.pid is not None]

    # -- beginning --------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._start = what_to_start(self.chain, self._sent)
        self._environment = environment(self.workers)
        self._opening = self._loop.create_future()
        try:
            for index in range(self.workers):
                self._links.append(self._spawn(index))
            await self._opening
        except BaseException:
            await self.abort()
            raise
        self._opening = None

    def _spawn(self, index: int) -> Link:
        link = Link(
            index, self.chain.name, self._environment, dict(self._sent), heard=self._on_delivery, ended=self._on_ended
        )
        self._alive.add(link)
        self._hold(link, True)  # while it is being built, time is real
        link.send(link.postbox.frame(START, (index, *self._start)))
        return link

    def _on_ready(self, link: Link, error: BaseException | None) -> None:
        link.ready = True
        self._hold(link, False)
        if error is not None:
            link.closing = True
            self._fail(error)
        elif self._opening is not None:
            if all(link.ready for link in self._links) and not self._opening.done():
                self._opening.set_result(None)
        elif not self._closing:
            self._feed()

    def _fail(self, error: BaseException) -> None:
        if self._opening is not None:
            if not self._opening.done():
                self._opening.set_exception(error)
        elif not self._broken and not self._closing:
            self._broken = True
            self.failed(error)

    def _count(self, change: int) -> None:
        self._counted += change
        outside.count += change

    def _hold(self, link: Link, held: bool) -> None:
        """Count the worker itself among what is outside, or don't any more."""
        if link.held != held:
            link.held = held
            self._count(1 if held else -1)

    # -- tasks out --------------------------------------------------------------------------------------------------

    def room(self) -> int:
        ahead = 2 if self._mean < _SLOW else 1
        return max(0, self.workers * self._chunk() * ahead - self._out)

    def _chunk(self) -> int:
        return min(_MOST, max(1, int(SLICE / self._mean)))

    def submit(self, tasks: Sequence[Task]) -> None:
        self._waiting.extend(tasks)
        self._out += len(tasks)
        self._count(len(tasks))
        self._feed()

    def withdraw(self, task: Task) -> bool:
        try:
            self._waiting.remove(task)
        except ValueError:
            return False
        self._out -= 1
        self._count(-1)
        return True

    def _feed(self) -> None:
        """Give every worker that may have one a chunk: those without work first, who has been so for longest before."""
        if not self._waiting:
            return
        idle = [link for link in self._links if link.ready and not link.chunks and not link.closing]
        self._spread(sorted(idle, key=lambda link: link.since))
        if self._waiting and self._mean < _SLOW:
            recent = time.monotonic() - _SLOW
            self._spread([link for link in self._links if len(link.chunks) == 1 and link.since > recent])

    def _spread(self, links: list[Link]) -> None:
        most = self._chunk()
        for left in range(len(links), 0, -1):
            if not self._waiting:
                return
            share = -(-len(self._waiting) // left)
            self._send_chunk(links[-left], min(most, share))

    def _send_chunk(self, link: Link, most: int) -> None:
        waiting, tasks = self._waiting, link.tasks
        first = link.first + len(tasks)
        parcel = Parcel(link.postbox)
        add, values = parcel.add, parcel.values
        ats: dict[int, int] = {}
        refused: list[Task] = []
        while waiting and len(values) < most and parcel.size < _HEAVY:
            task = waiting.popleft()
            try:
                add(task.value)
            except Exception as error:
                self._refuse(task, task.at, task.value, error)
                refused.append(task)
                continue
            if task.at:
                ats[len(values) - 1] = task.at
            task.seconds = None
            tasks.append(task)
        if refused:
            self._loop.call_soon(self._finish, refused)
        count = len(values)
        if not count:
            return
        if not link.chunks:
            link.since = time.monotonic()
            if link.timer is None and self._shortest < math.inf:
                link.timer = self._loop.call_later(self._shortest, self._check_deadline, link)
        link.chunks.append(count)
        link.send(link.postbox.frame(TASKS, (first, ats or None), parcel))

    def _refuse(self, task: Task, at: int, value: Any, error: Exception) -> None:
        task.outcome = FAILED
        task.error = refusal(self.chain.steps[at].name, value, error)

    # -- what workers say -------------------------------------------------------------------------------------------

    def _on_delivery(self, link: Link, delivery: Delivery) -> None:
        if self._aborted:
            return
        kind = delivery.kind
        if kind == RESULTS:
            self._on_results(link, delivery)
        elif kind == PART:
            self._on_part(link, delivery)
        elif kind == READY:
            self._on_ready(link, None if delivery.body is None else thaw_error(delivery.body))
        elif kind == DONE:
            link.done = True
            if delivery.body is not None and self._close_error is None:
                self._close_error = thaw_error(delivery.body)
            if link.timer is not None:
                link.timer.cancel()
            link.timer = self._loop.call_later(GRACE, self._hurry, link)

    def _on_results(self, link: Link, delivery: Delivery) -> None:
        if link.condemned is not None and self.chain.streams:
            return  # parts of it weren't taken any more: its end settles it
        odd, timings, busy = delivery.body
        values = delivery.values
        count = len(values)
        first = link.first
        tasks = link.take_back(count)
        self._deaths = 0
        for number, seconds in timings:
            if number >= first:  # one that missed its result's frame is of no use
                tasks[number - first].seconds = seconds
        if not odd and delivery.plain:
            for task, value in zip(tasks, values, strict=True):
                task.value = value
                task.outcome = OK
        else:
            for index, task in enumerate(tasks):
                try:
                    if index in odd:
                        self._settle(task, delivery, index, *odd[index])
                    else:
                        task.value = delivery.thaw(index)
                        task.outcome = OK
                except Exception as error:
                    self._refuse(task, len(self.chain.steps) - 1, None, error)
            if any(task.outcome == PENDING for task in tasks):
                tasks = self._send_again(link, tasks)
        service = busy / count
        self._log_mean += (math.log(max(service, 1e-7)) - self._log_mean) * max(0.25, count / (count + 8))
        self._mean = math.exp(self._log_mean)
        if self.chain.streams:
            self._end_stream(link)
        self._finish(tasks)

    @staticmethod
    def _settle(
        task: Task, delivery: Delivery, index: int, outcome: int, at: int, error: FrozenError | None, moved: bool
    ) -> None:
        """What isn't OK. ``moved``: what the step was given travelled back, so the task now stands before it."""
        task.stopped = at
        if moved:
            with suppress(Exception):  # or it stays where it came in
                task.value = delivery.thaw(index)
                task.at = at
        elif outcome == DROPPED:
            task.at = at
        task.outcome = outcome
        task.error = None if error is None else thaw_error(error)

    def _send_again(self, link: Link, tasks: list[Task]) -> list[Task]:
        """Put back what a worker couldn't read for want of a class; returns the others."""
        link.postbox.pickler.forget()
        self._waiting.extendleft(reversed([task for task in tasks if task.outcome == PENDING]))
        return [task for task in tasks if task.outcome != PENDING]

    def _finish(self, tasks: list[Task]) -> None:
        if self._aborted:
            return
        self._out -= len(tasks)
        self._count(-len(tasks))
        self._feed()
        self.done(tasks)

    # -- streams ----------------------------------------------------------------------------------------------------

    def _on_part(self, link: Link, delivery: Delivery) -> None:
        if link.condemned is not None:
            return
        link.since = time.monotonic()
        link.parted = True
        link.parts_out += 1
        if link.parts_out == PARTS_OUT:  # it may have to wait for us: until then it isn't at work
            link.paused = True
            self._count(-1)
        try:
            outputs = [delivery.thaw(index) for index in range(len(delivery.values))]
        except Exception as error:
            self._condemn(link, link.first, FAILED, refusal(self.chain.steps[-1].name, None, error))
            return
        assert self.part is not None
        self.part(link.tasks[0], outputs)

    def grant(self, task: Task) -> None:
        for link in self._links:
            if link.tasks and link.tasks[0] is task and link.parts_out:
                link.parts_out -= 1
                if link.paused:
                    link.paused = False
                    self._count(1)
                link.send(link.postbox.frame(GRANT, link.first))
                return

    def _end_stream(self, link: Link) -> None:
        link.parts_out = 0
        link.parted = False
        if link.paused:
            link.paused = False
            self._count(1)

    # -- timeouts and deaths ----------------------------------------------------------------------------------------

    def _check_deadline(self, link: Link) -> None:
        link.timer = None
        link.drain()
        if self._aborted or not link.tasks or link.condemned is not None:
            return
        now = time.monotonic()
        due = now + self._shortest  # a step that starts later can't be over before
        number, step, began = link.stamp()
        if link.first <= number < link.first + len(link.tasks):
            limit = self.chain.steps[step].timeout
            if limit is not None and began < math.inf:
                if began + limit <= now:
                    self._condemn(link, number, TIMED_OUT, StageTimeout(self.chain.steps[step].name, limit))
                    return
                due = min(due, began + limit)
        if link.timer is None:  # what was heard just now may have set it
            link.timer = self._loop.call_later(max(due - now, 0.001), self._check_deadline, link)

    def _condemn(self, link: Link, number: int, outcome: int, error: BaseException) -> None:
        link.condemned = (number, outcome, error)
        link.kill()

    def _on_ended(self, link: Link, code: int | None, error: Exception | None) -> None:
        self._alive.discard(link)
        self._hold(link, False)
        if self._ended is not None and not self._alive and not self._ended.done():
            self._ended.set_result(None)
        over = link.ready and link.closing  # its end was expected, or reported already
        link.closing = True
        if self._closing and not self._aborted and link.ready and code and not link.done:
            self._close_error = self._close_error or WorkerDied(self.chain.name, code, "the closing of its objects")
        if self._aborted or self._closing or over:
            return
        if link.paused:
            self._end_stream(link)
        charged = self._charge(link, code)
        self._waiting.extendleft(reversed(link.tasks))
        link.tasks.clear()
        link.chunks.clear()
        if error is not None:
            self._fail(error)
            return
        if charged is None and link.condemned is None:
            self._deaths += 1
            most = _KILLS if code == -signal.SIGKILL else _DEATHS if self._opening is None else 1
            if self._deaths >= most:
                doing = "nothing yet" if self._opening is None else "the building of its objects"
                others = f", like the {most - 1} before it" if most > 1 else ""
                self._fail(WorkerDied(self.chain.name, code, f"{doing}{others}"))
                return
        try:
            self._links[link.index] = self._spawn(link.index)
        except Exception as problem:  # the system has no room for another process, or for the thread that waits for it
            self._fail(problem)
        if charged is not None:
            self._finish([charged])
        else:
            self._feed()

    def _charge(self, link: Link, code: int | None) -> Task | None:
        """Write its outcome into the task that this death is to be charged to, if there is one, and take it out."""
        stamped, step, _ = link.stamp()
        number, outcome, error = link.condemned or (stamped, DIED, code)
        if not link.first <= number < link.first + len(link.tasks):
            if not link.parted:
                return None
            number, outcome, error = link.first, DIED, code
        task = link.tasks[number - link.first]
        del link.tasks[number - link.first]
        task.outcome = outcome
        task.error = error
        task.stopped = step if number == stamped else task.at
        if outcome == TIMED_OUT:
            task.seconds = [self.chain.steps[step].timeout or 0.0]
        return task

    # -- the end ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        try:
            self._closing = True
            for link in self._alive:
                self._hold(link, True)
                link.closing = True
                link.send(link.postbox.frame(CLOSE, None))
            await self._all_ended()
        except BaseException:
            await self.abort()
            raise
        self._count(-self._counted)
        if self._close_error is not None:
            raise self._close_error

    def _hurry(self, link: Link) -> None:
        """It has closed its objects, and doesn't end: threads of the user's keep it."""
        _log.warning("stage %r: a worker that had closed its objects didn't end and was killed", self.chain.name)
        link.kill()

    async def _all_ended(self) -> None:
        if self._alive:
            self._ended = self._ended or self._loop.create_future()
            await asyncio.shield(self._ended)

    async def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        self._waiting.clear()
        self._count(-self._counted)
        for link in self._alive:
            link.held = False
            self._hold(link, True)
            link.kill()
        try:
            async with asyncio.timeout(GRACE):
                await self._all_ended()
        except TimeoutError:
            pids = ", ".join(map(str, sorted(self.pids)))
            _log.warning("stage %r: killed and still there after %g s: process %s", self.chain.name, GRACE, pids)
        finally:
            for link in self._alive:
                link.discard()
            self._count(-self._counted)
