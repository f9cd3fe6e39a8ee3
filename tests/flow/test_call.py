"""An unbound flow behind live requests: everyone's own answer, and nothing left of those who went away."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import balanced, dice

import penstock as ps
from penstock.errors import Closed, Overloaded, PlanError, WrongLoop
from penstock.flow.call import Call
from penstock.testing import run_virtual


async def double(x: int) -> int:
    await asyncio.sleep(dice(x, "nap") / 100)
    return 2 * x


def nothing_is_left(call: Any) -> None:
    """No request is remembered anywhere."""
    assert isinstance(call, Call)
    assert not call._pending
    assert not call._inlet.items
    report = call.report()
    assert balanced(report)
    assert report.in_flight == 0
    for segment in call._run.segments:
        private = vars(segment)
        assert not private["_inflight"]
        assert not private["_in_pool"]
        assert not private["_exit"]
        assert not private["_timers"]
        assert not private["tries"]
        assert not private.get("_lanes")
        assert not private.get("_lane_of")


SHAPES: dict[str, Any] = {
    "loop": lambda flow: flow.map(double, concurrency=16),
    "threads": lambda flow: flow.map(lambda x: 2 * x, workers=2),
    "batches": lambda flow: flow.map_batches(lambda xs: [2 * x for x in xs], batch_size=32, max_wait=0.01),
    "keyed": lambda flow: flow.map(double, key=lambda x: x % 10),
    "three": lambda flow: (
        flow.map(lambda x: x - 1, workers=2)
        .map_batches(lambda xs: [x + 1 for x in xs], batch_size=8, max_wait=0)
        .map(double)
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thousand_callers_get_their_own_answers(shape: str) -> None:
    async def main() -> None:
        async with SHAPES[shape](ps.Flow()).open() as call:
            answers = await asyncio.gather(*(call(x) for x in range(1000)))
            assert answers == [2 * x for x in range(1000)]
            nothing_is_left(call)
            assert call.report().delivered == 1000

    run_virtual(main())


def test_a_thousand_callers_of_processes() -> None:
    async def main() -> None:
        work = ps.Flow().map(lambda x: 2 * x, place="process", workers=2)
        async with work.open() as call:
            assert await asyncio.gather(*(call(x) for x in range(1000))) == [2 * x for x in range(1000)]
            nothing_is_left(call)

    asyncio.run(main())


@pytest.mark.parametrize("shape", ["loop", "threads", "batches", "second of two"])
def test_every_caller_gets_its_own_error(shape: str) -> None:
    def check(x: int) -> int:
        if x % 3 == 0:
            raise ValueError(f"not {x}")
        return x

    async def check_async(x: int) -> int:
        await asyncio.sleep(dice(x, "nap") / 100)
        return check(x)

    work = {
        "loop": lambda: ps.Flow().map(check_async),
        "threads": lambda: ps.Flow().map(check),
        "batches": lambda: ps.Flow().map_batches(lambda xs: [check(x) for x in xs], batch_size=16, max_wait=0.01),
        "second of two": lambda: ps.Flow().map(double).map(lambda x: x // 2).map(check_async),
    }[shape]()

    async def main() -> None:
        async with work.open() as call:
            answers = await asyncio.gather(*(call(x) for x in range(1000)), return_exceptions=True)
            for x, answer in enumerate(answers):
                if x % 3:
                    assert answer == x
                else:
                    assert isinstance(answer, ValueError)
                    assert str(answer) == f"not {x}"
                    assert f"item {x}" in answer.__notes__[0]
            nothing_is_left(call)

    run_virtual(main())


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12)
@given(seed=st.integers(0, 1000))
def test_cancelled_callers_leave_nothing_behind(shape: str, seed: int) -> None:
    async def main() -> None:
        async with SHAPES[shape](ps.Flow()).open() as call:
            callers = [asyncio.create_task(call(x)) for x in range(200)]
            for x, caller in enumerate(callers):
                if dice(x, f"who{seed}") < 50:
                    asyncio.get_running_loop().call_later(dice(x, f"when{seed}") / 200, caller.cancel)
            answers = await asyncio.gather(*callers, return_exceptions=True)
            for x, answer in enumerate(answers):
                assert answer == 2 * x or isinstance(answer, asyncio.CancelledError)
            assert await call(7) == 14
        nothing_is_left(call)

    run_virtual(main())


@pytest.mark.parametrize("kind", ["loop", "threads", "keyed", "batches"])
def test_an_item_that_was_not_started_is_never_started(kind: str) -> None:
    started: list[int] = []
    go = threading.Event()
    gone = asyncio.Event()

    async def slow(x: int) -> int:
        started.append(x)
        await gone.wait()
        return x

    def slow_thread(x: int) -> int:
        started.append(x)
        go.wait(10)
        return x

    async def slow_batch(xs: list[int]) -> list[int]:
        started.extend(xs)
        await gone.wait()
        return xs

    work: ps.Flow[Any] = {
        "loop": lambda: ps.Flow().map(slow, concurrency=1),
        "threads": lambda: ps.Flow().map(slow_thread, workers=1),
        "keyed": lambda: ps.Flow().map(slow, key=lambda x: 0),
        "batches": lambda: ps.Flow().map_batches(slow_batch, batch_size=1, concurrency=1),
    }[kind]()

    async def main() -> None:
        async with work.open() as call:
            callers = [asyncio.create_task(call(x)) for x in range(200)]
            while not started:  # noqa: ASYNC110  # a thread or a batch may be the first
                await asyncio.sleep(0)
            held = set(started)
            for x, caller in enumerate(callers):
                if x > 20 or (x not in held and kind != "batches"):
                    caller.cancel()
            await asyncio.sleep(0)
            go.set()
            gone.set()
            await asyncio.gather(*callers, return_exceptions=True)
            nothing_is_left(call)
            assert call.report().released

    asyncio.run(main())
    assert max(started) <= 20
    if kind != "batches":
        assert started == [0]


def test_overload_is_refused_at_once() -> None:
    async def main() -> None:
        work = ps.Flow().map(double, concurrency=2)
        async with work.open(max_waiting=10) as call:
            callers = [asyncio.create_task(call(x)) for x in range(100)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as raised:
                await call(0)
            assert (raised.value.waiting, raised.value.bound) == (10, 10)
            answers = await asyncio.gather(*callers, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, Overloaded)]
            assert 80 < len(refused) < 90
            assert [answer for answer in answers if not isinstance(answer, Overloaded)] == [
                2 * x for x in range(100 - len(refused))
            ]
            assert await call(1) == 2
            nothing_is_left(call)

    run_virtual(main())


def test_what_waits_is_bounded_wherever_it_waits() -> None:
    """A stage that is quick takes in everything; the requests then wait before the next one."""

    async def quick(x: int) -> int:
        return x

    async def slow(xs: list[int]) -> list[int]:
        await asyncio.sleep(50)
        return xs

    async def main() -> None:
        work = ps.Flow().map(quick, concurrency=4).map_batches(slow, batch_size=8, max_wait=0.02, concurrency=1)
        most = 10 + 4 + 8
        async with work.open(max_waiting=10) as call:
            callers = []
            for x in range(400):
                callers.append(asyncio.create_task(call(x)))
                await asyncio.sleep(0.1)
                assert call.report().in_flight <= most
            answers = await asyncio.gather(*callers, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, Overloaded)]
            assert len(refused) > 300
            assert sorted(answer for answer in answers if isinstance(answer, int)) == [
                x for x, answer in enumerate(answers) if not isinstance(answer, Overloaded)
            ]
            nothing_is_left(call)

    run_virtual(main())


def test_batches_form_across_callers_and_wait_no_longer_than_they_may() -> None:
    batches: list[tuple[float, list[int]]] = []

    async def work(xs: list[int]) -> list[int]:
        batches.append((asyncio.get_running_loop().time(), list(xs)))
        return [-x for x in xs]

    async def caller(call: Any, x: int) -> float:
        await asyncio.sleep(x)
        assert await call(x) == -x
        return asyncio.get_running_loop().time() - x

    async def main() -> list[float]:
        async with ps.Flow().map_batches(work, batch_size=4, max_wait=2.5).open() as call:
            return await asyncio.gather(*(caller(call, x) for x in (0, 1, 2, 10, 11, 11.25, 11.5, 20)))

    waits = run_virtual(main())
    assert [batch for _, batch in batches] == [[0, 1, 2], [10, 11, 11.25, 11.5], [20]]
    assert [at for at, _ in batches] == pytest.approx([2.5, 11.5, 22.5])
    assert waits == pytest.approx([2.5, 1.5, 0.5, 1.5, 0.5, 0.25, 0.0, 2.5])


def test_nobody_waits_for_the_slowest() -> None:
    async def nap(x: float) -> float:
        await asyncio.sleep(x)
        return x

    async def main() -> None:
        async with ps.Flow().map(nap).open() as call:
            slow = asyncio.create_task(call(100))
            assert await asyncio.wait_for(call(1), 2) == 1
            assert not slow.done()
            assert await slow == 100

    run_virtual(main())


def test_keys_are_kept_in_order() -> None:
    order: list[int] = []

    async def note(x: int) -> int:
        await asyncio.sleep(10 - x)
        order.append(x)
        return x

    async def main() -> None:
        async with ps.Flow().map(note, key=lambda x: x % 2).open() as call:
            await asyncio.gather(*(call(x) for x in range(10)))

    run_virtual(main())
    assert [x for x in order if x % 2] == [1, 3, 5, 7, 9]
    assert [x for x in order if not x % 2] == [0, 2, 4, 6, 8]


def test_leaving_the_block_answers_what_was_accepted() -> None:
    async def main() -> None:
        async with (
            ps.Flow()
            .map(double, concurrency=2)
            .map_batches(lambda xs: xs, batch_size=100, max_wait=1000)
            .open() as call
        ):
            callers = [asyncio.create_task(call(x)) for x in range(50)]
            await asyncio.sleep(0)
        assert [caller.result() for caller in callers] == [2 * x for x in range(50)]
        with pytest.raises(Closed, match="call is closed"):
            await call(1)

    run_virtual(main())


def test_cancelling_the_drain_ends_at_once_and_tells_the_callers() -> None:
    async def hang(x: int) -> int:
        await asyncio.sleep(1e6)
        return x

    async def main() -> None:
        manager = ps.Flow().map(hang).open()
        call = await manager.__aenter__()
        callers = [asyncio.create_task(call(x)) for x in range(50)]
        await asyncio.sleep(0)
        leaving = asyncio.create_task(manager.__aexit__(None, None, None))
        await asyncio.sleep(1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert all(isinstance(answer, Closed) for answer in answers)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())


def test_another_loop_is_refused() -> None:
    async def main() -> None:
        async with ps.Flow().map(double).open() as call:
            with ThreadPoolExecutor(1) as others:

                def elsewhere() -> None:
                    async def ask() -> None:
                        await call(1)

                    asyncio.run(ask())

                with pytest.raises(WrongLoop, match="event loop that opened it"):
                    await asyncio.get_running_loop().run_in_executor(others, elsewhere)

    asyncio.run(main())


def test_retries_timeouts_and_keeping_work_as_in_any_flow() -> None:
    tried: list[int] = []

    async def work(x: int) -> int:
        tried.append(x)
        if x == 1 and tried.count(1) < 3:
            raise ValueError(x)
        if x == 2:
            await asyncio.sleep(1e6)
        return x

    async def main() -> None:
        async with ps.Flow().map(work, retry=2, timeout=5).open() as call:
            assert await call(1) == 1
            with pytest.raises(ps.errors.StageTimeout):
                await call(2)
            nothing_is_left(call)
        async with ps.Flow().map(work, timeout=5, on_error="keep").map(lambda x: x).open() as call:
            failed = await call(2)
            assert isinstance(failed, ps.Failed)
            assert (failed.item, failed.reason) == (2, "timeout")

    run_virtual(main())
    assert tried.count(1) == 3


def test_a_worker_that_cant_be_built_is_told_to_whoever_opens() -> None:
    class Model:
        def __init__(self) -> None:
            raise FileNotFoundError("no weights")

        def __call__(self, x: int) -> int:
            return x

    async def main() -> None:
        with pytest.raises(FileNotFoundError, match="no weights"):
            async with ps.Flow().map(ps.per_worker(Model)).open():
                pass

    asyncio.run(main())


@pytest.mark.parametrize(
    "work",
    [
        lambda: ps.Flow([1]).map(double),
        ps.Flow,
        lambda: ps.Flow().filter(double),
        lambda: ps.Flow().flat_map(lambda x: [x]),
        lambda: ps.Flow().batch(2),
        lambda: ps.Flow().map(double).take(1),
        lambda: ps.Flow().map(lambda x: [x]).unbatch(),
        lambda: ps.Flow().map(double, on_error="skip"),
        lambda: ps.Flow(on_error="dead_letter").map(double),
    ],
)
def test_flows_that_arent_one_to_one_are_refused(work: Any) -> None:
    async def main() -> None:
        with pytest.raises(PlanError):
            async with work().open():
                pass

    asyncio.run(main())


def test_open_sync_from_many_threads() -> None:
    work: ps.Flow[int] = ps.Flow().map_batches(lambda xs: [2 * x for x in xs], batch_size=8, max_wait=0.01)
    with work.open_sync() as call, ThreadPoolExecutor(8) as callers:
        assert list(callers.map(call, range(200))) == [2 * x for x in range(200)]
    with pytest.raises(Closed):
        call(1)


def test_an_error_in_the_block_comes_out_and_what_was_accepted_is_answered() -> None:
    async def main() -> None:
        callers = []
        with pytest.raises(KeyError):
            async with ps.Flow().map(double).open() as call:
                callers = [asyncio.create_task(call(x)) for x in range(5)]
                await asyncio.sleep(0)
                raise KeyError
        assert [caller.result() for caller in callers] == [0, 2, 4, 6, 8]

    run_virtual(main())


def test_a_caller_that_leaves_while_its_retry_waits_leaves_no_attempts_behind() -> None:
    async def work(x: str) -> str:
        if x == "slow":
            await asyncio.sleep(5)
            return x
        raise ValueError(x)

    async def main() -> None:
        retry = ps.Retry(2, backoff=1, jitter=False)
        async with ps.Flow().map(work, concurrency=1, retry=retry).open() as call:
            one = asyncio.create_task(call("one"))
            await asyncio.sleep(0.1)
            slow = asyncio.create_task(call("slow"))  # has the only worker when the other comes back
            await asyncio.sleep(1.5)
            one.cancel()
            await asyncio.wait([one])
            (segment,) = call._run.segments  # type: ignore[attr-defined]
            assert not segment.tries
            assert await slow == "slow"

    run_virtual(main())
