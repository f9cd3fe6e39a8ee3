"""Three stages of uneven service time, each where it runs best: coroutines, processes, threads.

The bound is what the busiest stage alone would take with all its workers at work all the time.
"""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from harness import Figures, NotRun, Outcome, Row, alternate, main, need, times, versus

ITEMS = 1500
FETCHERS, PARSERS, STORERS = 16, 1, 4

IN_ORDER = (
    "With exponential service times the slowest of many items is far slower than the mean: in order, the window "
    "stands behind it, and no runtime reaches the bound with a bounded window. That row has no target."
)

Item = tuple[float, float, float]


def work_items(kind: str) -> list[Item]:
    """Service times of each item at the three stages, in seconds: means 10 ms, 0.5 ms, 6 ms."""
    chance = random.Random(7)

    def service(mean: float) -> float:
        return chance.expovariate(1 / mean) if kind == "exponential" else mean * chance.uniform(0.5, 1.5)

    return [(service(0.010), service(0.0005), service(0.006)) for _ in range(ITEMS)]


def bound(items: list[Item]) -> float:
    """The least time: the busiest stage's whole service over its workers."""
    return max(
        sum(item[stage] for item in items) / workers for stage, workers in enumerate((FETCHERS, PARSERS, STORERS))
    )


async def fetch(item: Item) -> Item:
    await asyncio.sleep(item[0])
    return item


def parse(item: Item) -> Item:
    until = time.perf_counter() + item[1]
    while time.perf_counter() < until:
        pass
    return item


def store(item: Item) -> Item:
    time.sleep(item[2])
    return item


def penstock(kind: str, ordered: bool) -> Figures:
    import penstock as ps

    items = work_items(kind)

    async def work() -> float:
        flow = (
            ps.Flow(items, ordered=ordered)
            .map(fetch, concurrency=FETCHERS)
            .map(parse, place="process", workers=PARSERS)
            .map(store, place="thread", workers=STORERS)
        )
        count, began = 0, 0.0
        async for _ in flow:
            began = began or time.perf_counter()  # starting the workers is told by the benchmark "start"
            count += 1
        assert count == len(items)
        return time.perf_counter() - began

    return {"seconds": asyncio.run(work()), "bound": bound(items)}


def spdl(kind: str, ordered: bool) -> Figures:
    from spdl.pipeline import PipelineBuilder

    items = work_items(kind)
    order = "input" if ordered else "completion"
    with ProcessPoolExecutor(PARSERS) as processes, ThreadPoolExecutor(STORERS) as threads:
        processes.submit(parse, (0.0, 0.0, 0.0)).result()
        pipeline = (
            PipelineBuilder()
            .add_source(items)
            .pipe(fetch, concurrency=FETCHERS, output_order=order)
            .pipe(parse, concurrency=PARSERS, executor=processes, output_order=order)
            .pipe(store, concurrency=STORERS, executor=threads, output_order=order)
            .add_sink(16)
            .build(num_threads=2)
        )
        count, began = 0, 0.0
        with pipeline.auto_stop():
            for _ in pipeline:
                began = began or time.perf_counter()
                count += 1
        assert count == len(items)
        return {"seconds": time.perf_counter() - began, "bound": bound(items)}


def run() -> Outcome:
    rows = []
    for kind, ordered in (("uniform", True), ("exponential", False), ("exponential", True)):
        given = {"kind": kind, "ordered": ordered}
        found = alternate(__file__, {"penstock": given, "spdl": given}, rounds=3)
        ours = need(found["penstock"], "penstock")
        share = ours["bound"] / ours["seconds"]
        claim = f"{ITEMS:,} items, {kind} service times, {'ordered' if ordered else 'unordered'}"
        figure = f"{ours['seconds']:.2f} s"
        row = Row(claim, figure, "the busiest stage's bound", f"{ours['bound']:.2f} s", f"{share:.0%}")
        if kind == "uniform" or not ordered:
            row.target, row.met = "≥ 95 %", share >= 0.95
        rows.append(row)
        row = versus("the same", figure, "spdl", found["spdl"], lambda peer: f"{peer['seconds']:.2f} s")
        if not isinstance(found["spdl"], NotRun):
            row.ratio = times(found["spdl"]["seconds"] / ours["seconds"])
        rows.append(row)
    return Outcome(
        rows,
        remarks=[IN_ORDER, "The items wait for 6 and 10 ms: any runtime does well here that keeps its workers fed."],
    )


if __name__ == "__main__":
    main(run, penstock, spdl)
