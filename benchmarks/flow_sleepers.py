"""Many waits at once: 4,096 sleeps of 20 ms, 1,024 at a time. The limit is what bare coroutines take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from harness import Figures, NotRun, Outcome, Row, alternate, main, need, times, versus

ITEMS = 4096
AT_ONCE = 1024
SECONDS = 0.02


async def wait(x: int) -> int:
    await asyncio.sleep(SECONDS)
    return x


def limit() -> Figures:
    """Resident coroutines that share one iterator: nothing else could be left out."""

    async def work() -> None:
        items = iter(range(ITEMS))

        async def worker() -> None:
            for x in items:
                results[x] = await wait(x)

        results: dict[int, int] = {}
        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        assert len(results) == ITEMS

    return timed(work)


def penstock() -> Figures:
    import penstock as ps

    async def work() -> None:
        assert await ps.Flow(range(ITEMS)).map(wait, concurrency=AT_ONCE).collect() == list(range(ITEMS))

    asyncio.run(ps.Flow(range(AT_ONCE)).map(wait, concurrency=AT_ONCE).collect())
    return timed(work)


def aiostream() -> Figures:
    from aiostream import pipe, stream

    async def work() -> None:
        source = stream.iterate(range(ITEMS)) | pipe.map(wait, ordered=True, task_limit=AT_ONCE)
        assert await stream.list(source) == list(range(ITEMS))

    return timed(work)


def spdl() -> Figures:
    from spdl.pipeline import PipelineBuilder

    builder = PipelineBuilder().add_source(range(ITEMS)).pipe(wait, concurrency=AT_ONCE, output_order="input")
    pipeline = builder.add_sink(64).build(num_threads=1)
    began = time.perf_counter()
    with pipeline.auto_stop():
        assert list(pipeline) == list(range(ITEMS))
    return {"seconds": time.perf_counter() - began}


def timed(work: Callable[[], Coroutine[Any, Any, None]]) -> Figures:
    began = time.perf_counter()
    asyncio.run(work())
    return {"seconds": time.perf_counter() - began}


def told(figures: Figures) -> str:
    return f"{figures['seconds'] * 1e3:.0f} ms"


def run() -> Outcome:
    found = alternate(__file__, {"limit": {}, "penstock": {}}, rounds=9)
    peers = alternate(__file__, {"spdl": {}, "aiostream": {}}, rounds=3)
    ours, least = need(found["penstock"], "penstock"), need(found["limit"], "the limit")
    share = least["seconds"] / ours["seconds"]
    claim = f"{ITEMS:,} sleeps of 20 ms, {AT_ONCE:,} at once, ordered"
    rows = [Row(claim, told(ours), "bare coroutines (the limit)", told(least), f"{share:.0%}", "≥ 95 %", share >= 0.95)]
    for name, peer in peers.items():
        row = versus("the same", told(ours), name, peer, told)
        if not isinstance(peer, NotRun):
            row.ratio = times(peer["seconds"] / ours["seconds"])
        rows.append(row)
    return Outcome(rows, remarks=["Sleeps of exactly one length wake together; the sleeping itself takes 80 ms."])


if __name__ == "__main__":
    main(run, limit, penstock, aiostream, spdl)
