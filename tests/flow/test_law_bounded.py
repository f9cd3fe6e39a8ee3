"""Law 2: memory is O(concurrency + buffers), never O(items); every buffer has a bound, on by default."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.testing import run_virtual

STAGE = 3 * 1100  # work too short to measure crosses in chunks of 1,024: in the channel, at work, and waiting to leave
SOURCE = 3 * 1024  # a thread reads two chunks of 1,024 ahead of the one that is on its way


class Endless:
    """Counts how far it was read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        for item in itertools.count():
            self.read = item + 1
            yield item


class EndlessAsync:
    """The same for an async flow."""

    def __init__(self) -> None:
        self.read = 0

    async def __aiter__(self) -> AsyncIterator[int]:
        for item in itertools.count():
            self.read = item + 1
            yield item
            await asyncio.sleep(0)


async def same(x: Any) -> Any:
    return x


async def nap(x: Any) -> Any:
    await asyncio.sleep(0.01)
    return x


def double(x: Any) -> list[Any]:
    return [x, x]


SHAPES: dict[str, Any] = {
    "async": lambda flow: flow.map(nap, concurrency=8),
    "async that never suspends": lambda flow: flow.map(same),
    "unordered": lambda flow: flow.map(nap, concurrency=8, ordered=False),
    "keyed": lambda flow: flow.map(nap, concurrency=8, key=lambda x: x % 3),
    "threads": lambda flow: flow.map(abs, workers=2),
    "filter": lambda flow: flow.filter(nap, concurrency=4),
    "three": lambda flow: flow.map(nap).map(abs, workers=2).map(nap, concurrency=3),
    "batches": lambda flow: flow.map_batches(lambda xs: xs, batch_size=10, workers=2),
    "batch": lambda flow: flow.batch(10).unbatch(),
    "flat_map": lambda flow: flow.flat_map(double, workers=2),
    "one by one": lambda flow: flow.flat_map(double, whole=False, workers=2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", [Endless, EndlessAsync])
def test_law_bounded_the_source_is_read_only_so_far_ahead_of_a_slow_consumer(shape: str, source: Any) -> None:
    items = source()
    taken = 0
    ahead = 0
    given_: Any = iter(items) if source is Endless else aiter(items)

    async def main() -> None:
        nonlocal taken, ahead
        outputs = aiter(SHAPES[shape](ps.Flow(given_)))
        async for _ in outputs:
            taken += 1
            await asyncio.sleep(0.5)
            ahead = max(ahead, items.read - taken)
            if taken == 60:
                break
        await outputs.aclose()

    run_virtual(main())
    stages = 3 if shape == "three" else 1
    assert ahead <= STAGE * stages + (SOURCE if source is Endless else 64)


PLACES: dict[str, Any] = {
    "none": (0, lambda flow, **given: flow),
    "loop": (8, lambda flow, **given: flow.map(same, concurrency=8, **given)),
    "thread": (2, lambda flow, **given: flow.map(lambda x: x, workers=2, **given)),
    "process": (1, lambda flow, **given: flow.map(lambda x: x, place="process", workers=1, **given)),
    "filter": (2, lambda flow, **given: flow.filter(lambda x: True, workers=2, **given)),
    "whole": (2, lambda flow, **given: flow.flat_map(lambda x: [x], workers=2, **given)),
    "batches": (20, lambda flow, **given: flow.map_batches(lambda xs: xs, batch_size=20, **given)),
    "three": (12, lambda flow, **given: flow.map(same, concurrency=8, **given).map(abs, workers=4, **given)),
}


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("source", [Endless, EndlessAsync])
def test_law_bounded_by_demand_where_work_is_quick_and_the_consumer_is_slow(
    place: str, ordered: bool, sink: bool, source: Any
) -> None:
    """Whatever a place is worth in items of a microsecond: two rounds of work, and a few tens."""
    at_once, build = PLACES[place]
    items = source()
    given_: Any = iter(items) if source is Endless else aiter(items)
    flow = build(ps.Flow(given_), **({} if place == "none" else {"ordered": ordered}))
    taken = ahead = 0

    async def take(_: Any) -> None:
        nonlocal taken, ahead
        taken += 1
        await asyncio.sleep(0.5)
        ahead = max(ahead, items.read - taken)

    async def main() -> None:
        if sink:
            await flow.take(60).to(take).run(progress=False)
        else:
            outputs = aiter(flow)
            while taken < 60:
                await take(await anext(outputs))
            await outputs.aclose()

    run_virtual(main())
    read_ahead = 128 if source is Endless else 2  # in the source's thread, and what the reader has of it
    assert ahead <= 2 * at_once + 32 + read_ahead


@pytest.mark.parametrize("place", ["loop", "thread"])
def test_law_bounded_outputs_of_one_item_that_are_slow_to_make(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a stream ends after a few milliseconds, here after no time at all, and not only when it is long."""
    monkeypatch.setattr("penstock.place.crew.PART_TIME", 0.0)
    monkeypatch.setattr("penstock.place.loop.SLICE", 0.0)
    made = 0

    def expand(_: int) -> Iterator[int]:
        nonlocal made
        while made < 10_000:
            made += 1
            yield made

    async def expand_async(_: int) -> AsyncIterator[int]:
        for output in expand(0):
            yield output

    async def main() -> None:
        function: Any = expand if place == "thread" else expand_async
        outputs = aiter(ps.Flow([1]).flat_map(function, whole=False))
        ahead = 0
        for taken in range(1, 100):
            await anext(outputs)
            await asyncio.sleep(0.5)
            ahead = max(ahead, made - taken)
        await outputs.aclose()
        assert ahead <= 64 + 256  # before the consumer, and what it took

    run_virtual(main())


def test_law_bounded_a_consumer_that_becomes_slow_is_followed() -> None:
    items = Endless()

    async def main() -> None:
        outputs = aiter(ps.Flow(iter(items)).map(same, concurrency=8))
        taken = 20_000
        for _ in range(taken):
            await anext(outputs)
        await asyncio.sleep(1)
        much = items.read - taken
        for _ in range(2 * much):
            await anext(outputs)
            await asyncio.sleep(0.5)
            taken += 1
        await outputs.aclose()
        assert much > 500
        assert items.read - taken <= 2 * 8 + 32 + 128

    run_virtual(main())


@settings(max_examples=25)
@given(concurrency=st.integers(1, 16), stages=st.integers(1, 3), ordered=st.booleans())
def test_law_bounded_by_concurrency_and_buffers_for_work_that_takes_time(
    concurrency: int, stages: int, ordered: bool
) -> None:
    items = EndlessAsync()

    async def work(x: int) -> int:
        await asyncio.sleep(1)
        return x

    async def main() -> int:
        flow: ps.Flow[int] = ps.Flow(aiter(items))
        for _ in range(stages):
            flow = flow.map(work, concurrency=concurrency, ordered=ordered)
        outputs = aiter(flow)
        ahead = 0
        for taken in range(30):
            await anext(outputs)
            await asyncio.sleep(5)
            ahead = max(ahead, items.read - taken)
        await outputs.aclose()
        return ahead

    # before each stage a channel of 64, in it a few times its ceiling; 64 before the consumer, and what it took
    assert run_virtual(main()) <= (64 + 6 * concurrency) * stages + 2 * 64 + 2


def test_law_bounded_the_head_of_an_ordered_window_holds_up_what_comes_after() -> None:
    items = EndlessAsync()

    async def work(x: int) -> int:
        await asyncio.sleep(1000 if x == 0 else 1)
        return x

    async def main() -> None:
        outputs = aiter(ps.Flow(aiter(items)).map(work, concurrency=4))
        first = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(900)
        assert items.read <= 64 + 2 * 4 + 2
        assert await first == 0
        await outputs.aclose()

    run_virtual(main())


def test_law_bounded_retries_that_wait_hold_up_new_items() -> None:
    items = EndlessAsync()

    async def work(x: int) -> int:
        raise ValueError(x)

    async def main() -> None:
        flow = ps.Flow(aiter(items)).map(
            work, concurrency=4, ordered=False, retry=ps.Retry(50, backoff=60, jitter=False), on_error="skip"
        )
        async with flow.to(lambda x: None).start(progress=False) as run:
            await asyncio.sleep(600)
            assert items.read <= 64 + 2 * 4 + 2
            assert run.report().in_flight <= 64 + 2 * 4 + 1

    run_virtual(main())


def test_law_bounded_whole_expansions_pause_at_a_hundred_thousand_outputs() -> None:
    items = EndlessAsync()

    async def expand(x: int) -> list[int]:
        await asyncio.sleep(0.01)
        return [x] * 10_000

    async def stuck(x: int) -> int:
        await asyncio.sleep(1e9)
        return x

    async def main() -> None:
        flow = ps.Flow(aiter(items)).flat_map(expand, concurrency=2).map(stuck, concurrency=1)
        async with flow.to(Recorder()).start(progress=False) as run:
            await asyncio.sleep(1000)
            held = run.ledger.expanded
            assert held <= 100_000 + 4 * 10_000

    run_virtual(main())


class Thing:
    """Knows how many of its kind are alive."""

    alive: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.alive.add(id(self))

    def __del__(self) -> None:
        self.alive.discard(id(self))


@pytest.mark.parametrize("shape", ["async that never suspends", "three", "batches", "batch", "flat_map"])
def test_law_bounded_items_are_let_go_of(shape: str) -> None:
    count = 20_000
    shapes = {**SHAPES, "three": lambda flow: flow.map(same).map(lambda x: x, workers=2).map(same, concurrency=3)}
    most = seen = 0

    def look(thing: Thing) -> None:
        nonlocal most, seen
        seen += 1
        most = max(most, len(Thing.alive))

    report = asyncio.run(shapes[shape](ps.Flow(Thing() for _ in range(count))).to(look).run(progress=False))
    assert report.delivered == count
    assert seen >= count
    stages = 3 if shape == "three" else 1
    assert most <= SOURCE + (stages + 1) * STAGE < count
    assert not Thing.alive


class Result:
    """Something that can be seen to be alive."""


@pytest.mark.parametrize("source", [lambda: iter(range(2000)), lambda: range(2000)], ids=["iterator", "sequence"])
@pytest.mark.parametrize("sink", [False, True])
def test_law_bounded_results_that_were_taken_are_held_by_nobody(source: Any, sink: bool) -> None:
    """Else large ones pile up by the hundred, and the memory shared with processes runs short."""
    alive: weakref.WeakSet[Result] = weakref.WeakSet()
    most = 0

    async def work(x: int) -> Result:
        nonlocal most
        result = Result()
        alive.add(result)
        most = max(most, len(alive))
        await asyncio.sleep(0.001)
        return result

    async def main() -> None:
        flow = ps.Flow(source()).map(work, concurrency=2)
        if sink:
            await flow.to(lambda result: None).run(progress=False)
        else:
            async for _ in flow:
                pass

    run_virtual(main())
    assert most <= 40
