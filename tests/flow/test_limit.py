"""Limits: what may be sent and when, whose turn it is, what is learned from refusals. No clock but the given one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from math import inf, nan
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.flow.servers import Client, Fixed, Queue, Quota429, around, simulate

from penstock.errors import PlanError
from penstock.flow.limit import PATIENCE, Limit, Pace
from penstock.flow.search import Search
from penstock.flow.signals import OK, OVERLOADED, THROTTLED, UNKNOWN, Quota, Rates, Signal

GOOD = Signal()
NO = Signal(THROTTLED)


A, B, C, D, E = WAITERS = ["a", "b", "c", "d", "e"]  # a waiter is known by its identity


def count(item: Any) -> int:
    return len(item)


# -- what a user names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, -1, nan, inf, True, "5", [5], 1j])
@pytest.mark.parametrize("name", ["per_second", "per_minute", "tokens_per_minute"])
def test_rates_are_positive_numbers(name: str, rate: Any) -> None:
    with pytest.raises(PlanError, match=rf"Limit\({name}=.*\. Give a positive number"):
        Limit(**{name: rate}, tokens=count)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(PlanError, match=r"tokens_per_minute=90\) without tokens=. Give tokens="):
        Limit(tokens_per_minute=90)
    with pytest.raises(PlanError, match=r"tokens=count\) without tokens_per_minute=. Give the quota"):
        Limit(per_minute=90, tokens=count)
    with pytest.raises(PlanError, match=r"Limit\(tokens=5\). Give a function of an item"):
        Limit(tokens_per_minute=90, tokens=5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"Limit\(throttled='no'\). Give a function of an exception or a result"):
        Limit(throttled="no")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"Limit\(per_host='a'\). Give True or False"):
        Limit(per_host="a")  # type: ignore[arg-type]
    assert Limit(per_second=np.float32(5), per_minute=Fraction(7, 2)).per_minute == 3.5  # type: ignore[arg-type]


def test_repr_names_what_was_given() -> None:
    assert repr(Limit()) == "Limit()"
    assert repr(Limit(per_second=2.5, per_host=True)) == "Limit(per_second=2.5, per_host=True)"
    limit = Limit(per_minute=5, tokens_per_minute=9, tokens=count, throttled=max)
    assert repr(limit) == "Limit(per_minute=5, tokens_per_minute=9, tokens=count, throttled=max)"


def test_a_copy_is_a_fresh_one() -> None:
    limit = Limit(per_second=1, tokens_per_minute=60, tokens=lambda item: 3 * len(item), per_host=True)
    assert limit.pace("a").ask(0, "w", 0) == 0
    copy = cloudpickle.loads(cloudpickle.dumps(limit))
    assert repr(copy) == repr(limit)
    assert copy.cost("abc") == 9
    assert copy.pace("a").ask(0, "w", 0) == 0, "its quota is its own"
    assert limit.pace("a").ask(0, "w", 0) > 0


def test_cost() -> None:
    def costing(found: Any) -> Limit:
        return Limit(tokens_per_minute=60, tokens=lambda item: found)

    assert Limit(per_second=1).cost("anything") == 0.0
    assert Limit(tokens_per_minute=60, tokens=count).cost("abc") == 3.0
    assert costing(np.int64(7)).cost("x") == 7.0
    assert costing(0).cost("x") == 0.0
    for wrong in (-1, nan, inf):
        with pytest.raises(ValueError, match=r"tokens=.*<lambda> returned .*: return a number of tokens, 0 or more"):
            costing(wrong).cost("x")
    for strange in (None, "12", True, [1]):
        with pytest.raises(TypeError, match=r"tokens=.*<lambda> returned .*: return a number of tokens"):
            costing(strange).cost("x")
    with pytest.raises(ZeroDivisionError):
        Limit(tokens_per_minute=60, tokens=lambda item: 1 / 0).cost("x")


def test_the_hook_is_asked_first() -> None:
    answers: dict[Any, Any] = {"yes": True, "later": 2.5, "at once": 0, "no": False, "none": None}
    limit = Limit(throttled=lambda outcome: answers.get(outcome, False) if isinstance(outcome, str) else None)
    assert limit.signal("yes") == Signal(THROTTLED)
    assert limit.signal("later") == Signal(THROTTLED, 2.5)
    assert limit.signal("at once") == Signal(THROTTLED, 0.0)
    assert limit.signal("no") == limit.signal("none") == Signal(OK)
    assert limit.signal(TimeoutError()).kind == OVERLOADED, "what it doesn't know is read as always"
    assert limit.signal(ValueError()).kind == UNKNOWN
    with pytest.raises(TypeError, match=r"throttled=.* returned 'soon': return True, the seconds to wait"):
        Limit(throttled=lambda outcome: "soon").signal(5)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        Limit(throttled=lambda outcome: 1 / 0).signal(5)


def test_hosts() -> None:
    shared, each = Limit(per_second=1), Limit(per_second=1, per_host=True)
    assert shared.pace("a") is shared.pace("b")
    assert each.pace("a") is each.pace("a") is not each.pace("b")


def test_hosts_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.flow.limit._MOST_PACES", 10)
    limit = Limit(per_second=1, per_host=True)
    awaited = limit.pace("awaited")
    assert awaited.ask(0, "one", 0) == 0
    assert awaited.ask(0, "two", 0) > 0
    used = limit.pace("used")
    for number in range(100):
        limit.pace(f"host {number}")
        assert limit.pace("used") is used
    assert limit.pace("awaited") is awaited, "somebody waits for it"
    assert len(limit._paces) == 10


# -- rates -------------------------------------------------------------------------------------------------------------


def send(
    pace: Pace, seconds: float, *, late: Callable[[], float] = lambda: 0.0, tokens: float = 0.0, now: float = 0.0
) -> list[float]:
    """When one waiter after the other is let go, each asking as soon as it is told to, or a little later."""
    times = []
    end = now + seconds
    while now < end:
        wait = pace.ask(now, "waiter", tokens)
        if wait == 0.0:
            times.append(now)
        else:
            now += wait + late()
    return times


@pytest.mark.parametrize("rate", [0.05, 1, 7, 100, 500, 5000])
def test_a_rate_is_used_and_kept(rate: float) -> None:
    """At least 97 % of it with timers 1–2 ms late, and never more than it and a fiftieth of a second's burst."""
    seconds = max(12.0, 200 / rate)
    times = send(Pace(rate), seconds, late=around(0.0015, 1, 0.3))
    assert len(times) >= 0.97 * rate * seconds
    burst = max(1, 0.02 * rate)
    for first, span in [(0.0, 1.0), (0.0, seconds), (seconds / 3, 1.0), (seconds / 2, 5.0)]:
        assert sum(first <= at < first + span for at in times) <= rate * span + burst + 1


def test_several_rates_hold_at_once() -> None:
    assert len(send(Limit(per_second=50, per_minute=600).pace(""), 60)) == pytest.approx(594, abs=3)
    assert len(send(Limit(per_second=5, per_minute=600).pace(""), 60)) == pytest.approx(297, abs=3)
    by_tokens = Limit(per_second=50, tokens_per_minute=6000, tokens=count).pace("")
    assert len(send(by_tokens, 60, tokens=20.0)) == pytest.approx(297, abs=3)


def test_without_numbers_nothing_waits() -> None:
    pace = Limit().pace("")
    assert all(pace.ask(0.0, number, 1e9) == 0.0 for number in range(10_000))


def test_no_burst_at_the_start_nor_after_a_pause() -> None:
    """A minute's quota is spread over the minute."""
    pace = Pace(10.0)
    assert len(send(pace, 0.01)) == 1
    assert len(send(pace, 0.01, now=3600.0)) == 1
    pace = Pace(500.0)
    assert len(send(pace, 0.0001)) <= 10
    assert len(send(pace, 0.0001, now=3600.0)) <= 10


def test_a_request_of_more_than_the_whole_bucket_goes_and_leaves_a_debt() -> None:
    """A minute's tokens are 600, ten a second; this one takes two minutes' worth, and then the next waits for it."""
    pace = Limit(tokens_per_minute=600, tokens=count).pace("")
    assert pace.ask(0, "large", 1200) == 0
    wait = pace.ask(0, "small", 1)
    assert wait == pytest.approx(1200 / 9.9, rel=0.01)
    assert pace.ask(0, "another large", 1200) > wait
    assert pace.ask(wait + 0.001, "small", 1) == 0


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    pace = Limit(tokens_per_minute=600, tokens=count).pace("")
    assert pace.ask(0, "first", 10) == 0
    assert pace.ask(0, "large", 500) > 0
    for step in range(1, 8):
        assert pace.ask(step / 10, "small", 0.01) > 0, "it came later"
    assert pace.ask(1.2, "large", 500) == 0
    assert pace.ask(1.2, "small", 0.01) > 40


def test_tokens_are_put_right_by_what_was_really_used() -> None:
    def next_wait(used: float | None) -> float:
        pace = Limit(tokens_per_minute=600, tokens=count).pace("")
        assert pace.ask(0, "one", 100) == 0
        pace.report(1.0, Signal(tokens=used), 100, 0.0)
        return pace.ask(1.0, "two", 1)

    assert next_wait(None) == pytest.approx(9.1, abs=0.1)
    assert next_wait(10.0) < 0.2
    assert next_wait(0.0) == 0.0
    assert next_wait(200.0) == pytest.approx(19.2, abs=0.2)


# -- whose turn it is --------------------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    pace = Pace(1.0)
    assert pace.ask(0, A, 0) == 0
    waits = [pace.ask(0, name, 0) for name in WAITERS[1:]]
    assert waits == pytest.approx([1.01, 2.02, 3.03, 4.04], abs=0.01)
    assert pace.ask(0.5, C, 0) == pytest.approx(1.52, abs=0.01), "asking again keeps its place"
    assert pace.ask(1.02, C, 0) > 0, "b's turn came, and is kept for it"
    assert pace.ask(1.5, B, 0) == 0
    assert pace.ask(2.05, C, 0) == 0


def test_who_is_slow_to_come_back_holds_up_nobody() -> None:
    pace = Pace(1.0)
    assert pace.ask(0, A, 0) == 0
    assert pace.ask(0, "slow", 0) > 0
    assert pace.ask(0, "quick", 0) > 0
    assert pace.ask(1.02, "quick", 0) > 0
    assert pace.ask(2.04, "quick", 0) == 0
    assert pace.ask(2.05, "quick", 0) == pytest.approx(1.0, abs=0.02), "the slow one's grant is charged"
    assert pace.ask(500.0, "slow", 0) == 0, "and stands"
    assert not pace.idle


def test_leaving_gives_a_grant_back_and_makes_way() -> None:
    pace = Pace(1.0)
    assert pace.ask(0, A, 0) == 0
    for name in WAITERS[1:4]:
        assert pace.ask(0, name, 0) > 0
    pace.leave(C)  # from the middle
    assert pace.ask(1.02, D, 0) > 0  # b's turn is kept for it
    pace.leave(B)  # and given back
    assert pace.ask(1.02, D, 0) == 0
    pace.leave(D)  # isn't there any more
    pace.leave("nobody")
    assert pace.idle


def test_a_waiter_may_change_its_mind() -> None:
    """It may have another item to start by then: what is charged is what that takes."""
    pace = Limit(tokens_per_minute=600, tokens=count).pace("")
    assert pace.ask(0, A, 10) == 0
    assert pace.ask(0, B, 500) > 0
    assert pace.ask(0, C, 5) > 0
    assert pace.ask(1.2, C, 5) > 40, "b is granted 500"
    assert pace.ask(1.2, B, 10) == 0, "but takes 10"
    assert pace.ask(1.2, C, 5) < 1.1
    assert pace.ask(1.2, C, 99) < 1.1
    assert pace.ask(2.4, C, 99) == 0
    assert pace.ask(2.4, D, 1) == pytest.approx(99 / 9.9, abs=0.3)


def test_two_waiters_that_are_equal_are_two() -> None:
    pace = Pace(1.0)
    one, other = [1], [1]
    assert pace.ask(0, "a", 0) == 0
    assert pace.ask(0, one, 0) < pace.ask(0, other, 0)
    pace.leave(other)
    assert pace.ask(1.02, one, 0) == 0


@given(
    requests=st.sampled_from([inf, 0.5, 3.0, 40.0]),
    tokens=st.sampled_from([inf, 2.0, 50.0]),
    steps=st.lists(
        st.tuples(
            st.integers(0, 5),  # who
            st.sampled_from(["ask", "ask", "ask", "leave", "report"]),
            st.floats(0, 3),  # seconds until then
            st.sampled_from([0.0, 0.5, 3.0, 40.0, 1000.0]),  # tokens
            st.sampled_from(
                [GOOD, Signal(tokens=2.0), Signal(OVERLOADED), Signal(UNKNOWN), NO, Signal(THROTTLED, 1.5)]
            ),
        ),
        max_size=80,
    ),
)
def test_rates_are_kept_in_turn_and_nobody_waits_for_ever(
    requests: float, tokens: float, steps: list[tuple[int, str, float, float, Signal]]
) -> None:
    """Whoever comes, goes, or reports whatever, in any order."""
    pace = Pace(requests, tokens)
    now = 0.0
    wanted: dict[int, float] = {}
    order: list[int] = []
    grants: list[tuple[float, float]] = []
    corrected = 0.0

    def took(who: int) -> None:
        assert who == order[0] or who in stored(order, who), "a later one went first"
        order.remove(who)
        grants.append((now, wanted.pop(who)))

    def stored(order: list[int], who: int) -> set[int]:
        """Those before it that have been granted, and only have to come for it."""
        granted = {waiter.waiter for waiter in pace._granted.values()}
        before = order[: order.index(who)]
        return {who} if all(name in granted for name in before) else set()

    for who, what, later, amount, signal in steps:
        now += later
        if what == "ask":
            if who not in wanted:
                wanted[who] = amount
                order.append(who)
            if pace.ask(now, who, wanted[who]) == 0.0:
                took(who)
        elif what == "leave":
            pace.leave(who)
            if who in wanted:
                order.remove(who)
                del wanted[who]
        else:
            if signal.tokens is not None:
                corrected += max(0.0, amount - signal.tokens)
            pace.report(now, signal, amount, now - later)

    if requests < inf:  # and of each waiter at most one grant may be stored
        assert len(grants) <= requests * now + max(1, 0.02 * requests) + 6
    if grants and tokens < inf:
        spent = sum(amount for _, amount in grants[:-1])
        assert spent <= tokens * now + 0.02 * tokens + corrected + 6 * 1000.0
    for _ in range(10_000):
        if not order:
            break
        waits = {}
        for who in tuple(order):
            waits[who] = pace.ask(now, who, wanted[who])
            if waits[who] == 0.0:
                took(who)
        now += min((wait for wait in waits.values() if wait), default=0.0)
    assert not order, "somebody waits for ever"


@given(st.lists(st.tuples(st.floats(0.0, 0.4), st.sampled_from([0.0, 1.0, 9.0, 300.0])), min_size=1, max_size=200))
def test_in_no_window_is_more_than_the_rate(steps: list[tuple[float, float]]) -> None:
    """Rate times span, and the burst; of tokens, but for the last request, which may leave a debt."""
    pace = Pace(20.0, 100.0)
    now, grants = 0.0, []
    for later, amount in steps:
        now += later
        if pace.ask(now, "waiter", amount) == 0.0:
            grants.append((now, amount))
    for start in range(len(grants)):
        for end in range(start, len(grants)):
            span = grants[end][0] - grants[start][0]
            assert end - start + 1 <= 20.0 * span + 1.0 + 1e-6
            spent = [amount for _, amount in grants[start : end + 1] if amount]
            assert sum(spent[:-1]) <= 100.0 * span + 2.0 + 1e-6


def test_threads_share_one_quota() -> None:
    """Each thread has its own waiter and hears of the same made-up time."""
    pace = Pace(1000.0)
    granted: list[int] = []
    clock = iter(range(10**9))

    def work(number: int) -> None:
        name = f"waiter {number}"
        granted.extend(number for _ in range(2000) if pace.ask(next(clock) / 10_000, name, 0.0) == 0.0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = 8000 / 10_000
    assert 0.8 * 1000 * seconds <= len(granted) <= 1000 * seconds + 21
    assert len(set(granted)) == 4, "none was starved"


# -- what headers tell -------------------------------------------------------------------------------------------------


def told(
    pace: Pace, now: float, requests: Quota | None = None, tokens: Quota | None = None, used: float | None = None
) -> None:
    pace.report(now, Signal(OK, None, used, Rates(requests, tokens)), 0.0, now - 0.1)


def test_nothing_left_is_a_pause() -> None:
    pace = Limit().pace("")
    told(pace, 10.0, Quota(limit=100, remaining=0, reset=5.0))
    assert pace.ask(10.0, "a", 0) == pytest.approx(5.0)
    pace.report(11.0, GOOD, 0.0, 9.0)
    told(pace, 11.5, Quota(limit=100, remaining=3, reset=5.0))
    assert pace.ask(12.0, "a", 0) == pytest.approx(3.0), "answers of what was in flight don't end it"
    assert pace.ask(15.0, "a", 0) == 0


def test_where_it_refills_a_pause_lasts_for_one_request() -> None:
    """Reset is when all of it is back: sixty seconds for sixty requests are one for the next."""
    pace = Limit().pace("")
    told(pace, 10.0, Quota(limit=60, remaining=0, reset=60.0, window=60, refills=True))
    assert pace.ask(10.0, "a", 0) == pytest.approx(1.0)
    pace = Limit().pace("")
    told(pace, 10.0, tokens=Quota(limit=6000, remaining=0, reset=60.0, window=60, refills=True), used=200.0)
    assert pace.ask(10.0, "a", 0) == pytest.approx(2.0)


def test_what_is_left_is_spread() -> None:
    pace = Limit().pace("")
    told(pace, 0.0, Quota(limit=100, remaining=50, reset=10.0, window=60))
    assert len(send(pace, 9.9)) == pytest.approx(min(50 / 10, 0.98 * 100 / 60) * 9.9, abs=2)
    pace = Limit().pace("")
    told(pace, 0.0, Quota(limit=None, remaining=20, reset=10.0))
    assert len(send(pace, 9.9)) == pytest.approx(20, abs=2)


def test_a_limit_seeds_the_pace() -> None:
    pace = Limit().pace("")
    told(pace, 0.0, Quota(limit=600, remaining=599, reset=0.1, window=60, refills=True))
    assert len(send(pace, 60.0, now=0.2)) == pytest.approx(588, abs=5)


def test_a_quota_of_hours_is_used_as_it_comes() -> None:
    pace = Limit().pace("")
    told(pace, 0.0, Quota(limit=5000, remaining=4000, reset=3000.0))
    assert all(pace.ask(0.0, number, 0) == 0 for number in range(1000))
    told(pace, 1.0, Quota(limit=5000, remaining=30, reset=3000.0))
    assert len(send(pace, 1000.0, now=1.0)) <= 13, "until little is left"
    daily = Limit().pace("")
    told(daily, 0.0, Quota(limit=200, remaining=199, reset=432.0, window=60, refills=True))
    assert all(daily.ask(0.0, number, 0) == 0 for number in range(100)), "a minute's isn't whole in seven minutes"


def test_told_tokens_hold_back_requests_by_what_they_used_of_late() -> None:
    pace = Limit().pace("")
    for step in range(50):
        told(pace, step / 10, tokens=Quota(6000, 5000, 10.0, 60, True), used=20.0)
    assert len(send(pace, 60.0, now=5.0)) == pytest.approx(0.98 * 100 / 20 * 60, rel=0.05)


def test_told_is_never_more_than_given() -> None:
    pace = Limit(per_second=1).pace("")
    told(pace, 0.0, Quota(limit=60_000, remaining=60_000, reset=1.0, window=60))
    assert len(send(pace, 60.0)) <= 61


# -- what refusals teach -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.3, 7.0, 3600.0])
def test_retry_after_is_heeded(seconds: float, given: bool) -> None:
    pace = Pace(10.0 if given else inf)
    assert pace.ask(100.0, "a", 0) == 0
    pace.report(100.1, Signal(THROTTLED, seconds), 0.0, 100.0)
    wait = pace.ask(100.1, "b", 0)
    assert wait >= seconds - 1e-9
    pace.report(100.2, GOOD, 0.0, 99.0)  # what was in flight comes back
    assert pace.ask(100.1 + 0.99 * seconds, "b", 0) >= 0.009 * seconds
    assert len(send(pace, 0.01, now=100.2 + seconds)) <= 1, "and there is no burst after it"


def test_without_retry_after_the_pause_doubles() -> None:
    """Half a second, one, two, …, up to a minute; a success begins anew."""
    pace, now, waits = Limit().pace(""), 0.0, []
    for step in range(100):
        assert pace.ask(now, step, 0) == 0
        now += 0.01
    for _ in range(9):
        assert pace.ask(now, "a", 0) == 0
        pace.report(now, NO, 0.0, now)
        waits.append(pace.ask(now, "a", 0))
        now += waits[-1]
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 16, 32, 60, 60])
    assert pace.ask(now, "a", 0) == 0
    pace.report(now + 1, GOOD, 0.0, now)
    assert pace.ask(now + 100, "a", 0) == 0
    pace.report(now + 100, NO, 0.0, now + 100)
    assert pace.ask(now + 100, "a", 0) < 2


def test_a_server_that_says_too_little_is_given_more() -> None:
    pace, now, waits = Limit().pace(""), 0.0, []
    for step in range(100):
        assert pace.ask(now, step, 0) == 0
        now += 0.01
    for _ in range(6):
        assert pace.ask(now, "a", 0) == 0
        pace.report(now, Signal(THROTTLED, 0.1), 0.0, now)
        waits.append(pace.ask(now, "a", 0))
        now += waits[-1]
    assert waits == pytest.approx([0.1, 0.1, 0.5, 1, 2, 4])


def test_one_cut_for_a_burst() -> None:
    """Fifty that were sent before the first refusal came back say no more than the first."""

    def rate_after(refused: int) -> float:
        pace = Limit().pace("")
        for step in range(1000):
            assert pace.ask(step / 100, step, 0) == 0
            pace.report(step / 100 + 0.1, GOOD, 0.0, step / 100)
        for number in range(refused):
            pace.report(10.1, Signal(THROTTLED, 1.0), 0.0, 10.0 - number / 1000)
        assert pace.ask(11.2, "next", 0) == 0
        return pace.rate

    assert rate_after(1) == pytest.approx(0.98 * 999 / 11.2, rel=0.02)
    assert rate_after(50) == pytest.approx(0.98 * 950 / 11.2, rel=0.02)


KINDS = ["fixed", "sliding", "bucket"]
MINUTES = 60.0


def quota(limit: Limit, kind: str, **how: Any) -> Client:
    client = Client(Quota429(kind, 600, **how), Search(most=128), limit.pace(""), lateness=0.001)
    simulate([client], 25 * MINUTES)
    return client


@pytest.mark.parametrize("says", [True, False], ids=["Retry-After", "no Retry-After"])
@pytest.mark.parametrize("tells", [True, False], ids=["headers", "no headers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quota_that_is_known_is_used_and_never_exceeded(kind: str, says: bool, tells: bool) -> None:
    client = quota(Limit(per_minute=600), kind, says=says, tells=tells)
    whole = client.outcome(0, 25 * MINUTES)
    assert whole.goodput >= 0.95 * 10
    assert whole.wasted == 0


@pytest.mark.parametrize("says", [True, False], ids=["Retry-After", "no Retry-After"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quota_that_is_learned_is_used(kind: str, says: bool) -> None:
    """Nothing is given or told: after the first burst, at least 90 %, and under 1 % of the requests are wasted."""
    client = quota(Limit(), kind, says=says)
    later = client.outcome(2 * MINUTES, 25 * MINUTES)
    assert later.goodput >= 0.9 * 10
    assert later.wasted < 0.005
    assert client.outcome(0, 2 * MINUTES).throttled < 200
    assert client.outcome(0, 25 * MINUTES).wasted < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_quota_that_is_told_is_used(kind: str) -> None:
    client = quota(Limit(), kind, tells=True)
    whole = client.outcome(0, 25 * MINUTES)
    assert whole.goodput >= 0.95 * 10
    assert whole.wasted == 0


@pytest.mark.parametrize("factor", [0.5, pytest.param(2, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_quota_is_followed(kind: str, factor: float) -> None:
    server = Quota429(kind, 600)
    client = Client(server, Search(most=128), Limit().pace(""))

    def step() -> None:
        server.quota = 600 * factor

    simulate([client], 30 * MINUTES, (10 * MINUTES, step))
    later = client.outcome(20 * MINUTES, 30 * MINUTES)
    assert later.goodput >= 0.9 * 10 * factor
    assert later.wasted < 0.01


def test_a_rate_that_has_held_is_cut_by_little() -> None:
    """The server asks for a minute's patience, which says nothing about its rate."""
    pace = Pace(10.0)
    now = 0.0
    for _ in range(1000):
        while wait := pace.ask(now, A):
            now += wait
        pace.report(now + 0.1, GOOD, 0.0, now)
    pace.report(now + 0.2, Signal(THROTTLED, 60.0), 0.0, now + 0.1)
    assert pace.ask(now + 61, A) == 0
    assert pace.rate == pytest.approx(0.95 * 9.9)


def test_a_rate_that_was_given_is_believed_at_the_start() -> None:
    """What was refused at once may have been sent evenly and have come together; again and again it is too much."""
    pace = Pace(100.0)
    now = 0.0
    rates = []
    for _ in range(4):
        for step in range(30):
            assert pace.ask(now + step / 90, A) == 0
        now += 30 / 90
        for number in range(30):
            signal = GOOD if number < 10 else Signal(THROTTLED, 1.0)
            pace.report(now, signal, 0.0, now - 0.01)
        now += 1.1
        assert pace.ask(now, A) == 0
        rates.append(pace.rate)
        now += 1.0
    assert rates[0] == pytest.approx(0.95 * 99)
    assert min(rates[:3]) > 0.9 * 99
    assert rates[3] < 40


@pytest.mark.parametrize("kind", ["fixed", "bucket"])
def test_a_rate_that_was_given_a_hundred_times_too_high(kind: str) -> None:
    client = Client(Quota429(kind, 60), Search(most=128), Limit(per_minute=6000).pace(""))
    simulate([client], 30 * MINUTES)
    later = client.outcome(5 * MINUTES, 30 * MINUTES)
    assert later.goodput >= 0.9
    assert later.wasted < 0.01


def test_a_server_that_refuses_at_first_doesnt_ruin_the_rate() -> None:
    """It refuses all for a minute, whatever is sent, and then lets ten a second through."""
    server = Quota429("fixed", 0)
    client = Client(server, Search(most=128), Limit().pace(""))
    simulate([client], 10 * MINUTES, (MINUTES, lambda: setattr(server, "quota", 600)))
    assert client.outcome(3 * MINUTES, 10 * MINUTES).goodput >= 0.9 * 10


@pytest.mark.parametrize("kind", KINDS)
def test_slow_answers_and_a_quota(kind: str) -> None:
    """A language model's: ten seconds each, so that a hundred are in progress."""
    server = Quota429(kind, 600, seconds=around(10.0, 1, 0.3))
    client = Client(server, Search(most=512), Limit().pace(""))
    simulate([client], 30 * MINUTES)
    later = client.outcome(20 * MINUTES, 30 * MINUTES)
    assert later.goodput >= 0.9 * 10
    assert later.wasted < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_a_second(kind: str) -> None:
    """Counted by the second, with timers a millisecond late."""
    server = Quota429(kind, 500, window=1.0, seconds=around(0.05, 1, 0.3), offset=0.37)
    client = Client(server, Search(most=512), Limit(per_second=500).pace(""), lateness=0.0015)
    simulate([client], 60)
    whole = client.outcome(2, 60)
    assert whole.goodput >= 0.9 * 500
    assert whole.wasted < 0.01


def test_mixed_hosts_keep_to_their_own_quotas() -> None:
    limit = Limit(per_host=True)
    quotas = {"a": 600, "b": 60, "c": 3000}
    clients = {
        host: Client(Quota429("fixed", quota), Search(most=128), limit.pace(host)) for host, quota in quotas.items()
    }
    free = Client(Queue(32, around(0.5, 1)), Search(most=128), limit.pace("free"))
    simulate([*clients.values(), free], 8 * MINUTES)
    for host, client in clients.items():
        later = client.outcome(3 * MINUTES, 8 * MINUTES)
        assert later.goodput >= 0.9 * quotas[host] / 60, host
        assert later.wasted < 0.01, host
    assert free.outcome(1 * MINUTES, 8 * MINUTES).goodput >= 0.9 * 64


def test_two_stages_share_a_quota_fairly() -> None:
    pace = Limit(per_minute=600).pace("")
    clients = [Client(Queue(1000, around(0.2, number)), Fixed(50), pace) for number in range(2)]
    simulate(clients, 60)
    shares = [client.outcome(0, 60).good for client in clients]
    assert sum(shares) <= 600
    assert min(shares) >= 0.45 * sum(shares)


def test_a_slow_source_doesnt_raise_the_pace() -> None:
    """A rate that nothing pressed against has not been tried: later it would come as a burst of refusals."""
    pace = Limit().pace("")
    client = Client(Quota429("bucket", 600), Search(most=128), pace)

    def slower() -> None:
        client.arrivals, client.waiting = 1.0, 0
        client.arrive()

    simulate([client], 30 * MINUTES, (5 * MINUTES, slower))
    assert client.outcome(6 * MINUTES, 30 * MINUTES).goodput == pytest.approx(1.0, rel=0.02)
    assert pace.rate < 15


# -- patience, and clocks ----------------------------------------------------------------------------------------------


def test_ten_minutes_of_refusals_are_hopeless() -> None:
    pace, now = Limit().pace(""), 0.0
    assert not pace.hopeless(0.0)
    while now < 2 * PATIENCE:
        now += pace.ask(now, "a", 0)
        if pace.ask(now, "a", 0) == 0:
            pace.report(now, NO, 0.0, now)
        assert pace.hopeless(now) == (now >= PATIENCE)
    pace.forgive(now)
    assert not pace.hopeless(now)
    pace.report(now, GOOD, 0.0, now)
    assert not pace.hopeless(now + PATIENCE)


def test_being_told_to_wait_for_longer_is_hopeless_too() -> None:
    pace = Limit().pace("")
    pace.report(0.0, Signal(THROTTLED, 3600.0), 0.0, 0.0)
    assert not pace.hopeless(PATIENCE - 1)
    assert pace.hopeless(PATIENCE)
    pace.forgive(PATIENCE)
    assert not pace.hopeless(2 * PATIENCE - 1)
    assert pace.hopeless(2 * PATIENCE), "what comes later has the same patience"


@pytest.mark.parametrize("said", [None, 300.0])
def test_one_success_gives_new_patience(said: float | None) -> None:
    pace = Limit().pace("")
    for now in range(0, 1190, 10):
        pace.report(now, Signal(THROTTLED, said), 0.0, now)
        assert not pace.hopeless(now)
        if now == 590:
            pace.report(now, GOOD, 0.0, 0.0)
    pace.report(1200, Signal(THROTTLED, said), 0.0, 1200)
    assert pace.hopeless(1200)


def test_an_idle_hour_is_not_spent_patience() -> None:
    pace = Limit().pace("")
    pace.report(0.0, NO, 0.0, 0.0)
    pace.report(3600.0, NO, 0.0, 3599.0)
    assert not pace.hopeless(3600.0)


def test_a_refusal_long_ago_and_slow_answers_are_not_hopeless() -> None:
    pace = Limit().pace("")
    pace.report(0.0, NO, 0.0, 0.0)
    for now in range(1, 900, 10):
        assert pace.ask(float(now), "a", 0) == 0
        assert not pace.hopeless(now)


def test_the_clock_may_start_anew() -> None:
    """The virtual clock begins at 0 in each run. What was stamped is forgotten; what was learned isn't."""
    pace = Limit().pace("")
    for step in range(1000):
        assert pace.ask(5000 + step / 100, step, 0) == 0
    pace.report(5010.0, Signal(THROTTLED, 1000.0), 0.0, 5009.0)
    assert pace.ask(5010.0, "old", 0) == pytest.approx(1000.0)
    assert pace.ask(0.0, "new", 0) == 0, "no pause, and nobody before it"
    assert pace.ask(0.0, "old", 0) == 0
    given = Pace(1.0)
    assert given.ask(5000.0, "a", 0) == 0
    assert given.ask(5000.0, "b", 0) > 0
    assert given.ask(0.0, "c", 0) == 0
    assert given.ask(0.0, "b", 0) == pytest.approx(1.01, abs=0.01)


def test_reports_a_little_out_of_order_are_taken_as_they_are() -> None:
    pace = Pace(1.0)
    assert pace.ask(10.0, "a", 0) == 0
    pace.report(9.9, GOOD, 0.0, 9.0)
    assert pace.ask(9.95, "b", 0) == pytest.approx(1.01, abs=0.01)


def test_intervals_are_even() -> None:
    gaps = [after - before for before, after in pairwise(send(Pace(10.0), 30))]
    assert max(gaps[1:]) - min(gaps[1:]) < 1e-6
