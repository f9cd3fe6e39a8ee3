"""Outputs that go to the caller: ``async for``, ``for`` and ``collect``, left early, failing, shared."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import balanced, dice

import penstock as ps
from penstock.errors import PlanError
from penstock.flow import sync
from penstock.flow.iterate import Outputs, iterate
from penstock.flow.sync import background_loop, run_blocking
from penstock.testing import run_virtual


async def nap(x: int) -> int:
    await asyncio.sleep(dice(x, "nap") / 10)
    return x


class Watched:
    """An endless source that knows whether it is being read, and whether that ended."""

    def __init__(self) -> None:
        self.read = 0
        self.closed = threading.Event()

    async def __aiter__(self) -> AsyncIterator[int]:
        try:
            while True:
                self.read += 1
                yield self.read - 1
                await asyncio.sleep(0)
        finally:
            self.closed.set()


async def everything_else_to_end() -> None:
    """Until no task but this one is there."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


@settings(max_examples=40)
@given(
    count=st.integers(0, 700),
    ordered=st.booleans(),
    shape=st.sampled_from(["map", "filter", "flat_map", "batch", "none"]),
)
def test_all_three_give_the_same(count: int, ordered: bool, shape: str) -> None:
    flow: ps.Flow[Any] = ps.Flow(range(count))
    if shape == "map":
        flow = flow.map(nap, ordered=ordered)
    elif shape == "filter":
        flow = flow.filter(lambda x: dice(x, "keep") < 50, workers=2)
    elif shape == "flat_map":
        flow = flow.flat_map(lambda x: [x] * (dice(x, "many") % 3))
    elif shape == "batch":
        flow = flow.batch(7)

    async def main() -> tuple[list[Any], list[Any]]:
        return [output async for output in flow], await flow.collect()

    one, two = run_virtual(main())
    if ordered or shape != "map":
        assert one == two
    assert sorted(one) == sorted(two)
    if shape != "map":  # the naps would be real
        assert list(flow) == one


def test_none_is_an_output_and_not_the_end() -> None:
    flow = ps.Flow([1, None, 2, None])

    async def main() -> list[Any]:
        return [output async for output in flow]

    assert asyncio.run(main()) == flow.collect_sync() == list(flow) == [1, None, 2, None]


def test_outputs_come_as_they_are_made() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def wait(x: int) -> int:
            await asyncio.sleep(x)
            return x

        return [loop.time() - began async for _ in ps.Flow([1, 2, 5]).map(wait)]

    assert run_virtual(main()) == [1, 2, 5]


# -- leaving early ----------------------------------------------------------------------------------------------------


def test_break_stops_the_run_at_the_next_turn() -> None:
    async def main() -> None:
        source = Watched()
        async for x in ps.Flow(source).map(nap):
            if x == 3:
                break
        await everything_else_to_end()
        assert source.closed.is_set()

    run_virtual(main())


def test_aclose_waits_for_the_end() -> None:
    async def main() -> None:
        source = Watched()
        async with aclosing(iterate(ps.Flow(source).map(nap))) as outputs:
            async for x in outputs:
                if x == 3:
                    break
        assert source.closed.is_set()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await outputs.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)

    run_virtual(main())


def test_aclose_ends_whoever_waits_for_an_output() -> None:
    async def main() -> None:
        outputs = iterate(ps.Flow([100_000]).map(wait_for_ever))
        waiting = asyncio.create_task(anext(outputs, "the end"))  # type: ignore[arg-type]  # anext makes a coroutine
        await asyncio.sleep(1)
        await outputs.aclose()
        assert await waiting == "the end"

    run_virtual(main())


async def wait_for_ever(x: Any) -> Any:
    await asyncio.Event().wait()


def test_what_was_read_ahead_is_released() -> None:
    async def main() -> ps.Report:
        outputs = iterate(ps.Flow(range(1000)).map(nap))
        assert [await anext(outputs) for _ in range(3)] == [0, 1, 2]
        await outputs.aclose()
        return outputs._outlet.run.report()

    report = run_virtual(main())
    assert report.delivered == 3
    assert report.released == report.issued - 3 > 0
    assert balanced(report)


def test_an_iterator_that_is_never_asked_starts_nothing() -> None:
    source = Watched()

    async def main() -> None:
        outputs = aiter(ps.Flow(source))
        iter(ps.Flow(source))
        assert isinstance(outputs, Outputs)
        await outputs.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert source.read == 0


def test_an_iterator_may_outlive_its_loop() -> None:
    kept: list[Any] = []

    async def main() -> None:
        outputs = aiter(ps.Flow(Watched()))
        kept.append(outputs)
        assert await anext(outputs) == 0

    asyncio.run(main())
    kept.clear()
    gc.collect()


def test_a_plan_that_cant_run_is_refused_without_any_noise() -> None:
    for start in (aiter, iter, iterate):
        with pytest.raises(PlanError, match="unbound"):
            start(ps.Flow())
    gc.collect()


def test_break_out_of_a_plain_for_ends_the_run() -> None:
    source = Watched()
    for x in ps.Flow(source).map(str):
        if x == "3":
            break
    gc.collect()  # the iterator may be part of a cycle somewhere; usually it is gone already
    assert source.closed.is_set()


def test_closing_a_plain_iterator_ends_the_run() -> None:
    source = Watched()
    outputs = iter(ps.Flow(source))
    assert next(outputs) == 0
    outputs.close()  # type: ignore[attr-defined]  # it is a generator
    assert source.closed.is_set()
    assert list(outputs) == []


def test_a_plain_iterator_may_be_collected_on_the_loop_itself() -> None:
    """The garbage collector runs anywhere, also where waiting for the run would be waiting for oneself."""
    source = Watched()
    cycle: list[Any] = [iter(ps.Flow(source))]
    assert next(cycle[0]) == 0
    cycle.append(cycle)

    async def collect() -> None:
        gc.collect()

    gc.disable()
    try:
        del cycle
        run_blocking(collect)
    finally:
        gc.enable()
    assert source.closed.wait(30)


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupt_while_a_plain_for_starts_leaves_no_run(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come before the start was asked for, or after it was made and before anybody knew."""
    submit = sync._submit

    def interrupted(make: Any, future: Any) -> None:
        monkeypatch.setattr(sync, "_submit", submit)
        if begun:
            submit(make, future)
            futures.wait([future])
        raise KeyboardInterrupt

    monkeypatch.setattr(sync, "_submit", interrupted)
    source = Watched()
    with pytest.raises(KeyboardInterrupt):
        next(iter(ps.Flow(source).map(nap)))
    assert source.closed.is_set() == bool(source.read)

    async def others() -> set[Any]:
        return {task for task in asyncio.all_tasks() if "penstock" in task.get_name()}

    assert run_blocking(others) == set()


# -- errors -----------------------------------------------------------------------------------------------------------


def fails_at_five(x: int) -> int:
    if x == 5:
        raise LookupError(x)
    return x


def test_the_error_comes_after_outputs_that_were_before_it() -> None:
    async def one_by_one() -> AsyncIterator[int]:
        for x in range(10):
            yield x
            await asyncio.sleep(1)

    seen: list[int] = []

    async def main() -> None:
        outputs = iterate(ps.Flow(one_by_one()).map(fails_at_five, place="loop"))
        with pytest.raises(LookupError) as caught:
            while True:
                seen.append(await anext(outputs))
        assert "at stage 'fails_at_five', item 5: 5" in caught.value.__notes__
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(LookupError):  # and it doesn't look as if all was well when asked again
            await anext(outputs)

    run_virtual(main())
    assert seen == [0, 1, 2, 3, 4]


def test_an_error_comes_before_outputs_that_nobody_took_yet() -> None:
    async def main() -> None:
        outputs = iterate(ps.Flow(range(10)).map(nap_or_fail, concurrency=1))
        assert await anext(outputs) == 0
        await asyncio.sleep(100)
        with pytest.raises(LookupError):
            await anext(outputs)
        report = outputs._outlet.run.report()
        assert (report.delivered, report.released) == (1, report.issued - 1)

    run_virtual(main())


async def nap_or_fail(x: int) -> int:
    await asyncio.sleep(1)
    return fails_at_five(x)


def test_a_plain_for_raises_the_same_and_then_ends() -> None:
    def one_by_one() -> Iterator[int]:
        for x in range(10):
            if x == 5:
                assert handed.wait(30)
            yield x

    handed = threading.Event()
    seen: list[int] = []
    outputs = iter(ps.Flow(one_by_one()).map(fails_at_five))
    with pytest.raises(LookupError):
        for x in outputs:
            seen.append(x)
            if x == 4:
                handed.set()
    assert seen == [0, 1, 2, 3, 4]
    assert list(outputs) == []


class Unbuildable:
    def __init__(self) -> None:
        raise OSError("no model here")

    def __call__(self, x: int) -> int:
        return x


def test_an_error_of_opening_comes_out_and_ends_the_iterator() -> None:
    flow = ps.Flow([1]).map(ps.per_worker(Unbuildable))

    async def main() -> None:
        outputs = iterate(flow)
        with pytest.raises(OSError, match="no model here"):
            await anext(outputs)
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)
        with pytest.raises(OSError, match="no model here"):
            await flow.collect()

    asyncio.run(main())
    with pytest.raises(OSError, match="no model here"):
        next(iter(flow))


def test_an_error_in_the_callers_loop_ends_the_run() -> None:
    source = Watched()
    with pytest.raises(ZeroDivisionError):
        for x in ps.Flow(source):
            1 / (3 - x)
    gc.collect()
    assert source.closed.wait(30)


# -- shared and cancelled ---------------------------------------------------------------------------------------------


def test_several_tasks_share_one_iterator() -> None:
    async def main() -> list[list[int]]:
        outputs = aiter(ps.Flow(range(300)).map(nap))

        async def consume() -> list[int]:
            mine = []
            async for x in outputs:
                mine.append(x)
                await asyncio.sleep(dice(x, "slow") / 50)
            return mine

        return list(await asyncio.gather(*(consume() for _ in range(4))))

    shares = run_virtual(main())
    assert sorted(x for share in shares for x in share) == list(range(300))
    assert all(shares)
    assert all(share == sorted(share) for share in shares)


@settings(max_examples=40)
@given(st.lists(st.floats(0, 3), max_size=20))
def test_cancelling_anext_loses_nothing(patience: list[float]) -> None:
    async def main() -> list[int]:
        outputs = iterate(ps.Flow(range(40)).map(nap, concurrency=2))
        seen = [await anext(outputs)]
        for seconds in patience:
            try:
                async with asyncio.timeout(seconds):
                    seen.append(await anext(outputs))
            except (TimeoutError, StopAsyncIteration):
                pass
        seen += [x async for x in outputs]
        return seen

    assert run_virtual(main()) == list(range(40))


def test_cancelling_the_start_ends_it() -> None:
    class Slow:
        def __init__(self) -> None:
            begun.set()
            gate.wait(30)

        def __call__(self, x: int) -> int:
            return x

    begun, gate = threading.Event(), threading.Event()

    async def main() -> None:
        outputs = iterate(ps.Flow([1]).map(ps.per_worker(Slow)))
        starting = asyncio.create_task(anext(outputs))  # type: ignore[arg-type]  # anext makes a coroutine
        await asyncio.to_thread(begun.wait, 30)
        starting.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)
        await outputs.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_two_iterators_of_one_flow_are_two_runs() -> None:
    flow = ps.Flow(range(3)).map(nap)

    async def main() -> list[int]:
        one, other = iterate(flow), iterate(flow)
        return [x for _ in range(3) for x in (await anext(one), await anext(other))]

    assert run_virtual(main()) == [0, 0, 1, 1, 2, 2]
    plain = ps.Flow(range(3))
    assert list(zip(plain, plain, strict=True)) == [(0, 0), (1, 1), (2, 2)]


def test_the_plain_iterator_runs_on_the_background_loop() -> None:
    async def where(x: int) -> Any:
        return asyncio.get_running_loop()

    assert list(ps.Flow([1]).map(where)) == [background_loop()]
