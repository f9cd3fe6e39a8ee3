"""A flow whose outputs go to the caller: ``collect``, ``async for`` and ``for``.

The run is its own supervisor task and knows nothing of the iterator, so an iterator that is dropped (a ``break``) can
stop the run from its finalizer, at the next turn of the loop. An output counts as delivered when it is handed to the
caller; what is in the buffer then is released.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from penstock.flow.demand import Demand
from penstock.flow.plan import Plan, make_plan
from penstock.flow.run import Run
from penstock.flow.stage import Work
from penstock.flow.sync import background_loop, on_background_loop, run_blocking
from penstock.place.base import Task

if TYPE_CHECKING:
    from penstock.flow.flow import Flow

__all__ = ["Outlet", "Outputs", "collect", "iterate", "iterate_blocking"]

_BLOCKING_BATCH = 256
_COLLECTED = 1024


class Outlet:
    """The consumer's end of a run without a sink."""

    def __init__(self, plan: Plan, *, inline: bool = False, room: int = 64) -> None:
        self.run = Run(plan, inline=inline, outlet_room=room)
        self._plain = all(
            isinstance(stage, Work) and stage.verb != "flat_map" for s in plan.segments for stage in s.stages
        )
        self._wanted: asyncio.Future[None] | None = None
        self._begun = False

    async def open(self) -> None:
        """Start the run. Raises what opening raised."""
        self._begun = True
        await self.run.__aenter__()
        self._channel = self.run.outlet
        self._channel.on_items = self._wake
        self.run.on_end = self._wake

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def take(self, most: int) -> list[Task]:
        """The next outputs, at least one; none at the end. Raises what the run failed with.

        Cancelling it loses nothing: outputs stay until they are taken.
        """
        channel, run = self._channel, self.run
        while not channel.items:
            if channel.closed or run.ended:
                run.outlet_closed()
                await run.wait()
                return []
            self._wanted = run.loop.create_future()
            try:
                await self._wanted
            finally:
                self._wanted = None
        if run.ended and run.failed:
            await run.wait()
        return channel.take(most)

    def deliver(self, tasks: list[Task]) -> None:
        """These were handed to the caller."""
        ledger = self.run.ledger
        if self._plain:
            ledger.deliver_plain(len(tasks))
            return
        ledger.arrive(tasks)
        entries, ledger.entries = ledger.entries, []
        ledger.delivered(entries)

    async def close(self) -> None:
        """End the run if it was begun; when this returns, nothing of it runs any more."""
        if self._begun:
            await self.run.__aexit__(None, GeneratorExit(), None)  # who leaves wants no more, also no failure


async def collect(flow: Flow[Any], *, inline: bool = False) -> list[Any]:
    """All outputs of a flow. Cancelling it ends the run first."""
    outlet = Outlet(make_plan(flow, None), inline=inline, room=_COLLECTED)  # they are all kept anyway
    await outlet.open()
    outputs: list[Any] = []
    try:
        while tasks := await outlet.take(1 << 30):
            outlet.deliver(tasks)
            outputs.extend([task.value for task in tasks])
    finally:
        await outlet.close()
    return outputs


class Outputs(AsyncIterator[Any]):
    """The outputs of a flow as an async iterator, which starts the run when it is first asked.

    ``aclose`` ends the run and waits for it; dropping the iterator ends it at the next turn of the loop. Cancelling
    ``__anext__`` loses nothing, unless it cancels the start of the run, which ends it. Several tasks may share one
    iterator: each output goes to one of them.
    """

    def __init__(self, plan: Plan) -> None:
        self._outlet = Outlet(plan)
        self._buffer: deque[Task] = deque()
        self._opened = False
        self._closed = False
        self._turn = asyncio.Lock()

    async def __anext__(self) -> Any:
        while not self._buffer:
            if self._closed:
                raise StopAsyncIteration
            async with self._turn:
                if not self._buffer and not self._closed:
                    await self._fill()
        task = self._buffer.popleft()
        value = task.value
        self._outlet.deliver([task])
        return value

    async def _fill(self) -> None:
        if not self._opened:
            self._opened = True
            try:
                await self._outlet.open()
            except BaseException:
                self._closed = True
                raise
        tasks = await self._outlet.take(_BLOCKING_BATCH)
        if not tasks:
            await self.aclose()
        self._buffer.extend(tasks)

    async def aclose(self) -> None:
        """End the run; nothing of it runs any more when this returns."""
        if self._opened and not self._closed:
            self._closed = True
            self._buffer.clear()
            await self._outlet.close()

    def __del__(self) -> None:
        if self._opened and not self._closed:
            run = self._outlet.run
            if not run.loop.is_closed():
                run.loop.call_soon_threadsafe(run.stop)


def iterate(flow: Flow[Any]) -> Outputs:
    """The outputs of a flow as an async iterator. Raises PlanError."""
    return Outputs(make_plan(flow, None))


def iterate_blocking(flow: Flow[Any]) -> Iterator[Any]:
    """The outputs of a flow as a plain iterator; the flow runs on the background loop. Raises PlanError."""
    return _iterate(Outlet(make_plan(flow, None)))


def _iterate(outlet: Outlet) -> Iterator[Any]:
    handed: list[Task] = []
    demand = Demand(time.perf_counter, 1, _BLOCKING_BATCH)
    process = os.getpid()
    try:
        run_blocking(outlet.open)
        while tasks := run_blocking(lambda: _next(outlet, handed, demand.note(len(handed)))):
            for task in tasks:
                handed.append(task)
                yield task.value
    finally:
        if on_background_loop():  # garbage collected there, where nothing may wait
            outlet.run.stop()
        elif process == os.getpid() and background_loop().is_running():  # else the run has ended, or isn't ours
            run_blocking(lambda: _close(outlet, handed))


async def _next(outlet: Outlet, handed: list[Task], most: int) -> list[Task]:
    _deliver(outlet, handed)
    return await outlet.take(most)


async def _close(outlet: Outlet, handed: list[Task]) -> None:
    if not outlet.run.ended:
        _deliver(outlet, handed)
    await outlet.close()


def _deliver(outlet: Outlet, handed: list[Task]) -> None:
    """Once each, also when an interrupt comes between this and the next output."""
    tasks = handed.copy()
    handed.clear()
    outlet.deliver(tasks)
