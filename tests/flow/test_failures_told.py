"""What a failure says and counts: notes on every exception, budgets, busy shares, batches that hang, closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import penstock as ps
from penstock.testing import run_virtual


async def late(x: int) -> int:
    await asyncio.sleep(1)
    raise ValueError(x)


def test_a_stage_whose_calls_fail_is_busy_all_the_same() -> None:
    flow = ps.Flow(range(64)).map(late, concurrency=4, on_error="skip")
    report = run_virtual(flow.to(lambda x: None).run(progress=False))
    assert report.stages[0].busy > 0.9
    assert report.stages[0].p50 == pytest.approx(1, rel=0.05)
    assert report.bottleneck.reason == "busy"


def test_so_is_one_whose_calls_time_out_and_one_after_another_stage() -> None:
    async def same(x: int) -> int:
        return x

    flow = ps.Flow(range(64)).map(same, concurrency=4).map(late, concurrency=4, timeout=0.5, on_error="skip")
    report = run_virtual(flow.to(lambda x: None).run(progress=False))
    assert report.stages[1].p50 == pytest.approx(0.5, rel=0.05)
    assert report.bottleneck.stage == "late"


@pytest.mark.parametrize("place", ["thread", "process"])
def test_samples_of_failed_calls_belong_to_the_step_that_failed(place: Any) -> None:
    def fail(x: int) -> int:
        raise ValueError(x)

    flow = ps.Flow(range(5)).map(lambda x: x, place=place, workers=1).map(fail, place=place, workers=1, on_error="skip")
    report = asyncio.run(flow.to(lambda x: None).run(progress=False))
    assert report.skipped == 5
    assert all(stage.p50 > 0 for stage in report.stages[:2])


def test_a_budget_in_items_tells_of_how_many_they_are() -> None:
    async def work(x: int) -> int:
        if x >= 4:
            raise ValueError(x)
        return x

    with pytest.raises(ps.errors.FailureBudgetExceeded) as raised:
        run_virtual(ps.Flow(range(100)).map(work, concurrency=1, on_error="skip", max_failures=5).collect())
    assert (raised.value.failed, raised.value.tried) == (6, 10)
    assert "6 of 10 items failed" in str(raised.value)


def test_an_exception_of_the_source_says_where_it_was() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise KeyError("gone")

    async def empty() -> AsyncIterator[int]:
        raise KeyError("gone")
        yield 1

    with pytest.raises(KeyError) as raised:
        asyncio.run(ps.Flow(source()).collect())
    assert raised.value.__notes__ == ["in the source memory:source, after item 2"]
    with pytest.raises(KeyError) as raised:
        asyncio.run(ps.Flow(empty()).collect())
    assert raised.value.__notes__ == ["in the source memory:empty, before its first item"]


def test_an_on_function_that_raises_fails_the_item_it_was_asked_about() -> None:
    async def work(x: int) -> int:
        if x == 1:
            raise ValueError(x)
        return x

    def confused(error: BaseException) -> bool:
        raise LookupError("no such code")

    flow = ps.Flow(range(3))
    assert run_virtual(flow.map(work, retry=ps.Retry(2, on=confused), on_error="skip").collect()) == [0, 2]
    with pytest.raises(LookupError) as raised:
        run_virtual(flow.map(work, retry=ps.Retry(2, on=confused)).collect())
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.value.__notes__[-1] == "at stage 'work', item 1: 1"
    assert "Retry(on=)" in raised.value.__notes__[0]


class Closing:
    """Notes how it was closed; ``problem`` is raised then."""

    def __init__(self, closed: list[str], problem: Exception | None = None) -> None:
        self.closed = closed
        self.problem = problem

    def __call__(self, x: int) -> int:
        return x

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed.append(threading.current_thread().name)
        if self.problem is not None:
            raise self.problem


class ClosingAsync(Closing):
    async def __call__(self, x: int) -> int:  # type: ignore[override]  # an async object
        return x


@pytest.mark.parametrize("kind", [Closing, ClosingAsync])
def test_an_async_close_is_awaited_and_what_it_raises_says_so(kind: type[Closing]) -> None:
    closed: list[str] = []
    assert asyncio.run(ps.Flow(range(3)).map(ps.per_worker(kind, closed)).collect()) == [0, 1, 2]
    assert len(closed) == 1
    with pytest.raises(OSError, match="still busy") as raised:
        asyncio.run(ps.Flow(range(3)).map(ps.per_worker(kind, closed, OSError("still busy")), name="s").collect())
    assert raised.value.__notes__ == ["in close() of an object that a worker of stage 's' had"]


def test_closing_in_a_process_says_so() -> None:
    with pytest.raises(OSError, match="still busy") as raised:
        flow = ps.Flow([1]).map(ps.per_worker(Closing, [], OSError("still busy")), name="s", place="process")
        asyncio.run(flow.collect())
    assert "in close() of an object that a worker of stage 's' had" in raised.value.__notes__


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_run_arrives_from_a_process_as_itself(error: type[BaseException]) -> None:
    def work(x: int) -> int:
        raise error

    with pytest.raises(error) as raised:
        asyncio.run(ps.Flow([7]).map(work, place="process", workers=1, on_error="skip").collect())
    assert raised.value.__notes__[-1] == "at stage 'work', item 0: 7"


def test_only_signal_nine_speaks_of_memory() -> None:
    assert "memory" in str(ps.errors.WorkerDied("s", -9, "1"))
    assert "memory" not in str(ps.errors.WorkerDied("s", -2, "1"))
    assert "memory" not in str(ps.errors.WorkerDied("s", 3, "1"))


def test_an_item_that_hangs_in_a_batch_in_a_thread_is_kept_and_costs_two_threads() -> None:
    go = threading.Event()

    def batch(xs: list[int]) -> list[int]:
        if 0 in xs:
            go.wait(30)
        return xs

    async def main() -> list[Any]:
        try:
            flow = ps.Flow(range(16)).map_batches(batch, batch_size=16, timeout=0.05, on_error="keep")
            return await flow.collect()
        finally:
            go.set()

    kept, *others = asyncio.run(main())
    assert kept.reason == "timeout"
    assert others == list(range(1, 16))


def test_more_items_that_hang_in_batches_than_there_are_workers_fail_the_flow() -> None:
    go = threading.Event()

    def batch(xs: list[int]) -> list[int]:
        if 0 in xs or 1 in xs:
            go.wait(30)
        return xs

    async def main() -> None:
        try:
            await ps.Flow(range(16)).map_batches(batch, batch_size=16, timeout=0.05, on_error="keep").collect()
        finally:
            go.set()

    with pytest.raises(ps.errors.AbandonedThreads):
        asyncio.run(main())


def test_parameters_that_are_none_are_refused() -> None:
    with pytest.raises(ps.errors.PlanError, match="per_worker"):
        ps.per_worker(5)  # type: ignore[arg-type]
    with pytest.raises(ps.errors.PlanError, match="ordered='x'"):
        ps.Flow([1]).map(str, ordered="x")  # type: ignore[call-overload]
    with pytest.raises(ps.errors.PlanError, match="jitter=5"):
        ps.Retry(jitter=5)  # type: ignore[arg-type]
