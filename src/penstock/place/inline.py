"""The calling thread as a place, for debugging: one task after the other on the loop's own thread.

It is the loop's pool with one resident that also calls plain functions, so ``breakpoint()`` works and a traceback
has one thread. A plain function blocks the loop while it runs and can't be timed out; what is awaited can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.place.base import Chain, Task
from penstock.place.loop import LoopPool

__all__ = ["InlinePool"]


class InlinePool(LoopPool):
    """One worker on the loop that opened the pool, whatever ``workers`` says."""

    def __init__(
        self,
        chain: Chain,
        workers: int = 1,
        *,
        done: Callable[[list[Task]], None],
        failed: Callable[[BaseException], None],
        part: Callable[[Task, list[Any]], None] | None = None,
    ) -> None:
        super().__init__(chain, 1, done=done, failed=failed, part=part)

    def _fail(self, task: Task, step: int, value: Any, error: BaseException) -> None:
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
            error = error.__cause__  # a plain function raised it; only a coroutine may not
        super()._fail(task, step, value, error)
