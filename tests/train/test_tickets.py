"""Tickets and leases: the bound holds at every start, and somebody can always go on."""

from __future__ import annotations

import asyncio
import random
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock as ps
from penstock.errors import PlanError
from penstock.place.base import DIED, FAILED, OK, Chain, Step, Task
from penstock.place.loop import LoopPool
from penstock.testing import run_virtual
from penstock.train.consistency import Consistency
from penstock.train.lease import Lease
from penstock.train.tickets import Tickets

CONSISTENCIES = [ps.ASP(), ps.SSP(1), ps.SSP(3), ps.BSP()]


def holds(consistency: Consistency, ticket: int, out: list[int], applied: int, workers: int) -> bool:
    """The rule, as it is written down: ``out`` are the tickets that are out, this one among them."""
    if len(out) > workers:
        return False
    if isinstance(consistency, ps.SSP):
        return ticket - min(out) <= consistency.s * workers
    if isinstance(consistency, ps.BSP):
        return ticket // workers == applied // workers
    return True


@given(
    consistency=st.sampled_from(CONSISTENCIES),
    workers=st.integers(1, 5),
    actions=st.lists(st.tuples(st.sampled_from(["start", "ready", "void"]), st.integers(0, 99)), max_size=120),
)
def test_the_bound_holds_at_every_start_and_somebody_can_always_go_on(
    consistency: Consistency, workers: int, actions: list[tuple[str, int]]
) -> None:
    tickets = Tickets(consistency, workers)
    running: list[int] = []
    ready: list[int] = []  # computed; in rounds they wait for those before them
    applied = 0
    for action, at in actions:
        if action == "start" and tickets.may_start():
            ticket = tickets.start()
            assert ticket not in running
            running.append(ticket)
            assert holds(consistency, ticket, [*running, *ready], applied, workers)
        elif action != "start" and running:
            ticket = running.pop(0 if at % 8 == 0 else -1)  # mostly the newest, so that old ones stay out for long
            if action == "void":
                tickets.void(ticket)
            else:
                ready.append(ticket)
        if consistency.in_rounds:
            if len(ready) == workers:
                applied += workers
                tickets.applied(sorted(ready))
                ready.clear()
        else:
            applied += len(ready)
            tickets.applied(ready)
            ready.clear()
        assert sorted(tickets.out) == sorted([*running, *ready])
        assert running or tickets.may_start()


@pytest.mark.parametrize("s", [1, 3])
@pytest.mark.parametrize("workers", [2, 8])
def test_one_that_is_held_lets_just_so_many_pass(s: int, workers: int) -> None:
    tickets = Tickets(ps.SSP(s), workers)
    held = tickets.start()
    passed = 0
    while tickets.may_start():
        tickets.applied([tickets.start()])
        passed += 1
    assert (held, passed) == (0, s * workers)
    tickets.applied([held])
    assert tickets.may_start()


def test_a_void_ticket_is_given_again_in_rounds_only() -> None:
    for consistency, following in ((ps.BSP(), 0), (ps.ASP(), 2)):
        tickets = Tickets(consistency, 2)
        assert [tickets.start(), tickets.start()] == [0, 1]
        tickets.void(0)
        assert tickets.start() == following


class Back:
    """What the gradient would be: the pool writes its ticket on it."""

    ticket = -1

    def __init__(self, number: int) -> None:
        self.number = number


class Mortal(LoopPool):
    """A loop whose tasks may be reported as having died, as those of a process are."""

    deaths: ClassVar[dict[int, int]]

    def submit(self, tasks: Any) -> None:
        dying = [task for task in tasks if self.deaths.get(task.value, 0)]
        for task in dying:
            self.deaths[task.value] -= 1
            task.outcome, task.error = DIED, -9
        if dying:
            asyncio.get_running_loop().call_soon(self.done, dying)
        super().submit([task for task in tasks if task not in dying])


@given(
    consistency=st.sampled_from(CONSISTENCIES),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    count=st.integers(1, 40),
)
def test_the_dead_start_again_under_their_ticket(consistency: Consistency, workers: int, seed: int, count: int) -> None:
    draw = random.Random(seed)
    deadly = {number: draw.choice([0, 0, 0, 1, 3, 99]) for number in range(count)}
    failing = {number for number in range(count) if draw.random() < 0.1}
    waits = [draw.choice([0, 1, 5]) for _ in range(count)]

    async def work(number: int) -> Back:
        await asyncio.sleep(waits[number])
        if number in failing:
            raise ValueError
        return Back(number)

    async def main() -> None:
        tickets = Tickets(consistency, workers)
        back: dict[int, Task] = {}
        rounds: list[int] = []
        over = asyncio.get_running_loop().create_future()

        def done(tasks: list[Task]) -> None:
            for task in tasks:
                assert task.origin not in back
                back[task.origin] = task
                if task.outcome == OK:
                    assert task.value.ticket in tickets.out
                    rounds.append(task.value.ticket)
            most = workers if consistency.in_rounds else 1
            while len(rounds) >= most:
                tickets.applied([rounds.pop(0) for _ in range(most)])
            if len(back) == count:
                over.set_result(None)

        class Pool(Mortal):
            deaths: ClassVar[dict[int, int]] = dict(deadly)

        chain = Chain("work", (Step("work", work),))
        pool = Lease(chain, workers, tickets=tickets, inner=Pool, done=done, failed=over.set_exception)
        await pool.open()
        pool.submit([Task(number, number) for number in range(count)])
        await asyncio.wait([over], timeout=1000)
        for number, task in back.items():
            if deadly[number] > 5:
                assert task.outcome == DIED
            else:
                assert task.outcome == (FAILED if number in failing else OK)
        assert over.done() == (len(back) == count)
        assert len(back) == count
        await pool.abort()

    run_virtual(main())


@pytest.mark.parametrize("s", [0, -1, True, 1.5, None])
def test_an_odd_bound_is_refused(s: Any) -> None:
    with pytest.raises(PlanError, match=r"SSP\(s="):
        ps.SSP(s)


def test_what_is_too_stale_is_dropped_by_ssp_too() -> None:
    assert ps.SSP(2, drop=3).drops(4)
    assert ps.SSP(2, scale=True).damping(2) == 0.5
    assert not ps.BSP().drops(1000)
    assert ps.BSP().damping(7) == 1.0
