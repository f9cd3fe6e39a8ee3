"""The search for the best concurrency, against simulated servers. All on the virtual clock, so all the same each time.

Times are in round trips: what one request takes from a server with nothing else to do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.flow.servers import (
    Client,
    Fixed,
    Outcome,
    Queue,
    Refusing,
    Server,
    Thrashing,
    around,
    heavy_tail,
    simulate,
)

from penstock.flow.search import Search
from penstock.flow.signals import OK, OVERLOADED, THROTTLED, UNKNOWN

SERVERS: dict[str, tuple[Callable[[], Server], float, float]] = {  # server, its most a second, seconds a round trip
    "queue": (lambda: Queue(32, lambda: 0.5), 64, 0.5),
    "queue, uneven": (lambda: Queue(32, around(0.5, 1)), 64, 0.5),
    "heavy tail": (lambda: Queue(32, heavy_tail(5, 3)), 6.4, 5),
    "heavy tail, other draws": (lambda: Queue(32, heavy_tail(5, 4)), 6.4, 5),
    "thrashing past 32": (lambda: Thrashing(32, 0.5), 64, 0.5),
    "one at a time": (lambda: Queue(1, around(1, 1)), 1, 1),
    "very wide": (lambda: Queue(600, around(1, 1)), 600, 1),
    "refuses past 48": (lambda: Refusing(32, around(0.5, 1), 48), 64, 0.5),
    "one in fifty fails": (lambda: Refusing(32, around(0.5, 1), failing=0.02), 64, 0.5),
}
KNEE = {"one at a time": 1, "very wide": 600}
every_server = pytest.mark.parametrize("name", SERVERS)


def run(server: Server, search: Search | Fixed, seconds: float, *events: tuple[float, Callable[[], None]]) -> Client:
    client = Client(server, search)
    simulate([client], seconds, *events)
    return client


@every_server
def test_the_optimum_is_found_and_kept(name: str) -> None:
    make, most, trip = SERVERS[name]
    after = 400 if name == "one at a time" else 50  # with 16 in line for one, a look takes 16 times as long
    until = after + (80 if name == "very wide" else 250)  # as many requests as the others make
    client = run(make(), Search(most=1024), until * trip)
    found = client.outcome(after * trip, until * trip)
    assert found.goodput >= 0.9 * most
    knee = run(make(), Fixed(KNEE.get(name, 32)), 100 * trip).outcome(10 * trip, 100 * trip)
    assert found.latency <= 2 * knee.latency


@every_server
def test_it_begins_well(name: str) -> None:
    """In the first fifty round trips, most of what could be done is done, but where 600 at once would be best."""
    make, most, trip = SERVERS[name]
    begun = run(make(), Search(most=1024), 50 * trip).outcome(0, 50 * trip)
    assert begun.goodput >= (0.5 if name == "very wide" else 0.7) * most


def test_from_one() -> None:
    client = run(Queue(32, around(0.5, 1)), Search(most=1024, start=1), 100)
    assert client.outcome(50, 100).goodput >= 0.9 * 64


@pytest.mark.parametrize("factor", [0.5, 2, pytest.param(4, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["uneven", "heavy tail"])
def test_a_step_of_the_capacity_is_followed(kind: str, factor: float) -> None:
    """Within a hundred round trips it has found the new optimum, whether there is more or less of it."""
    trip = 0.5 if kind == "uneven" else 5.0
    server = Queue(32, around(trip, 1) if kind == "uneven" else heavy_tail(trip, 3))

    def step() -> None:
        server.slots = int(32 * factor)

    client = run(server, Search(most=1024), 500 * trip, (200 * trip, step))
    most = 32 / trip
    assert client.outcome(100 * trip, 200 * trip).goodput >= 0.9 * most
    assert client.outcome(300 * trip, 500 * trip).goodput >= 0.9 * most * factor
    knee = run(Queue(server.slots, server.service), Fixed(server.slots), 100 * trip).outcome(10 * trip, 100 * trip)
    assert client.outcome(300 * trip, 500 * trip).latency <= 2 * knee.latency


def test_mixed_hosts() -> None:
    """Each host has a search of its own, and none is drawn to what is right for another."""
    several = [name for name in SERVERS if name != "very wide"]  # which by itself makes more requests than all others
    clients = {name: Client(SERVERS[name][0](), Search(most=1024)) for name in several}
    simulate(list(clients.values()), 300)
    for name, client in clients.items():
        most, trip = SERVERS[name][1:]
        assert client.outcome(50 * trip, 300).goodput >= 0.85 * most, name


# -- when nothing is to be learned -------------------------------------------------------------------------------------


def test_a_slow_source_teaches_nothing() -> None:
    """Five items a second need three at once; the limit stays where it is, and doesn't shrink or grow."""
    search = Search(most=1024)
    client = Client(Queue(32, around(0.5, 1)), search, arrivals=5)
    simulate([client], 500)
    assert search.limit == 16
    assert {limit for _, limit in client.limits} == {16}


def test_a_source_that_goes_slow_and_fast() -> None:
    search = Search(most=1024)
    client = Client(Queue(32, around(0.5, 1)), search, arrivals=200)

    def slower() -> None:
        client.arrivals, client.waiting = 5, 0

    def faster() -> None:
        client.arrivals = 200

    simulate([client], 400, (100, slower), (300, faster))
    kept = {limit for at, limit in client.limits if 110 < at <= 300}
    assert len(kept) <= 1, "only a look that had begun was given up"
    assert client.outcome(310, 400).goodput >= 0.9 * 64


def test_unknown_failures_are_no_goodput() -> None:
    """A server that fails fast past 32 looks fast, and isn't."""

    class Failing(Thrashing):
        def answer(self, done: Callable[[object], None]) -> None:  # type: ignore[override]
            crowded = self.busy > 40
            self.busy -= 1
            done(UNKNOWN_SIGNAL if crowded else GOOD)

    from penstock.flow.signals import Signal

    GOOD, UNKNOWN_SIGNAL = Signal(OK), Signal(UNKNOWN)
    client = run(Failing(10_000, 0.5), Search(most=1024), 200)
    assert client.outcome(50, 200).goodput >= 0.9 * 64


# -- overload ----------------------------------------------------------------------------------------------------------


def feed(search: Search, kinds: list[int], now: float = 100.0, began: float = 99.0) -> None:
    for kind in kinds:
        search.ended(now, began, kind, True)


def test_one_cut_for_a_burst() -> None:
    search = Search(most=1024, start=100)
    feed(search, [OVERLOADED] * 100)
    assert search.limit == 70
    feed(search, [OVERLOADED] * 100, now=101.0, began=99.5)  # were sent before the cut
    assert search.limit == 70
    feed(search, [OVERLOADED] * 100, now=102.0, began=101.0)
    assert search.limit == 49


def test_a_stray_reset_is_no_overload() -> None:
    search = Search(most=1024, start=100)
    feed(search, [OVERLOADED, *[OK] * 19] * 4)
    assert search.limit == 100


def test_throttled_is_not_overload_and_not_goodput() -> None:
    search = Search(most=1024, start=16)
    for step in range(2000):
        search.ended(step / 32, step / 32 - 0.5, THROTTLED, True)
    assert search.limit <= 16


def test_a_dead_server_and_its_return() -> None:
    server = Refusing(32, around(0.5, 1))
    search = Search(most=1024)

    def die() -> None:
        server.most = 0

    def live() -> None:
        server.most = float("inf")

    client = Client(server, search)
    simulate([client], 200, (50, die), (100, live))
    assert client.outcome(60, 100).good == 0
    assert min(limit for at, limit in client.limits if at < 100) == 1
    assert client.outcome(100, 115).goodput >= 0.5 * 64
    assert client.outcome(120, 200).goodput >= 0.9 * 64


def test_trouble_is_remembered() -> None:
    """A server that refuses past 48 isn't pushed past it again and again: under one refusal in a hundred."""
    client = run(Refusing(32, around(0.5, 1), 48), Search(most=1024), 200)
    late = [kind for _, ended, kind in client.ended if ended > 50]
    assert late.count(OVERLOADED) / len(late) < 0.01


# -- bounds and clocks -------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 200),
    st.integers(1, 300),
    st.lists(
        st.tuples(
            st.floats(-5, 5), st.floats(0, 3), st.sampled_from([OK, OVERLOADED, THROTTLED, UNKNOWN]), st.booleans()
        )
    ),
)
def test_the_limit_stays_in_its_bounds(most: int, start: int, outcomes: list[tuple[float, float, int, bool]]) -> None:
    """Whatever comes, also with a clock that jumps back and forth."""
    search = Search(most=most, start=start)
    now = 0.0
    for step, took, kind, saturated in outcomes * 20:
        now += step
        search.ended(now, now - took, kind, saturated)
        assert 1 <= search.limit <= most


def test_the_clock_may_start_anew() -> None:
    """A second run starts at 0 again, and goes on with what was found."""
    search = Search(most=1024)
    run(Queue(32, around(0.5, 1)), search, 100)
    found = search.limit
    assert 24 <= found <= 64
    again = run(Queue(128, around(0.5, 2)), search, 100)
    assert again.limits[0][1] == found
    assert again.outcome(50, 100).goodput >= 0.9 * 256


def test_outcomes_are_counted_as_they_say() -> None:
    """The measure of these tests itself."""
    outcome = Outcome([(0, 1, OK), (0, 2, OK), (0, 3, THROTTLED), (0, 9, OK)], 1, 5)
    assert (outcome.good, outcome.throttled, outcome.goodput, outcome.wasted) == (1, 1, 0.25, 0.5)
