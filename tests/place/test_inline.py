from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from penstock.place.base import (
    DROPPED,
    FAILED,
    KEEP,
    MAP,
    OK,
    PART_SIZE,
    SPREAD,
    STREAM,
    TIMED_OUT,
    Chain,
    Step,
    Task,
    per_worker,
    worker_index,
)
from penstock.place.inline import InlinePool


def run_chain(steps: tuple[Step, ...], values: list[Any]) -> tuple[list[Task], list[Any]]:
    """The tasks of these values in the order in which they ended, and what a STREAM step handed over."""
    finished: list[Task] = []
    outputs: list[Any] = []

    async def main() -> None:
        all_done = asyncio.Event()

        def done(tasks: list[Task]) -> None:
            finished.extend(tasks)
            if len(finished) == len(values):
                all_done.set()

        def part(task: Task, given: list[Any]) -> None:
            outputs.extend(given)
            pool.grant(task)

        pool = InlinePool(Chain("stage", steps), 8, done=done, failed=print, part=part)
        assert pool.workers == 1
        await pool.open()
        pool.submit([Task(value) for value in values])
        async with asyncio.timeout(30):
            await all_done.wait()
        await pool.close()

    asyncio.run(main())
    return finished, outputs


def test_one_task_after_the_other_on_the_thread_of_the_loop() -> None:
    log: list[tuple[str, int]] = []

    async def slow(x: int) -> int:
        log.append(("in", x))
        await asyncio.sleep(0)
        log.append(("out", x))
        return x

    def where(x: int) -> tuple[int, str, int]:
        return x, threading.current_thread().name, worker_index()

    finished, _ = run_chain((Step("slow", slow), Step("where", where)), [0, 1, 2])
    assert [task.value for task in finished] == [(x, "MainThread", 0) for x in range(3)]
    assert log == [("in", 0), ("out", 0), ("in", 1), ("out", 1), ("in", 2), ("out", 2)]


def test_every_verb_and_outcome() -> None:
    def check(x: int) -> bool:
        if x == 2:
            raise StopIteration("odd")
        return x != 1

    finished, _ = run_chain((Step("keep", check, KEEP), Step("spread", range, SPREAD)), [0, 1, 2, 3])
    assert [(task.outcome, task.value) for task in finished] == [(OK, []), (DROPPED, 1), (FAILED, 2), (OK, [0, 1, 2])]
    assert isinstance(finished[2].error, StopIteration)


def test_what_is_awaited_can_time_out() -> None:
    async def work(x: float) -> float:
        await asyncio.sleep(x)
        return x

    finished, _ = run_chain((Step("work", partial(work), MAP, 0.05),), [30.0, 0.0])
    assert [(task.outcome, task.value) for task in finished] == [(TIMED_OUT, 30.0), (OK, 0.0)]


def test_streams_of_both_kinds() -> None:
    def expand(n: int) -> Iterator[int]:
        yield from range(n)

    async def expand_slowly(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    for function in (expand, expand_slowly):
        finished, outputs = run_chain((Step("expand", function, STREAM),), [3 * PART_SIZE, 1])
        assert outputs == [*range(3 * PART_SIZE), 0]
        assert [task.outcome for task in finished] == [OK, OK]


def test_objects_are_built_once_and_closed() -> None:
    log: list[str] = []

    class Tool:
        def __init__(self) -> None:
            log.append("built")

        def __call__(self, x: int) -> int:
            return x

        def close(self) -> None:
            log.append("closed")

    run_chain((Step("tool", per_worker(Tool)),), [1, 2, 3])
    assert log == ["built", "closed"]
