"""Law 5: cancelling leaves an item not taken, or in flight and so taken again later."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import FATES, Built, Case, balanced, cases, check_outputs, expect
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.flow.memory import SequenceSource
from penstock.testing import run_virtual


@settings(max_examples=60)
@given(
    case=cases(dead_letters=True, errors=False, sources=("list",)),
    stops=st.lists(st.tuples(st.sampled_from(["cancel", "stop", "drain", "at once"]), st.integers(1, 80)), max_size=4),
)
def test_law_cancellation_then_run_again_gives_the_undisturbed_output(case: Case, stops: list[tuple[str, int]]) -> None:
    recorder = Recorder()
    for how, at in stops:
        _run_and_stop(case, recorder, how, at)
    built = Built(case)
    report = run_virtual(built.flow.to(recorder).run(progress=False))
    expected = expect(case)
    check_outputs(expected, recorder.outputs)
    assert balanced(report)
    if expected.exact:
        assert {name: recorder.progress.counts.get(name, 0) for name in FATES} == {
            name: expected.count(name) for name in FATES
        }
        assert {position for _, position in recorder.letters} == set(expected.letters)
    if expected.order == "sequence":
        ids = {repr(value.value): number for number, value in enumerate(expected.outputs)}
        assert [ids[repr(output)] for output in recorder.outputs] == sorted(ids.values())


def _run_and_stop(case: Case, recorder: Recorder, how: str, at: int) -> None:
    built = Built(case)

    async def main() -> None:
        run = built.flow.to(recorder).start(progress=False)

        async def whole() -> None:
            async with run:
                await run.finish()

        task = asyncio.create_task(whole())

        def act(calls: int) -> None:
            if calls != at:
                return
            if how == "cancel":
                task.cancel()
            elif how == "drain":
                run.drain()
            else:
                run.stop(immediately=how == "at once")

        built.on_call = act
        try:
            await task
        except asyncio.CancelledError:
            assert how == "cancel"
        assert built.active == 0
        assert not recorder.is_open
        report = run.report()
        assert balanced(report)
        assert report.in_flight == 0

    run_virtual(main())


@settings(max_examples=15)
@given(instants=st.lists(st.floats(0, 12), min_size=1, max_size=4), ordered=st.booleans())
def test_law_cancellation_of_a_job_to_a_file(
    instants: list[float], ordered: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("out") / "out.jsonl"

    async def work(x: int) -> dict[str, int]:
        await asyncio.sleep((x * 7) % 5 / 10)
        if x % 11 == 5:
            raise ValueError(x)
        return {"x": x}

    def job() -> ps.Job:
        return (
            ps.Flow(list(range(100)))
            .filter(lambda x: x % 3)
            .map(work, concurrency=4, ordered=ordered, on_error="dead_letter")
            .to(str(path))
        )

    async def cancelled(after: float) -> None:
        task = asyncio.create_task(job().run(progress=False))
        await asyncio.sleep(after)
        task.cancel()
        await asyncio.wait([task])

    for after in instants:
        run_virtual(cancelled(after))
    run_virtual(job().run(progress=False))
    lines = [msgspec.json.decode(line)["x"] for line in Path(path).read_bytes().splitlines()]
    wanted = [x for x in range(100) if x % 3 and x % 11 != 5]
    assert (lines if ordered else sorted(lines)) == wanted
    letters = ps.read.dead(str(path)).collect_sync()
    assert sorted(letter.item for letter in letters) == [x for x in range(100) if x % 3 and x % 11 == 5]


def test_law_cancellation_of_collect_ends_everything_first() -> None:
    ended = []

    async def work(x: int) -> int:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(5)
            ended.append(x)
        return x

    async def main() -> None:
        task = asyncio.create_task(ps.Flow(range(100)).map(work, concurrency=3).collect())
        await asyncio.sleep(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(ended) == [0, 1, 2]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())


def test_law_cancellation_of_anext_loses_nothing() -> None:
    async def work(x: int) -> int:
        await asyncio.sleep(1)
        return x

    async def main() -> list[int]:
        outputs = aiter(ps.Flow(range(20)).map(work, concurrency=2))
        got = [await anext(outputs)]
        while True:
            try:
                async with asyncio.timeout(0.3):
                    got.append(await anext(outputs))
            except TimeoutError:
                continue
            except StopAsyncIteration:
                return got

    assert run_virtual(main()) == list(range(20))


def test_law_cancellation_while_opening_closes_what_was_opened() -> None:
    recorder = Recorder()
    opened = recorder.open

    async def slow_open(job: Any) -> Any:
        progress = await opened(job)
        await asyncio.sleep(10)
        return progress

    recorder.open = slow_open  # type: ignore[method-assign]

    async def main() -> None:
        task = asyncio.create_task(ps.Flow(range(5)).map(str).to(recorder).run(progress=False))
        await asyncio.sleep(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())
    assert not recorder.outputs


def test_law_cancellation_twice_doesnt_cut_the_shutdown_short() -> None:
    at_work = 0

    async def work(x: int) -> int:
        nonlocal at_work
        at_work += 1
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(10)
            at_work -= 1
        return x

    async def main() -> None:
        task = asyncio.create_task(ps.Flow(range(100)).map(work, concurrency=3).to(Recorder()).run(progress=False))
        await asyncio.sleep(5)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(1)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert at_work == 0

    run_virtual(main())


def test_law_cancellation_of_a_functions_own_is_that_items_failure() -> None:
    async def work(x: int) -> int:
        if x == 3:
            raise asyncio.CancelledError
        return x

    assert asyncio.run(ps.Flow(range(5)).map(work, on_error="skip").collect()) == [0, 1, 2, 4]
    with pytest.raises(ps.errors.StrayException) as raised:  # itself, it would cancel whoever waits
        asyncio.run(ps.Flow(range(5)).map(work).collect())
    assert "at stage 'work', item 3: 3" in raised.value.__notes__


def test_a_signal_while_the_workers_end_loses_nothing() -> None:
    class Model:
        async def __call__(self, x: int) -> int:
            return x

        def close(self) -> None:
            runs[0].interrupt(signal.SIGTERM)

    recorder = Recorder(pace=100.0)
    runs: list[Any] = []

    async def main() -> Any:
        async with ps.Flow(range(1000)).map(ps.per_worker(Model)).to(recorder).start(progress=False) as run:
            runs.append(run)
            return await run.finish()

    report = run_virtual(main())
    assert recorder.outputs == list(range(1000))
    assert report.delivered == 1000
    assert runs[0].interrupted == signal.SIGTERM


def test_nothing_is_committed_after_an_acknowledgement_failed() -> None:
    class Queue(SequenceSource):
        async def settle(self, positions: Any) -> None:
            raise OSError("disk full")

    recorder = Recorder()

    async def slowly(x: int) -> int:
        await asyncio.sleep(x)
        return x

    with pytest.raises(OSError, match="disk full"):
        run_virtual(ps.Flow(Queue(list(range(5)), "queue")).map(slowly).to(recorder).run(progress=False))
    assert recorder.commits == 1
