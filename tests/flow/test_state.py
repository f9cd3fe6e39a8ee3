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
from penstock.errors import CannotEncode, FailureBudgetExceeded, IdError, PlanError
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


def test_a_key_that_cant_be_found_is_named_as_such() -> None:
    with pytest.raises(IdError, match=r"^key= of the item 7 raised ZeroDivisionError"):
        ps.Flow([7]).map_state(count, key=lambda x: x / 0).collect_sync()


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
    refused=st.sets(st.integers(0, 39)),
    most=st.one_of(st.none(), st.integers(1, 9)),
    pace=st.sampled_from([0.0, 1.0]),
    writing=st.sampled_from([0.0, 1.5]),
    ordered=st.booleans(),
)
@settings(max_examples=200)
def test_law_commit_a_state_counts_with_its_items(
    items: list[str],
    lost: set[int],
    refused: set[int],
    most: int | None,
    pace: float,
    writing: float,
    ordered: bool,
) -> None:
    """At each commit, the state of a key is that after the settled items of the key, and no other.

    Items are lost in a stage, or refused by the sink, until there are too many of them; writing takes its time.
    """
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

    class Slow(Recorder):
        async def write(self, outputs: Any) -> None:
            await asyncio.sleep(writing)
            await super().write(outputs)

    made = [f"{x}{which}" for x, which in numbered(items)]
    unwanted = {made[number] for number in refused if number < len(made)}
    recorder = Slow(pace=pace, before_commit=look, refuse=unwanted.__contains__)
    flow = ps.Flow(list(enumerate(items))).map_state(count, key=lambda pair: pair[1])
    flow = flow.map(late, ordered=ordered, on_error="skip", max_failures=most, concurrency=8)
    job = flow.to(recorder, on_error="skip" if most is None else "raise")
    try:
        run_virtual(job.run())
    except (FailureBudgetExceeded, ValueError):
        assert most is not None
    else:
        outputs = [output for number, output in enumerate(made) if number not in lost and output not in unwanted]
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


def test_an_output_that_isnt_taken_leaves_the_state_to_the_next_run(tmp_path: Path) -> None:
    bad = True

    def total(state: int, x: int) -> tuple[int, Any]:
        return state + x, object() if bad and x == 2 else state + x

    flow = ps.Flow([1, 2, 3], name="n").map_state(total, initial=0, name="sums")
    with pytest.raises(CannotEncode):
        flow.to(tmp_path / "out.jsonl").run_sync(progress=False)
    bad = False
    flow.to(tmp_path / "out.jsonl").run_sync(progress=False)
    assert (tmp_path / "out.jsonl").read_text().split() == ["1", "3", "6"]


def test_a_generator_begins_with_new_states(tmp_path: Path) -> None:
    def items() -> Any:
        yield "a"
        time.sleep(0.1)  # so that something has been committed when the second is looked up
        yield "b"

    for _ in range(2):
        flow = ps.Flow(items(), name="g").map_state(count, key=str)
        flow.to(tmp_path / "out.jsonl").run_sync(progress=False)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == 2 * [["a", 1], ["b", 1]]


@pytest.mark.parametrize("loose", [{"ordered": False}, {"key": str}])
def test_take_behind_a_stage_without_order_is_refused(loose: dict[str, Any]) -> None:
    flow = ps.Flow([1]).map_state(count)
    with pytest.raises(PlanError, match="take"):
        flow.map(str, **loose).take(1).explain()
    flow.take(1).map(str, **loose).explain()
    flow.map(str).take(1).explain()
    ps.Flow([1]).map(str, **loose).map_state(count).take(1).explain()


@pytest.mark.parametrize("form", ["def", "async def"])
def test_nothing_more_is_called_after_a_failure(form: str) -> None:
    calls: list[int] = []

    def work(state: None, x: int) -> tuple[None, int]:
        calls.append(x)
        if x == 1:
            raise ValueError("no")
        return state, x

    async def work_async(state: None, x: int) -> tuple[None, int]:
        return work(state, x)

    with pytest.raises(ValueError, match="no"):
        run_virtual(ps.Flow(range(100)).map_state(work if form == "def" else work_async).collect())
    assert calls == [0, 1]


def test_nothing_more_is_called_once_it_was_stopped() -> None:
    calls: list[int] = []

    async def work(state: None, x: int) -> tuple[None, int]:
        calls.append(x)
        await asyncio.sleep(1)
        return state, x

    async def main() -> None:
        async with ps.Flow(range(100)).map_state(work).to(Recorder()).start(progress=False) as run:
            await asyncio.sleep(2.5)
            run.stop(immediately=True)

    run_virtual(main())
    assert calls == [0, 1, 2]
