"""Attempts, and the ends of items that fail for good. All on the virtual clock."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import BatchMismatch, ExpansionTooLarge, PlanError
from penstock.flow.failing import short
from penstock.flow.retry import NEVER_RETRIED, as_retry
from penstock.testing import run_virtual


class Shaky:
    """Fails at an item's first attempts; remembers when each attempt was."""

    def __init__(self, failures: Callable[[int], int], error: type[BaseException] = ValueError) -> None:
        self.failures = failures
        self.error = error
        self.times: dict[int, list[float]] = defaultdict(list)
        self.active = 0
        self.peak = 0

    async def __call__(self, x: int) -> int:
        self.times[x].append(asyncio.get_running_loop().time())
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            await asyncio.sleep(1)
            if len(self.times[x]) <= self.failures(x):
                raise self.error(x)
            return -x
        finally:
            self.active -= 1


# -- the schedule ------------------------------------------------------------------------------------------------------


@given(attempts=st.integers(1, 200), backoff=st.floats(0.001, 100) | st.just(0))
def test_the_wait_doubles_up_to_a_minute_and_jitter_is_a_random_part_of_it(attempts: int, backoff: float) -> None:
    full = min(backoff * 2.0 ** (attempts - 1), 60.0)
    assert ps.Retry(200, backoff=backoff, jitter=False).delay(attempts) == pytest.approx(full)
    assert 0 <= ps.Retry(200, backoff=backoff).delay(attempts) <= full


def test_jitter_is_full() -> None:
    """Waits are spread over the whole of the time, so what failed together doesn't come back together."""
    waits = [ps.Retry(3, backoff=8).delay(1) for _ in range(2000)]
    quarters = Counter(int(wait // 2) for wait in waits)
    assert sorted(quarters) == [0, 1, 2, 3]
    assert min(quarters.values()) > 300


def test_attempts_and_waits() -> None:
    shaky = Shaky(lambda x: 3)
    flow = ps.Flow([5]).map(shaky, retry=ps.Retry(3, backoff=2, jitter=False))
    report = run_virtual(flow.to(Recorder()).run(progress=False))
    assert shaky.times == {5: [0, 3, 8, 17]}  # a second of work each; waits of 2, 4 and 8
    assert (report.delivered, report.retried) == (1, 3)


@given(attempts=st.integers(0, 4), failures=st.integers(0, 6))
def test_a_number_is_so_many_further_attempts(attempts: int, failures: int) -> None:
    shaky = Shaky(lambda x: failures)
    outputs = run_virtual(ps.Flow([1]).map(shaky, retry=attempts, on_error="keep").collect())
    assert len(shaky.times[1]) == min(failures, attempts) + 1
    if failures <= attempts:
        assert outputs == [-1]
    else:
        assert outputs == [ps.Failed(1, ("", 0), "Shaky", "ValueError", "1", attempts + 1)]


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"attempts": -1}, "attempts=-1"),
        ({"attempts": True}, "attempts=True"),
        ({"attempts": 1.5}, "attempts=1.5"),
        ({"backoff": -0.1}, "backoff=-0.1"),
        ({"backoff": "1"}, "backoff='1'"),
        ({"backoff": True}, "backoff=True"),
        ({"backoff": float("nan")}, "backoff=nan"),
        ({"backoff": float("inf")}, "backoff=inf"),
        ({"on": 5}, "on=5"),
        ({"on": int}, "on=<class 'int'>"),
        ({"on": (ValueError, "OSError")}, "OSError"),
    ],
)
def test_values_out_of_range_are_refused(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        ps.Retry(**given_)


def test_what_retry_may_be() -> None:
    assert as_retry(None) is None
    assert as_retry(4) == ps.Retry(attempts=4)
    assert as_retry(ps.Retry(2)) == ps.Retry(2)
    for wrong in (True, "3", 1.5, -1):
        with pytest.raises(PlanError, match="Give a "):
            as_retry(wrong)


# -- what is tried again -----------------------------------------------------------------------------------------------


def made(kind: type[BaseException]) -> BaseException:
    arguments: dict[type[BaseException], tuple[Any, ...]] = {
        BatchMismatch: ("m", 2, "1 results"),
        ExpansionTooLarge: ("m", 1),
    }
    error = kind.__new__(kind)
    error.__init__(*arguments[kind]) if kind in arguments else None  # type: ignore[misc]
    return error


@pytest.mark.parametrize("kind", NEVER_RETRIED)
def test_errors_of_the_program_are_never_repeated_whatever_on_says(kind: type[BaseException]) -> None:
    error = made(kind)
    for on in (Exception, kind, lambda error: True):
        assert not ps.Retry(5, on=on).repeats(error, 1)


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError, AssertionError, NotImplementedError])
def test_a_type_error_and_its_like_are_called_once(error: type[Exception]) -> None:
    shaky = Shaky(lambda x: 9, error)
    with pytest.raises(error):
        run_virtual(ps.Flow([1]).map(shaky, retry=5).collect())
    assert len(shaky.times[1]) == 1


@pytest.mark.parametrize(
    ("on", "repeated"),
    [
        (Exception, {OSError, ConnectionError, KeyError}),
        (OSError, {OSError, ConnectionError}),
        ((KeyError, ConnectionError), {KeyError, ConnectionError}),
        (lambda error: "again" in str(error), {KeyError}),
        ((), set()),
    ],
)
def test_on_says_what_is_worth_another_attempt(on: Any, repeated: set[type[Exception]]) -> None:
    retry = ps.Retry(2, on=on)
    for error in (OSError("no"), ConnectionError("no"), KeyError("again")):
        assert retry.repeats(error, 1) is retry.repeats(error, 2) is (type(error) in repeated)
        assert not retry.repeats(error, 3)
    assert not retry.repeats(KeyboardInterrupt("again"), 1)


def test_a_timeout_is_tried_again_and_says_what_it_was() -> None:
    calls: list[float] = []

    async def hang(x: int) -> None:
        calls.append(asyncio.get_running_loop().time())
        await asyncio.sleep(1e9)

    flow = ps.Flow([1]).map(hang, timeout=5, retry=ps.Retry(1, backoff=1, jitter=False), on_error="keep")
    (failed,) = run_virtual(flow.collect())
    assert calls == [0, 6]
    assert (failed.reason, failed.attempts) == ("timeout", 2)


def test_a_function_of_the_error_that_fails_stops_the_run() -> None:
    def on(error: BaseException) -> bool:
        raise LookupError("in on=")

    with pytest.raises(LookupError, match="in on="):
        run_virtual(ps.Flow([1]).map(Shaky(lambda x: 1), retry=ps.Retry(1, on=on)).collect())


def test_a_fused_item_comes_back_at_its_stage_and_each_stage_counts_its_own_attempts() -> None:
    first, second = Shaky(lambda x: 2), Shaky(lambda x: 2)
    flow = ps.Flow([1, 2]).map(first, retry=2).map(second, retry=2)
    assert run_virtual(flow.collect()) == [1, 2]
    assert {x: len(times) for x, times in first.times.items()} == {1: 3, 2: 3}
    assert {x: len(times) for x, times in second.times.items()} == {-1: 3, -2: 3}


# -- what waits --------------------------------------------------------------------------------------------------------


def test_an_item_that_waits_holds_no_worker() -> None:
    shaky = Shaky(lambda x: x == 0)
    flow = ps.Flow(range(5)).map(shaky, concurrency=1, ordered=False, retry=ps.Retry(1, backoff=50, jitter=False))
    assert run_virtual(flow.collect()) == [-1, -2, -3, -4, 0]
    assert [shaky.times[x][0] for x in range(5)] == [0, 1, 2, 3, 4]
    assert shaky.peak == 1


def test_the_ordered_window_stalls_only_behind_its_head() -> None:
    """With a ceiling of 2 the window holds 4: the head that waits lets three pass it into the window, no more."""
    shaky = Shaky(lambda x: x == 0)
    flow = ps.Flow(range(9)).map(shaky, concurrency=2, retry=ps.Retry(1, backoff=50, jitter=False))
    assert run_virtual(flow.collect()) == [-x for x in range(9)]
    assert max(shaky.times[x][0] for x in range(4)) <= 2
    assert min(shaky.times[x][0] for x in range(4, 9)) >= 52


@settings(max_examples=60)
@given(
    count=st.integers(0, 20),
    failing=st.sets(st.integers(0, 19)),
    keys=st.integers(1, 4),
    concurrency=st.integers(1, 5),
)
def test_a_keyed_item_that_waits_blocks_its_lane_and_no_other(
    count: int, failing: set[int], keys: int, concurrency: int
) -> None:
    shaky = Shaky(lambda x: x in failing)
    retry = ps.Retry(1, backoff=3, jitter=False)
    flow = ps.Flow(range(count)).map(shaky, key=lambda x: x % keys, concurrency=concurrency, retry=retry)
    outputs = run_virtual(flow.collect())
    assert sorted(outputs, reverse=True) == [-x for x in range(count)]
    for key in range(keys):
        lane = [x for x in range(count) if x % keys == key]
        assert [-output for output in outputs if -output % keys == key] == lane
        for before, after in pairwise(lane):
            assert shaky.times[before][-1] + 1 <= shaky.times[after][0]
    assert shaky.peak <= concurrency
    if concurrency >= keys and not failing:
        assert all(shaky.times[x][0] == x // keys for x in range(count))


def test_another_lane_goes_on_while_one_waits() -> None:
    shaky = Shaky(lambda x: x == 0)
    flow = ps.Flow(range(6)).map(
        shaky, key=lambda x: x % 2, concurrency=4, retry=ps.Retry(1, backoff=100, jitter=False)
    )
    assert run_virtual(flow.collect()) == [-1, -3, -5, 0, -2, -4]


# -- the four ends -----------------------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[ps.Flow[Any], Any, Any], ps.Flow[Any]]] = {
    "map": lambda flow, bad, end: flow.map(bad, on_error=end, name="bad"),
    "filter": lambda flow, bad, end: flow.filter(bad, on_error=end, name="bad"),
    "unordered": lambda flow, bad, end: flow.map(bad, on_error=end, name="bad", ordered=False),
    "keyed": lambda flow, bad, end: flow.map(bad, on_error=end, name="bad", key=lambda x: 0),
    "the key": lambda flow, bad, end: flow.map(same, on_error=end, name="bad", key=sour),
    "fused": lambda flow, bad, end: flow.map(same).map(bad, on_error=end, name="bad").map(same),
    "flat_map": lambda flow, bad, end: flow.flat_map(sour_list, on_error=end, name="bad", place="loop"),
    "threads": lambda flow, bad, end: flow.map(sour, on_error=end, name="bad", workers=1),
}


async def same(x: Any) -> Any:
    return x


def sour(x: int) -> int:
    assert type(x) is int, "a Failed goes on to the stages after this one"
    if x == 2:
        raise OSError("sour")
    return x


def sour_list(x: int) -> list[int]:
    return [sour(x)]


async def bad(x: int) -> int:
    return sour(x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["raise", "skip", "keep", "dead_letter"])
def test_the_four_ends(shape: str, end: Any) -> None:
    recorder = Recorder()
    job = SHAPES[shape](ps.Flow([1, 2, 3]), bad, end).to(recorder)
    if end == "raise":
        with pytest.raises(OSError, match="sour") as raised:
            run_virtual(job.run(progress=False))
        assert raised.value.__notes__ == ["at stage 'bad', item 1: 2"]
        return
    report = run_virtual(job.run(progress=False))
    failed = ps.Failed(2, ("", 1), "bad", "OSError", "sour", 1)
    assert sorted(recorder.outputs, key=repr) == sorted([1, 3, *([failed] if end == "keep" else [])], key=repr)
    assert list(recorder.letters.values()) == [failed] * (end == "dead_letter")
    assert (report.skipped, report.dead) == (end == "skip", end == "dead_letter")
    (group,) = report.errors
    assert (group.stage, group.kind, group.count, group.example) == ("bad", "OSError", 1, "sour")


@pytest.mark.parametrize(("budget", "failures", "stops"), [(0, 0, False), (0, 1, True), (2, 2, False), (2, 3, True)])
@pytest.mark.parametrize("retry", [0, 2])
def test_a_budget_as_a_count_is_of_items_given_up_and_not_of_attempts(
    budget: int, failures: int, stops: bool, retry: int
) -> None:
    shaky = Shaky(lambda x: 9 if x < failures else 1 if retry else 0)
    flow = ps.Flow(range(10)).map(shaky, on_error="skip", retry=retry, max_failures=budget)
    if stops:
        with pytest.raises(ps.errors.FailureBudgetExceeded) as raised:
            run_virtual(flow.collect())
        assert raised.value.failed == budget + 1
    else:
        assert run_virtual(flow.collect()) == [-x for x in range(failures, 10)]


class Odd:
    def __repr__(self) -> str:
        raise ZeroDivisionError


def test_a_value_is_told_in_at_most_200_characters_whatever_its_repr_does() -> None:
    assert short("x" * 500) == "'" + "x" * 196 + "..."
    assert short(Odd()) == "<Odd whose repr raised ZeroDivisionError>"
    assert short([1]) == "[1]"
