"""Law 10: what can be woken is never polled."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.testing import run_virtual

QUIET = 0.3
"""Real seconds of nothing to do; something that polls every 50 ms would be seen."""


class CountingLoop(asyncio.SelectorEventLoop):
    turns = 0

    def _run_once(self) -> None:
        self.turns += 1
        super()._run_once()  # type: ignore[misc]  # the loop's own, which typeshed doesn't know


class Gate:
    """Items that come when they are let in; the source waits for the rest of them."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[int]:
        yield 1
        await self.open.wait()
        yield 2


async def same(x: Any) -> Any:
    return x


SHAPES: dict[str, Callable[[ps.Flow[Any]], ps.Flow[Any]]] = {
    "loop": lambda flow: flow.map(same),
    "timeouts and retries": lambda flow: flow.map(same, timeout=60, retry=3),
    "threads": lambda flow: flow.map(lambda x: x, workers=2),
    "threads with timeouts": lambda flow: flow.map(lambda x: x, workers=2, timeout=60),
    "processes": lambda flow: flow.map(lambda x: x, place="process", workers=1),
    "batches": lambda flow: flow.map_batches(lambda xs: xs, batch_size=1, max_wait=1),
    "keyed and unordered": lambda flow: flow.map(same, key=str).map(lambda x: x, ordered=False),
}


def settled(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(make())


async def quiet() -> None:
    """Nothing happens: hardly a turn of the loop, and no time of any thread."""
    await asyncio.sleep(0.2)  # what was begun comes to rest
    loop = asyncio.get_running_loop()
    assert isinstance(loop, CountingLoop)
    turns, used = loop.turns, time.process_time()
    await asyncio.sleep(QUIET)
    assert loop.turns - turns <= 3
    assert time.process_time() - used < QUIET / 20


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sink", ["function", "recorder"])
def test_law_idle_a_flow_whose_source_waits(shape: str, sink: str) -> None:
    async def main() -> None:
        gate = Gate()
        outputs: list[int] = []
        recorder = Recorder()
        job = SHAPES[shape](ps.Flow(gate)).to(recorder if sink == "recorder" else outputs.append)
        async with job.start(progress=False) as run:
            await quiet()
            gate.open.set()
            report = await run.finish()
        assert report.delivered == 2
        assert (outputs or recorder.outputs) == [1, 2]

    settled(main)


def test_law_idle_a_source_that_blocks_in_its_thread() -> None:
    async def main() -> None:
        go = threading.Event()

        def source() -> Iterator[int]:
            yield 1
            go.wait(10)
            yield 2

        async with ps.Flow(source()).map(same).to(lambda x: None).start(progress=False) as run:
            await quiet()
            go.set()
            assert (await run.finish()).delivered == 2

    settled(main)


def test_law_idle_a_function_that_waits() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def work(x: int) -> int:
            await go.wait()
            return x

        async with ps.Flow(range(100)).map(work).to(Recorder()).start(progress=False) as run:
            await quiet()
            go.set()
            assert (await run.finish()).delivered == 100

    settled(main)


def test_law_idle_a_consumer_that_waits() -> None:
    async def main() -> None:
        outputs = aiter(ps.Flow(range(100_000)).map(lambda x: x, workers=2).map(same))
        assert await anext(outputs) == 0
        await quiet()
        await outputs.aclose()  # type: ignore[attr-defined]  # an iterator of penstock's has it

    settled(main)


def test_law_idle_open_without_callers() -> None:
    async def main() -> None:
        work = ps.Flow().map(lambda x: x, workers=2).map_batches(lambda xs: xs, batch_size=8, max_wait=0.01)
        async with work.open() as call:
            assert await call(1) == 1
            await quiet()
            assert await call(2) == 2

    settled(main)


def test_law_idle_a_retry_that_waits_has_one_timer() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        tried: list[float] = []

        async def work(x: int) -> int:
            tried.append(loop.time())
            if len(tried) == 1:
                raise ValueError(x)
            return x

        retry = ps.Retry(2, backoff=3600, jitter=False)
        async with ps.Flow([1]).map(work, retry=retry).to(Recorder()).start(progress=False) as run:
            await asyncio.sleep(1)
            timers = [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
            await run.finish()
        assert tried[1] - tried[0] >= 60
        return len(timers)

    assert run_virtual(main()) == 2  # and the one that looks every 15 s whether the run is stuck
