"""The event loop as a place: resident coroutines that take one task after the other.

States of a resident: *asleep* (waiting for a task), *at work* (awaiting a user's function), *waiting for a grant*
(its stream's parts aren't wanted yet: it counts as at work). There is never a task or future per item.

Residents are made when they are needed. A resident that takes a task while more wait rouses two others, so 1,024
residents stand after ten turns of the loop; one that never suspends finds the queue empty before they run.
It yields after a millisecond, or it would starve commits, signals and leases.

Who cancels what: only ``abort`` cancels residents, and it awaits them. A CancelledError that a user's function
raises by itself is that task's failure. If anybody else cancels a resident (the loop is shut down, or a function
cancels the task it runs in), that says nothing about the item: the pool has failed, and the item isn't settled.
Every await here leaves the task either in the queue or with its resident;
``abort`` drops both, and the caller knows which tasks never came back.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from typing import Any

from penstock.place.base import (
    DROPPED,
    FAILED,
    KEEP,
    MAP,
    OK,
    PART_SIZE,
    PARTS_OUT,
    SLICE,
    SPREAD,
    STREAM,
    TIMED_OUT,
    Pool,
    Task,
    as_failure,
    is_async,
    spread_async,
)
from penstock.place.objects import bind, close_all_async

__all__ = ["LoopPool", "clock_of", "is_cancelled"]

_YIELD_AFTER = 0.001
_ALWAYS_TIMED = 0.0001
_FIRST_SAMPLES = 128
_LEAST_OFTEN = 256  # of short ones, every so manieth is timed; the first ones more often
_LOOK_EVERY = 8
_MOST_AHEAD = 512
_WELL = (OK, DROPPED)


def clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """A clock with microseconds that follows the loop's: a virtual loop's time is virtual, uvloop's is too coarse."""
    return time.perf_counter if type(loop).__module__.startswith("uvloop") else loop.time


def is_cancelled() -> bool:
    """Whether somebody cancelled the running task; if not, a CancelledError comes from what it calls."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Stream:
    """One expansion: what it gave and nobody took, how many parts may be handed over, and who waits for more.

    Its timeout runs anew for each output, and not while it waits for a grant.
    """

    __slots__ = ("left", "part", "scope", "timeout", "waiter")

    def __init__(self, scope: asyncio.Timeout | None, timeout: float | None) -> None:
        self.part: list[Any] = []
        self.left = PARTS_OUT
        self.waiter: asyncio.Future[None] | None = None
        self.scope = scope
        self.timeout = timeout


class LoopPool(Pool):
    """Up to ``workers`` resident coroutines on the loop that opened the pool."""

    async def open(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._clock = clock_of(loop)
        self._calls, self._closers, failure = bind(self.chain)  # first: if it fails, there is nothing to abort
        if failure is not None:
            await close_all_async(self._closers, self.chain.name)
            raise failure
        self._queue: deque[Task] = deque()
        self._finished: list[Task] = []
        self._asleep: list[asyncio.Future[None]] = []
        self._rousing = 0
        self._residents: list[asyncio.Task[None]] = []
        self._streams: dict[int, _Stream] = {}
        self._aborting = False
        self._timed = True
        self._until_sample = self._sample_every = _LOOK_EVERY
        self._samples = 0
        self._ahead = self.workers
        steps = self.chain.steps
        self._plain = all(step.verb == MAP and step.timeout is None and is_async(step.call) for step in steps)

    @property
    def in_progress(self) -> int:
        return len(self._residents) - len(self._asleep) - self._rousing

    def room(self) -> int:
        return max(0, self.workers + self._ahead - self.in_progress - len(self._queue))

    def submit(self, tasks: Sequence[Task]) -> None:
        self._queue.extend(tasks)
        if not self._rousing:
            self._rouse()

    def grant(self, task: Task) -> None:
        stream = self._streams.get(id(task))
        if stream is None:
            return
        stream.left += 1
        if stream.waiter is None:
            self._flush(task, stream)
        elif not stream.waiter.done():
            stream.waiter.set_result(None)

    def withdraw(self, task: Task) -> bool:
        try:
            self._queue.remove(task)
        except ValueError:
            return False
        return True

    def halt(self) -> None:
        if hasattr(self, "_queue"):
            self._queue.clear()

    def _rouse(self) -> None:
        """Wake a sleeping resident, or make one; at most two are on their way at a time."""
        while self._asleep:
            asleep = self._asleep.pop()
            if not asleep.done():  # or its resident was cancelled
                self._rousing += 1
                asleep.set_result(None)
                return
        if len(self._residents) < self.workers and not self._aborting:
            self._rousing += 1
            resident = self._loop.create_task(self._reside(), name=f"penstock {self.chain.name}")
            self._residents.append(resident)

    def _deliver(self) -> None:
        """Hand over what is finished: when the queue ran dry, and in the turn after something was."""
        if self._finished and not self._aborting:
            finished = self._finished.copy()
            self._finished.clear()
            self.done(finished)

    async def _reside(self) -> None:
        self._rousing -= 1
        queue, finished = self._queue, self._finished
        calls, clock, plain = self._calls, self._clock, self._plain
        turn_ends = clock() + _YIELD_AFTER
        countdown = _LOOK_EVERY
        roused = True
        try:
            while True:
                if not queue:
                    self._deliver()
                    if self._aborting:
                        return
                    if not queue:
                        asleep: asyncio.Future[None] = self._loop.create_future()
                        self._asleep.append(asleep)
                        await asleep
                        self._rousing -= 1
                        roused = True
                        turn_ends = clock() + _YIELD_AFTER
                        continue
                task = queue.popleft()
                if roused:
                    roused = False
                    if queue and not self._rousing:
                        self._rouse()
                        self._rouse()
                if plain:
                    step = task.at
                    value = task.value
                    timed = self._timed
                    try:
                        if timed:
                            began = clock()
                            seconds = []
                            for call in calls[step:]:
                                value = await call(value)
                                now = clock()
                                seconds.append(now - began)
                                began = now
                                step += 1
                            self._sampled(task, seconds)
                        else:
                            for call in calls if step == 0 else calls[step:]:
                                value = await call(value)
                                step += 1
                    except BaseException as error:
                        if timed:
                            seconds.append(clock() - began)
                            self._sampled(task, seconds)
                        self._fail(task, step, value, error)
                    else:
                        task.value = value
                        task.outcome = OK
                else:
                    await self._run(task)
                if not finished:
                    self._loop.call_soon(self._deliver)
                finished.append(task)
                if (
                    task.outcome not in _WELL
                ):  # at once: this may be the end of the run, and then no other call may start
                    self._deliver()
                countdown -= 1
                if not countdown:
                    countdown = _LOOK_EVERY
                    self._until_sample -= _LOOK_EVERY
                    if self._until_sample <= 0:
                        self._timed = True
                    if clock() > turn_ends:
                        await asyncio.sleep(0)
                        turn_ends = clock() + _YIELD_AFTER
        except asyncio.CancelledError as error:
            if not self._aborting:  # whoever cancelled it, between two items or in one: the pool has failed
                self.failed(as_failure(self.chain.name, error))
            raise

    def _sampled(self, task: Task, seconds: list[float]) -> None:
        """Keep these times; long ones are always taken, short ones now and then."""
        task.seconds = seconds
        service = sum(seconds)
        self._samples += 1
        self._timed = service >= _ALWAYS_TIMED and self._samples < _FIRST_SAMPLES
        if service < _ALWAYS_TIMED:
            self._sample_every = min(2 * self._sample_every, _LEAST_OFTEN)
        self._until_sample = self._sample_every
        fits = min(int(SLICE / service) if service > 0 else _MOST_AHEAD, _MOST_AHEAD)
        self._ahead = max(self.workers, (self._ahead + fits) // 2)

    def _fail(self, task: Task, step: int, value: Any, error: BaseException) -> None:
        if self._aborting and isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            raise error
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise error
        task.at = step
        task.value = value
        task.error = error
        task.outcome = FAILED

    async def _run(self, task: Task) -> None:
        """One task with everything a step may have: verbs, timeouts, functions that may or may not be awaited."""
        clock = self._clock
        seconds: list[float] = []
        step = task.at
        value = task.value
        scope: asyncio.Timeout | None = None
        steps = self.chain.steps
        try:
            while step < len(steps):
                began = clock()
                timeout = steps[step].timeout
                if timeout is None:
                    result = await self._step(task, step, value, None)
                else:
                    async with asyncio.timeout(timeout) as scope:
                        result = await self._step(task, step, value, scope)
                seconds.append(clock() - began)
                if steps[step].verb == KEEP:
                    if not result:
                        task.at = step
                        task.value = value
                        task.outcome = DROPPED
                        return
                else:
                    value = result
                step += 1
        except BaseException as error:
            seconds.append(clock() - began)
            self._fail(task, step, value, error)
            if scope is not None and scope.expired() and isinstance(error, TimeoutError):
                task.outcome = TIMED_OUT
        else:
            task.value = value
            task.outcome = OK
        finally:
            if self._timed:
                self._sampled(task, seconds)

    async def _step(self, task: Task, at: int, value: Any, scope: asyncio.Timeout | None) -> Any:
        step = self.chain.steps[at]
        result = self._calls[at](value)
        if step.verb == SPREAD:
            return await spread_async(step.name, result)
        if step.verb == STREAM:
            return await self._flow(task, result, _Stream(scope, step.timeout))
        if inspect.isawaitable(result):
            result = await result
        return result

    async def _flow(self, task: Task, result: Any, stream: _Stream) -> None:
        """Hand an expansion over in parts, waiting for a grant when two are out."""
        self._streams[id(task)] = stream
        try:
            if inspect.isawaitable(result):
                result = await result
            clock = self._clock
            part = stream.part
            began = clock()
            if isinstance(result, AsyncIterable):
                async for output in result:
                    if not part:
                        self._loop.call_soon(self._flush, task, stream)  # the next output may be long in coming
                    part.append(output)
                    if len(part) >= PART_SIZE or clock() - began >= SLICE:
                        await self._hand_over(task, stream)
                        began = clock()
                    self._renew(stream)
            else:
                iterable: Iterable[Any] = result
                for output in iterable:
                    part.append(output)
                    if len(part) >= PART_SIZE or clock() - began >= SLICE:
                        await self._hand_over(task, stream)
                        began = clock()
            if part:
                await self._hand_over(task, stream)
        except BaseException:
            if not self._aborting:
                stream.left = max(stream.left, 1)  # what came before the failure counts, granted or not
                self._flush(task, stream)
            raise
        finally:
            del self._streams[id(task)]
            if isinstance(result, AsyncGenerator):
                await result.aclose()

    def _renew(self, stream: _Stream) -> None:
        if stream.scope is not None and stream.timeout is not None:
            stream.scope.reschedule(self._loop.time() + stream.timeout)

    async def _hand_over(self, task: Task, stream: _Stream) -> None:
        if stream.left <= 0:
            if stream.scope is not None:
                stream.scope.reschedule(None)
            while stream.left <= 0:
                stream.waiter = self._loop.create_future()
                await stream.waiter
                stream.waiter = None
            self._renew(stream)
        self._flush(task, stream)

    def _flush(self, task: Task, stream: _Stream) -> None:
        """Hand over what there is, if that may be and the stream still flows."""
        if stream.part and stream.left > 0 and self._streams.get(id(task)) is stream:
            stream.left -= 1
            part = stream.part.copy()
            stream.part.clear()
            assert self.part is not None
            self.part(task, part)

    async def close(self) -> None:
        """End the residents (all asleep by now), then close the objects they shared."""
        await self.abort()

    async def abort(self) -> None:
        if not hasattr(self, "_residents") or self._aborting:
            return
        self._aborting = True
        self._queue.clear()
        for resident in self._residents:
            resident.cancel()
        if self._residents:
            await asyncio.wait(self._residents)
        self._residents.clear()
        for task in self._finished:
            task.error = None  # its traceback holds a resident's frame, which may hold the task: a cycle nobody sees
        self._finished.clear()
        failure = await close_all_async(self._closers, self.chain.name)
        if failure is not None:
            raise failure
