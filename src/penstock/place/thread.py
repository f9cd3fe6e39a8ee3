"""Threads as a place: one shared queue of tasks, and resident threads that take from it.

*What is shared.* ``tasks`` (submitted, not started) and ``results`` (finished, not delivered) are deques, whose
``append`` and ``popleft`` are atomic. A task that waits behind a slow one is taken by whichever thread is free, so
prefetching never holds an item hostage. A thread writes to a task only between taking it and giving it to
``results``; everything else (counts, timers, callbacks) belongs to the loop.

*States of a thread.* Building (``bind``) → at work ⇄ at rest (in ``resting``, blocked on its own ``wake`` lock) →
ending (closing its objects) → ended. A thread that found the queue empty enters ``resting`` and looks once more:
a submit in between either sees it there or has left a task to be seen. Whoever takes a thread out of ``resting``
owes it exactly one release of ``wake``. A thread whose step timed out is *abandoned*: the loop has delivered the
task and started another thread in its place; its late result is dropped, and it ends when its call returns.
``lock`` decides which of the two came first.

*Delivery.* A finished task rings the loop (``call_soon_threadsafe``) only if no delivery is due. Between fast tasks
the loop waits two milliseconds before it looks again, so a wake-up carries hundreds of results; a thread that runs out
of tasks while results wait ``hurries`` the loop. Flags are cleared before the deque is read, so nothing is missed.

*Who cancels what.* Nobody can cancel a thread. ``abort`` drops what waits, cancels and awaits the awaitables that
threads wait for, releases threads that wait for a grant, and gives the others GRACE real seconds. ``open`` and
``close`` cancelled half way abort first. ``abort`` cancelled half way leaves the threads to end by themselves;
they call nothing back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from typing import Any

from penstock.errors import AbandonedThreads, StageTimeout
from penstock.place.base import GRACE, PART_SIZE, TIMED_OUT, Chain, Pool, Task, outside
from penstock.place.crew import Exchange, Stamp, Stream, Worker

__all__ = ["ThreadPool"]

_DELIVER_EVERY = 0.002
"""Seconds between deliveries while threads have more to do: each takes the interpreter from threads at work."""

_AHEAD = 0.012
"""Seconds of work that may wait for each thread. Busy threads keep the loop waiting for the interpreter for up to
5 ms, its switch interval; with less ahead they run dry each time, and waking them costs more than fast tasks do."""

_MOST_AHEAD = 1024
_FAST = math.log(0.0002)
"""Tasks slower than this ring the loop for each result."""

_log = logging.getLogger("penstock")


class ThreadPool(Pool):
    """``workers`` daemon threads, named ``penstock-<chain>-<index>``, in copies of the context that opened the pool.

    A timeout runs from the moment the thread starts the step; for a STREAM step it runs anew for each output.
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
        exchange = self._exchange = Exchange(chain)
        exchange.log_service = math.log(_AHEAD)
        exchange.deliver = self._deliver
        exchange.on_built = self._on_built
        exchange.on_ended = self._on_ended
        exchange.on_blocked = self._on_blocked
        self._workers: list[Worker] = []
        self._alive: set[Worker] = set()
        self._opened = False
        self._change: asyncio.Future[None] | None = None
        self._delivery: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._shortest = min((step.timeout for step in chain.steps if step.timeout is not None), default=math.inf)
        self._out = 0
        self._counted = 0
        self._gave_up = 0

    @property
    def in_progress(self) -> int:
        return sum(worker.task is not None and not worker.abandoned for worker in self._workers)

    @property
    def abandoned(self) -> list[str]:
        """The names of the threads that timed out and still run."""
        return [worker.thread.name for worker in self._alive if worker.abandoned]

    async def open(self) -> None:
        self._exchange.loop = asyncio.get_running_loop()
        try:
            for index in range(self.workers):
                self._workers.append(self._start(index))
            while any(worker.building for worker in self._workers):
                self._raise_error()
                await self._changed()
            self._raise_error()
        except BaseException:
            await self.abort()
            raise
        self._opened = True

    def _raise_error(self) -> None:
        for worker in self._workers:
            if worker.error is not None:
                raise worker.error

    def _start(self, index: int) -> Worker:
        worker = Worker(self._exchange, index)
        name = f"penstock-{self.chain.name}-{index}"
        worker.thread = threading.Thread(target=copy_context().run, args=(worker.main,), name=name, daemon=True)
        worker.thread.start()
        self._count(1)
        self._alive.add(worker)
        return worker

    def _count(self, change: int) -> None:
        self._counted += change
        outside.count += change

    async def _changed(self) -> None:
        """Wait until a thread was built or ended."""
        if self._change is None or self._change.done():
            self._change = self._exchange.loop.create_future()
        await asyncio.shield(self._change)

    def _on_change(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    def _on_built(self, worker: Worker) -> None:
        worker.building = False
        if not self._exchange.ending:
            self._count(-1)
        self._on_change()

    def _on_ended(self, worker: Worker) -> None:
        worker.thread.join()  # calling this was its last act
        self._alive.discard(worker)
        if worker.building:
            self._on_built(worker)
        if worker.error is not None and self._opened and not self._exchange.ending and not worker.abandoned:
            self.failed(worker.error)
        self._on_change()

    def room(self) -> int:
        ahead = int(self.workers * _AHEAD / math.exp(self._exchange.log_service))
        ahead = min(max(ahead, self.workers), _MOST_AHEAD)
        return max(0, self.workers + ahead - self._out)

    def submit(self, tasks: Sequence[Task]) -> None:
        self._exchange.tasks.extend(tasks)
        self._out += len(tasks)
        self._count(len(tasks))
        for _ in tasks:
            if not self._exchange.wake_one():
                break
        if not self._exchange.due and self._exchange.log_service < _FAST:
            self._deliver_later()
        if self._exchange.timed and self._deadline is None:
            self._deadline = self._exchange.loop.call_later(self._shortest, self._check_deadlines)

    def withdraw(self, task: Task) -> bool:
        try:
            self._exchange.tasks.remove(task)
        except ValueError:
            return False
        self._out -= 1
        self._count(-1)
        return True

    def halt(self) -> None:
        self._exchange.tasks.clear()

    def _deliver_later(self) -> None:
        exchange = self._exchange
        self._delivery = exchange.loop.call_later(_DELIVER_EVERY, self._deliver_on_time)
        exchange.delayed = True
        exchange.due = True  # last: from here on, threads rely on the timer

    def _deliver_on_time(self) -> None:
        self._exchange.delayed = False
        self._deliver()

    def _deliver(self) -> None:
        """Hand over what is finished; look again soon if more is soon to come."""
        exchange = self._exchange
        if not exchange.delayed:
            exchange.due = False
        exchange.hurried = False
        if exchange.ending:
            return
        flowed = self.chain.streams and self._flush_streams()
        results = exchange.results
        finished = [results.popleft() for _ in range(len(results))]
        if finished:
            self._out -= len(finished)
            self._count(-len(finished))
            self.done(finished)
        if (flowed or (finished and exchange.tasks)) and not exchange.due and not exchange.ending:
            self._deliver_later()

    # -- streams ----------------------------------------------------------------------------------------------------

    def grant(self, task: Task) -> None:
        for worker in self._workers:
            stream = worker.stream
            if stream is not None and stream.task is task:
                stream.granted += 1
                self._flush(stream)
                return

    def _flush_streams(self) -> bool:
        flowed = False
        for worker in self._workers:
            stream = worker.stream
            if stream is not None and self._flush(stream):
                flowed = True
        return flowed

    def _flush(self, stream: Stream) -> bool:
        """Hand over one part, if there is one and it may be; a thread that waits for space goes on."""
        if not stream.granted or not stream.buffer or self._exchange.ending:
            return False
        stream.granted -= 1
        self._hand_over(stream)
        return True

    def _hand_over(self, stream: Stream) -> None:
        buffer = stream.buffer
        outputs = [buffer.popleft() for _ in range(min(len(buffer), PART_SIZE))]
        with stream.changed:
            if stream.uncounted:
                stream.uncounted = False
                self._count(1)
            stream.changed.notify()
        assert self.part is not None
        self.part(stream.task, outputs)

    def _on_blocked(self, stream: Stream) -> None:
        """The thread waits for space: it goes on now, or waits for a grant and isn't at work until then."""
        self._flush(stream)
        with stream.changed:
            waits = 0 < stream.bound <= len(stream.buffer)
            if waits and not stream.granted and not stream.uncounted and not self._exchange.ending:
                stream.uncounted = True
                self._count(-1)

    # -- timeouts ----------------------------------------------------------------------------------------------------

    def _check_deadlines(self) -> None:
        """Give up on steps that are over time; look again when the next one may be."""
        self._deadline = None
        if self._exchange.ending or not self._out:
            return
        now = time.monotonic()
        following = now + self._shortest  # a step that starts later can't be over before
        for worker in tuple(self._workers):
            with worker.lock:
                if worker.stamp is None:
                    continue
                deadline = worker.stamp[3]
                if deadline > now:
                    following = min(following, deadline)
                    continue
                worker.abandoned = True  # from here on its thread touches the task no more
            if not self._abandon(worker, worker.stamp):
                break
        else:
            self._deadline = self._exchange.loop.call_later(max(following - now, 0.001), self._check_deadlines)
        self._deliver()

    def _abandon(self, worker: Worker, stamp: Stamp) -> bool:
        """Take the task from a thread that is over time, and put another in its place; False if there were too many."""
        task, at, given, _ = stamp
        step = self.chain.steps[at]
        assert step.timeout is not None
        task.at = at
        task.value = given
        task.error = StageTimeout(step.name, step.timeout)
        task.outcome = TIMED_OUT
        task.seconds = [step.timeout]
        self._exchange.results.append(task)
        self._gave_up += 1
        worker.thread.name += f" (timed out, number {self._gave_up})"
        if worker.awaiting is not None:
            worker.awaiting.cancel()
        if worker.stream is not None and worker.stream.buffer:
            self._hand_over(worker.stream)  # what came in time counts, granted or not
        count = len(self.abandoned)
        if count > self.workers * self.chain.attempts:
            self.failed(AbandonedThreads(self.chain.name, count))
            return False
        try:
            self._workers[worker.index] = self._start(worker.index)
        except RuntimeError as error:  # the system has no room for another thread
            self.failed(error)
            return False
        return True

    # -- the end ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        try:
            self._end()
            while self._alive_now():
                await self._changed()
        except BaseException:
            await self.abort()
            raise
        self._count(-self._counted)
        self._raise_error()

    def _alive_now(self) -> list[Worker]:
        return [worker for worker in self._alive if not worker.abandoned]

    def _end(self) -> None:
        self._exchange.ending = True
        for timer in (self._delivery, self._deadline):
            if timer is not None:
                timer.cancel()
        while self._exchange.wake_one():
            pass
        self._count(len(self._alive_now()) - self._counted)  # until they have ended, time is real

    async def abort(self) -> None:
        if self._exchange.aborted:
            return
        self._exchange.aborted = True
        self._exchange.tasks.clear()
        self._end()
        for worker in self._workers:
            if worker.stream is not None:
                with worker.stream.changed:
                    worker.stream.changed.notify()
        for awaited in self._exchange.awaited:
            awaited.cancel()
        try:
            if self._exchange.awaited:
                await asyncio.wait(self._exchange.awaited)
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    while self._alive_now():
                        await self._changed()
            left = sorted(worker.thread.name for worker in self._alive)
            if left:
                _log.warning(
                    "stage %r: left behind, still in a call: %s. A thread can't be killed; it ends when the call "
                    "returns, or with the process",
                    self.chain.name,
                    ", ".join(left),
                )
        finally:
            self._count(-self._counted)
