"""What the runtime costs: items through three async stages that do nothing, in order.

What is imported on first use isn't a cost of items (``start`` measures that): every runner has its modules loaded by a
first run of a hundred items.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from harness import Figures, NotRun, Outcome, Row, alternate, main, need, times, versus

ITEMS = 100_000
FEWER = 5_000  # for peers whose cost an item is so high that the whole would take half a minute


async def first(x: int) -> int:
    return x


async def second(x: int) -> int:
    return x


async def third(x: int) -> int:
    return x


def measured(run: Callable[[int], list[int]], items: int) -> Figures:
    """Run it warm, and see that everything came, in order."""
    run(100)
    began = time.perf_counter()
    assert run(items) == list(range(items))
    seconds = time.perf_counter() - began
    return {"microseconds": seconds / items * 1e6, "seconds": seconds}


def penstock(items: int) -> Figures:
    import penstock as ps

    async def work(count: int) -> list[int]:
        return await ps.Flow(range(count)).map(first).map(second).map(third).collect()

    return measured(lambda count: asyncio.run(work(count)), items)


def gather(items: int) -> Figures:
    async def one(x: int) -> int:
        return await third(await second(await first(x)))

    async def work(count: int) -> list[int]:
        return await asyncio.gather(*(one(x) for x in range(count)))

    return measured(lambda count: asyncio.run(work(count)), items)


def spdl(items: int) -> Figures:
    from spdl.pipeline import PipelineBuilder

    def work(count: int) -> list[int]:
        builder = PipelineBuilder().add_source(range(count))
        for stage in (first, second, third):
            builder = builder.pipe(stage, concurrency=32, output_order="input")
        pipeline = builder.add_sink(64).build(num_threads=1)
        with pipeline.auto_stop():
            return list(pipeline)

    return measured(work, items)


def aiostream(items: int) -> Figures:
    from aiostream import pipe, stream

    async def work(count: int) -> list[int]:
        source = stream.iterate(range(count))
        for stage in (first, second, third):
            source = source | pipe.map(stage, ordered=True, task_limit=32)
        return await stream.list(source)

    return measured(lambda count: asyncio.run(work(count)), items)


def pypeln(items: int) -> Figures:
    import pypeln as pl

    async def work(count: int) -> list[int]:
        source = range(count)
        for stage in (first, second, third):
            source = pl.task.map(stage, source, workers=32, maxsize=64)
        return list(await pl.task.ordered(source))

    return measured(lambda count: asyncio.run(work(count)), items)


def told(figures: Figures) -> str:
    return f"{figures['microseconds']:.1f} µs an item"


def run() -> Outcome:
    found = alternate(__file__, {"penstock": {"items": ITEMS}, "gather": {"items": ITEMS}}, rounds=7)
    peers = alternate(__file__, {name: {"items": FEWER} for name in ("spdl", "aiostream", "pypeln")}, rounds=3)
    ours = need(found["penstock"], "penstock")
    theirs = need(found["gather"], "gather")
    ratio = theirs["microseconds"] / ours["microseconds"]
    figure = f"{ours['microseconds']:.2f} µs an item"
    claim = f"{ITEMS:,} items through three no-op async stages, ordered"
    rows = [Row(claim, figure, "gather over everything", told(theirs), times(ratio), "≥ 6×", ratio >= 6)]
    for name, peer in peers.items():
        row = versus(f"the same, beside a peer at {FEWER:,} items", figure, name, peer, told)
        if not isinstance(peer, NotRun):
            row.ratio = times(peer["microseconds"] / ours["microseconds"])
        rows.append(row)
    return Outcome(rows)


if __name__ == "__main__":
    main(run, penstock, gather, spdl, aiostream, pypeln)
