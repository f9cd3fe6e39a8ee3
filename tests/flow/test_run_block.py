"""What entering and leaving ``async with job.start() as run`` raises: a failure is told once (law 8)."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

import penstock as ps
from penstock.testing import run_virtual


async def fail(x: int) -> int:
    raise ZeroDivisionError(x)


async def same(x: int) -> int:
    return x


def job(function: Any = fail) -> ps.Job:
    return ps.Flow([1, 2, 3]).map(function).to(lambda x: None)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.ERROR]


def test_leaving_the_block_raises_a_failure_that_nobody_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with job().start(progress=False) as run:
            await asyncio.sleep(10)
            assert run.report().released

    with pytest.raises(ZeroDivisionError) as raised:
        run_virtual(main())
    assert "at stage 'fail', item 0: 1" in raised.value.__notes__
    assert not told(caplog)


def test_on_the_way_of_another_exception_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with job().start(progress=False):
            await asyncio.sleep(10)
            raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        run_virtual(main())
    (message,) = told(caplog)
    assert "ZeroDivisionError" in message


def test_what_finish_raised_isnt_raised_again(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with job().start(progress=False) as run:
            with pytest.raises(ZeroDivisionError):
                await run.finish()

    run_virtual(main())
    assert not told(caplog)


def test_leaving_a_run_that_works_raises_nothing() -> None:
    async def forever(x: int) -> int:
        await asyncio.sleep(1e9)
        return x

    async def main() -> None:
        async with job(forever).start(progress=False):
            await asyncio.sleep(10)

    run_virtual(main())


def test_leaving_an_iterator_raises_nothing_more_and_logs_what_is_untold(caplog: pytest.LogCaptureFixture) -> None:
    async def late(x: int) -> int:
        if x == 2:
            await asyncio.sleep(1)
            raise ZeroDivisionError
        return x

    async def main() -> None:
        outputs: Any = aiter(ps.Flow(range(3)).map(late))
        assert await anext(outputs) == 0
        await asyncio.sleep(10)
        await outputs.aclose()
        with pytest.raises(ZeroDivisionError):
            async for _ in ps.Flow([2]).map(late):
                pass

    run_virtual(main())
    assert len(told(caplog)) == 1


def test_leaving_a_service_that_failed_raises_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main(own: bool) -> None:
        async with ps.Flow().map(lambda x: x, max_failures=0).open() as call:
            call._run.fail(OSError("gone"))  # as a pool does whose worker can't be built again
            if own:
                raise KeyError("own")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(main(own=False))
    assert not told(caplog)
    with pytest.raises(KeyError, match="own"):
        asyncio.run(main(own=True))
    assert len(told(caplog)) == 1


def test_a_run_is_entered_once() -> None:
    async def main() -> None:
        run = job(same).start(progress=False)
        with pytest.raises(ps.errors.Closed, match="async with"):
            await run.finish()
        async with run:
            with pytest.raises(ps.errors.PlanError, match="second time"):
                await run.__aenter__()
            await run.finish()
        with pytest.raises(ps.errors.PlanError, match=r"start\(\)"):
            async with run:
                pass

    run_virtual(main())


def test_meters_start_when_the_workers_are_there() -> None:
    """Else a short run with processes would be said to have waited for its source."""
    built: list[float] = []

    class Slow:
        def __init__(self) -> None:
            built.append(time.monotonic())

        def __call__(self, x: int) -> int:
            return x

    async def main() -> None:
        flow = ps.Flow([1, 2, 3]).map(same).map(ps.per_worker(Slow))
        async with flow.to(lambda x: None).start(progress=False) as run:
            assert run.clock() - run.loop.time() < 1  # the same clock
            assert min(meter.started for meter in run._meters) >= built[0] >= run._began
            await run.finish()

    asyncio.run(main())
