"""Law 3: a source item is settled only when everything that came of it is committed, or given up for good."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import Built, Case, cases, check_outputs, expect
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.flow.commit import MOST_UNCOMMITTED
from penstock.flow.contract import Delta
from penstock.testing import run_virtual


def outputs_by_position(case: Case) -> dict[int, Counter[str]]:
    """The outputs of each source item, in the model."""
    found: dict[int, Counter[str]] = {}
    for value in expect(case).outputs:
        for position in set(value.came.positions):  # twice, where it came of two parts of one item
            found.setdefault(position, Counter())[repr(value.value)] += 1
    return found


@settings(max_examples=60)
@given(
    case=cases(dead_letters=True, errors=False, takes=False),
    pace=st.sampled_from([0.0, 0.5, 3.0]),
    stop=st.integers(1, 120),
)
def test_law_commit_settles_with_or_after_the_outputs(case: Case, pace: float, stop: int) -> None:
    expected = expect(case)
    wanted = outputs_by_position(case)
    dead = {position for position, fate in expected.fates.items() if fate == 3}

    letters = set()

    def look(recorder: Recorder, delta: Delta) -> None:
        there = Counter(map(repr, recorder.outputs))
        there.update(repr(value) for _, value in recorder.written)
        letters.update(failed.position for failed in delta.dead)  # before the item settles, if its parts do one by one
        for start, end in delta.settled.of(""):
            for position in range(start, end):
                assert not wanted.get(position, Counter()) - there, f"item {position} is settled without its outputs"
                if position in dead:
                    assert ("", position) in letters

    recorder = Recorder(pace=pace, before_commit=look)
    built = Built(case)

    async def main() -> None:
        async with built.flow.to(recorder).start(progress=False) as run:
            built.on_call = lambda calls: run.stop() if calls == stop else None
            await run.finish()

    run_virtual(main())
    check_outputs(expected, recorder.outputs, partly=True)
    assert len(recorder.outputs) == len(set(map(repr, recorder.outputs)))


@settings(max_examples=60)
@given(case=cases(dead_letters=True, errors=False, takes=False))
def test_law_commit_at_the_end_everything_is_settled(case: Case) -> None:
    expected = expect(case)
    recorder = Recorder()
    run_virtual(Built(case).flow.to(recorder).run(progress=False))
    check_outputs(expected, recorder.outputs)
    assert len(recorder.progress.settled) == case.count
    assert recorder.progress.finished
    assert not recorder.progress.children
    letters = {position[1]: letter for position, letter in recorder.letters.items()}
    assert set(letters) == set(expected.letters)
    for position, letter in letters.items():
        assert letter.item == position
        if expected.order == "sequence":
            assert (letter.stage, letter.reason, letter.error, letter.attempts) == expected.letters[position]


def test_law_commit_a_whole_expansion_waits_for_its_last_output() -> None:
    async def last_is_slow(output: tuple[int, int]) -> tuple[int, int]:
        await asyncio.sleep(100 if output == (0, 2) else 1)
        return output

    recorder = Recorder()

    async def main() -> None:
        flow = ps.Flow(range(3)).flat_map(lambda x: [(x, index) for index in range(3)])
        async with flow.map(last_is_slow, ordered=False).to(recorder).start(progress=False) as run:
            await asyncio.sleep(50)
            assert sorted(recorder.outputs) == [(x, index) for x in (1, 2) for index in range(3)]
            assert ("", 0) not in recorder.progress.settled
            await run.finish()

    run_virtual(main())
    assert sorted(recorder.outputs) == [(x, index) for x in range(3) for index in range(3)]


def test_law_commit_one_by_one_outputs_count_at_once_and_the_item_at_its_end() -> None:
    async def expand(x: int) -> Any:
        for index in range(5):
            await asyncio.sleep(10)
            yield (x, index)

    recorder = Recorder()

    async def main() -> None:
        job = ps.Flow([7]).flat_map(expand, whole=False).to(recorder)
        async with job.start(progress=False) as run:
            await asyncio.sleep(35)
            assert recorder.outputs == [(7, 0), (7, 1), (7, 2)]
            assert len(recorder.progress.children["", 0]) == 3
            assert not recorder.progress.settled
            await run.finish()

    run_virtual(main())
    assert recorder.outputs == [(7, index) for index in range(5)]
    assert len(recorder.progress.settled) == 1


def test_law_commit_a_batch_settles_all_its_members_together() -> None:
    recorder = Recorder()
    asyncio.run(ps.Flow(range(10)).batch(4).to(recorder).run(progress=False))
    assert recorder.outputs == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert recorder.origins == [tuple(("", x) for x in batch) for batch in recorder.outputs]


def test_law_commit_is_forced_when_much_is_unsettled() -> None:
    recorder = Recorder(pace=1e9)

    async def main() -> None:
        async with ps.Flow(range(3 * MOST_UNCOMMITTED)).to(recorder).start(progress=False) as run:
            await run.finish()

    run_virtual(main())
    assert recorder.commits >= 3
    assert recorder.outputs == list(range(3 * MOST_UNCOMMITTED))


def test_law_commit_is_never_cut_short() -> None:
    """Cancelled in the middle of a commit, the run waits for it, and what it committed counts."""
    recorder = Recorder()
    commit = recorder.commit
    began = asyncio.Event()

    async def slow_commit(delta: Delta) -> Any:
        began.set()
        recorder.busy = True
        await asyncio.sleep(100)
        recorder.busy = False
        return await commit(delta)

    recorder.commit = slow_commit  # type: ignore[method-assign]

    async def nap(x: int) -> int:
        await asyncio.sleep(1)
        return x

    async def main() -> None:
        task = asyncio.create_task(ps.Flow(range(100)).map(nap, concurrency=2).to(recorder).run(progress=False))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not recorder.is_open

    run_virtual(main())
    assert recorder.outputs
    assert recorder.outputs == list(range(len(recorder.outputs)))
    assert len(recorder.progress.settled) == len(recorder.outputs)


def test_law_commit_what_the_sink_refuses_goes_by_on_error() -> None:
    def refuse(value: Any) -> bool:
        return bool(value % 3 == 0)

    recorder = Recorder(refuse=refuse)
    report = asyncio.run(ps.Flow(range(10)).to(recorder, on_error="dead_letter").run(progress=False))
    assert recorder.outputs == [1, 2, 4, 5, 7, 8]
    assert [(letter.item, letter.stage, letter.reason) for letter in recorder.letters.values()] == [
        (x, "to", "ValueError") for x in (0, 3, 6, 9)
    ]
    assert (report.delivered, report.dead) == (6, 4)
    with pytest.raises(ValueError, match="refused"):
        asyncio.run(ps.Flow(range(10)).to(Recorder(refuse=refuse)).run(progress=False))


def test_law_commit_a_sink_that_fails_stops_the_run_and_is_asked_for_nothing_more() -> None:
    recorder = Recorder()

    async def full(delta: Delta) -> Any:
        raise OSError("disk full")

    recorder.commit = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        asyncio.run(ps.Flow(range(10)).to(recorder).run(progress=False))
    assert not recorder.is_open
    assert not recorder.outputs
