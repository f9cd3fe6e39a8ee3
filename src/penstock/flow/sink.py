"""Where outputs go when no file is named: functions as sinks, and the choice of a sink by suffix."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from penstock.errors import OutputRejected, PlanError, StrayException
from penstock.flow.blocking import Desk
from penstock.flow.contract import SUFFIXES, Delta, JobId, Origin, Sink
from penstock.flow.progress import Positions, Progress
from penstock.place.base import is_async
from penstock.place.loop import is_cancelled

__all__ = ["FunctionSink", "as_sink"]


def as_sink(target: Any) -> Sink[Any]:
    """The sink that ``.to(target)`` means. Raises PlanError for an unknown suffix or an object that is no sink."""
    if isinstance(target, str):
        for suffix in sorted(SUFFIXES, key=len, reverse=True):
            if target.endswith(suffix):
                module, _, name = SUFFIXES[suffix].partition(":")
                sink: Sink[Any] = getattr(importlib.import_module(module), name)(target)
                return sink
        raise PlanError(
            f"to({target!r}): the suffix doesn't say what to write",
            f"Known are {', '.join(sorted(SUFFIXES))}; or give one of ps.write, or a function",
        )
    if hasattr(target, "as_sink"):
        target = target.as_sink()
    if hasattr(target, "commit") and hasattr(target, "write"):
        given: Sink[Any] = target
        return given
    if callable(target):
        return FunctionSink(target)
    raise PlanError(
        f"to({target!r:.60}) was given a {type(target).__name__}, which is no sink",
        "Give a path like 'out.jsonl', one of ps.write, or a function of one output",
    )


def _stray(error: asyncio.CancelledError) -> StrayException:
    stray = StrayException("to", type(error).__name__)
    stray.__cause__ = error
    return stray


class FunctionSink:
    """Calls a function with each output, one after the other, a ``def`` in a thread: at least once.

    What the function raises is that output's failure, and goes by ``on_error`` of ``to``.
    """

    exactly_once = False
    keeps_dead = False
    pace = 0.0

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self._desk = Desk("penstock-to")
        self._taken = 0  # outputs of the next write that the function has had: those before the one it refused

    @property
    def identity(self) -> str:
        return f"function:{getattr(self.function, '__qualname__', type(self.function).__name__)}"

    async def open(self, job: JobId) -> Progress:
        self._desk = Desk("penstock-to")
        self._taken = 0
        return Progress()

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        values = [(index, value) for index, (_, given) in enumerate(outputs) for value in given]
        at, self._taken = self._taken, 0
        while at < len(values):
            at, error = await self._call(values, at)
            if error is not None:
                index = values[at][0]
                self._taken = sum(before < index for before, _ in values)
                raise OutputRejected([(index, error)])

    async def _call(self, values: Sequence[tuple[int, Any]], at: int) -> tuple[int, Exception | None]:
        """Call the function with the outputs from number ``at`` on: where it came to, and what it raised there."""
        function = self.function
        if not is_async(function):
            at, result, error = await self._desk.call(self._call_until, values, at)
            if result is None:
                return at, error
        else:
            result = function(values[at][1])
        try:
            await result
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            return at, _stray(error)
        except Exception as error:
            return at, error
        return at + 1, None

    def _call_until(
        self, values: Sequence[tuple[int, Any]], at: int
    ) -> tuple[int, Awaitable[Any] | None, Exception | None]:
        """Runs in a thread, since it may block, and comes back with what must be awaited on the loop."""
        while at < len(values):
            try:
                result = self.function(values[at][1])
            except asyncio.CancelledError as error:
                return at, None, _stray(error)
            except Exception as error:
                return at, None, error
            if inspect.isawaitable(result):
                return at, result, None
            at += 1
        return at, None, None

    async def commit(self, delta: Delta) -> Positions:
        return Positions()

    async def close(self) -> None:
        await self._desk.close()
