"""Law 8: errors are loud. The original exception, noted; the rest is over first; skipping and keeping are chosen."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from tests.flow.random_flows import Built, Case, carry_out, cases, check, expect
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.testing import run_virtual


class Broken(Exception):
    """A user's own exception, which takes no message."""

    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__()
        self.code = code
        self.hint = hint


@settings(max_examples=60)
@given(case=cases(takes=False).filter(lambda case: expect(case).errors))
def test_law_errors_of_random_flows(case: Case) -> None:
    built = Built(case)
    check(case, built, run_virtual(carry_out(built)))


ERROR = Broken(7, hint="mend it")


def fail_plainly(x: int) -> int:
    if x == 3:
        raise ERROR
    return x


async def fail(x: int) -> int:
    return fail_plainly(x)


def fail_whole(x: int) -> list[int]:
    return [fail_plainly(x)]


async def fail_one_by_one(x: int) -> AsyncIterator[int]:
    yield fail_plainly(x)


def fail_batch(xs: list[int]) -> list[int]:
    return [fail_plainly(x) for x in xs]


STAGES: dict[str, Any] = {
    "map on the loop": lambda flow: flow.map(fail, name="s"),
    "map in threads": lambda flow: flow.map(fail_plainly, name="s"),
    "unordered": lambda flow: flow.map(fail, name="s", ordered=False),
    "keyed": lambda flow: flow.map(fail, name="s", key=lambda x: x % 2),
    "filter": lambda flow: flow.filter(fail_plainly, name="s"),
    "flat_map": lambda flow: flow.flat_map(fail_whole, name="s"),
    "one by one": lambda flow: flow.flat_map(fail_one_by_one, whole=False, name="s"),
    "map_batches": lambda flow: flow.map_batches(fail_batch, batch_size=4, name="s"),
    "second of two": lambda flow: flow.map(lambda x: x).map(fail_plainly, name="s"),
    "key": lambda flow: flow.map(lambda x: x, key=fail_plainly, name="s"),
}


@pytest.mark.parametrize("shape", STAGES)
@pytest.mark.parametrize("how", ["collect", "async for", "run", "inline", "for"])
def test_law_errors_the_original_comes_out_with_notes(shape: str, how: str) -> None:
    flow = STAGES[shape](ps.Flow(range(10)))
    before = len(getattr(ERROR, "__notes__", []))

    async def iterate() -> None:
        async for _ in flow:
            pass

    def iterate_blocking() -> None:
        for _ in flow:
            pass

    with pytest.raises(Broken) as raised:
        if how == "collect":
            asyncio.run(flow.collect())
        elif how == "async for":
            asyncio.run(iterate())
        elif how == "for":
            iterate_blocking()
        else:
            asyncio.run(flow.to(lambda x: None).run(progress=False, inline=how == "inline"))
    assert raised.value is ERROR
    assert ERROR.__notes__[before:] == ["at stage 's', item 3: 3"]


def test_law_errors_in_a_process_bring_the_remote_traceback() -> None:
    def work(x: int) -> int:
        if x == 3:
            raise KeyError("deep down")
        return x

    with pytest.raises(KeyError, match="deep down") as raised:
        asyncio.run(ps.Flow(range(10)).map(work, place="process", workers=1).collect())
    notes = "\n".join(raised.value.__notes__)
    assert "at stage 'work', item 3: 3" in notes
    assert 'raise KeyError("deep down")' in notes


def test_law_errors_say_how_often_it_was_tried() -> None:
    with pytest.raises(ValueError) as raised:
        run_virtual(ps.Flow([1]).map(always_wrong, retry=2).collect())
    assert raised.value.__notes__ == ["at stage 'always_wrong', item 0, tried 3 times: 1"]


async def always_wrong(x: Any) -> Any:
    raise ValueError(f"wrong: {x}")


def test_law_errors_of_the_source_come_out_as_themselves() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ERROR

    async def source_async() -> AsyncIterator[int]:
        yield 1
        raise ERROR

    for items in (source(), source_async()):
        with pytest.raises(Broken) as raised:
            asyncio.run(ps.Flow(items).map(str).collect())
        assert raised.value is ERROR


def test_law_errors_of_the_sink_come_out_as_themselves() -> None:
    def sink(x: int) -> None:
        if x == 3:
            raise ERROR

    with pytest.raises(Broken) as raised:
        asyncio.run(ps.Flow(range(10)).to(sink).run(progress=False))
    assert raised.value is ERROR


@pytest.mark.parametrize("place", ["loop", "thread", "process"])
def test_law_errors_of_a_constructor_come_out_as_themselves_before_anything_is_read(place: Any) -> None:
    class Model:
        def __init__(self) -> None:
            raise FileNotFoundError("no weights")

        def __call__(self, x: int) -> int:
            return x

    read: list[int] = []

    def source() -> Iterator[int]:
        read.append(1)
        yield 1

    recorder = Recorder()
    with pytest.raises(FileNotFoundError, match="no weights"):
        asyncio.run(ps.Flow(source()).map(ps.per_worker(Model), place=place).to(recorder).run(progress=False))
    assert not read
    assert not recorder.outputs
    assert not recorder.is_open


def test_law_errors_threads_have_ended_when_it_is_raised() -> None:
    go = threading.Event()

    def work(x: int) -> int:
        if x == 1:
            raise ERROR
        go.wait(10)
        return x

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.1, go.set)
        with pytest.raises(Broken):
            await ps.Flow(range(100)).map(work, workers=2).collect()
        assert go.is_set()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("penstock-work")]

    asyncio.run(main())


def test_law_errors_no_group_for_two_at_once() -> None:
    async def work(x: int) -> int:
        await asyncio.sleep(1)
        raise ValueError(x)

    with pytest.raises(ValueError) as raised:
        run_virtual(ps.Flow(range(10)).map(work, concurrency=10).collect())
    assert not isinstance(raised.value, BaseExceptionGroup)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_law_errors_what_is_no_exception_is_raised_whatever_on_error_says(error: type[BaseException]) -> None:
    def work(x: int) -> int:
        raise error

    with pytest.raises(error):
        asyncio.run(ps.Flow(range(3)).map(work, on_error="skip", retry=2).collect())


def test_law_errors_none_is_a_value() -> None:
    def nothing(x: Any) -> None:
        return None

    async def nothing_async(x: Any) -> None:
        return None

    flow = ps.Flow([None, 1, None])
    assert asyncio.run(flow.collect()) == [None, 1, None]
    assert asyncio.run(flow.map(nothing).map(nothing_async).collect()) == [None] * 3
    assert asyncio.run(flow.map_batches(lambda xs: [None for _ in xs], batch_size=2).collect()) == [None] * 3
    assert asyncio.run(flow.flat_map(lambda x: [x, x]).collect()) == [None, None, 1, 1, None, None]
    assert asyncio.run(flow.batch(2).unbatch().filter(lambda x: x is None).collect()) == [None, None]
    recorder = Recorder()
    assert asyncio.run(flow.map(nothing).to(recorder).run(progress=False)).delivered == 3
    assert recorder.outputs == [None] * 3

    async def main() -> None:
        async with ps.Flow().map(nothing).open() as call:
            assert await call(None) is None

    asyncio.run(main())


def test_law_errors_the_four_forms() -> None:
    def half(x: int) -> float:
        return 6 / x

    items = [1, 0, 2]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(ps.Flow(items).map(half).collect())
    assert asyncio.run(ps.Flow(items).map(half, on_error="skip").collect()) == [6, 3]
    one, kept, two = asyncio.run(ps.Flow(items).map(half, on_error="keep").collect())
    assert (one, two) == (6, 3)
    assert kept == ps.Failed(0, ("", 1), "half", "ZeroDivisionError", "division by zero", 1)
    recorder = Recorder()
    asyncio.run(ps.Flow(items).map(half, on_error="dead_letter").to(recorder).run(progress=False))
    assert recorder.outputs == [6, 3]
    assert list(recorder.letters.values()) == [kept]


def test_law_errors_a_default_for_all_stages_and_the_stages_own_choice() -> None:
    flow = ps.Flow([1, 0, 2], on_error="skip").map(lambda x: 6 / x)
    assert asyncio.run(flow.collect()) == [6, 3]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(ps.Flow([1, 0], on_error="skip").map(lambda x: 6 / x, on_error="raise").collect())


@pytest.mark.parametrize(("budget", "failures", "stops"), [(3, 3, False), (3, 4, True), (0, 1, True), (0.1, 9, False)])
def test_law_errors_a_failure_budget_stops_a_doomed_run(budget: float, failures: int, stops: bool) -> None:
    async def work(x: int) -> int:
        if x % 10 == 9 and x < failures * 10:
            raise ValueError(f"bad {x}")
        return x

    flow = ps.Flow(range(100)).map(work, on_error="skip", max_failures=budget)
    if not stops:
        assert len(run_virtual(flow.collect())) == 100 - failures
        return
    with pytest.raises(ps.errors.FailureBudgetExceeded) as raised:
        run_virtual(flow.collect())
    error = raised.value
    assert (error.stage, error.failed, error.budget) == ("work", int(budget) + 1, budget)
    assert "ValueError: bad" in error.example
    assert isinstance(error.__cause__, ValueError)
    assert f"max_failures={budget}" in str(error)


def test_law_errors_a_report_groups_them_by_kind_with_an_example() -> None:
    async def work(x: int) -> int:
        if x % 2:
            raise KeyError(f"no {x}")
        raise ValueError(f"bad {x}")

    report = run_virtual(ps.Flow(range(9)).map(work, on_error="skip").to(lambda x: None).run(progress=False))
    assert [(group.stage, group.kind, group.count, group.example) for group in report.errors] == [
        ("work", "ValueError", 5, "bad 0"),
        ("work", "KeyError", 4, "'no 1'"),
    ]


@pytest.mark.parametrize("shape", ["loop", "threads", "later stage", "batches", "retried", "kept", "filtered before"])
def test_law_errors_a_share_is_judged_after_twenty_items_were_tried(shape: str) -> None:
    tried: set[int] = set()

    async def work(x: int) -> int:
        await asyncio.sleep(0.001)
        tried.add(x)
        raise ValueError(f"bad {x}")

    def thread(x: int) -> int:
        tried.add(x)
        raise ValueError(f"bad {x}")

    async def batch(xs: list[int]) -> list[int]:
        if len(xs) == 1:
            tried.update(xs)
        raise ValueError(f"bad {xs}")

    async def same(x: int) -> int:
        return x

    async def even(x: int) -> bool:
        return x % 2 == 0

    flow: ps.Flow[int] = ps.Flow(range(1000))
    given: dict[str, Any] = {"on_error": "skip", "max_failures": 0.5}
    doomed: ps.Flow[Any] = {
        "loop": lambda: flow.map(work, concurrency=4, **given),
        "threads": lambda: flow.map(thread, workers=1, **given),
        "later stage": lambda: flow.map(same).map(work, **given),
        "batches": lambda: flow.map_batches(batch, batch_size=8, **given),
        "retried": lambda: flow.map(work, concurrency=4, retry=ps.Retry(2, backoff=0.001), **given),
        "kept": lambda: flow.map(work, concurrency=4, **{**given, "on_error": "keep"}).map(same, concurrency=4),
        "filtered before": lambda: flow.filter(even).map(work, **given),
    }[shape]()
    with pytest.raises(ps.errors.FailureBudgetExceeded) as raised:
        run_virtual(doomed.collect())
    error = raised.value
    assert len(tried) >= error.tried >= 20
    assert error.failed > error.tried / 2
    if shape != "retried":  # there, some that were tried aren't given up yet
        assert error.failed == error.tried == 20


@pytest.mark.parametrize("error", [LookupError, KeyError, OSError])
def test_law_errors_nothing_of_the_run_is_at_work_when_it_is_raised(error: type[Exception]) -> None:
    """No call starts from the moment of failure, and those that were at work have ended."""
    started: list[int] = []
    ended: list[int] = []

    async def work(x: int) -> int:
        started.append(x)
        try:
            if x == 5:
                raise error(x)
            await asyncio.sleep(10)
            return x
        finally:
            ended.append(x)

    with pytest.raises(error):
        run_virtual(ps.Flow(range(1000)).map(work).collect())
    assert started == list(range(6))
    assert sorted(ended) == started


def test_an_error_that_cant_say_what_it_is_goes_by_on_error() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError("in __str__")

    async def work(x: int) -> int:
        raise Bad

    (kept,) = run_virtual(ps.Flow([1]).map(work, on_error="keep").collect())
    assert (kept.reason, kept.error) == ("Bad", "<Bad whose str raised RuntimeError>")
    assert run_virtual(ps.Flow([1]).map(work, on_error="skip").collect()) == []


@pytest.mark.parametrize("taken", [None, 3])
def test_what_closing_an_object_raises_is_raised_also_before_a_take(taken: int | None) -> None:
    class Model:
        async def __call__(self, x: int) -> int:
            return x

        def close(self) -> None:
            raise ValueError("close failed")

    flow = ps.Flow(range(100)).map(ps.per_worker(Model))
    with pytest.raises(ValueError, match="close failed"):
        run_virtual((flow if taken is None else flow.take(taken)).collect())


def test_no_call_starts_after_a_key_has_failed() -> None:
    failed = threading.Event()
    late: list[int] = []

    def key(x: int) -> int:
        if x == 20:
            failed.set()
            raise ValueError("no key")
        return x

    def work(x: int) -> int:
        if failed.is_set():
            late.append(x)
        return x

    with pytest.raises(ValueError, match="no key"):
        ps.Flow(range(64)).map(work, key=key, workers=4).collect_sync()
    assert len(late) <= 4, "more than were being started"
