"""Functions as sinks: called with each output once, in order; what they raise goes by ``on_error``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import penstock as ps
from penstock.errors import PlanError
from penstock.testing import run_virtual


class Sinks:
    """A function in each form a sink may have; it refuses multiples of four."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def plain(self, value: int) -> None:
        self.calls.append(value)
        if value % 4 == 0:
            raise ValueError(f"not {value}")

    async def coroutine(self, value: int) -> None:
        await asyncio.sleep(1)
        self.plain(value)

    def awaitable(self, value: int) -> Awaitable[None]:
        return self.coroutine(value)

    def sometimes(self, value: int) -> Awaitable[None] | None:
        return self.coroutine(value) if value % 2 else self.plain(value)  # type: ignore[func-returns-value]


FORMS = ["plain", "coroutine", "awaitable", "sometimes"]


@pytest.mark.parametrize("form", FORMS)
def test_a_function_is_called_once_with_each_output_in_order(form: str) -> None:
    sinks = Sinks()
    flow = ps.Flow(range(1, 200)).filter(lambda x: x % 4 != 0)
    report = run_virtual(flow.to(getattr(sinks, form)).run(progress=False))
    assert sinks.calls == [x for x in range(1, 200) if x % 4]
    assert report.delivered == len(sinks.calls)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_function_raises_is_raised_with_the_item_named(form: str) -> None:
    sinks = Sinks()
    with pytest.raises(ValueError, match="not 4") as raised:
        run_virtual(ps.Flow(range(1, 20)).to(getattr(sinks, form)).run(progress=False))
    assert raised.value.__notes__ == ["at stage 'to', item 3: 4"]
    assert sinks.calls == [1, 2, 3, 4]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_function_refuses_can_be_skipped(form: str) -> None:
    sinks = Sinks()
    report = run_virtual(ps.Flow(range(20)).to(getattr(sinks, form), on_error="skip").run(progress=False))
    assert sinks.calls == list(range(20))
    assert (report.delivered, report.skipped, report.in_flight) == (15, 5, 0)
    assert [(group.stage, group.kind, group.count, group.example) for group in report.errors] == [
        ("to", "ValueError", 5, "not 0")
    ]


def test_of_an_expansion_only_the_refused_output_is_missing() -> None:
    sinks = Sinks()
    flow = ps.Flow([1, 2, 5]).flat_map(lambda x: [x, 2 * x, x])
    report = run_virtual(flow.to(sinks.plain, on_error="skip").run(progress=False))
    assert sinks.calls == [1, 2, 1, 2, 4, 2, 5, 10, 5]
    assert (report.delivered, report.skipped) == (3, 0)


def test_a_plain_function_runs_in_a_thread_and_a_coroutine_on_the_loop() -> None:
    seen: list[int] = []

    async def coroutine(value: int) -> None:
        seen.append(threading.get_ident())

    async def main() -> None:
        await ps.Flow([1]).to(lambda value: seen.append(threading.get_ident())).run(progress=False)
        await ps.Flow([1]).to(coroutine).run(progress=False)

    asyncio.run(main())
    assert seen[0] != threading.get_ident() == seen[1]


@pytest.mark.parametrize(
    ("target", "said"),
    [("out.xyz", "suffix"), (5, "is no sink"), (None, "NoneType"), (object(), "object")],
)
def test_what_is_no_sink_is_refused_by_name(target: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        ps.Flow([1]).to(target)


def test_a_function_without_a_name_has_an_identity() -> None:
    class Keep:
        def __call__(self, value: int) -> None:
            """Anything."""

    target: Callable[[int], None] = Keep()
    assert ps.Flow([1]).to(target).explain().count("Keep") >= 1


@pytest.mark.parametrize("form", ["plain", "coroutine"])
def test_a_job_into_a_function_can_be_run_again(form: str) -> None:
    sinks = Sinks()
    job = ps.Flow([1, 2]).to(getattr(sinks, form))
    assert run_virtual(job.run(progress=False)).delivered == 2
    assert run_virtual(job.run(progress=False)).delivered == 2
    assert sinks.calls == [1, 2, 1, 2]


def test_a_run_after_one_that_failed_hands_over_every_output() -> None:
    seen: list[int] = []
    fails = True

    async def sink(x: int) -> None:
        if fails and x == 3:
            raise ValueError("once")
        seen.append(x)

    job = ps.Flow([1, 2, 3, 4]).to(sink)
    with pytest.raises(ValueError, match="once"):
        run_virtual(job.run(progress=False))
    fails = False
    assert run_virtual(job.run(progress=False)).delivered == 4
    assert seen == [1, 2, 1, 2, 3, 4]
