"""What the runtime costs: items through three async stages that do nothing, in order."""

from __future__ import annotations

import asyncio
import time

from harness import Figures, NotRun, Outcome, Row, alternate, main, need, times, versus

ITEMS = 100_000
FEWER = 5_000  # for peers whose cost an item is so high that the whole would take half a minute


async def first(x: int) -> int:
    return x


async def second(x: int) -> int:
    return x


async def third(x: int) -> int:
    return x


def figures(items: int, began: float) -> Figures:
    seconds = time.perf_counter() - began
    return {"microseconds": seconds / items * 1e6, "seconds": seconds}


def penstock(items: int) -> Figures:
    import penstock as ps

    async def work() -> list[int]:
        return await ps.Flow(range(items)).map(first).map(second).map(third).collect()

    began = time.perf_counter()
    assert asyncio.run(work()) == list(range(items))
    return figures(items, began)


def gather(items: int) -> Figures:
    async def one(x: int) -> int:
        return await third(await second(await first(x)))

    async def work() -> list[int]:
        return await asyncio.gather(*(one(x) for x in range(items)))

    began = time.perf_counter()
    assert asyncio.run(work()) == list(range(items))
    return figures(items, began)


def spdl(items: int) -> Figures:
    from spdl.pipeline import PipelineBuilder

    builder = PipelineBuilder().add_source(range(items))
    for stage in (first, second, third):
        builder = builder.pipe(stage, concurrency=32, output_order="input")
    pipeline = builder.add_sink(64).build(num_threads=1)
    began = time.perf_counter()
    with pipeline.auto_stop():
        assert list(pipeline) == list(range(items))
    return figures(items, began)


def aiostream(items: int) -> Figures:
    from aiostream import pipe, stream

    async def work() -> list[int]:
        source = stream.iterate(range(items))
        for stage in (first, second, third):
            source = source | pipe.map(stage, ordered=True, task_limit=32)
        return await stream.list(source)

    began = time.perf_counter()
    assert asyncio.run(work()) == list(range(items))
    return figures(items, began)


def pypeln(items: int) -> Figures:
    import pypeln as pl

    async def work() -> list[int]:
        source = range(items)
        for stage in (first, second, third):
            source = pl.task.map(stage, source, workers=32, maxsize=64)
        return list(await pl.task.ordered(source))

    began = time.perf_counter()
    assert asyncio.run(work()) == list(range(items))
    return figures(items, began)


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
