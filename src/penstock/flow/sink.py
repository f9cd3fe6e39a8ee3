"""Where outputs go when no file is named: functions as sinks, and the choice of a sink by suffix."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from penstock.errors import PlanError
from penstock.flow.blocking import Desk
from penstock.flow.contract import SUFFIXES, Delta, JobId, Origin, Sink
from penstock.flow.progress import Positions, Progress
from penstock.place.base import is_async

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
    if hasattr(target, "commit") and hasattr(target, "write"):
        given: Sink[Any] = target
        return given
    if callable(target):
        return FunctionSink(target)
    raise PlanError(
        f"to({target!r:.60}) was given a {type(target).__name__}, which is no sink",
        "Give a path like 'out.jsonl', one of ps.write, or a function of one output",
    )


class FunctionSink:
    """Calls a function with each output, one after the other, a ``def`` in a thread: at least once."""

    exactly_once = False
    keeps_dead = False
    pace = 0.0

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self._desk = Desk("penstock-to")

    @property
    def identity(self) -> str:
        return f"function:{getattr(self.function, '__qualname__', type(self.function).__name__)}"

    async def open(self, job: JobId) -> Progress:
        return Progress()

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        values = [value for _, outputs_of_one in outputs for value in outputs_of_one]
        if is_async(self.function):
            for value in values:
                await self.function(value)
        else:
            for result in await self._desk.call(self._call_all, values):
                await result

    def _call_all(self, values: Sequence[Any]) -> list[Any]:
        """Runs in a thread, since it may block; what is to be awaited is returned."""
        results = [self.function(value) for value in values]
        return [result for result in results if inspect.isawaitable(result)]

    async def commit(self, delta: Delta) -> Positions:
        return Positions()

    async def close(self) -> None:
        await self._desk.close()
