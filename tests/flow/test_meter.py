"""The meters: quantiles within their bound, counters that follow from few calls, shares that never exceed the whole."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.flow.meter import (
    BLOCKED_HEAD,
    BLOCKED_OUTPUT,
    BUSY,
    HELD,
    WAITING_INPUT,
    Histogram,
    SegmentMeter,
    StageMeter,
)

durations = st.floats(min_value=1e-6, max_value=1e5, allow_nan=False)


def segment_of(count: int, ceiling: int = 1, started: float = 0.0) -> SegmentMeter:
    return SegmentMeter([StageMeter(f"s{number}", "loop", ceiling) for number in range(count)], ceiling, started)


def histogram_of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(st.lists(durations, min_size=1, max_size=200), st.floats(min_value=0, max_value=1))
def test_a_quantile_is_right_to_half_a_bucket(values: list[float], q: float) -> None:
    exact = sorted(values)[max(0, ceil(q * len(values)) - 1)]
    assert histogram_of(values).quantile(q) == pytest.approx(exact, rel=0.026)


def test_a_histogram_is_bounded() -> None:
    histogram = histogram_of([10 ** (power / 500) for power in range(-5000, 5000)])
    assert len(histogram._buckets) <= 520
    assert histogram.count == 10_000


def test_an_empty_histogram_and_one_beyond_its_range() -> None:
    assert Histogram().quantile(0.5) == 0.0
    assert histogram_of([0.0]).quantile(0.5) == 0.0
    assert histogram_of([1e9]).quantile(0.5) == 1e9


@given(
    st.integers(min_value=1, max_value=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=30),
)
def test_what_a_stage_emits_the_next_takes(count: int, ends: list[tuple[int, int, bool]]) -> None:
    """Items stop anywhere; those to be retried enter again where they stopped and then pass."""
    segment = segment_of(count)
    reached = [0] * count
    emitted = [0] * count
    for _, at, retried in ends:
        at = min(at, count - 1)
        segment.first.taken += 1
        segment.stopped(0, at)
        passed = at
        if retried:
            segment.passed(1, at)
            passed = count
        for number in range(count):
            reached[number] += number <= passed
            emitted[number] += number < passed
    assert [stage.taken for stage in segment.stages] == reached
    assert [stage.emitted for stage in segment.stages] == emitted


def test_a_last_stage_that_spreads_counts_its_outputs() -> None:
    segment = segment_of(2)
    segment.first.taken += 3
    segment.passed(3, outputs=12)
    assert [(stage.taken, stage.emitted) for stage in segment.stages] == [(3, 3), (3, 12)]
    alone = segment_of(1)
    alone.passed(3, outputs=7)
    assert alone.first.emitted == 7


def test_a_retry_at_the_last_stage_is_not_taken_twice() -> None:
    segment = segment_of(3)
    segment.first.taken += 1
    segment.stopped(0, 2)
    segment.last.retried += 1
    segment.passed(1, entry=2)
    assert [(stage.taken, stage.emitted) for stage in segment.stages] == [(1, 1)] * 3


def test_busy_is_service_over_capacity() -> None:
    segment = segment_of(2, ceiling=4, started=100.0)
    segment.set_state(BUSY, 100.0)
    segment.first.taken += 20
    segment.passed(20)
    segment.add_samples(0, [0.5, 0.25])
    shares = segment.shares(110.0)
    assert segment.busy(segment.first, 110.0) == pytest.approx(20 * 0.5 / 40)
    assert segment.busy(segment.last, 110.0) == pytest.approx(20 * 0.25 / 40)
    assert shares.busy == pytest.approx(0.375)
    assert shares.waiting == shares.blocked == shares.head == 0


def test_batches_are_timed_by_the_call() -> None:
    segment = segment_of(1)
    segment.first.taken += 320
    segment.passed(320)
    segment.first.calls += 10
    segment.add_samples(0, [0.1])
    assert segment.shares(10.0).busy == pytest.approx(0.1)


def test_a_retried_item_enters_the_samples_at_its_stage() -> None:
    segment = segment_of(3)
    segment.add_samples(1, [0.5, 0.25])
    assert [stage.service_total for stage in segment.stages] == [0.0, 0.5, 0.25]


def test_a_first_item_that_takes_long_shows_as_busy() -> None:
    segment = segment_of(1, ceiling=4)
    segment.first.taken = segment.first.in_progress = 2
    assert segment.shares(60.0).busy == 0.5


def test_idle_time_goes_to_the_state_it_was_spent_in() -> None:
    segment = segment_of(1)
    for state, now in ((BUSY, 1.0), (BLOCKED_OUTPUT, 2.0), (BLOCKED_HEAD, 6.0), (HELD, 9.0), (WAITING_INPUT, 9.2)):
        segment.set_state(state, now)
        segment.set_state(state, now + 0.5)  # no change, and so no effect
    shares = segment.shares(10.0)
    assert shares == pytest.approx((0.0, 0.18, 0.4, 0.3, 0.02))


def test_no_time_no_shares() -> None:
    assert segment_of(1, started=5.0).shares(5.0) == (0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_ceiling_that_changes_counts_by_the_time_it_held() -> None:
    segment = segment_of(1, ceiling=2)
    segment.set_ceiling(10, 10.0)  # 20 seconds of work were to be had
    segment.set_ceiling(4, 13.0)  # and 30 more
    segment.first.taken = 15
    segment.passed(15)
    segment.add_samples(0, [2.0])
    assert segment.capacity(15.0) == 58.0
    assert segment.shares(15.0).busy == pytest.approx(30 / 58)
    assert segment.first.ceiling == 4


@given(
    st.integers(1, 32),
    st.lists(st.tuples(st.integers(0, 4), st.floats(0.001, 10)), min_size=1, max_size=20),
    st.floats(0, 100),
    st.integers(0, 1000),
)
def test_shares_never_exceed_the_whole(
    ceiling: int, states: list[tuple[int, float]], service: float, items: int
) -> None:
    segment = segment_of(1, ceiling)
    now = 0.0
    for state, seconds in states:
        segment.set_state(state, now)
        now += seconds
    segment.first.taken += items
    segment.passed(items)
    segment.add_samples(0, [service])
    shares = segment.shares(now)
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) <= 1 + 1e-9
