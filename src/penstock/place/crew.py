"""The thread's side of ``ThreadPool``: what a thread does with a task, and what it shares with the loop.

The states of a thread and who may do what stand in ``penstock.place.thread``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from penstock.place.base import (
    DROPPED,
    FAILED,
    KEEP,
    MAP,
    OK,
    PART_SIZE,
    PARTS_OUT,
    SPREAD,
    STREAM,
    Chain,
    Task,
    as_failure,
    set_worker_index,
    spread,
    spread_async,
)
from penstock.place.loop import is_cancelled
from penstock.place.objects import bind, close_all

__all__ = ["PART_TIME", "Exchange", "Stamp", "Stream", "Worker"]

PART_TIME = 0.004
"""Seconds of a stream's work in one part: what is slow to make is large, or dear, and not wanted by the thousand."""

_ALWAYS_TIMED = 0.0001
_SAMPLE_EVERY = 128
_MOST_PLAIN = 1000

Stamp = tuple[Task, int, Any, float]
"""What a thread is at: the task, the step, what the step was given, and the monotonic time when it is over time."""

_NO = object()
"""What a KEEP step makes of a value that is to be dropped."""


class _Ended(BaseException):
    """Raised in a thread, by penstock's own code, when there is nobody left to work for."""


class Stream:
    """The outputs of one expansion that the loop hasn't taken yet."""

    __slots__ = ("bound", "buffer", "changed", "granted", "task", "uncounted")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.buffer: deque[Any] = deque()
        self.changed = threading.Condition()
        self.granted = PARTS_OUT
        self.bound = 0  # the thread waits until fewer outputs than this lie in the buffer; 0: it doesn't wait
        self.uncounted = False  # … and isn't counted as outside


class Exchange:
    """What the threads of a pool and its loop share."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.timed = any(step.timeout is not None for step in chain.steps)
        self.loop: asyncio.AbstractEventLoop
        self.tasks: deque[Task] = deque()
        self.results: deque[Task] = deque()
        self.resting: dict[Worker, None] = {}
        self.awaited: set[asyncio.Task[None]] = set()
        self.due = False  # a delivery will come: by a ring that is on its way, or by the timer
        self.delayed = False  # … by the timer
        self.hurried = False  # … and a thread asked for it at once
        self.ending = False
        self.aborted = False
        # Of the geometric mean of the service time: a few very slow tasks among fast ones hardly move it.
        self.log_service = 0.0
        self.samples = 0
        self.deliver: Callable[[], None]
        self.on_built: Callable[[Worker], None]
        self.on_ended: Callable[[Worker], None]
        self.on_blocked: Callable[[Stream], None]

    def call(self, function: Callable[..., None], *args: Any) -> bool:
        """Have the loop call this. If the loop is closed (False), there is nobody left to tell."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)
            return True
        return False

    def ring(self) -> None:
        """Have the loop deliver, unless it is about to."""
        if not self.due:
            self.due = True
            self.call(self.deliver)

    def wake_one(self) -> bool:
        """Wake a resting thread; False if there is none."""
        try:
            worker, _ = self.resting.popitem()
        except KeyError:
            return False
        worker.wake.release()
        return True


class Worker:
    """One thread: it builds what the steps call, runs one task after the other, and closes what it built."""

    def __init__(self, exchange: Exchange, index: int) -> None:
        self.exchange = exchange
        self.index = index
        self.thread: threading.Thread
        self.wake = threading.Lock()
        self.wake.acquire()
        self.task: Task | None = None
        self.building = True
        self.error: BaseException | None = None  # what ended it: a constructor, a ``close``, or a bug
        self.lock = threading.Lock()  # over the next two, in chains with timeouts
        self.stamp: Stamp | None = None
        self.abandoned = False
        self.awaiting: asyncio.Task[None] | None = None
        self.stream: Stream | None = None
        self.plain: set[type] = {type(None), bool, int, float, str, bytes, list, dict, tuple}  # nothing to await

    def main(self) -> None:
        exchange = self.exchange
        set_worker_index(self.index)
        calls, closers, self.error = bind(exchange.chain)
        if self.error is None:
            exchange.call(exchange.on_built, self)
            try:
                self._serve(calls)
            except _Ended:
                pass
            except BaseException as error:
                self.error = error
        self.task = self.stamp = self.stream = None
        failure = close_all(closers, exchange.chain.name, self._closed)
        self.error = self.error or failure
        exchange.call(exchange.on_ended, self)

    def _closed(self, result: Any) -> None:
        if hasattr(result, "__await__"):
            self._await(result, closing=True)

    def _rest(self) -> bool:
        """Sleep until there may be a task; False when there will be none."""
        exchange = self.exchange
        if exchange.results and exchange.delayed and not exchange.hurried:
            exchange.hurried = True
            exchange.call(exchange.deliver)
        exchange.resting[self] = None
        if exchange.tasks or exchange.ending:
            try:
                del exchange.resting[self]
            except KeyError:
                self.wake.acquire()  # taken out already: the release is on its way
        else:
            self.wake.acquire()
        return not exchange.ending or bool(exchange.tasks)

    def _serve(self, calls: list[Any]) -> None:
        """Run one task after the other until the pool ends or this thread is abandoned."""
        exchange = self.exchange
        take = exchange.tasks.popleft
        give = exchange.results.append
        plain = self.plain
        simple = all(step.verb == MAP and step.timeout is None for step in exchange.chain.steps)
        until_sample = 1
        task: Task | None
        while True:
            try:
                self.task = task = take()
            except IndexError:
                task = value = result = self.task = None  # a thread at rest keeps nothing alive
                if self._rest():
                    continue
                return
            until_sample -= 1
            if simple and until_sample:  # the same as _run, without what costs time
                at = task.at
                value = task.value
                try:
                    for call in calls[at:] if at else calls:
                        result = call(value)
                        if type(result) not in plain:
                            result = self._settled(result)
                        value = result
                        at += 1
                except _Ended:
                    raise
                except BaseException as error:
                    self._fail(task, at, value, error)
                else:
                    task.value = value
                    task.outcome = OK
                task.seconds = None
            else:
                seconds = self._run(task, calls)
                if until_sample:
                    task.seconds = None
                else:
                    task.seconds = seconds
                    until_sample = self._sampled(seconds)
            give(task)
            if not exchange.due:
                exchange.ring()

    def _run(self, task: Task, calls: list[Any]) -> list[float]:
        """One task with everything a step may have; returns how long each step took."""
        clock = time.perf_counter
        seconds: list[float] = []
        outcome = OK
        error: BaseException | None = None
        at = task.at
        value = task.value
        while at < len(calls) and outcome == OK:
            began = clock()
            try:
                result = self._step(task, at, calls[at], value)
            except _Ended:
                raise
            except BaseException as raised:
                outcome = FAILED
                error = raised
            else:
                if result is _NO:
                    outcome = DROPPED
                else:
                    value = result
                    at += 1
            seconds.append(clock() - began)
        if self.exchange.timed:
            self._unstamp()
        if error is not None:
            self._fail(task, at, value, error)
        else:
            if outcome == DROPPED:
                task.at = at
            task.value = value
            task.outcome = outcome
        return seconds

    def _step(self, task: Task, at: int, call: Any, value: Any) -> Any:
        """What the step makes of the value; _NO if it is to be dropped."""
        if self.exchange.timed:
            self._stamp(task, at, value)
        result = call(value)
        here = self.exchange.chain.steps[at]
        verb = here.verb
        if verb == SPREAD:
            return self._spread(here.name, result)
        if verb == STREAM:
            return self._flow(task, at, value, result)
        result = self._settled(result)
        if verb == KEEP:
            return value if result else _NO
        return result

    def _fail(self, task: Task, at: int, value: Any, error: BaseException) -> None:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # it begins in the user's function, and keeps no frame of a resident thread
        task.at = at
        task.value = value
        task.error = error.with_traceback(trace)
        task.outcome = FAILED

    def _sampled(self, seconds: list[float]) -> int:
        """Note the service time of a task; returns in how many tasks to take the next sample."""
        service = max(sum(seconds), 1e-7)
        exchange = self.exchange
        exchange.samples += 1
        exchange.log_service += (math.log(service) - exchange.log_service) * max(1 / exchange.samples, 0.1)
        return 1 if service >= _ALWAYS_TIMED else min(exchange.samples, _SAMPLE_EVERY)

    def _stamp(self, task: Task, at: int, value: Any) -> None:
        """Start the clock of a step. Ends the thread if the loop gave up on it."""
        timeout = self.exchange.chain.steps[at].timeout
        stamp = (task, at, value, math.inf if timeout is None else time.monotonic() + timeout)
        with self.lock:
            if self.abandoned:
                raise _Ended
            self.stamp = stamp

    def _unstamp(self) -> None:
        with self.lock:
            if self.abandoned:
                raise _Ended
            self.stamp = None

    def _settled(self, result: Any) -> Any:
        """The result itself, or what it gives when awaited on the loop."""
        kind = type(result)
        if hasattr(kind, "__await__"):
            return self._await(result)
        if len(self.plain) < _MOST_PLAIN:  # a function may make a class per call
            self.plain.add(kind)
        return result

    def _spread(self, step: str, result: Any) -> list[Any]:
        if hasattr(result, "__await__") or isinstance(result, AsyncIterable):
            outputs: list[Any] = self._await(spread_async(step, result))
            return outputs
        return spread(step, result)

    # -- awaiting on the loop ------------------------------------------------------------------------------------

    def _await(self, awaitable: Any, *, closing: bool = False) -> Any:
        """Have the loop await this, and wait for what comes of it."""
        outcome: Future[Any] = Future()
        refused = self.exchange.aborted and not closing
        if refused or not self.exchange.call(self._begin_await, awaitable, outcome, closing):
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            raise _Ended
        return outcome.result()

    @property
    def _unwanted(self) -> bool:
        return self.exchange.aborted or self.abandoned

    def _begin_await(self, awaitable: Any, outcome: Future[Any], closing: bool) -> None:
        """On the loop: a task of its own for the awaitable."""

        async def settle() -> None:
            try:
                value = await awaitable
            except BaseException as error:  # also what would stop the loop: it belongs to the item
                if isinstance(error, asyncio.CancelledError) and is_cancelled() and not self._unwanted:
                    self.error = as_failure(self.exchange.chain.name, error)  # not the item's: the loop is shut down
                    error = _Ended()
                outcome.set_exception(error)
            else:
                outcome.set_result(value)

        def ended(settling: asyncio.Task[None]) -> None:
            if self.awaiting is settling:  # the thread may have gone on to the next one
                self.awaiting = None
            self.exchange.awaited.discard(settling)
            if not outcome.done():  # cancelled before it began
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
                outcome.set_exception(asyncio.CancelledError())

        settling = self.exchange.loop.create_task(settle(), name=self.thread.name)
        self.awaiting = settling
        self.exchange.awaited.add(settling)
        settling.add_done_callback(ended)
        if self._unwanted and not closing:
            settling.cancel()  # too late: whoever cancels the others has been here already

    # -- streams -------------------------------------------------------------------------------------------------

    def _flow(self, task: Task, at: int, value: Any, result: Any) -> None:
        """Lay the outputs out for the loop to take, a part ahead at most; returns when all are taken."""
        exchange = self.exchange
        timed = exchange.timed
        stream = self.stream = Stream(task)
        buffer = stream.buffer
        outputs = self._outputs(result)
        clock = time.perf_counter
        began = clock()
        try:
            for output in outputs:
                if exchange.aborted:
                    raise _Ended
                if timed:
                    self._stamp(task, at, value)
                buffer.append(output)
                if not exchange.due:
                    exchange.ring()
                ahead = len(buffer)
                if ahead >= PART_SIZE or (ahead and clock() - began >= PART_TIME):
                    self._wait_below(stream, ahead)
                    began = clock()
                    if timed:
                        self._stamp(task, at, value)
        except _Ended:
            close = getattr(outputs, "close", None)
            if close is not None:
                close()
            raise
        except BaseException:
            self._wait_below(stream, 1)
            raise
        self._wait_below(stream, 1)
        self.stream = None

    def _outputs(self, result: Any) -> Iterator[Any]:
        if hasattr(result, "__await__"):
            result = self._await(result)
        return self._pulled(result) if isinstance(result, AsyncIterable) else iter(result)

    def _pulled(self, outputs: AsyncIterable[Any]) -> Iterator[Any]:
        iterator = aiter(outputs)
        try:
            while True:
                try:
                    output = self._await(anext(iterator))
                except StopAsyncIteration:
                    return
                yield output
        finally:
            if isinstance(iterator, AsyncGenerator):
                self._await(iterator.aclose(), closing=True)

    def _wait_below(self, stream: Stream, bound: int) -> None:
        """Wait until fewer outputs than this lie in the buffer. No timeout runs meanwhile."""
        exchange = self.exchange
        if exchange.timed:
            self._unstamp()
        with stream.changed:
            if len(stream.buffer) < bound:
                return
            stream.bound = bound
            exchange.call(exchange.on_blocked, stream)
            while len(stream.buffer) >= bound and not exchange.aborted:
                stream.changed.wait()
            stream.bound = 0
        if exchange.aborted:
            raise _Ended
