from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import AbandonedThreads, ExpansionTooLarge, StageTimeout
from penstock.place import crew
from penstock.place.base import (
    DROPPED,
    FAILED,
    KEEP,
    MAP,
    OK,
    PART_SIZE,
    SPREAD,
    SPREAD_BOUND,
    STREAM,
    TIMED_OUT,
    Chain,
    Step,
    Task,
    outside,
    per_worker,
    worker_index,
)
from penstock.place.thread import ThreadPool

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread, and nothing counted as outside."""
    threads = threading.enumerate()
    yield
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if thread not in threads] == []
    assert outside.count == 0


class Rig:
    """A pool and what it called back."""

    def __init__(self, *steps: Any, workers: int = 2, name: str = "stage") -> None:
        chain = Chain(name, tuple(step if isinstance(step, Step) else Step("step", step) for step in steps))
        self.finished: list[Task] = []
        self.parts: list[tuple[Task, list[Any]]] = []
        self.failures: list[BaseException] = []
        self.aborted = False
        self.changed = asyncio.Event()
        self.pool = ThreadPool(chain, workers, done=self.done, failed=self.failed, part=self.part)

    def done(self, tasks: list[Task]) -> None:
        assert not self.aborted
        self.finished += tasks
        self.changed.set()

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)
        self.changed.set()

    def part(self, task: Task, outputs: list[Any]) -> None:
        assert task not in self.finished
        self.parts.append((task, outputs))
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def run(self, values: Sequence[Any]) -> list[Task]:
        tasks = [Task(value) for value in values]
        self.pool.submit(tasks)
        await self.until(lambda: len(self.finished) >= len(tasks))
        return tasks

    async def __aenter__(self) -> Self:
        await self.pool.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.pool.abort()
        self.aborted = True


async def turns_until(condition: Callable[[], object]) -> None:
    """For what no callback tells."""
    for _ in iter(condition, True):
        await asyncio.sleep(0)


def run(main: Callable[[], Any]) -> None:
    unhandled: list[dict[str, Any]] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        async with asyncio.timeout(30):
            await main()

    asyncio.run(bounded())
    assert unhandled == []


def double(x: int) -> int:
    return 2 * x


def test_every_task_comes_back_once_with_its_result() -> None:
    async def main() -> None:
        async with Rig(double, lambda x: x + 1, workers=3) as rig:
            tasks = await rig.run(range(5000))
            assert [(task.outcome, task.value) for task in tasks] == [(OK, 2 * x + 1) for x in range(5000)]
            assert len({id(task) for task in rig.finished}) == len(rig.finished) == 5000
            await rig.pool.close()

    run(main)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.integers(0, 6), max_size=60),
    workers=st.integers(1, 4),
    pieces=st.integers(1, 7),
    timed=st.booleans(),
)
def test_law_accounting_in_threads(values: list[int], workers: int, pieces: int, timed: bool) -> None:
    def work(x: int) -> Any:
        if x == 1:
            raise ValueError(x)
        if x == 2:
            raise StopIteration(x)
        if x == 3:
            raise SystemExit(x)
        if x == 4:

            async def later() -> int:
                await asyncio.sleep(0)
                return x

            return later()
        return x

    expected = {1: ValueError, 2: StopIteration, 3: SystemExit}

    async def main() -> None:
        timeout = 60 if timed else None
        async with Rig(
            Step("a", lambda x: x != 6, KEEP, timeout), Step("b", work, MAP, timeout), workers=workers
        ) as rig:
            tasks = [Task(x, origin=i) for i, x in enumerate(values)]
            for start in range(0, len(tasks), pieces):
                rig.pool.submit(tasks[start : start + pieces])
                await asyncio.sleep(0)
            await rig.until(lambda: len(rig.finished) == len(tasks))
            for i, (x, task) in enumerate(zip(values, tasks, strict=True)):
                assert task.origin == i
                if x == 6:
                    assert (task.outcome, task.at, task.value) == (DROPPED, 0, 6)
                elif x in expected:
                    assert (task.outcome, task.at, task.value, type(task.error)) == (FAILED, 1, x, expected[x])
                else:
                    assert (task.outcome, task.value) == (OK, x)
            await rig.pool.close()
            assert len(rig.finished) == len(tasks)

    run(main)


def test_law_ceilings_in_threads() -> None:
    lock = threading.Lock()
    now = most = 0

    def work(x: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.0001)
        with lock:
            now -= 1
        return x

    async def main() -> None:
        async with Rig(work, workers=3) as rig:
            tasks = [Task(x) for x in range(500)]
            rig.pool.submit(tasks)
            while len(rig.finished) < 500:
                assert rig.pool.in_progress <= 3
                rig.changed.clear()
                await rig.changed.wait()
            assert most == 3

    run(main)


def test_a_task_behind_a_slow_one_is_taken_by_another_thread() -> None:
    go = threading.Event()

    async def main() -> None:
        async with Rig(lambda x: go.wait(10) if x == 0 else x, workers=2) as rig:
            tasks = [Task(x) for x in range(200)]
            rig.pool.submit(tasks)
            await rig.until(lambda: len(rig.finished) == 199)
            assert tasks[0] not in rig.finished
            assert rig.pool.in_progress == 1
            go.set()
            await rig.until(lambda: len(rig.finished) == 200)

    run(main)


def test_a_result_is_not_held_back_by_the_next_slow_item() -> None:
    go = threading.Event()

    async def main() -> None:
        async with Rig(lambda x: go.wait(10) if x == 99 else x, workers=1) as rig:
            rig.pool.submit([Task(x) for x in range(101)])
            await rig.until(lambda: len(rig.finished) == 99)
            go.set()
            await rig.until(lambda: len(rig.finished) == 101)

    run(main)


def test_no_wake_up_is_lost() -> None:
    async def main() -> None:
        async with Rig(double, workers=2) as rig:
            for x in range(4000):
                rig.pool.submit([Task(x)])
                await rig.until(lambda: rig.finished)
                assert rig.finished.pop().value == 2 * x

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run(main)
    finally:
        sys.setswitchinterval(interval)


def test_threads_that_run_dry_have_their_results_delivered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.place.thread._DELIVER_EVERY", 1000)

    async def main() -> None:
        async with Rig(double, workers=2) as rig:
            for _ in range(50):  # fast enough, soon, that deliveries wait for the timer
                await rig.run(range(100))
                rig.finished.clear()

    run(main)


def test_a_failed_task_enters_again_at_its_step() -> None:
    first: list[int] = []
    fails = [True]

    def flaky(x: int) -> int:
        if fails:
            fails.pop()
            raise OSError("busy")
        return x + 1

    async def main() -> None:
        async with Rig(lambda x: first.append(x) or 10 * x, flaky) as rig:
            (task,) = await rig.run([4])
            assert (task.outcome, task.at, task.value, str(task.error)) == (FAILED, 1, 40, "busy")
            rig.finished.clear()
            rig.pool.submit([task])
            await rig.until(lambda: rig.finished)
            assert (task.outcome, task.value, first) == (OK, 41, [4])

    run(main)


def test_a_traceback_starts_in_the_function_of_the_user() -> None:
    def fail(x: int) -> int:
        return 1 // x

    async def main() -> None:
        async with Rig(fail) as rig:
            (task,) = await rig.run([0])
            assert task.error.__traceback__.tb_frame.f_code is fail.__code__

    run(main)


def test_context_and_number_follow_into_the_threads() -> None:
    def look(x: int) -> tuple[str, int, str]:
        barrier.wait(10)
        return colour.get(), worker_index(), threading.current_thread().name

    barrier = threading.Barrier(3)

    async def main() -> None:
        colour.set("red")
        async with Rig(look, workers=3, name="look") as rig:
            colour.set("blue")
            tasks = await rig.run(range(3))
            assert sorted(task.value for task in tasks) == [("red", i, f"penstock-look-{i}") for i in range(3)]
            assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("penstock"))

    run(main)


class Tool:
    """Built per worker: remembers where it was built, called and closed."""

    log: list[tuple[str, str]] = []  # noqa: RUF012  # cleared by the tests

    def __init__(self, fail_on: int | None = None) -> None:
        if worker_index() == fail_on:
            raise StopIteration("no tool") if fail_on == 9 else ValueError("no tool")
        self.log.append(("built", threading.current_thread().name))

    def __call__(self, x: int) -> int:
        self.log.append(("called", threading.current_thread().name))
        return x

    def close(self) -> None:
        self.log.append(("closed", threading.current_thread().name))


def test_objects_are_built_called_and_closed_in_their_thread() -> None:
    Tool.log.clear()

    async def main() -> None:
        async with Rig(per_worker(Tool), workers=2) as rig:
            assert sorted(Tool.log) == [("built", "penstock-stage-0"), ("built", "penstock-stage-1")]
            await rig.run(range(10))
            await rig.pool.close()
        assert sorted(e for e in Tool.log if e[0] == "closed") == [
            ("closed", "penstock-stage-0"),
            ("closed", "penstock-stage-1"),
        ]
        called = {name for what, name in Tool.log if what == "called"}
        assert called <= {"penstock-stage-0", "penstock-stage-1"}

    run(main)


def test_what_a_constructor_raises_comes_out_of_open_as_itself() -> None:
    Tool.log.clear()

    async def main() -> None:
        rig = Rig(per_worker(Tool, 1), workers=3)
        with pytest.raises(ValueError, match="no tool"):
            await rig.pool.open()
        assert rig.failures == []
        assert [what for what, _ in Tool.log].count("built") == [what for what, _ in Tool.log].count("closed")

    run(main)


def test_what_a_close_raises_comes_out_of_close() -> None:
    class Bad(Tool):
        def close(self) -> None:
            raise OSError("can't close")

    async def main() -> None:
        async with Rig(per_worker(Bad), workers=2) as rig:
            await rig.run([1])
            with pytest.raises(OSError, match="can't close"):
                await rig.pool.close()

    run(main)


def test_spread_gives_a_list_and_fails_past_the_bound() -> None:
    def expand(n: int) -> Any:
        if n < 0:
            return n
        return iter(range(n))

    async def expand_later(n: int) -> list[int]:
        return list(range(n))

    async def expand_slowly(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async def main() -> None:
        async with Rig(Step("x", expand, SPREAD)) as rig:
            three, none, many, wrong = await rig.run([3, 0, SPREAD_BOUND + 5, -1])
            assert (three.value, none.value) == ([0, 1, 2], [])
            assert (many.outcome, type(many.error), many.value) == (FAILED, ExpansionTooLarge, SPREAD_BOUND + 5)
            assert (wrong.outcome, type(wrong.error), wrong.value) == (FAILED, TypeError, -1)
        for function in (partial(expand_later), partial(expand_slowly)):
            async with Rig(Step("x", function, SPREAD)) as rig:
                (task,) = await rig.run([3])
                assert task.value == [0, 1, 2]

    run(main)


def test_stream_hands_over_parts_and_waits_for_grants() -> None:
    count = 5 * PART_SIZE + 7
    made = [0]

    def expand(_: int) -> Iterator[int]:
        for i in range(count):
            made[0] = i + 1
            yield i

    async def main() -> None:
        async with Rig(Step("x", expand, STREAM), workers=1) as rig:
            task = Task(0)
            rig.pool.submit([task])
            await rig.until(lambda: len(rig.parts) == 2)
            await turns_until(lambda: not outside.count)  # the thread waits for a grant
            assert len(rig.parts) == 2
            ahead = made[0] - sum(len(outputs) for _, outputs in rig.parts)
            assert 0 < ahead <= PART_SIZE  # fewer, where making them took long
            assert rig.pool.in_progress == 1
            while not rig.finished:
                before = len(rig.parts)
                rig.pool.grant(task)
                assert len(rig.parts) <= before + 1
                await asyncio.sleep(0)
            assert [x for _, outputs in rig.parts for x in outputs] == list(range(count))
            assert all(len(outputs) <= PART_SIZE for _, outputs in rig.parts)
            assert (task.outcome, task.value) == (OK, None)

    run(main)


def granting(rig: Rig) -> None:
    """Let the pool stream freely."""
    handed = rig.part

    def part(task: Task, outputs: list[Any]) -> None:
        handed(task, outputs)
        rig.pool.grant(task)

    rig.pool.part = part


def test_stream_outputs_come_before_the_slow_one_and_before_the_error() -> None:
    go = threading.Event()

    def expand(_: int) -> Iterator[int]:
        yield from range(3)
        go.wait(10)
        yield 3
        raise ValueError("broken")

    async def main() -> None:
        async with Rig(Step("x", expand, STREAM), workers=1) as rig:
            granting(rig)
            task = Task(0)
            rig.pool.submit([task])
            await rig.until(lambda: sum(len(outputs) for _, outputs in rig.parts) == 3)
            go.set()
            await rig.until(lambda: rig.finished)
            assert [x for _, outputs in rig.parts for x in outputs] == [0, 1, 2, 3]
            assert (task.outcome, str(task.error), task.value) == (FAILED, "broken", 0)

    run(main)


def test_stream_outputs_come_before_an_error_at_once() -> None:
    def expand(n: int) -> Iterator[int]:
        yield from range(n)
        raise ValueError("broken")

    async def main() -> None:
        async with Rig(Step("x", expand, STREAM), workers=1) as rig:
            granting(rig)
            tasks = await rig.run([3, PART_SIZE, 2 * PART_SIZE + 1, *[3] * 50])
            for task in tasks:
                got = [x for whose, outputs in rig.parts if whose is task for x in outputs]
                assert got == list(range(task.value))

    run(main)


def test_stream_of_an_async_generator() -> None:
    async def expand(n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    async def main() -> None:
        async with Rig(Step("x", partial(expand), STREAM), workers=2) as rig:
            granting(rig)
            await rig.run([3, 4])
            got = {task.value: [] for task in rig.finished}
            assert got == {None: []}
            assert sorted(x for _, outputs in rig.parts for x in outputs) == [0, 0, 1, 1, 2, 2, 3]

    run(main)


def test_abort_closes_a_generator_that_waits_for_a_grant() -> None:
    closed_in: list[str] = []

    def expand(_: int) -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed_in.append(threading.current_thread().name)

    async def main() -> None:
        async with Rig(Step("x", expand, STREAM), workers=1) as rig:
            rig.pool.submit([Task(0)])
            await rig.until(lambda: len(rig.parts) == 2)
        assert closed_in == ["penstock-stage-0"]

    run(main)


def test_abort_cancels_what_a_thread_awaits() -> None:
    states: list[str] = []

    async def forever(_: int) -> None:
        states.append("begun")
        rig.changed.set()
        try:
            await asyncio.Event().wait()
        finally:
            states.append("cancelled")

    rig: Rig

    async def main() -> None:
        nonlocal rig
        rig = Rig(partial(forever), workers=1)
        async with rig:
            rig.pool.submit([Task(0), Task(1)])
            await rig.until(lambda: states)
        assert states == ["begun", "cancelled"]

    run(main)


@pytest.mark.parametrize("verb", [MAP, STREAM])
def test_nothing_is_awaited_any_more_after_abort_began(verb: int) -> None:
    go = threading.Event()
    there = threading.Event()
    begun: list[int] = []

    async def later(x: int) -> list[int]:
        begun.append(x)
        return [x]

    def work(x: int) -> Any:
        there.set()
        go.wait(10)
        return later(x)

    async def main() -> None:
        rig = Rig(Step("x", work, verb), workers=1)
        await rig.pool.open()
        rig.pool.submit([Task(0)])
        await asyncio.to_thread(there.wait, 10)
        aborting = asyncio.create_task(rig.pool.abort())
        await asyncio.sleep(0)
        go.set()
        await aborting
        assert begun == []

    run(main)


def test_stream_of_a_list_that_is_awaited() -> None:
    async def later(n: int) -> list[int]:
        return list(range(n))

    async def main() -> None:
        async with Rig(Step("x", partial(later), STREAM), workers=1) as rig:
            granting(rig)
            await rig.run([3])
            assert [x for _, outputs in rig.parts for x in outputs] == [0, 1, 2]

    run(main)


def test_abort_drops_what_waits_and_waits_for_what_runs() -> None:
    go = threading.Event()
    there = threading.Event()
    begun: list[int] = []

    def work(x: int) -> None:
        begun.append(x)
        there.set()
        go.wait(10)

    async def main() -> None:
        rig = Rig(work, workers=1)
        await rig.pool.open()
        rig.pool.submit([Task(0), Task(1)])
        await asyncio.to_thread(there.wait, 10)
        aborting = asyncio.create_task(rig.pool.abort())
        await asyncio.sleep(0)
        assert not aborting.done()
        go.set()
        await aborting
        await asyncio.sleep(0)
        assert begun == [0]
        assert rig.finished == []
        await rig.pool.abort()

    run(main)


def test_abort_leaves_a_hanging_thread_behind_and_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("penstock.place.thread.GRACE", 0.01)
    go = threading.Event()
    begun = threading.Event()
    threads: list[threading.Thread] = []

    def hang(x: int) -> None:
        threads.append(threading.current_thread())
        begun.set()
        go.wait(10)

    async def main() -> None:
        async with Rig(hang, workers=1, name="hang") as rig:
            rig.pool.submit([Task(0)])
            await asyncio.to_thread(begun.wait, 10)
        assert outside.count == 0

    run(main)
    assert "penstock-hang-0" in caplog.text
    go.set()
    threads[0].join(10)


@pytest.mark.parametrize("phase", ["open", "close"])
def test_a_cancelled_open_or_close_leaves_nothing_running(phase: str) -> None:
    go = threading.Event()
    there = threading.Event()

    class Slow:
        def __init__(self) -> None:
            if phase == "open":
                there.set()
                go.wait(10)

        def __call__(self, x: int) -> int:
            return x

        def close(self) -> None:
            if phase == "close":
                there.set()
                go.wait(10)

    async def main() -> None:
        rig = Rig(per_worker(Slow), workers=1)
        if phase == "close":
            await rig.pool.open()
        doing = asyncio.create_task(rig.pool.open() if phase == "open" else rig.pool.close())
        await asyncio.to_thread(there.wait, 10)
        doing.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await doing

    run(main)


def test_abort_of_a_pool_that_never_opened() -> None:
    async def main() -> None:
        await Rig(double).pool.abort()
        await Rig(double).pool.close()

    run(main)


def test_a_timed_out_thread_is_replaced_under_its_number_and_its_late_result_dropped() -> None:
    Tool.log.clear()
    go = threading.Event()
    threads: list[threading.Thread] = []

    class Slow(Tool):
        def __call__(self, x: int) -> int:
            if x == 0:
                threads.append(threading.current_thread())
                go.wait(10)
            return worker_index()

    async def main() -> None:
        async with Rig(lambda x: x, Step("slow", per_worker(Slow), MAP, 0.2), workers=1) as rig:
            late, then = await rig.run([0, 1])
            assert (late.outcome, late.at, late.value) == (TIMED_OUT, 1, 0)
            assert isinstance(late.error, StageTimeout)
            assert str(late.error) == "stage 'slow': an attempt took longer than its timeout of 0.2 s"
            assert (then.outcome, then.value) == (OK, 0)
            assert rig.pool.abandoned == ["penstock-stage-0 (timed out, number 1)"]
            assert rig.pool.in_progress <= 1
            go.set()
            threads[0].join(10)
            await asyncio.sleep(0)
            assert rig.pool.abandoned == []
            assert [what for what, _ in Tool.log] == ["built", "built", "closed"]
            assert (late.outcome, late.value) == (TIMED_OUT, 0)
            assert len(rig.finished) == 2

    run(main)


def test_more_abandoned_threads_than_workers_fail_the_pool() -> None:
    go = threading.Event()
    threads: list[threading.Thread] = []

    def hang(x: int) -> None:
        threads.append(threading.current_thread())
        go.wait(10)

    async def main() -> None:
        async with Rig(Step("hang", hang, MAP, 0.01), workers=2, name="hang") as rig:
            rig.pool.submit([Task(x) for x in range(5)])
            await rig.until(lambda: rig.failures)
            error = rig.failures[0]
            assert isinstance(error, AbandonedThreads)
            assert (error.stage, error.count) == ("hang", 3)
            assert rig.pool.in_progress <= 2
            go.set()

    run(main)
    for thread in threads:
        thread.join(10)


def test_a_replacement_that_cannot_be_built_fails_the_pool() -> None:
    go = threading.Event()
    threads: list[threading.Thread] = []

    class Once:
        def __init__(self) -> None:
            if threads:
                raise ConnectionError("gone")

        def __call__(self, x: int) -> None:
            threads.append(threading.current_thread())
            go.wait(10)

    async def main() -> None:
        async with Rig(Step("once", per_worker(Once), MAP, 0.01), workers=1) as rig:
            rig.pool.submit([Task(0)])
            await rig.until(lambda: rig.failures)
            assert isinstance(rig.failures[0], ConnectionError)
            go.set()

    run(main)
    threads[0].join(10)


def test_a_timeout_cancels_what_the_thread_awaits() -> None:
    async def forever(_: int) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with Rig(Step("x", partial(forever), MAP, 0.01), workers=1) as rig:
            (task,) = await rig.run([0])
            assert task.outcome == TIMED_OUT
            await turns_until(lambda: not rig.pool.abandoned)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main)


def test_a_stream_times_out_by_the_output_and_keeps_what_came() -> None:
    go = threading.Event()
    threads: list[threading.Thread] = []

    def expand(_: int) -> Iterator[int]:
        threads.append(threading.current_thread())
        for i in range(4):
            time.sleep(0.15)
            yield i
        go.wait(10)
        yield 4

    async def main() -> None:
        async with Rig(Step("x", expand, STREAM, 0.5), workers=1) as rig:
            granting(rig)
            (task,) = await rig.run([7])
            assert (task.outcome, task.value) == (TIMED_OUT, 7)
            assert [x for _, outputs in rig.parts for x in outputs] == [0, 1, 2, 3]
            go.set()

    run(main)
    threads[0].join(10)


def test_a_stream_that_times_out_without_a_grant_keeps_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "PART_TIME", 60.0)  # or a slow machine makes the thread wait for a grant, untimed
    handed_over = [threading.Event(), threading.Event()]
    go = threading.Event()
    threads: list[threading.Thread] = []

    def expand(_: int) -> Iterator[int]:
        threads.append(threading.current_thread())
        for i, event in enumerate(handed_over):
            yield i
            event.wait(10)
        yield 2
        go.wait(10)

    async def main() -> None:
        async with Rig(Step("x", expand, STREAM, 1), workers=1) as rig:
            handed = rig.part

            def part(task: Task, outputs: list[Any]) -> None:
                handed(task, outputs)
                for event in handed_over[: len(rig.parts)]:
                    event.set()

            rig.pool.part = part
            (task,) = await rig.run([7])
            assert task.outcome == TIMED_OUT
            assert [outputs for _, outputs in rig.parts] == [[0], [1], [2]]
            go.set()

    run(main)
    threads[0].join(10)


def test_slow_tasks_are_all_timed_and_fast_ones_sampled() -> None:
    async def main() -> None:
        async with Rig(lambda x: time.sleep(0.0002), double_or_none, workers=1) as rig:
            tasks = await rig.run(range(20))
            assert all(task.seconds is not None and len(task.seconds) == 2 for task in tasks)
            assert all(task.seconds[0] >= 0.0002 for task in tasks)  # type: ignore[index]
        async with Rig(double, workers=1) as rig:
            tasks = await rig.run(range(3200))
            assert 10 <= sum(task.seconds is not None for task in tasks) <= 400

    run(main)


def double_or_none(x: int | None) -> int | None:
    return None if x is None else 2 * x


def test_room_follows_the_service_time() -> None:
    async def main() -> None:
        async with Rig(double, workers=2) as rig:
            await rig.run(range(2000))
            assert 100 < rig.pool.room() <= 1026
            rig.pool.submit([Task(x) for x in range(50)])
            assert rig.pool.room() <= 1026 - 50
            await rig.until(lambda: len(rig.finished) == 2050)
        async with Rig(lambda x: time.sleep(0.01), workers=2) as rig:
            await rig.run(range(20))
            assert rig.pool.room() == 4
            go = threading.Event()
            rig.pool.submit([Task(0)])
            assert rig.pool.room() == 3
            go.set()

    run(main)


def test_a_resting_thread_keeps_nothing_alive() -> None:
    class Big:
        pass

    async def main() -> None:
        async with Rig(lambda x: x, workers=1) as rig:
            big = Big()
            seen = weakref.ref(big)
            task = Task(big)
            del big
            rig.pool.submit([task])
            await rig.until(lambda: rig.finished)
            rig.finished.clear()
            del task
            await turns_until(lambda: not rig.pool.in_progress)
            gc.collect()
            assert seen() is None

    run(main)


def test_outside_counts_what_is_with_the_threads() -> None:
    go = threading.Event()

    async def main() -> None:
        async with Rig(lambda x: go.wait(10), workers=1) as rig:
            assert outside.count == 0
            rig.pool.submit([Task(0), Task(1)])
            assert outside.count == 2
            go.set()
            await rig.until(lambda: len(rig.finished) == 2)
            assert outside.count == 0

    run(main)
