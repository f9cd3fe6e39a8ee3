"""Law 1: issued = delivered + filtered + skipped + dead + released + in flight, at every moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import Built, Case, balanced, carry_out, cases, check
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.flow.iterate import Outputs
from penstock.testing import run_virtual


@settings(max_examples=60)
@given(case=cases(), sink=st.sampled_from(["function", "iteration"]), inline=st.booleans())
def test_law_accounting_of_random_flows(case: Case, sink: str, inline: bool) -> None:
    built = Built(case)
    check(case, built, run_virtual(carry_out(built, sink=sink, inline=inline)))


@settings(max_examples=60)
@given(case=cases(dead_letters=True))
def test_law_accounting_with_dead_letters(case: Case) -> None:
    built = Built(case)
    check(case, built, run_virtual(carry_out(built, sink="recorder")))


@settings(max_examples=60)
@given(case=cases(dead_letters=True), at=st.integers(1, 60), drains=st.booleans())
def test_law_accounting_after_cancelling_and_draining(case: Case, at: int, drains: bool) -> None:
    built = Built(case)

    async def main() -> ps.Report:
        run = built.flow.to(Recorder()).start(progress=False)

        def look(calls: int) -> None:
            assert balanced(run.report())
            if calls == at:
                (run.drain if drains else run.stop)()

        built.on_call = look
        try:
            async with run:
                await run.finish()
        except Exception as error:  # the case's own
            assert run.failure is error
        return run.report()

    report = run_virtual(main())
    assert balanced(report)
    assert report.in_flight == 0
    assert built.active == 0


@pytest.mark.parametrize("stop_after", [0, 1, 3, 70])
def test_law_accounting_after_break(stop_after: int) -> None:
    async def work(x: int) -> int:
        await asyncio.sleep(x % 3)
        return x

    async def main() -> ps.Report:
        outputs = aiter(ps.Flow(range(200)).map(work, concurrency=4))
        assert isinstance(outputs, Outputs)
        run = outputs._outlet.run
        for _ in range(stop_after):
            await anext(outputs)
            assert balanced(run.report())
        await outputs.aclose()
        return run.report()

    report = run_virtual(main())
    assert report.delivered == stop_after
    assert report.released == report.issued - stop_after
    assert balanced(report)


def test_law_accounting_counts_source_items_and_not_outputs() -> None:
    report = asyncio.run(ps.Flow(range(10)).batch(4).map(sum).to(lambda x: None).run(progress=False))
    assert (report.issued, report.delivered) == (10, 10)
    expanding = ps.Flow(range(10)).flat_map(lambda x: [x] * (x % 3)).to(lambda x: None)
    report = asyncio.run(expanding.run(progress=False))
    assert (report.issued, report.delivered, report.filtered) == (10, 6, 4)


def test_law_accounting_one_fate_an_item_dead_before_delivered_before_skipped_before_filtered() -> None:
    def spread(x: int) -> list[tuple[int, str]]:
        return [(x, fate) for fate in ("filtered", "skipped", "delivered", "dead")[: x + 1]]

    def skip(output: tuple[int, str]) -> Any:
        if output[1] == "skipped":
            raise ValueError("skip")
        return output

    def die(output: tuple[int, str]) -> Any:
        if output[1] == "dead":
            raise ValueError("die")
        return output

    def job(recorder: Recorder, whole: bool) -> ps.Job:
        return (
            ps.Flow(range(4))
            .flat_map(spread, whole=whole)
            .filter(lambda output: output[1] != "filtered")
            .map(skip, on_error="skip")
            .map(die, on_error="dead_letter")
            .to(recorder)
        )

    recorder = Recorder()
    report = asyncio.run(job(recorder, whole=True).run(progress=False))
    assert (report.filtered, report.skipped, report.delivered, report.dead) == (1, 1, 1, 1)
    assert recorder.outputs == [(2, "delivered")]  # one dead output makes the whole item dead, and delivers none
    recorder = Recorder()
    report = asyncio.run(job(recorder, whole=False).run(progress=False))
    assert (report.filtered, report.skipped, report.delivered, report.dead) == (1, 1, 1, 1)
    assert recorder.outputs == [(2, "delivered"), (3, "delivered")]
    assert [(letter.item, letter.stage) for letter in recorder.letters.values()] == [(3, "die")]


def test_law_accounting_in_processes() -> None:
    def work(x: int) -> int:
        if x % 7 == 3:
            raise ValueError(x)
        return 2 * x

    flow = (
        ps.Flow(range(300))
        .map(work, place="process", workers=2, on_error="skip")
        .filter(lambda x: x % 3, place="process", workers=2)
    )
    outputs: list[int] = []

    async def main() -> ps.Report:
        async with flow.to(outputs.append).start(progress=False) as run:
            while not run.ended:
                assert balanced(run.report())
                await asyncio.sleep(0.01)
            return await run.finish()

    report = asyncio.run(main())
    left = [2 * x for x in range(300) if x % 7 != 3]
    assert outputs == [x for x in left if x % 3]
    assert (report.issued, report.skipped, report.filtered) == (300, 43, len(left) - len(outputs))
