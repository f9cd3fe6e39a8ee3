"""Sets of positions against plain sets, and what a job remembers between two runs."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock as ps
from penstock.flow.progress import Intervals, Known, Positions, Progress

INDEXES = st.integers(0, 40)
RANGES = st.builds(lambda start, length: (start, start + length), INDEXES, st.integers(-2, 8))
SETS = st.lists(RANGES, max_size=12)
POSITIONS = st.tuples(st.sampled_from(["", "a", "b"]), INDEXES)


def members(intervals: Intervals) -> set[int]:
    """What is inside; the intervals must be sorted, disjoint and as few as can be."""
    pairs = list(intervals)
    assert all(start < stop for start, stop in pairs)
    assert all(before[1] < after[0] for before, after in pairwise(pairs))
    return {index for start, stop in pairs for index in range(start, stop)}


def plain(ranges: list[tuple[int, int]]) -> set[int]:
    return {index for start, stop in ranges for index in range(start, stop)}


@given(steps=st.lists(st.one_of(INDEXES, RANGES), max_size=40))
def test_intervals_are_a_set(steps: list[int | tuple[int, int]]) -> None:
    intervals, model = Intervals(), set[int]()
    for step in steps:
        if isinstance(step, int):
            assert intervals.add(step) is (step not in model)
            model.add(step)
        else:
            intervals.add_range(*step)
            model |= set(range(*step))
        assert members(intervals) == model
        assert len(intervals) == len(model)
        assert bool(intervals) is bool(model)
        assert {index for index in range(60) if index in intervals} == model
        assert -1 not in intervals
        assert intervals.watermark == next(index for index in range(60) if index not in model)


@given(one=SETS, other=SETS)
def test_intervals_unite_and_are_equal_as_sets_are(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    first, second = Intervals(one), Intervals(other)
    assert (first == second) is (plain(one) == plain(other))
    first.update(second)
    assert members(first) == plain(one) | plain(other)
    assert members(second) == plain(other)
    assert first == Intervals([*reversed(other), *one])
    first.update(first)
    assert members(first) == plain(one) | plain(other)


@given(ranges=SETS, bounds=RANGES)
def test_what_is_removed_is_no_member(ranges: list[tuple[int, int]], bounds: tuple[int, int]) -> None:
    left = Intervals(ranges)
    left.remove_range(*bounds)
    assert members(left) == plain(ranges) - set(range(*bounds))


@given(one=st.lists(POSITIONS), other=st.lists(POSITIONS))
def test_positions_are_removed_as_sets_are(one: list[tuple[str, int]], other: list[tuple[str, int]]) -> None:
    left, gone = Positions(), Positions()
    for position in one:
        left.add(position)
    for position in other:
        gone.add(position)
    left.remove(gone)
    assert {position for position in one if position in left} == set(one) - set(other)
    assert len(left) == len(set(one) - set(other))
    assert all(left.partitions.values())


@given(order=st.permutations(range(30)))
def test_intervals_in_any_order_end_as_one(order: list[int]) -> None:
    intervals = Intervals()
    for index in order:
        assert intervals.add(index)
    assert list(intervals) == [(0, 30)]
    assert intervals.watermark == 30


def test_intervals_cost_memory_by_their_gaps() -> None:
    intervals = Intervals()
    intervals.add_range(0, 10**15)
    assert intervals.add(10**15)
    assert len(intervals) == 10**15 + 1
    assert repr(intervals) == f"Intervals([(0, {10**15 + 1})])"


@given(steps=st.lists(POSITIONS, max_size=40), others=st.lists(POSITIONS, max_size=40))
def test_positions_are_a_set(steps: list[tuple[str, int]], others: list[tuple[str, int]]) -> None:
    positions, model = Positions(), set[tuple[str, int]]()
    for step in steps:
        assert positions.add(step) is (step not in model)
        model.add(step)
        assert len(positions) == len(model)
        assert step in positions
    other = Positions()
    for step in others:
        other.add(step)
        assert (step in positions) is (step in model)
    assert (positions == other) is (model == set(others))
    assert bool(positions) is bool(model)
    positions.update(other)
    model |= set(others)
    assert {(name, index) for name in positions.partitions for index in members(positions.of(name))} == model
    assert {(name, index) for name in other.partitions for index in members(other.of(name))} == set(others)


def test_the_members_of_a_partition_that_has_none() -> None:
    positions = Positions()
    assert not positions.of("a")
    positions.of("a").add(3)
    assert not positions
    assert ("a", 3) not in positions
    assert positions.partitions == {}
    positions.partitions["a"] = Intervals()
    assert not positions


@pytest.mark.parametrize("mutable", [Intervals(), Positions()])
def test_mutable_sets_are_no_keys_and_equal_nothing_else(mutable: Intervals | Positions) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(mutable)
    assert mutable != set()
    assert mutable == type(mutable)()


def test_an_update_doesnt_share_what_it_adds() -> None:
    one, other = Positions(), Positions({"a": Intervals([(0, 3)])})
    one.update(other)
    one.add(("a", 3))
    assert ("a", 3) not in other
    assert repr(other) == "Positions({'a': Intervals([(0, 3)])})"


def test_a_new_progress_knows_nothing_and_shares_nothing() -> None:
    one, other = Progress(), Progress()
    one.settled.add(("", 0))
    one.children["", 1] = Intervals([(0, 1)])
    one.taken[0] = one.counts["delivered"] = 1
    assert other == Progress()
    assert not other.settled
    assert Known("i:1") == Known("i:1", repeated=False, done=False, children=None, fate=0, digest=None)


@settings(max_examples=25)
@given(
    tables=st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=4),
    poison=st.sets(st.integers(0, 12), max_size=3),
)
def test_the_index_of_ids_is_a_set_over_all_runs(tables: list[list[int]], poison: set[int]) -> None:
    """Each run reads another export of the table: reordered, grown, shrunk, with ids that come twice."""

    def work(row: dict[str, int]) -> dict[str, int]:
        if row["id"] in poison:
            raise ValueError("poison")
        return row

    settled = set[tuple[int, int]]()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "out.jsonl"
        for table in tables:
            met = [(one, table[:index].count(one)) for index, one in enumerate(table)]
            new = [key for key in met if key not in settled]
            settled |= set(new)
            flow = ps.Flow([{"id": one} for one in table], name="rows", id="id", on_error="skip").map(work)
            report = flow.to(path).run_sync(inline=True, progress=False)
            assert report.issued == len(new)
            assert report.skipped == sum(occurrence > 0 or one in poison for one, occurrence in new)
            assert report.skipped + report.delivered == report.issued
        delivered = {one for one, _ in settled} - poison
        lines = path.read_bytes().splitlines() if path.exists() else []
        assert sorted(msgspec.json.decode(line)["id"] for line in lines) == sorted(delivered)
