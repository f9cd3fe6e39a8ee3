"""Exceptions that Python steers by (CancelledError, StopIteration), raised by a user's function: one item's failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import StrayException
from penstock.testing import run_virtual

KINDS: list[type[BaseException]] = [asyncio.CancelledError, StopIteration, StopAsyncIteration]


def at_one(kind: type[BaseException]) -> Callable[[int], int]:
    def work(x: int) -> int:
        if x == 1:
            raise kind
        return x

    return work


def awaited(kind: type[BaseException]) -> Callable[[int], Any]:
    async def work(x: int) -> int:
        if x == 1:
            raise kind
        return x

    return work


def whole(kind: type[BaseException]) -> Callable[[int], Any]:
    return lambda x: [at_one(kind)(x)]


def batch(kind: type[BaseException]) -> Callable[[list[int]], Any]:
    return lambda xs: [at_one(kind)(x) for x in xs]


def stated(kind: type[BaseException]) -> Callable[[None, int], Any]:
    async def work(state: None, x: int) -> tuple[None, int]:
        return state, await awaited(kind)(x)

    return work


STAGES: dict[str, Any] = {
    "loop": lambda flow, kind, **given: flow.map(awaited(kind), name="s", **given),
    "threads": lambda flow, kind, **given: flow.map(at_one(kind), name="s", **given),
    "awaited in threads": lambda flow, kind, **given: flow.map(awaited(kind), place="thread", name="s", **given),
    "filter": lambda flow, kind, **given: flow.filter(lambda x: at_one(kind)(x) is not None, name="s", **given),
    "flat_map": lambda flow, kind, **given: flow.flat_map(whole(kind), name="s", **given),
    "one by one": lambda flow, kind, **given: flow.flat_map(whole(kind), whole=False, name="s", **given),
    "map_batches": lambda flow, kind, **given: flow.map_batches(
        batch(kind), batch_size=2, max_wait=0, name="s", **given
    ),
    "states": lambda flow, kind, **given: flow.map_state(lambda s, x: (s, at_one(kind)(x)), name="s", **given),
    "states awaited": lambda flow, kind, **given: flow.map_state(stated(kind), name="s", **given),
    "key": lambda flow, kind, **given: flow.map(lambda x: x, key=at_one(kind), name="s", **given),
    "timed": lambda flow, kind, **given: flow.map(awaited(kind), timeout=60, name="s", **given),
    "processes": lambda flow, kind, **given: flow.map(at_one(kind), place="process", workers=1, name="s", **given),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", STAGES)
def test_an_exception_that_steers_goes_by_on_error(shape: str, kind: type[BaseException]) -> None:
    flow = STAGES[shape]
    assert asyncio.run(flow(ps.Flow(range(3)), kind, on_error="skip").collect()) == [0, 2]
    kept: list[Any] = asyncio.run(flow(ps.Flow(range(3)), kind, on_error="keep").collect())
    (one,) = [output for output in kept if isinstance(output, ps.Failed)]
    assert [output for output in kept if output is not one] == [0, 2]
    assert (one.item, one.stage, one.attempts) == (1, "s", 1)
    assert one.reason in (kind.__name__, "RuntimeError")  # coroutines themselves make a RuntimeError of StopIteration


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", STAGES)
@pytest.mark.parametrize("how", ["collect", "run", "async for", "for"])
def test_raised_it_can_be_taken_for_nothing_else(shape: str, kind: type[BaseException], how: str) -> None:
    flow = STAGES[shape](ps.Flow(range(3)), kind)

    async def main() -> None:
        if how == "collect":
            await flow.collect()
        elif how == "run":
            await flow.to(lambda x: None).run(progress=False)
        else:
            async for _ in flow:
                pass

    with pytest.raises(RuntimeError) as raised:
        if how == "for":
            list(flow)
        else:
            asyncio.run(main())
    assert "at stage 's', item 1: 1" in raised.value.__notes__
    assert isinstance(raised.value.__cause__, kind)
    if isinstance(raised.value, StrayException):
        assert (raised.value.stage, raised.value.kind) == ("s", kind.__name__)
        assert kind.__name__ in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["loop", "threads", "awaited in threads", "map_batches", "processes"])
def test_a_service_outlives_it_and_tells_the_one_caller(shape: str, kind: type[BaseException]) -> None:
    async def main() -> None:
        async with STAGES[shape](ps.Flow(), kind).open() as call:
            zero, one, two = await asyncio.gather(call(0), call(1), call(2), return_exceptions=True)
            assert (zero, two) == (0, 2)
            assert isinstance(one, RuntimeError)
            assert "at stage 's', item 1: 1" in one.__notes__
            assert await call(7) == 7

    asyncio.run(main())


def test_it_is_retried_like_any_other_and_on_sees_the_original() -> None:
    tries: list[int] = []

    async def work(x: int) -> int:
        tries.append(x)
        if len(tries) < 3:
            raise asyncio.CancelledError
        return x

    flow = ps.Flow([5])
    assert run_virtual(flow.map(work, retry=ps.Retry(5, on=asyncio.CancelledError)).collect()) == [5]
    tries.clear()
    with pytest.raises(StrayException):
        run_virtual(flow.map(work, retry=ps.Retry(5, on=ValueError)).collect())


@pytest.mark.parametrize("place", ["loop", "thread", "process"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_constructor_it_ends_the_run_before_anything_is_read(place: Any, kind: type[BaseException]) -> None:
    class Model:
        def __init__(self) -> None:
            raise kind

        def __call__(self, x: int) -> int:
            return x

    with pytest.raises(StrayException, match=kind.__name__):
        asyncio.run(ps.Flow([1]).map(ps.per_worker(Model), place=place).collect())


def test_of_a_source_it_fails_the_run_and_is_no_end() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    recorder = Recorder()
    with pytest.raises(StrayException) as raised:
        asyncio.run(ps.Flow(source()).to(recorder).run(progress=False))
    assert raised.value.stage == "read"


@pytest.mark.parametrize("kind", [asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_of_a_function_that_takes_the_outputs(kind: type[BaseException], asynchronous: bool) -> None:
    take = (awaited if asynchronous else at_one)(kind)
    report = asyncio.run(ps.Flow(range(3)).to(take, on_error="skip").run(progress=False))
    assert (report.delivered, report.skipped) == (2, 1)
    with pytest.raises(RuntimeError):
        asyncio.run(ps.Flow(range(3)).to(take).run(progress=False))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_end_of_the_loop_is_no_items_failure(asynchronous: bool) -> None:
    """asyncio.run cancels every task that is left, the workers' too: nothing may be settled for that."""
    recorder = Recorder()

    async def main() -> asyncio.Task[ps.Report]:
        reached = asyncio.Event()

        async def work(x: int) -> int:
            if x == 3:
                reached.set()
                await asyncio.sleep(3600)
            return x

        place: Any = "loop" if asynchronous else "thread"
        job = ps.Flow(range(9)).map(work, place=place, on_error="skip").to(recorder)
        task = asyncio.create_task(job.run(progress=False))
        await reached.wait()
        return task

    assert asyncio.run(main()).cancelled()
    assert set(recorder.outputs) <= {0, 1, 2}
    assert ("", 3) not in recorder.progress.settled


def test_a_function_that_cancels_its_own_worker_fails_the_run() -> None:
    async def work(x: int) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)
        return x

    with pytest.raises(StrayException, match="CancelledError"):
        run_virtual(ps.Flow(range(3)).map(work, on_error="skip").collect())
