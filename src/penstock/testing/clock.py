"""A virtual clock: an event loop whose time jumps to the next timer when nothing else can happen.

The loop is asyncio's own over a selector that doesn't sleep. Each turn it decides, in this order:

1. Something is ready: time stands still.
2. Something real is at work that will ring the loop: a function in an executor, a process, or a thread or process of
   penstock (``outside``). It waits for that as long as it takes, and time goes on as it really does.
3. A descriptor is registered (a socket, a pipe), so the other side may be real: it waits PATIENCE, then goes on.
4. There is a timer: time jumps to it. Those of a progress display don't count: it looks on, and moves nothing.
5. A descriptor is registered: it waits for it.
6. Nothing can ever happen again: Deadlock.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from math import inf
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from penstock.errors import Deadlock
from penstock.flow.display import Display
from penstock.place.base import outside

__all__ = ["PATIENCE", "run_virtual"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE = 0.01
"""Real seconds that a jump waits for open sockets and pipes. What is in this process answers at once; what is in
another may need longer, and then sees timeouts that a real clock wouldn't have had."""


def run_virtual(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a loop with a virtual clock, which starts at 0, and return its result.

    ``asyncio.sleep``, ``asyncio.timeout``, ``loop.call_later`` and ``loop.time`` follow the virtual clock;
    ``time.monotonic`` and ``time.sleep`` stay real. Executors of this loop, processes, sockets and penstock's threads
    work: time doesn't jump while one is at work. Threads that you start yourself aren't seen. What is left at the end
    is cancelled and awaited, as by ``asyncio.run``.

    Raises what the coroutine raises, and Deadlock, which names the waiting tasks, if nothing can ever happen again.

    >>> import asyncio
    >>> async def nap() -> float:
    ...     await asyncio.sleep(3600)
    ...     return asyncio.get_running_loop().time()
    >>> run_virtual(nap())
    3600.0
    """
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(coroutine)


class _VirtualSelector(selectors.BaseSelector):
    """Asks the loop how long to wait, and otherwise does what the selector it stands for does."""

    def __init__(self, real: selectors.BaseSelector) -> None:
        self.real = real
        self.wait: Callable[[float | None], list[tuple[selectors.SelectorKey, int]]] = real.select

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return self.wait(timeout)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self.real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self.real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self.real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self.real.get_map()

    def close(self) -> None:
        self.real.close()


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._now = 0.0
        self._at_work = 0  # functions in executors, and the executors' own shutdown
        self._processes: list[asyncio.SubprocessTransport] = []
        self._virtual = _VirtualSelector(selectors.DefaultSelector())
        super().__init__(self._virtual)
        self._own = len(self._virtual.get_map())  # the loop's own descriptor, by which threads wake it
        self._virtual.wait = self._wait

    def time(self) -> float:
        return self._now

    def _wait(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        select = self._virtual.real.select
        timeout = None if timeout is None else float(timeout)  # it may be NumPy's, and so would the time be
        events = select(0)
        if events or timeout == 0:
            return events
        began = time.monotonic()
        if self._busy():
            events = select(timeout)
            passed = time.monotonic() - began
            if not events and timeout is not None:
                passed = max(passed, timeout)
            self._now += passed if timeout is None else min(passed, timeout)
            return events
        foreign = len(self._virtual.get_map()) > self._own
        if timeout is None or self._nothing_comes():
            if not foreign:
                raise Deadlock([_describe(task) for task in asyncio.all_tasks(self)])
            return select(None)
        if foreign:
            events = select(PATIENCE)
        if not events:
            self._now += timeout
        return events

    def _nothing_comes(self) -> bool:
        """Whether all timers are displays', or never end; nearly always the first one already isn't."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]  # the loop's own
        return all(handle.cancelled() or handle.when() == inf or _is_display(handle) for handle in scheduled)

    def _busy(self) -> bool:
        self._processes = [process for process in self._processes if process.get_returncode() is None]
        return bool(outside.count > 0 or self._at_work or self._processes)

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._at_work += 1
        future.add_done_callback(self._over)
        return future

    def _over(self, future: asyncio.Future[Any]) -> None:
        self._at_work -= 1

    async def shutdown_default_executor(self) -> None:
        self._at_work += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._at_work -= 1

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        transport, protocol = await super().subprocess_exec(*args, **kwargs)
        self._processes.append(transport)
        return transport, protocol

    async def subprocess_shell(self, *args: Any, **kwargs: Any) -> Any:
        transport, protocol = await super().subprocess_shell(*args, **kwargs)
        self._processes.append(transport)
        return transport, protocol


def _is_display(handle: asyncio.TimerHandle) -> bool:
    callback: Any = handle._callback  # type: ignore[attr-defined]  # there is no other way to tell
    return isinstance(getattr(callback, "__self__", None), Display)


def _describe(task: asyncio.Task[Any]) -> str:
    """A task's name, and the line of the innermost coroutine where it waits."""
    inner: Any = task.get_coro()
    frame = None
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "ag_frame", None) or frame
        inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)
    if frame is None:
        return task.get_name()
    return f"{task.get_name()} in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
