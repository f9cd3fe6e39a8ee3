"""flat_map and unbatch: one item becomes many, all together or one by one, in every place."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import ExpansionTooLarge
from penstock.testing import run_virtual

BOUND = 100_000
EACH_WAY = pytest.mark.parametrize("whole", [True, False])


def as_list(x: int) -> list[tuple[int, int]]:
    return [(x, index) for index in range(x % 4)]


def as_generator(x: int) -> Iterator[tuple[int, int]]:
    yield from as_list(x)


async def as_awaited_list(x: int) -> list[tuple[int, int]]:
    await asyncio.sleep(0)
    return as_list(x)


async def as_async_generator(x: int) -> AsyncIterator[tuple[int, int]]:
    for output in as_list(x):
        await asyncio.sleep(0)
        yield output


PLAIN: dict[str, Callable[[int], Any]] = {
    "list": as_list,
    "generator": as_generator,
    "dict": lambda x: dict.fromkeys(as_list(x)),
    "iterator": lambda x: iter(as_list(x)),
}
ASYNC: dict[str, Callable[[int], Any]] = {"awaited list": as_awaited_list, "async generator": as_async_generator}


@EACH_WAY
@pytest.mark.parametrize("form", [*PLAIN, *ASYNC])
@pytest.mark.parametrize("place", ["loop", "thread", "inline"])
def test_outputs_come_in_the_order_of_the_items(form: str, place: str, whole: bool) -> None:
    function = (PLAIN | ASYNC)[form]
    options: dict[str, Any] = {"place": "thread" if place == "inline" else place, "whole": whole}
    recorder = Recorder()
    job = ps.Flow(range(20)).flat_map(function, **options).to(recorder)
    report = run_virtual(job.run(progress=False, inline=place == "inline"))
    assert recorder.outputs == [output for x in range(20) for output in as_list(x)]
    assert recorder.origins == [(("", x),) for x, _ in recorder.outputs]
    assert (report.delivered, report.filtered) == (15, 5)


@EACH_WAY
def test_in_processes(whole: bool) -> None:
    def many(x: int) -> Iterator[int]:
        yield from range(x, x + 3000)

    flow = ps.Flow(range(5)).flat_map(many, whole=whole, place="process", workers=2)
    assert asyncio.run(flow.collect()) == [output for x in range(5) for output in range(x, x + 3000)]


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 5), max_size=8),
    naps=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    whole=st.booleans(),
    concurrency=st.integers(1, 4),
)
def test_unordered_expansions_lose_and_double_nothing(
    counts: list[int], naps: list[int], whole: bool, concurrency: int
) -> None:
    async def expand(x: int) -> AsyncIterator[tuple[int, int]]:
        for index in range(counts[x]):
            await asyncio.sleep(naps[x])
            yield (x, index)

    flow = ps.Flow(range(len(counts))).flat_map(expand, whole=whole, ordered=False, concurrency=concurrency)
    outputs = run_virtual(flow.collect())
    assert sorted(outputs) == [(x, index) for x, many in enumerate(counts) for index in range(many)]
    for x, many in enumerate(counts):
        assert [output for output in outputs if output[0] == x] == [(x, index) for index in range(many)]


def test_unordered_expansions_one_by_one_go_on_side_by_side_and_ordered_ones_dont() -> None:
    def outputs(ordered: bool) -> list[str]:
        async def expand(x: str) -> AsyncIterator[str]:
            for _ in range(2):
                await asyncio.sleep(1)
                yield x

        return run_virtual(ps.Flow(["a", "b"]).flat_map(expand, whole=False, ordered=ordered).collect())

    assert outputs(ordered=True) == ["a", "a", "b", "b"]
    assert outputs(ordered=False) == ["a", "b", "a", "b"]


def test_outputs_one_by_one_are_there_before_the_next_is_made() -> None:
    seen: list[tuple[float, int]] = []

    async def expand(x: int) -> AsyncIterator[int]:
        for index in range(3):
            yield index
            await asyncio.sleep(10)

    async def note(x: int) -> None:
        seen.append((asyncio.get_running_loop().time(), x))

    run_virtual(ps.Flow([0]).flat_map(expand, whole=False).map(note).collect())
    assert seen == [(0, 0), (10, 1), (20, 2)]


# -- the bound ---------------------------------------------------------------------------------------------------------


async def endless_async(x: int) -> AsyncIterator[int]:
    for index in itertools.count():
        yield index


@pytest.mark.parametrize("place", ["loop", "async", "thread", "process", "inline", "unbatch"])
def test_more_than_a_hundred_thousand_outputs_are_refused_and_the_way_out_is_named(place: str) -> None:
    flow: ps.Flow[Any] = ps.Flow([0])
    if place == "unbatch":
        flow = ps.Flow([range(BOUND + 1)]).unbatch()
    elif place == "async":
        flow = flow.flat_map(endless_async, retry=3)
    else:
        where: Any = "thread" if place == "inline" else place
        flow = flow.flat_map(lambda x: itertools.count(), place=where, retry=3)
    with pytest.raises(ExpansionTooLarge, match="whole=False") as raised:
        asyncio.run(flow.to(lambda x: None).run(progress=False, inline=place == "inline"))
    assert raised.value.bound == BOUND
    assert "100,000" in str(raised.value)


@pytest.mark.parametrize("whole", [True, False])
def test_as_many_as_the_bound_are_held_and_more_go_one_by_one(whole: bool) -> None:
    count = BOUND if whole else 2 * BOUND
    outputs = run_virtual(ps.Flow([0]).flat_map(lambda x: range(count), whole=whole, place="loop").collect())
    assert outputs == list(range(count))


@pytest.mark.parametrize("between", ["nothing", "take", "unbatch"])
def test_nested_expansions_are_held_together_up_to_the_bound(between: str) -> None:
    def hundreds(x: int) -> list[int]:
        return [x] * 400

    flow: ps.Flow[int] = ps.Flow([1, 2]).flat_map(hundreds, place="loop")
    if between == "take":
        flow = flow.take(1000)
    flow = flow.map(lambda x: [x] * 400).unbatch() if between == "unbatch" else flow.flat_map(hundreds, place="loop")
    with pytest.raises(ExpansionTooLarge, match="100,000"):
        run_virtual(flow.collect())


@pytest.mark.parametrize(
    ("end", "verb"),
    [
        ("skip", "flat_map"),
        ("skip", "unbatch"),
        ("keep", "flat_map"),
        ("keep", "unbatch"),
        ("dead_letter", "flat_map"),
        ("dead_letter", "unbatch"),
    ],
)
def test_what_is_too_large_goes_by_on_error(end: Any, verb: str) -> None:
    flow: ps.Flow[Any] = ps.Flow([range(2), range(BOUND + 1), range(3)], on_error=end)
    flow = flow.unbatch() if verb == "unbatch" else flow.flat_map(lambda xs: xs, place="loop", name="unbatch")
    recorder = Recorder()
    report = run_virtual(flow.to(recorder).run(progress=False))
    failed = ps.Failed(
        range(BOUND + 1), ("", 1), "unbatch", "ExpansionTooLarge", str(ExpansionTooLarge("unbatch", BOUND)), 1
    )
    assert recorder.outputs == [0, 1, *([failed] if end == "keep" else []), 0, 1, 2]
    assert (report.delivered, report.skipped, report.dead) == (2 + (end == "keep"), end == "skip", end == "dead_letter")
    assert list(recorder.letters.values()) == [failed] * (end == "dead_letter")


# -- unbatch -----------------------------------------------------------------------------------------------------------


@given(lists=st.lists(st.lists(st.integers(), max_size=5), max_size=12), size=st.integers(1, 4))
def test_unbatch_undoes_batch_and_flattens_lists(lists: list[list[int]], size: int) -> None:
    flat = [x for xs in lists for x in xs]
    assert run_virtual(ps.Flow(lists).unbatch().collect()) == flat
    assert run_virtual(ps.Flow(flat).batch(size).unbatch().collect()) == flat


@pytest.mark.parametrize("value", ["text", b"bytes", 5, None])
def test_unbatch_needs_lists(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"was given a {type(value).__name__}, and unbatch\(\) needs lists") as raised:
        run_virtual(ps.Flow([[1], value]).unbatch().collect())
    assert raised.value.__notes__ == [f"at stage 'unbatch', item 1: {value!r}"]


def test_the_members_of_a_batch_that_is_unbatched_settle_together() -> None:
    recorder = Recorder()

    def fail(x: int) -> int:
        if x == 4:
            raise ValueError(x)
        return x

    flow = ps.Flow(range(9)).batch(3).unbatch().map(fail, on_error="dead_letter")
    report = run_virtual(flow.to(recorder).run(progress=False))
    assert recorder.outputs == [0, 1, 2, 6, 7, 8]
    assert (report.delivered, report.dead) == (6, 3)
    assert {index: letter.item for (_, index), letter in recorder.letters.items()} == {3: 3, 4: 4, 5: 5}


# -- take --------------------------------------------------------------------------------------------------------------


@EACH_WAY
@pytest.mark.parametrize("place", ["loop", "thread", "async"])
@pytest.mark.parametrize("limit", [0, 1, 4, 7])
def test_take_within_an_expansion(place: str, whole: bool, limit: int) -> None:
    flow: ps.Flow[Any] = ps.Flow(range(3))
    if place == "async":
        flow = flow.flat_map(lambda x: as_async_generator(3), place="loop", whole=whole)
    else:
        flow = flow.flat_map(lambda x: as_list(3), place=place, whole=whole)  # type: ignore[arg-type]
    recorder = Recorder()
    report = run_virtual(flow.take(limit).to(recorder).run(progress=False))
    assert recorder.outputs == (as_list(3) * 3)[:limit]
    assert recorder.progress.taken == ({1: limit} if limit else {})
    assert report.issued == report.delivered + report.released


@pytest.mark.parametrize("place", ["loop", "async", "thread", "process"])
def test_take_ends_an_endless_expansion(place: Any) -> None:
    flow = ps.Flow([0])
    endless: ps.Flow[int]
    if place == "async":
        endless = flow.flat_map(endless_async, whole=False)
    else:
        endless = flow.flat_map(lambda x: itertools.count(), whole=False, place=place)
    assert asyncio.run(endless.take(5000).collect()) == list(range(5000))


def test_a_take_that_was_cut_short_goes_on_where_it_was() -> None:
    recorder = Recorder()

    def job() -> ps.Job:
        return ps.Flow(range(5)).flat_map(lambda x: [x] * 3, place="loop").take(7).map(hold, concurrency=1).to(recorder)

    gate: list[bool] = []

    async def hold(x: int) -> int:
        if x == 1 and not gate:
            await asyncio.sleep(1e9)
        return x

    async def main() -> None:
        async with job().start(progress=False):
            await asyncio.sleep(100)
        assert recorder.outputs == [0, 0, 0]
        gate.append(True)
        await job().run(progress=False)

    run_virtual(main())
    assert recorder.outputs == [0, 0, 0, 1, 1, 1, 2]


# -- expansions that fail ----------------------------------------------------------------------------------------------


def failing(fails: Callable[[int, int], bool]) -> tuple[Any, Any, list[int]]:
    """A generator and an async one of three outputs; which attempt at which output fails; and the attempts."""
    attempts: list[int] = []

    def expand(x: int) -> Iterator[tuple[int, int]]:
        attempts.append(x)
        for index in range(3):
            if x == 1 and fails(len([one for one in attempts if one == 1]), index):
                raise ValueError("torn")
            yield (x, index)

    async def expand_async(x: int) -> AsyncIterator[tuple[int, int]]:
        for output in expand(x):
            yield output

    return expand, expand_async, attempts


@EACH_WAY
@pytest.mark.parametrize("end", ["skip", "keep", "dead_letter"])
@pytest.mark.parametrize("place", ["thread", "loop", "async"])
@pytest.mark.parametrize("ordered", [True, False])
def test_what_a_failing_expansion_gave_counts_only_one_by_one(place: Any, end: Any, whole: bool, ordered: bool) -> None:
    expand, expand_async, _ = failing(lambda attempt, index: index == 2)
    recorder = Recorder()
    flow: ps.Flow[Any] = ps.Flow(range(3)).flat_map(
        expand_async if place == "async" else expand,
        place="loop" if place == "async" else place,
        whole=whole,
        on_error=end,
        ordered=ordered,
        name="expand",
    )
    report = run_virtual(flow.to(recorder).run(progress=False))
    failed = ps.Failed(1, ("", 1), "expand", "ValueError", "torn", 1)
    before = [] if whole else [(1, 0), (1, 1)]
    kept: list[Any] = [failed] if end == "keep" else []
    assert [output for output in recorder.outputs if output == failed or output[0] == 1] == [*before, *kept]
    assert len(recorder.outputs) == 6 + len(before) + len(kept)
    assert list(recorder.letters.values()) == [failed] * (end == "dead_letter")
    delivered = end == "keep" or (end == "skip" and not whole)
    assert (report.delivered, report.skipped, report.dead) == (
        2 + delivered,
        not delivered and end == "skip",
        end == "dead_letter",
    )


def test_what_an_expansion_gave_before_it_failed_comes_out_of_a_process_too() -> None:
    def expand(x: int) -> Iterator[int]:
        yield x
        raise ValueError("torn")

    flow = ps.Flow(range(3)).flat_map(expand, whole=False, on_error="skip", place="process", workers=1)
    assert asyncio.run(flow.collect()) == [0, 1, 2]


@EACH_WAY
@pytest.mark.parametrize("place", ["thread", "loop", "async"])
def test_another_attempt_doubles_nothing(place: Any, whole: bool) -> None:
    expand, expand_async, attempts = failing(lambda attempt, index: attempt < 4 and index == attempt % 3)
    flow: ps.Flow[Any] = ps.Flow(range(3)).flat_map(
        expand_async if place == "async" else expand,
        place="loop" if place == "async" else place,
        whole=whole,
        retry=ps.Retry(3, backoff=0.01),
    )
    outputs = run_virtual(flow.collect())
    assert outputs == [(x, index) for x in range(3) for index in range(3)]
    assert attempts.count(1) == 4


def test_a_kept_failure_stands_after_all_outputs_of_all_attempts() -> None:
    expand, _, _ = failing(lambda attempt, index: index == (2 if attempt == 1 else 1))
    flow: ps.Flow[Any] = ps.Flow([1]).flat_map(
        expand, place="loop", whole=False, on_error="keep", retry=ps.Retry(1, backoff=0.01)
    )
    *outputs, failed = run_virtual(flow.collect())
    assert outputs == [(1, 0), (1, 1)]
    assert (failed.error, failed.attempts) == ("torn", 2)


@EACH_WAY
@pytest.mark.parametrize("value", [5, None])
def test_what_cant_be_iterated_is_an_error_of_the_program(value: Any, whole: bool) -> None:
    calls: list[int] = []

    def expand(x: int) -> Any:
        calls.append(x)
        return value

    with pytest.raises(TypeError, match="not iterable"):
        run_virtual(ps.Flow([0]).flat_map(expand, whole=whole, retry=5).collect())
    assert calls == [0]


@pytest.mark.parametrize(("gap", "outputs"), [(4, 5), (6, 0)])
def test_the_timeout_of_an_expansion_one_by_one_is_that_of_each_output(gap: float, outputs: int) -> None:
    async def expand(x: int) -> AsyncIterator[int]:
        for index in range(5):
            await asyncio.sleep(gap)
            yield index

    recorder = Recorder()
    flow = ps.Flow([0]).flat_map(expand, whole=False, timeout=5, on_error="skip")
    report = run_virtual(flow.to(recorder).run(progress=False))
    assert recorder.outputs == list(range(outputs))
    assert (report.delivered, report.skipped) == ((1, 0) if outputs else (0, 1))


def test_waiting_for_room_is_no_part_of_the_timeout() -> None:
    async def slowly(x: int) -> int:
        await asyncio.sleep(1)
        return x

    flow = ps.Flow([0]).flat_map(lambda x: range(4000), whole=False, timeout=5, place="loop").map(slowly, concurrency=1)
    assert run_virtual(flow.collect()) == list(range(4000))


@EACH_WAY
def test_keys_keep_the_order_of_their_expansions(whole: bool) -> None:
    async def expand(x: int) -> AsyncIterator[int]:
        await asyncio.sleep(10 - x)
        yield x
        yield x

    flow = ps.Flow(range(8)).flat_map(expand, whole=whole, key=lambda x: x % 2)
    outputs = run_virtual(flow.collect())
    for key in (0, 1):
        own = [x for x in outputs if x % 2 == key]
        assert own == sorted(own)
    assert len(outputs) == 16


def test_what_takes_the_place_of_an_expansion_isnt_taken_for_one_of_its_known_outputs() -> None:
    last = 3

    def expand(x: str) -> Iterator[int]:
        yield from range(last)
        raise ValueError("cut")

    recorder = Recorder()
    with pytest.raises(ValueError, match="cut"):
        run_virtual(ps.Flow(["x"]).flat_map(expand, whole=False).to(recorder).run(progress=False))
    assert recorder.outputs == [0, 1, 2]
    last = 2  # it fails earlier than it did
    flow = ps.Flow(["x"]).flat_map(expand, whole=False, on_error="keep")
    run_virtual(flow.to(recorder).run(progress=False))
    assert recorder.outputs[:3] == [0, 1, 2]
    (kept,) = recorder.outputs[3:]
    assert (kept.item, kept.reason) == ("x", "ValueError")
