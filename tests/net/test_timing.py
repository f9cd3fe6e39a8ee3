"""Timeouts: what they count, what they don't, and loops that are late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.net.hostile import Hostile

from penstock.errors import FetchError, PlanError
from penstock.net.fetcher import Fetcher
from penstock.net.timing import Timeout, Watch, as_timeout
from penstock.testing import run_virtual


@pytest.mark.parametrize("wrong", [{"connect": 0}, {"idle": -1}, {"total": "5"}, {"idle": True}, {"total": float("nan")}])
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
    """While the loop is blocked for longer than the idle time, the answer comes: it is there when it is looked for."""

    async def main() -> Any:
        async with Hostile() as server:
            fetcher = Fetcher(allow_private=True, timeout=Timeout(connect=5, idle=0.3))
            await fetcher(server.url("/ok"))
            asyncio.get_running_loop().call_later(0.01, time.sleep, 0.8)  # after the request has gone out
            page = await fetcher(server.url("/drip/0"))
            await fetcher.close()
            return page

    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(main()).status == 200


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
