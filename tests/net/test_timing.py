"""Timeouts: what they count, what they don't, and loops that are late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.net.hostile import Hostile, Seen, ok

from penstock.errors import FetchError, PlanError
from penstock.net.fetcher import Fetcher
from penstock.net.timing import Timeout, Watch, as_timeout
from penstock.testing import run_virtual


@pytest.mark.parametrize(
    "wrong", [{"connect": 0}, {"idle": -1}, {"total": "5"}, {"idle": True}, {"total": float("nan")}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(PlanError, match=f"Timeout\\({name}="):
        Timeout(**wrong)


def test_what_timeout_may_be() -> None:
    assert as_timeout(None) == Timeout(10, 60, None)
    assert as_timeout(5) == Timeout(total=5)
    assert as_timeout(Timeout(idle=1)) == Timeout(idle=1)
    for wrong in ("5", True, [1]):
        with pytest.raises(PlanError, match="Give seconds"):
            as_timeout(wrong)


async def watched(timeout: Timeout, attempt: Callable[[Watch], Any]) -> tuple[str | None, float]:
    """How an attempt ended, and when."""
    loop = asyncio.get_running_loop()
    watch = Watch(loop, timeout)
    for _ in range(2):  # a watch is used again
        began = loop.time()
        watch.begin()
        try:
            await attempt(watch)
        except asyncio.CancelledError:
            assert watch.absorb()
        finally:
            watch.end()
        result = watch.expired, loop.time() - began
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    watch.close()
    return result


@pytest.mark.parametrize(
    ("timeout", "expired", "at"),
    [
        (Timeout(3, 7, None), "connect", 3),
        (Timeout(None, 7, None), None, 100),
        (Timeout(3, 7, 2), "total", 2),
        (Timeout(200, 7, 50), "total", 50),
    ],
)
def test_the_bound_that_comes_first_counts(timeout: Timeout, expired: str | None, at: float) -> None:
    async def attempt(watch: Watch) -> None:
        watch.expect_connection()
        await asyncio.sleep(100)

    assert run_virtual(watched(timeout, attempt)) == (expired, at)


def test_idle_begins_anew_with_every_byte_and_rests_while_we_are_busy() -> None:
    async def attempt(watch: Watch) -> None:
        for _ in range(10):
            watch.expect_bytes()
            await asyncio.sleep(6)
            watch.rest()
            await asyncio.sleep(50)
        watch.expect_bytes()
        await asyncio.sleep(100)

    assert run_virtual(watched(Timeout(3, 7, None), attempt)) == ("idle", 567)


def test_a_bound_that_comes_nearer_is_kept() -> None:
    async def attempt(watch: Watch) -> None:
        watch.expect_bytes()
        await asyncio.sleep(1)
        watch.expect_connection()
        await asyncio.sleep(100)

    assert run_virtual(watched(Timeout(2, 50, None), attempt)) == ("connect", 3)


def test_total_counts_our_own_time_too() -> None:
    async def attempt(watch: Watch) -> None:
        watch.rest()
        await asyncio.sleep(100)

    assert run_virtual(watched(Timeout(3, 7, 20), attempt)) == ("total", 20)


def test_a_cancellation_from_outside_wins() -> None:
    async def main() -> None:
        watch = Watch(asyncio.get_running_loop(), Timeout(total=5))

        async def attempt() -> None:
            watch.begin()
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                assert not watch.absorb()
                raise
            finally:
                watch.end()
                watch.close()

        task = asyncio.create_task(attempt())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_at(5, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    run_virtual(main())


def loops() -> list[Any]:
    found: list[Any] = [asyncio.new_event_loop]
    try:
        import uvloop
    except ImportError:
        return found
    return [*found, uvloop.new_event_loop]


@pytest.mark.parametrize("make_loop", loops())
def test_a_loop_that_was_blocked_blames_nobody(make_loop: Any) -> None:
    """The loop is blocked for longer than the idle time, and the answer comes meanwhile: it counts."""

    async def block(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        time.sleep(0.5)  # noqa: ASYNC251  # the blocking is what is tested
        return await ok(server, request, reader, writer)

    async def main() -> Any:
        async with Hostile(routes={"block": block}) as server:
            fetcher = Fetcher(allow_private=True, timeout=Timeout(connect=5, idle=0.1))
            page = await fetcher(server.url("/block"))
            await fetcher.close()
            return page

    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(main()).status == 200


class LateLoop:
    """A loop as far as a watch needs one, whose time is what the test says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: list[Any] = []
        self.timers: list[Any] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Any) -> asyncio.Handle:
        self.soon.append(asyncio.Handle(callback, (), self))  # type: ignore[arg-type]
        return self.soon[-1]

    def call_at(self, when: float, callback: Any) -> asyncio.TimerHandle:
        self.timers.append(asyncio.TimerHandle(when, callback, (), self))  # type: ignore[arg-type]
        return self.timers[-1]

    def _timer_handle_cancelled(self, handle: Any) -> None:
        """What a loop keeps count of."""

    def get_debug(self) -> bool:
        return False

    def turn(self, to: float) -> None:
        """One turn of the loop at this time: what is due, and what was to be called soon."""
        self.now = to
        due = [timer for timer in self.timers if timer.when() <= to]
        self.timers = [timer for timer in self.timers if timer.when() > to]
        ready, self.soon = [*self.soon, *due], []
        for handle in ready:
            if not handle.cancelled():
                handle._callback()


def test_a_late_timer_moves_the_bound_once_by_what_was_lost() -> None:
    async def main() -> None:
        loop: Any = LateLoop()
        watch = Watch(loop, Timeout(connect=None, idle=10))
        task = asyncio.current_task()
        assert task is not None

        def turns(to: float) -> str | None:
            for _ in range(10):
                loop.turn(to)
            return watch.expired

        watch.begin()
        watch.expect_bytes()
        assert turns(14) is None  # blocked from 0 to 14: four seconds late
        assert turns(17.9) is None
        watch.expect_bytes()  # something came: all anew
        assert turns(27.8) is None
        assert turns(50) is None  # late again, by more than the whole bound
        assert turns(59.9) is None
        assert not task.cancelling()
        assert turns(70) == "idle"  # it was moved once, and not again
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        assert watch.absorb()
        watch.end()
        watch.close()
        assert not loop.timers or all(timer.cancelled() for timer in loop.timers)

    run_virtual(main())


def test_what_came_within_a_few_turns_counts() -> None:
    async def main() -> None:
        loop: Any = LateLoop()
        watch = Watch(loop, Timeout(connect=None, idle=10))
        watch.begin()
        watch.expect_bytes()
        for _ in range(3):
            loop.turn(10)
        watch.expect_bytes()
        for _ in range(10):
            loop.turn(10)
        assert watch.expired is None
        watch.end()
        loop.turn(100)
        watch.begin()  # the old timer has fired into the void
        watch.expect_bytes()
        for _ in range(10):
            loop.turn(110)
        assert watch.expired == "idle"
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        assert watch.absorb()
        watch.end()
        watch.close()

    run_virtual(main())


@pytest.mark.parametrize("make_loop", loops())
@pytest.mark.parametrize("path", ["/silent", "/stall"])
def test_silence_ends_on_a_real_loop_too(make_loop: Any, path: str) -> None:
    async def main() -> Any:
        async with Hostile() as server:
            fetcher = Fetcher(allow_private=True, timeout=Timeout(idle=0.05))
            with pytest.raises(FetchError) as raised:
                await fetcher(server.url(path))
            page = await fetcher(server.url("/ok"))
            await fetcher.close()
            return raised.value, page

    with asyncio.Runner(loop_factory=make_loop) as runner:
        error, page = runner.run(main())
    assert error.reason == "timeout"
    assert page.status == 200
