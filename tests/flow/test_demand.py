"""The bound on what is ahead: it follows what was taken in the last few milliseconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.flow.demand import HORIZON, Demand


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_it_starts_at_the_least_and_stays_there_for_a_slow_consumer() -> None:
    clock = Clock()
    demand = Demand(clock, 16, 1024)
    for _ in range(100):
        clock.now += 1.5 * HORIZON
        assert demand.note(1) == 16


def test_it_doubles_while_all_of_it_is_taken_in_time_up_to_the_most() -> None:
    clock = Clock()
    demand = Demand(clock, 16, 100)
    sizes = []
    for _ in range(5):
        clock.now += HORIZON / 2
        sizes.append(demand.note(demand.size))
    assert sizes == [32, 64, 100, 100, 100]


def test_it_halves_where_less_than_half_of_it_was_taken() -> None:
    clock = Clock()
    demand = Demand(clock, 4, 1024)
    for _ in range(10):
        demand.note(demand.size)
    sizes = []
    while demand.size > 4:
        clock.now += 1.5 * HORIZON
        sizes.append(demand.note(1))
    assert sizes == [512, 256, 128, 64, 32, 16, 8, 4]


def test_a_least_that_grew_holds_at_once_where_the_bound_is_looked_at() -> None:
    clock = Clock()
    demand = Demand(clock, 4, 1024)
    demand.least = 300
    clock.now += 1.5 * HORIZON
    assert demand.note(0) == 300


@given(
    steps=st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 1)), max_size=50),
    least=st.integers(1, 50),
    most=st.integers(50, 3000),
)
def test_it_stays_within_its_bounds(steps: list[tuple[int, float]], least: int, most: int) -> None:
    clock = Clock()
    demand = Demand(clock, least, most)
    for taken, seconds in steps:
        clock.now += seconds
        assert least <= demand.note(taken) <= most


def test_what_keeps_the_workers_busy_is_asked_for_at_once() -> None:
    demand = Demand(lambda: 0.0, 32, 1000)
    demand.least = 232
    assert demand.note(0) == 232
