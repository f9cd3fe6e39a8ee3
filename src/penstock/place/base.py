"""The contract of every place: a pool that runs one chain of steps over tasks.

The contract, in numbered prose. If an implementation is inconsistent with it, the implementation is wrong.

1. A *chain* is a tuple of steps, run one after the other on the same worker for each task. A *task* carries one
   value from ``at`` (the step to start from) to its outcome. The pool writes the outcome into the task itself and
   hands it back through ``done``; it never keeps or copies a task after that.
2. All methods are called, and ``done``, ``part`` and ``failed`` call back, on the event loop that opened the pool.
   ``done`` is called with a list of tasks, each exactly once per ``submit``; it may call ``submit`` again.
   After ``abort`` returned, nothing is called back any more.
3. At most ``workers`` tasks are in progress at any instant. What is submitted beyond that waits inside the pool
   without a worker. ``room()`` says how many more tasks the pool can use now so that its workers stay busy: a
   few milliseconds of work a worker. Submitting more is allowed; the bound on it is the caller's.
4. ``open()`` starts every worker, builds the objects of ``per_worker`` in each, and raises what a constructor
   raised, as itself. A worker that has to be replaced later and can't be built is reported by ``failed``.
5. Outcomes: ``OK`` (``value`` is the result), ``DROPPED`` (a KEEP step said no at ``at``; ``value`` says nothing),
   ``FAILED`` (``error`` is the exception, ``at`` the step that raised it, ``value`` what that step was given),
   ``TIMED_OUT`` and ``DIED`` (like FAILED; ``error`` is the exit code of a process that died). A task that fails can be
   submitted again as it is: it re-enters at its step. ``SPREAD`` results are lists: the outcome of a chain that ends
   with a SPREAD step is ``OK`` with ``value`` a list of at most SPREAD_BOUND outputs; more are ExpansionTooLarge,
   FAILED like any error.
6. A chain whose last step is a STREAM step hands its outputs over in parts, by ``part(task, outputs)``, all before
   the task's own ``done`` (whose value is then None). Two parts may be out; for each further one the worker
   waits until ``grant(task)`` was called once. A worker that waits so is in progress.
7. ``close()`` is called when no task is out. It ends the workers; objects of ``per_worker`` that have a ``close``
   are closed in their worker first. ``abort()`` cancels what runs: coroutines are cancelled and awaited, processes
   are killed and reaped, threads finish the call they are in (no thread can be killed; after ``GRACE`` seconds
   they are left behind as daemons, counted and named in the log). Both may be called on a pool that never opened.
8. A cancelled ``open`` or ``close`` leaves nothing running: both end in ``abort``.
"""

from __future__ import annotations

import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeVar

import msgspec

from penstock.errors import ExpansionTooLarge, PlanError, StrayException

__all__ = [
    "DIED",
    "DROPPED",
    "FAILED",
    "GRACE",
    "KEEP",
    "MAP",
    "OK",
    "PARTS_OUT",
    "PART_SIZE",
    "PENDING",
    "SLICE",
    "SPREAD",
    "SPREAD_BOUND",
    "STREAM",
    "TIMED_OUT",
    "Chain",
    "Outer",
    "Outside",
    "PerWorker",
    "Pool",
    "Step",
    "Task",
    "annotate",
    "as_failure",
    "cores",
    "is_async",
    "outside",
    "per_worker",
    "set_worker_index",
    "spread",
    "spread_async",
    "worker_index",
]

P = ParamSpec("P")
R = TypeVar("R")

SLICE = 0.0005
"""Seconds of work a hop should carry: chunks, flushes and yields are sized by it."""

GRACE = 5.0
"""Seconds that abort waits for a thread to finish the call it is in."""

PART_SIZE = 1024
"""The most outputs of a STREAM step in one part; a part is also handed over after SLICE seconds."""

PARTS_OUT = 2
"""Parts of a STREAM step that may be handed over before the first grant."""

SPREAD_BOUND = 100_000
"""The most outputs a SPREAD step may give: they are held to be committed together."""

# What a step does with the result of its function.
MAP, KEEP, SPREAD, STREAM = range(4)

# What became of a task.
PENDING, OK, DROPPED, FAILED, TIMED_OUT, DIED = range(6)


class Task(msgspec.Struct, gc=False, eq=False):
    """One value on its way through a chain; ``origin`` and ``tag`` belong to the caller, who finds them untouched.

    ``stopped`` is the step that TIMED_OUT or DIED where the task itself is back at an earlier one, ``at``.
    ``seconds`` holds, for tasks whose timing was sampled, the service time of each step that ran, from ``at`` on.
    """

    value: Any
    origin: Any = None
    at: int = 0
    outcome: int = PENDING
    error: Any = None
    stopped: int = 0
    tag: Any = None
    seconds: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One function of a chain: ``call`` is the function, or a PerWorker that builds it in each worker."""

    name: str
    call: Any
    verb: int = MAP
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """The steps that one worker runs for a task, and the name of the whole for messages and thread names.

    ``attempts``: calls it may take to find the one value that hangs; a batch takes one, and its guilty item another.
    """

    name: str
    steps: tuple[Step, ...]
    attempts: int = 1

    @property
    def streams(self) -> bool:
        return self.steps[-1].verb == STREAM


class PerWorker(Generic[P, R]):
    """What ``per_worker`` returns: how to build one callable object in each worker."""

    def __init__(self, factory: Callable[P, R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.factory = factory
        self.args = args
        self.kwargs = kwargs

    def build(self) -> R:
        return self.factory(*self.args, **self.kwargs)

    def __repr__(self) -> str:
        return f"per_worker({getattr(self.factory, '__name__', self.factory)!s})"


def per_worker(factory: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Build ``factory(*args, **kwargs)`` once in each worker of a stage, and call the object for each item.

    For what is slow to make or can't travel: a model, a connection, a tokenizer. The object must be callable;
    if it has a ``close`` method, it is called when the worker ends. A stage of it has one worker unless
    ``workers=`` says otherwise.

    Returns a description to be given to ``map``, ``map_batches``, ``filter`` or ``flat_map``; nothing is built
    here. Its declared type is that of the object, so that the flow's item type follows.

    Raises PlanError for a factory that can't be called; what the constructor raises comes out of the run as itself,
    before any item is read.

    >>> import penstock as ps
    >>> class Scale:
    ...     def __init__(self, factor: int) -> None:
    ...         self.factor = factor
    ...     def __call__(self, x: int) -> int:
    ...         return self.factor * x
    >>> ps.Flow([1, 2, 3]).map(ps.per_worker(Scale, 10)).collect_sync()
    [10, 20, 30]
    """
    if not callable(factory):
        raise PlanError(
            f"per_worker({factory!r:.60}) was given {type(factory).__name__!r}, which isn't callable",
            "Give a class or a function that makes the object, and its arguments: per_worker(Model, 'weights.bin')",
        )
    return PerWorker(factory, args, kwargs)  # type: ignore[return-value]  # stands for the object it will build


_worker: ContextVar[int] = ContextVar("penstock_worker", default=0)


def worker_index() -> int:
    """The number of the worker that runs the caller: 0 … workers - 1; 0 on the event loop and outside a flow.

    A worker that replaces a dead one takes over its number.

    >>> import penstock as ps
    >>> ps.Flow(range(3)).map(lambda _: ps.worker_index(), workers=1).collect_sync()
    [0, 0, 0]
    """
    return _worker.get()


def set_worker_index(index: int) -> None:
    """Number the calling worker, in its own context."""
    _worker.set(index)


def is_async(function: Any) -> bool:
    """Whether calling ``function`` (or the object a PerWorker builds) gives something to await or ``async for``."""
    if isinstance(function, PerWorker):
        function = function.factory
        if inspect.isclass(function):
            call = function.__call__
            return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)
        return False
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return True
    if inspect.isclass(function):
        return False
    method: Any = getattr(function, "__call__", None)  # noqa: B004  # the bound method is wanted, not callable()
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def annotate(error: BaseException, note: str) -> None:
    """Add a note to an exception, if it takes one: a frozen dataclass doesn't."""
    with suppress(Exception):
        error.add_note(note)


def as_failure(stage: str, error: BaseException) -> BaseException:
    """What a stage's function raised, or a StrayException caused by it, if raising it would steer other code."""
    known = sys.modules.get("asyncio.exceptions")  # nobody can raise what was never imported
    stray = known is not None and isinstance(error, known.CancelledError)
    if not stray and not isinstance(error, (StopIteration, StopAsyncIteration)):
        return error
    failure = StrayException(stage, type(error).__name__)
    failure.__cause__ = error
    for note in getattr(error, "__notes__", ()):
        failure.add_note(note)
    return failure


def spread(step: str, result: Iterable[Any]) -> list[Any]:
    """The outputs of a SPREAD step as a list. Raises ExpansionTooLarge for more than SPREAD_BOUND."""
    outputs = list(islice(result, SPREAD_BOUND + 1))
    if len(outputs) > SPREAD_BOUND:
        raise ExpansionTooLarge(step, SPREAD_BOUND)
    return outputs


async def spread_async(step: str, result: Any) -> list[Any]:
    """The same for what may have to be awaited, or iterated asynchronously."""
    if inspect.isawaitable(result):
        result = await result
    if not isinstance(result, AsyncIterable):
        return spread(step, result)
    outputs = []
    try:
        async for output in result:
            outputs.append(output)
            if len(outputs) > SPREAD_BOUND:
                raise ExpansionTooLarge(step, SPREAD_BOUND)
    finally:
        if isinstance(result, AsyncGenerator):
            await result.aclose()
    return outputs


@cache
def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Outside:
    """How many tasks are with threads and processes now, in this process.

    The virtual clock reads it: time may jump only while nothing real is at work.
    """

    def __init__(self) -> None:
        self.count = 0


outside = Outside()


class Pool(ABC):
    """Runs a chain over tasks, somewhere; see the module's text for the contract."""

    def __init__(
        self,
        chain: Chain,
        workers: int,
        *,
        done: Callable[[list[Task]], None],
        failed: Callable[[BaseException], None],
        part: Callable[[Task, list[Any]], None] | None = None,
    ) -> None:
        self.chain = chain
        self.workers = workers
        self.done = done
        self.failed = failed
        self.part = part

    @abstractmethod
    async def open(self) -> None:
        """Start the workers. Raises what a constructor raised, CannotSend for a chain that can't travel."""

    @abstractmethod
    def room(self) -> int:
        """How many more tasks keep the workers busy; never negative."""

    @abstractmethod
    def submit(self, tasks: Sequence[Task]) -> None:
        """Take these tasks. Returns at once."""

    @abstractmethod
    def grant(self, task: Task) -> None:
        """Allow one more part of a STREAM step's outputs."""

    @property
    @abstractmethod
    def in_progress(self) -> int:
        """How many tasks are being worked on at this instant: never more than ``workers``."""

    @property
    def backlog(self) -> int:
        """How many tasks wait inside, beyond what keeps the workers busy."""
        return 0

    @property
    def held_back(self) -> bool:
        """Whether tasks wait though workers are free, because something else doesn't let them start."""
        return False

    def resume(self) -> None:  # noqa: B027  # most places hold nothing back
        """What has been handed over was taken: a place that held tasks back because of it may start them."""

    def withdraw(self, task: Task) -> bool:
        """Forget a task that waits without a worker; False if it is at work, was, or can't be got back."""
        return False

    def halt(self) -> None:  # noqa: B027  # a place that can't get back what waits has nothing to do
        """Start nothing that waits, as far as it can be got back: ``abort`` follows, or ``close`` if nothing waits."""

    @abstractmethod
    async def close(self) -> None:
        """End the workers after their work, closing their objects."""

    @abstractmethod
    async def abort(self) -> None:
        """Cancel everything and wait until nothing runs."""


class Outer(Pool):
    """A pool around another one, ``_inner``, that says when its tasks start: what all such pools share."""

    _inner: Pool

    async def open(self) -> None:
        await self._inner.open()

    @property
    def in_progress(self) -> int:
        return self._inner.in_progress

    @property
    def abandoned(self) -> list[str]:
        """The inner pool's threads that timed out and still run."""
        return list(getattr(self._inner, "abandoned", ()))

    def grant(self, task: Task) -> None:
        self._inner.grant(task)

    async def close(self) -> None:
        self.halt()
        await self._inner.close()

    async def abort(self) -> None:
        self.halt()
        await self._inner.abort()
