"""Blocking work off the loop: a desk that does one call after the other, and a feed from a blocking iterator.

Both have one daemon thread of their own, which sleeps on a lock while it has nothing to do. What a thread and its
loop share is a deque; counts, futures and callbacks belong to the loop. Both count as *outside* while they work,
so a virtual clock doesn't jump meanwhile.

Who cancels what: nobody can cancel a blocking call. Cancelling ``Desk.call`` leaves the call to finish unobserved.
Cancelling or closing a feed asks its thread to stop before the next batch and waits for it, up to GRACE seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar

from penstock.errors import Closed
from penstock.flow.demand import Demand
from penstock.place.base import GRACE, SLICE, outside
from penstock.place.loop import clock_of

__all__ = ["Desk", "Ending", "chunks", "feed", "feed_each"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_BATCHES_AHEAD = 2
_LEAST_AHEAD = 16

_log = logging.getLogger("penstock")


class Ending:
    """The end of a thread: any number of loops wait for it, and count it as outside meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] | None = []  # None when it is over

    def over(self) -> None:
        """Tell all that wait: the thread's last act."""
        with self._lock:
            waiting, self._waiting = self._waiting, None
        for tell in waiting or ():
            tell()

    async def awaited(self) -> None:
        """Wait for it. Cancelling leaves the thread to end."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            outside.count -= 1
            if not ended.done():
                ended.set_result(None)

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # the loop is closed: nobody waits any more
                outside.count -= 1

        with self._lock:
            if self._waiting is None:
                return
            self._waiting.append(tell)
            outside.count += 1
        await ended


class Desk:
    """One thread that does what it is asked, one call after the other, in order; for a database or a file.

    The thread is a daemon called ``name``, started by the first call. May be used from any loop: each call is
    answered on the loop that asked.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._ending = Ending()

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function in the desk's thread; returns what it returns, raises what it raises.

        Cancelling leaves the call to be made and to finish in the background; its outcome is dropped.
        Raises Closed after ``close``.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        context = copy_context()

        def work() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = context.run(function, *args, **kwargs)
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                outside.count -= 1

        def settle(result: Any, error: BaseException | None) -> None:
            outside.count -= 1
            if not answer.done():
                answer.set_result((result, error))

        with self._lock:
            if self._closed:
                raise Closed(self.name)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._thread.start()
            outside.count += 1
            self._calls.put(work)
        result, error = await answer
        if error is not None:
            try:
                raise error
            finally:
                del error  # or the traceback would hold this frame, and the frame the traceback
        value: R = result
        return value

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            work()
            del work  # it holds the function's arguments
        self._ending.over()

    async def close(self) -> None:
        """Wait for what was called, then end the thread. Safe to call twice, and without any call before.

        Cancelling leaves the thread to finish what was called, and then end.
        """
        self.dismiss()
        if self._thread is not None:
            await self._ending.awaited()
            self._thread.join()  # telling was its last act

    def dismiss(self) -> None:
        """Let the thread end after what was called, and don't wait for it."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._calls.put(None)


class _Supply(Generic[T]):
    """What a feed's thread has made and the loop hasn't taken yet."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.loop = asyncio.get_running_loop()
        self.made: deque[T] = deque()
        self.space = threading.Condition()
        self.blocked = False  # the thread waits for space
        self.wanted = False  # the loop waits for more
        self.more: asyncio.Future[None] | None = None
        self.stopped = False
        self.ended = False
        self.error: BaseException | None = None
        self.counted = True
        outside.count += 1

    # In the thread.

    def work(self, make: Callable[[], Iterator[T]]) -> None:
        made = self.made
        try:
            products = make()
            try:
                for product in products:
                    if self.stopped:
                        break
                    made.append(product)
                    del product
                    if self.wanted:
                        self.wanted = False
                        self._tell(self._wake)
                    if len(made) >= self.bound:
                        self._wait_for_space()
            finally:
                if isinstance(products, Generator):
                    products.close()
        except BaseException as error:
            self.error = error
        self._tell(self._end)

    def _tell(self, function: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(function)

    def _wait_for_space(self) -> None:
        with self.space:
            if len(self.made) < self.bound or self.stopped:
                return
            self.blocked = True
            self._tell(self._rest)
            while len(self.made) >= self.bound and not self.stopped:
                self.space.wait()
            self.blocked = False

    # On the loop.

    def _count(self, counted: bool) -> None:
        outside.count += counted - self.counted
        self.counted = counted

    def _rest(self) -> None:
        with self.space:
            if self.blocked and len(self.made) >= self.bound and not self.stopped:
                self._count(False)

    def _wake(self) -> None:
        if self.more is not None and not self.more.done():
            self.more.set_result(None)

    def _end(self) -> None:
        self.ended = True
        self._count(False)
        self._wake()

    def make_space(self) -> None:
        """After taking: let a thread that waits go on."""
        if self.blocked:
            with self.space:
                if self.blocked:
                    self._count(True)
                    self.space.notify()

    async def wait(self) -> bool:
        """Wait until something is there to be taken; False at the end."""
        while not self.made and not self.ended:
            self.more = self.loop.create_future()
            self.wanted = True
            if self.made:  # made before the thread could see that it's wanted
                self.wanted = False
                break
            await self.more
        return bool(self.made)

    async def stop(self, thread: threading.Thread) -> None:
        """Have the thread end after what it is doing, and wait for it up to GRACE seconds."""
        with self.space:
            self.stopped = True
            if self.blocked:
                self._count(True)
            self.space.notify()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    while not self.ended:
                        self.more = self.loop.create_future()
                        await self.more
        finally:
            self._count(False)
        if self.ended:
            thread.join()  # telling was its last act
        else:
            _log.warning(
                "%s is left behind after %g s, still reading. A thread can't be killed; it ends when its read "
                "returns, or with the process",
                thread.name,
                GRACE,
            )


def _start(supply: _Supply[T], make: Callable[[], Iterator[T]], name: str) -> threading.Thread:
    thread = threading.Thread(target=copy_context().run, args=(supply.work, make), name=name, daemon=True)
    thread.start()
    return thread


async def feed(make: Callable[[], Iterator[Sequence[T]]], name: str) -> AsyncGenerator[Sequence[T], None]:
    """Run a blocking iterator of batches in a thread called ``name``, at most two batches ahead.

    ``make`` is called in that thread, a generator is closed in it, and the caller's context variables hold in it.
    What it raises comes out as itself, after the batches before it.

    Cancelling or closing (``aclose``) stops the thread before its next batch and waits for that, up to GRACE
    seconds; after that it is left behind and named in the log.
    """
    supply: _Supply[Sequence[T]] = _Supply(_BATCHES_AHEAD)
    thread = _start(supply, make, name)
    try:
        while await supply.wait():
            batch = supply.made.popleft()
            supply.make_space()
            yield batch
    finally:
        await supply.stop(thread)
    if supply.error is not None:
        raise supply.error


async def feed_each(make: Callable[[], Iterator[T]], name: str, most: int = 1024) -> AsyncGenerator[Sequence[T], None]:
    """Run a blocking iterator of items in a thread: yields what is there, 1 … ``most`` items, as soon as it is.

    Unlike ``feed`` over ``chunks``, no item ever waits for a slow one behind it; and the thread is as far ahead as
    demand asks for, up to ``most``. Otherwise the same.
    """
    demand = Demand(clock_of(asyncio.get_running_loop()), min(_LEAST_AHEAD, most), most)
    supply: _Supply[T] = _Supply(demand.size)
    thread = _start(supply, make, name)
    made = supply.made
    try:
        while await supply.wait():
            items = [made.popleft() for _ in range(len(made))]
            supply.make_space()
            yield items
            supply.bound = demand.note(len(items))
    finally:
        await supply.stop(thread)
    if supply.error is not None:
        raise supply.error


def chunks(iterator: Iterator[T], most: int = 1024) -> Iterator[list[T]]:
    """Group items into lists by the time they take: about SLICE seconds of the iterator's own work, 1 … ``most``.

    A list is handed on when it has lasted SLICE seconds, so at once after an item that was slow to come. What came
    quickly before a slow item waits for it; ``feed_each`` has no such wait.

    >>> [item for chunk in chunks(iter("abcde"), most=2) for item in chunk]
    ['a', 'b', 'c', 'd', 'e']
    """
    clock = time.perf_counter
    size = 1  # doubles while items come quickly: the first go out one by one
    chunk: list[T] = []
    began = last = clock()
    for item in iterator:
        chunk.append(item)
        now = clock()
        if len(chunk) < size and now - began < SLICE:
            last = now
            continue
        size = 1 if now - last >= SLICE else min(2 * size, most) if len(chunk) == size else size
        yield chunk
        chunk = []
        began = last = clock()
    if chunk:
        yield chunk
