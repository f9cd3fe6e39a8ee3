"""Law 7: ordered stages keep the order of their input, unordered ones as completed, keyed ones keep it in a key."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import Built, Case, carry_out, cases, check

import penstock as ps
from penstock.testing import run_virtual


@settings(max_examples=60)
@given(case=cases(errors=False, takes=False), sink=st.sampled_from(["function", "iteration", "recorder"]))
def test_law_order_of_random_flows(case: Case, sink: str) -> None:
    built = Built(case)
    check(case, built, run_virtual(carry_out(built, sink=sink)))


async def slow_first(x: int) -> int:
    await asyncio.sleep(10 - x)
    return x


def test_law_order_ordered_stages_wait_for_the_slowest() -> None:
    assert run_virtual(ps.Flow(range(10)).map(slow_first, concurrency=10).collect()) == list(range(10))


def test_law_order_unordered_stages_give_as_completed() -> None:
    flow = ps.Flow(range(10)).map(slow_first, concurrency=10, ordered=False)
    assert run_virtual(flow.collect()) == list(reversed(range(10)))


def test_law_order_an_ordered_stage_keeps_the_order_that_an_unordered_one_made() -> None:
    async def same(x: int) -> int:
        await asyncio.sleep(x)
        return x

    flow = ps.Flow(range(10)).map(slow_first, concurrency=10, ordered=False).map(same, concurrency=10)
    assert run_virtual(flow.collect()) == list(reversed(range(10)))


def test_law_order_within_a_key_across_whole_expansions(tmp_path: Path) -> None:
    """The second list is complete long before the first, of which one output takes long and the other came first."""

    async def slow_b(key: str) -> str:
        await asyncio.sleep(10 if key == "b" else 0)
        return key

    flow = ps.Flow([["a", "b"], ["a"]]).unbatch().map(slow_b, key=str)
    path = tmp_path / "out.jsonl"
    run_virtual(flow.to(str(path)).run())
    assert path.read_text().split() == ['"a"', '"b"', '"a"']


@pytest.mark.parametrize("retry", [0, 2])
def test_law_order_within_a_key_and_keys_in_parallel(retry: int) -> None:
    chance = random.Random(5)
    items = [(chance.randrange(4), index) for index in range(60)]
    naps = {item: chance.random() for item in items}
    failed: set[Any] = set()
    at_work: dict[int, int] = defaultdict(int)
    together = 0

    async def work(item: tuple[int, int]) -> tuple[int, int]:
        nonlocal together
        at_work[item[0]] += 1
        together = max(together, sum(at_work.values()))
        assert at_work[item[0]] == 1
        try:
            await asyncio.sleep(naps[item])
            if retry and item[1] % 5 == 0 and item not in failed:
                failed.add(item)
                raise ValueError(item)
        finally:
            at_work[item[0]] -= 1
        return item

    flow = ps.Flow(items).map(work, key=lambda item: item[0], retry=retry, concurrency=8)
    outputs = run_virtual(flow.collect())
    assert outputs != items
    for key in range(4):
        assert [item for item in outputs if item[0] == key] == [item for item in items if item[0] == key]
    assert together == 4


def test_law_order_of_threads_that_take_different_times() -> None:
    barrier: list[int] = []

    def work(x: int) -> int:
        barrier.append(x)
        return x

    outputs = asyncio.run(ps.Flow(range(3000)).map(work, workers=4).map(str, workers=2).collect())
    assert outputs == [str(x) for x in range(3000)]
    assert sorted(barrier) == list(range(3000))


def test_law_order_in_processes() -> None:
    outputs = asyncio.run(ps.Flow(range(2000)).map(lambda x: -x, place="process", workers=2).collect())
    assert outputs == [-x for x in range(2000)]


def test_law_order_of_one_by_one_expansions_that_are_tried_again() -> None:
    tried: set[int] = set()

    async def expand(x: int) -> Any:
        for index in range(3):
            if x == 0 and index == 2 and x not in tried:
                tried.add(x)
                raise ValueError(x)
            yield (x, index)

    flow = ps.Flow(range(4)).flat_map(expand, whole=False, retry=2)
    assert run_virtual(flow.collect()) == [(x, index) for x in range(4) for index in range(3)]
