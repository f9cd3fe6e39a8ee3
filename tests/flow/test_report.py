"""The report: its law, its printed form, its way through JSON, and the sentence that names what to fix."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock as ps
from penstock.flow.meter import BLOCKED_HEAD, BLOCKED_OUTPUT, BUSY, HELD, WAITING_INPUT, SegmentMeter, StageMeter
from penstock.flow.report import ErrorGroup, ErrorLog, Report, build
from penstock.testing import run_virtual

ELAPSED = 10.0
ITEMS = 1000


def segment(
    name: str, *, busy: float = 0.0, state: int = BUSY, share: float = 0.0, place: str = "thread", ceiling: int = 4
) -> SegmentMeter:
    """A segment of one stage that was busy for a share of its capacity and in ``state`` for another of the time."""
    meter = SegmentMeter([StageMeter(name, place, ceiling)], ceiling, 0.0)
    meter.first.taken = ITEMS
    meter.passed(ITEMS)
    meter.add_samples(0, [busy * ELAPSED * ceiling / ITEMS])
    meter.set_state(BUSY, 0.0)
    meter.set_state(state, ELAPSED * (1 - share))
    return meter


def report_of(*segments: SegmentMeter, **changes: Any) -> Report:
    arguments: dict[str, Any] = {
        "name": "out.jsonl",
        "counts": {"issued": ITEMS, "delivered": ITEMS},
        "elapsed": ELAPSED,
        "segments": segments,
        "errors": ErrorLog(),
        "now": ELAPSED,
        "cores": 64,
    }
    return build(**{**arguments, **changes})


def test_the_busy_stage_is_named_with_the_gain_of_a_worker() -> None:
    report = report_of(
        segment("clean", busy=0.2, state=BLOCKED_OUTPUT, share=0.8),
        segment("embed", busy=0.99),
        segment("keep", busy=0.1, state=WAITING_INPUT, share=0.9),
        sink="out.jsonl",
    )
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("busy", "embed")
    assert report.bottleneck.gain == pytest.approx(0.25)
    assert str(report.bottleneck) == (
        "The stage to fix is 'embed': its 4 threads are 99 % busy at 39.6 ms a call. "
        "One more worker would give up to 25 % more (125 items/s)."
    )


def test_the_gain_ends_where_the_next_stage_is_full() -> None:
    report = report_of(segment("clean", busy=0.9), segment("embed", busy=0.99))
    assert report.bottleneck.gain == pytest.approx(0.1)
    assert "all that the next busiest can take" in str(report.bottleneck)


def test_two_stages_equally_busy_gain_nothing() -> None:
    report = report_of(segment("clean", busy=0.98), segment("embed", busy=0.98))
    assert report.bottleneck.gain == 0
    assert "would give nothing" in str(report.bottleneck)


def test_with_all_cores_in_use_the_gain_has_a_condition() -> None:
    report = report_of(segment("embed", busy=0.99, place="process"), cores=2)
    assert "if it waits rather than computes: there are 2 cores" in str(report.bottleneck)


def test_of_fused_stages_the_heaviest_is_named() -> None:
    meter = SegmentMeter([StageMeter(name, "loop", 32) for name in ("light", "heavy")], 32, 0.0)
    meter.first.taken = ITEMS
    meter.passed(ITEMS)
    meter.add_samples(0, [0.01, 0.3])
    meter.set_state(BUSY, 0.0)
    report = report_of(meter)
    assert report.bottleneck.stage == "heavy"
    assert "32 slots" in str(report.bottleneck)
    assert [stage.segment for stage in report.stages] == [0, 0]


def test_a_slow_source_is_named() -> None:
    report = report_of(
        segment("clean", busy=0.1, state=WAITING_INPUT, share=0.9),
        segment("embed", busy=0.2, state=WAITING_INPUT, share=0.8),
        source="texts/*.jsonl",
    )
    assert (report.bottleneck.reason, report.bottleneck.gain) == ("source", 0)
    assert "waits 90 % of the time for texts/*.jsonl" in str(report.bottleneck)


def test_a_source_that_has_ended_holds_nobody_up() -> None:
    """The first stage has nothing to do for most of the time, having had all there was."""

    async def work(xs: list[int]) -> list[int]:
        await asyncio.sleep(5)
        return xs

    async def quick(x: int) -> int:
        return x

    flow = ps.Flow(range(100)).map(quick).map_batches(work, batch_size=10, concurrency=1)
    report = run_virtual(flow.to(lambda x: None).run())
    assert report.bottleneck.stage == "work"
    batched = ps.Flow(range(100)).batch(10).map(work, concurrency=1)
    report = run_virtual(batched.to(lambda x: None).run())
    assert report.bottleneck.stage == "work"
    assert report.stages[0].waiting == 0


@pytest.mark.parametrize(
    ("sink", "said"), [("out.jsonl", "writing to out.jsonl"), (None, "the code that takes the results")]
)
def test_a_slow_sink_is_named(sink: str | None, said: str) -> None:
    blocked = segment("embed", busy=0.2, state=BLOCKED_OUTPUT, share=0.8)
    report = report_of(segment("clean", busy=0.1, state=BLOCKED_OUTPUT, share=0.9), blocked, sink=sink)
    assert report.bottleneck.reason == "sink"
    assert said in str(report.bottleneck)


def test_a_sink_that_writes_all_the_time_is_named() -> None:
    sink = segment("to", busy=0.9, place="sink", ceiling=1)
    report = report_of(segment("clean", busy=0.2, state=BLOCKED_OUTPUT, share=0.8), sink, sink="out.jsonl")
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("sink", None)
    assert "writing to out.jsonl takes 90 % of the time" in str(report.bottleneck)
    assert "sink  1,000" in str(report)


def test_a_worker_gains_no_more_than_the_sink_can_take() -> None:
    report = report_of(segment("clean", busy=0.99), segment("to", busy=0.9, place="sink", ceiling=1), sink="out.jsonl")
    assert report.bottleneck.gain == pytest.approx(0.1)


def test_a_flow_without_stages_blames_none() -> None:
    report = report_of(segment("to", busy=0.9, place="sink"), sink="out.jsonl")
    assert str(report.bottleneck).startswith("The flow has no stage")


def test_the_head_of_an_ordered_window_is_named() -> None:
    report = report_of(segment("ask", busy=0.3, state=BLOCKED_HEAD, share=0.7))
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("order", "ask")
    assert "ordered=False" in str(report.bottleneck)
    assert "order" in str(report).splitlines()[3]
    assert "items of more even size" in str(report.bottleneck)


def test_attempts_that_wait_to_be_repeated_are_named_where_the_order_waits_for_them() -> None:
    ask = segment("ask", busy=0.3, state=BLOCKED_HEAD, share=0.7)
    ask.stages[0].retried = 36
    said = str(report_of(ask).bottleneck)
    assert "which may wait to be tried again (36 were)" in said
    assert "fewer attempts (retry=)" in said


@pytest.mark.parametrize(
    ("learns", "said"), [(True, "give it, as Limit(per_second=...)"), (False, "A higher quota would")]
)
def test_a_limit_that_holds_says_whether_it_was_learned(learns: bool, said: str) -> None:
    ask = segment("ask", busy=0.1, state=HELD, share=0.9)
    ask.learns = learns
    report = report_of(ask)
    assert report.bottleneck.reason == "limit"
    assert said in str(report.bottleneck)


def test_an_event_loop_that_computes_is_named() -> None:
    report = report_of(segment("noop", busy=0.001, place="loop", ceiling=32), loop_busy=0.98)
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("loop", None)
    assert "10 ms an item" in str(report.bottleneck)


def test_a_coroutine_that_computes_is_named() -> None:
    report = report_of(segment("crunch", busy=0.9, place="loop", ceiling=1), loop_busy=0.98)
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("loop", "crunch")
    assert "'crunch' computes belongs in a plain function" in str(report.bottleneck)


def test_a_busy_loop_is_not_blamed_on_a_coroutine_that_waits() -> None:
    report = report_of(segment("ask", busy=0.9, place="loop", ceiling=1024), loop_busy=0.98)
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("loop", None)


def test_a_sink_that_waits_for_a_busy_loop_is_not_blamed() -> None:
    sink = segment("to", busy=0.9, place="sink", ceiling=1)
    assert report_of(segment("noop", busy=0.001), sink, loop_busy=0.9).bottleneck.reason == "loop"


def test_where_nothing_stands_out_nothing_is_blamed() -> None:
    report = report_of(segment("clean", busy=0.1), segment("embed", busy=0.2))
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("none", None)
    assert "No stage is the bottleneck: the busiest, 'embed'" in str(report.bottleneck)


def test_before_anything_is_done_nothing_is_said() -> None:
    report = report_of(segment("embed", busy=0.9), counts={"issued": 5, "in_flight": 5})
    assert report.bottleneck.reason == "none"
    assert report_of().bottleneck.reason == "none"
    assert report_of(elapsed=0.0).rate == 0


def test_errors_are_grouped_bounded_and_cut() -> None:
    log = ErrorLog()
    for number in range(200):
        log.add("ask", f"Kind{number}", "x" * 1000, ("a", number))
    for _ in range(5):
        log.add("ask", "Kind7", "again", ("a", 999))
    groups = log.groups()
    assert len(groups) == 50
    assert sum(group.count for group in groups) == 205
    assert groups[0] == ErrorGroup("", "other errors", 151, "x" * 199 + "…", ("a", 49))
    assert groups[1] == ErrorGroup("ask", "Kind7", 6, "x" * 199 + "…", ("a", 7))


def test_a_message_of_many_lines_becomes_one() -> None:
    log = ErrorLog()
    log.add("ask", "ValueError", "first\n   second\n")
    assert log.groups()[0].example == "first second"


def full_report() -> Report:
    log = ErrorLog()
    log.add("ask", "ValueError", "no label", ("texts/a.jsonl", 17))
    log.add("ask", "KeyError", "", ("", 3))
    log.add("keep", "TimeoutError", "word " * 25)
    meter = segment("ask", busy=0.9)
    meter.first.failed, meter.first.retried = 3, 12
    counts = {"issued": 20, "delivered": 9, "filtered": 1, "skipped": 2, "dead": 3, "released": 1, "in_flight": 4}
    return report_of(
        meter,
        counts={**counts, "retried": 12},
        errors=log,
        guarantee="exactly once",
        earlier={"delivered": 500, "dead": 0},
        notes=["nothing to do: " + "the job is finished, " * 8],
    )


def test_law_accounting_stands_in_the_report() -> None:
    report = full_report()
    parts = (report.delivered, report.filtered, report.skipped, report.dead, report.released, report.in_flight)
    assert report.issued == sum(parts)
    assert report.settled == 15
    assert report.rate == 1.5


def test_a_report_survives_json() -> None:
    report = full_report()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_what_is_no_report_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="issued"):
        Report.from_dict({"name": "out.jsonl"})


def test_the_printed_report() -> None:
    assert str(full_report()).splitlines() == [
        "out.jsonl: 20 items issued in 10 s, 1.5 items/s",
        "  delivered 9, filtered 1, skipped 2, dead 3, released 1, in flight 4, retried 12",
        "  earlier runs: delivered 500",
        "  exactly once",
        "",
        "stage       place     in    out  busy  waiting  blocked    p50    p99",
        "ask    thread × 4  1,000  1,000  91 %      0 %      0 %  36 ms  36 ms",
        "  ask: 3 failed, 12 retried",
        "",
        "errors",
        "  1 × ValueError in ask: no label (texts/a.jsonl, item 17)",
        "  1 × KeyError in ask: no message (item 3)",
        "  1 × TimeoutError in keep:",
        "    word word word word word word word word word word word word word word word word word word word",
        "    word word word word word word",
        "",
        "The stage to fix is 'ask': its 4 threads are 91 % busy at 36 ms a call. One more worker would give",
        "up to 25 % more (1.88 items/s).",
        "note: nothing to do: the job is finished, the job is finished, the job is finished, the job is",
        "  finished, the job is finished, the job is finished, the job is finished, the job is finished,",
    ]


@given(
    st.lists(st.text("abcdefg_<>", min_size=1, max_size=150), min_size=1, max_size=4),
    st.integers(0, 10**12),
    st.text(max_size=300),
)
def test_the_printed_report_is_never_wider_than_a_terminal(names: list[str], items: int, message: str) -> None:
    meters = [segment(name, busy=0.5, place="process", state=BLOCKED_HEAD, share=0.3) for name in names]
    log = ErrorLog()
    for meter in meters:
        meter.first.taken = meter.first.emitted = items
        meter.first.failed = meter.first.retried = items
        log.add(meter.first.name, "ValueError", message, ("file", items))
    report = report_of(*meters, errors=log, counts={"issued": items, "delivered": items})
    assert max(len(line) for line in str(report).splitlines()[2:]) <= 100


def test_a_run_tells_how_much_its_loop_computes() -> None:
    """On the virtual clock: next to no time passes, and computing takes some."""

    async def crunch(x: int) -> int:
        await asyncio.sleep(1e-9)
        return sum(range(1000))

    report = run_virtual(ps.Flow(range(300)).map(crunch).to(lambda x: None).run(progress=False))
    assert report.bottleneck.reason == "loop"
