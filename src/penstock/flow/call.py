"""An unbound flow behind live requests: ``async with work.open() as call``.

A request is in one of four states: *waiting* in the inlet, *taken* by a segment and not started there, *at work*,
*answered*. Those that aren't answered are bounded, by what all stages may have at work at once and ``max_waiting``
besides: one that comes beyond is refused at once, wherever the others wait. Each has a future that its caller awaits,
found by the item's position, so nobody can get another's answer.

Cancelling a caller withdraws its item if it isn't at work yet; otherwise the work goes on and its answer is dropped.
An error that would stop a run goes to the one caller whose item it is. Leaving the block closes the inlet: what was
accepted is answered, then the workers end. If the whole run fails (a worker can't be built again), every caller
gets that exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from penstock.errors import Closed, Overloaded, WrongLoop
from penstock.flow.plan import Plan, plan_call
from penstock.flow.report import Report
from penstock.flow.run import Run
from penstock.flow.segment import WorkSegment
from penstock.flow.stage import positive
from penstock.flow.sync import run_blocking
from penstock.place.base import Task

if TYPE_CHECKING:
    from penstock.flow.flow import Flow

__all__ = ["Call", "open_call", "open_call_blocking"]

T = TypeVar("T")
U = TypeVar("U")


class Call(Generic[T, U]):
    """Answers single requests: ``await call(x)``; made by ``Flow.open``. ``call.report()`` is live."""

    def __init__(self, plan: Plan, max_waiting: int) -> None:
        self._run = Run(plan, progress=False, refuse=self._refuse)
        self._max_waiting = max_waiting
        self._pending: dict[int, asyncio.Future[U]] = {}
        self._next = 0
        self._open = False

    async def _start(self) -> None:
        run = self._run
        await run.__aenter__()
        self._inlet = run.inlet
        self._at_once = sum(one.ceiling * one.merges for one in run.segments if isinstance(one, WorkSegment))
        run.outlet.on_items = self._answer
        run.on_end = self._end
        self._open = True

    async def __call__(self, item: T) -> U:
        """Have one item worked on and return its result.

        Raises what its stage raised, Overloaded at once when too many requests wait, Closed outside the block, and
        WrongLoop on another event loop than the one that opened it. Cancelling it withdraws the item if it wasn't
        started; otherwise the work goes on and the answer is dropped.
        """
        if not self._open:
            raise Closed("call")
        run = self._run
        if asyncio.get_running_loop() is not run.loop:
            raise WrongLoop
        waiting = run.ledger.open - self._at_once
        if waiting >= self._max_waiting:
            raise Overloaded(waiting, self._max_waiting)
        number = self._next
        self._next += 1
        answer: asyncio.Future[U] = run.loop.create_future()
        self._pending[number] = answer
        task = Task(item, ("", number))
        run.ledger.issue([task])
        self._inlet.put([task])
        try:
            return await answer
        except asyncio.CancelledError:
            self._withdraw(task)
            raise
        finally:
            self._pending.pop(number, None)

    def report(self) -> Report:
        """How the calls stand now: counts, rates, errors by kind, and the stage to fix."""
        return self._run.report()

    def _withdraw(self, task: Task) -> None:
        """Take back an item that nobody waits for, if it wasn't started."""
        run = self._run
        first = run.segments[0]
        withdrawn = self._inlet.withdraw(task) or (isinstance(first, WorkSegment) and first.withdraw(task))
        if withdrawn:
            run.ledger.withdraw(1)

    def _answer(self) -> None:
        outlet = self._run.outlet
        tasks = outlet.take(len(outlet))
        self._run.ledger.deliver_plain(len(tasks))
        for task in tasks:
            answer = self._pending.get(task.origin[1])
            if answer is not None and not answer.done():
                answer.set_result(task.value)
        if outlet.ended:
            self._run.outlet_closed()

    def _refuse(self, origin: Any, error: BaseException) -> bool:
        """The error of one item goes to its caller."""
        if not isinstance(error, Exception):
            return False
        answer = self._pending.get(origin[1])
        if answer is not None and not answer.done():
            answer.set_exception(error)
        return True

    def _end(self) -> None:
        """The run is over, by closing or by failing: nobody waits any longer."""
        self._open = False
        error = self._run.failure or Closed("call")
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(error)

    async def _close(self, error: BaseException | None) -> None:
        """Answer what was accepted, then end; ``error`` leaves the block already. Cancelling ends at once."""
        self._open = False
        self._inlet.close()
        try:
            await self._run.over()
        except asyncio.CancelledError as cancelled:
            error = cancelled
            raise
        finally:
            await self._run.__aexit__(None, error, None)


@asynccontextmanager
async def open_call(flow: Flow[Any], max_waiting: int) -> AsyncIterator[Call[Any, Any]]:
    """What ``Flow.open`` returns."""
    call: Call[Any, Any] = Call(plan_call(flow), positive(max_waiting, "open(max_waiting)"))
    await call._start()
    try:
        yield call
    except BaseException as error:
        await call._close(error)
        raise
    await call._close(None)


@contextmanager
def open_call_blocking(flow: Flow[Any], max_waiting: int) -> Iterator[Callable[[Any], Any]]:
    """What ``Flow.open_sync`` returns."""
    manager = open_call(flow, max_waiting)
    call = run_blocking(lambda: _enter(manager))

    def ask(item: Any) -> Any:
        return run_blocking(lambda: _ask(call, item))

    try:
        yield ask
    finally:
        run_blocking(lambda: _leave(manager))


async def _enter(manager: Any) -> Call[Any, Any]:
    call: Call[Any, Any] = await manager.__aenter__()
    return call


async def _leave(manager: Any) -> None:
    await manager.__aexit__(None, None, None)


async def _ask(call: Call[Any, Any], item: Any) -> Any:
    return await call(item)
