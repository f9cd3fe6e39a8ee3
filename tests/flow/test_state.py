"""``map_state``: a state for each key, which counts with the outputs it made."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import PlanError
from penstock.testing import run_virtual
from penstock.testing.killing import torture


def count(state: int | None, x: Any) -> tuple[int, tuple[Any, int]]:
    number = (state or 0) + 1
    return number, (x, number)


async def count_async(state: int | None, x: Any) -> tuple[int, tuple[Any, int]]:
    await asyncio.sleep(0)
    return count(state, x)


def numbered(items: Any) -> list[tuple[Any, int]]:
    seen = Counter[Any]()
    out = []
    for x in items:
        seen[x] += 1
        out.append((x, seen[x]))
    return out


@pytest.mark.parametrize("function", [count, count_async])
def test_a_state_for_each_key(function: Any) -> None:
    items = [random.Random(3).choice("abcd") for _ in range(1000)]
    assert run_virtual(ps.Flow(items).map_state(function, key=str).collect()) == numbered(items)


def test_one_state_without_a_key() -> None:
    outputs = ps.Flow([5, 6, 7]).map_state(lambda total, x: (total + x, total + x), initial=0).collect_sync()
    assert outputs == [5, 11, 18]


def test_an_initial_state_isnt_shared() -> None:
    def append(seen: list[int], x: int) -> tuple[list[int], list[int]]:
        seen.append(x)
        return seen, list(seen)

    outputs = ps.Flow([1, 2, 3, 4]).map_state(append, key=lambda x: x % 2, initial=[]).collect_sync()
    assert outputs == [[1], [2], [1, 3], [2, 4]]


def test_a_failing_item_leaves_the_state_as_it_was() -> None:
    def fails(seen: list[int], x: int) -> tuple[list[int], int]:
        seen.append(x)
        if x == 2:
            raise ValueError("two")
        return seen, len(seen)

    flow = ps.Flow([1, 2, 3]).map_state(fails, initial=[], on_error="skip")
    assert flow.collect_sync() == [1, 2]
    with pytest.raises(ValueError, match="two"):
        ps.Flow([1, 2, 3]).map_state(fails, initial=[]).collect_sync()
    kept = ps.Flow([1, 2]).map_state(fails, initial=[], on_error="keep").collect_sync()
    assert isinstance(kept[1], ps.Failed)


def test_what_isnt_a_state_and_an_output() -> None:
    for wrong in (lambda state, x: x, lambda state, x: (1, 2, 3)):
        with pytest.raises(TypeError, match=r"return \(state, output\)"):
            ps.Flow([1]).map_state(wrong).collect_sync()  # type: ignore[arg-type, return-value]


def test_what_cant_be_planned() -> None:
    for flow in (
        lambda: ps.Flow([1]).map_state(5),  # type: ignore[arg-type]
        lambda: ps.Flow([1]).map_state(count, key=5),  # type: ignore[arg-type]
        lambda: ps.Flow([1]).map_state(count, on_error="no"),  # type: ignore[arg-type]
        lambda: ps.Flow([[1]]).unbatch().map_state(count).explain(),
        lambda: ps.Flow([1]).flat_map(lambda x: [x]).map_state(count).explain(),
        lambda: ps.Flow([1]).map_state(count).batch(2).explain(),
    ):
        with pytest.raises(PlanError):
            flow()
    assert "map_state(count)" in ps.Flow([1]).map_state(count).explain()


@given(
    items=st.lists(st.sampled_from("abc"), max_size=40),
    lost=st.sets(st.integers(0, 39)),
    pace=st.sampled_from([0.0, 1.0]),
    ordered=st.booleans(),
)
@settings(max_examples=60)
def test_law_commit_a_state_counts_with_its_items(items: list[str], lost: set[int], pace: float, ordered: bool) -> None:
    """At each commit, the state of a key is that after the settled items of the key, and no other."""
    kept: dict[str, int] = {}
    settled: dict[str, set[int]] = defaultdict(set)

    def look(recorder: Recorder, delta: Any) -> None:
        for (_, _, key), packed in delta.states.items():
            kept[key] = json.loads(packed[1:])
        for start, stop in delta.settled.of(""):
            for position in range(start, stop):
                settled[items[position]].add(position)
        for key, positions in settled.items():
            mine = [position for position, item in enumerate(items) if item == key]
            assert positions == set(mine[: len(positions)]), "an item settled before its predecessor"
            assert kept[f'i:"{key}"'] == len(positions)

    async def late(output: tuple[tuple[int, str], int]) -> str:
        (number, x), which = output
        await asyncio.sleep((number * 7919) % 11)
        if number in lost:
            raise ValueError("lost")
        return f"{x}{which}"

    recorder = Recorder(pace=pace, before_commit=look)
    flow = ps.Flow(list(enumerate(items))).map_state(count, key=lambda pair: pair[1])
    run_virtual(flow.map(late, ordered=ordered, on_error="skip", concurrency=8).to(recorder).run())
    outputs = [f"{x}{which}" for number, (x, which) in enumerate(numbered(items)) if number not in lost]
    assert sorted(recorder.outputs) == sorted(outputs)


def test_what_is_at_rest_is_forgotten(tmp_path: Path) -> None:
    """Memory holds the states of what is on its way or not yet committed, not of all keys."""

    async def main() -> None:
        flow = ps.Flow(range(4000)).map_state(count, key=lambda x: x % 2000)
        async with flow.to(str(tmp_path / "out.jsonl")).start() as run:
            await run.finish()
        assert run.ledger.lanes == {}

    asyncio.run(main())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [[x, 1 + x // 2000] for x in range(4000)]


def slow_count(state: int | None, x: int) -> tuple[int, dict[str, int]]:
    time.sleep(0.0005)
    return (state or 0) + 1, {"x": x, "number": (state or 0) + 1}


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("suffix", ["jsonl", "db"])
def test_law_exactly_once_with_states(tmp_path: Path, suffix: str) -> None:
    flow = ps.Flow(range(1000)).map_state(slow_count, key=lambda x: x % 7)
    torture(flow.map(dict, ordered=False, workers=2).to(str(tmp_path / f"out.{suffix}")), kills=2, seed=5)
