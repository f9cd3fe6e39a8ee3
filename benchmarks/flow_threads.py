"""Plain functions in threads: short ones, long ones that free the interpreter, and a mix of both."""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

from harness import Figures, Outcome, Row, alternate, main, need, versus

SHORT, LONG, MIXED = 50_000, 200, 3_000
WORKERS = 2
DATA = bytes(7_500_000)
TURNS = 280
"""Turns of the short function's loop: about 10 µs."""


def short(x: int) -> int:
    """About 10 µs of Python."""
    total = 0
    for turn in range(TURNS):
        total += turn & x
    return x


def long(x: int) -> int:
    """About 10 ms of C that runs without the interpreter's lock."""
    hashlib.sha256(DATA).digest()
    hashlib.sha256(DATA).digest()
    return x


def mixed(x: int) -> int:
    """One in a hundred waits 100 ms, the others compute for 10 µs."""
    if x % 100 == 50:
        time.sleep(0.1)
        return x
    return short(x)


FUNCTIONS = {"short": (short, SHORT), "long": (long, LONG), "mixed": (mixed, MIXED)}


def alone(name: str) -> Figures:
    """One after the other, in a loop."""
    function, items = FUNCTIONS[name]
    began = time.perf_counter()
    for x in range(items):
        function(x)
    return {"seconds": time.perf_counter() - began}


def penstock(name: str, ordered: bool = True) -> Figures:
    import penstock as ps

    function, items = FUNCTIONS[name]

    async def work() -> float:
        began = time.perf_counter()
        results = await ps.Flow(range(items)).map(function, workers=WORKERS, ordered=ordered).collect()
        assert len(results) == items
        return time.perf_counter() - began

    asyncio.run(ps.Flow(range(10)).map(short, workers=WORKERS).collect())
    return {"seconds": asyncio.run(work())}


def executor(name: str, items: int) -> Figures:
    function, _ = FUNCTIONS[name]
    with ThreadPoolExecutor(WORKERS) as pool:
        began = time.perf_counter()
        assert len(list(pool.map(function, range(items)))) == items
        return {"seconds": time.perf_counter() - began}


def spdl(name: str, items: int) -> Figures:
    from spdl.pipeline import PipelineBuilder

    function, _ = FUNCTIONS[name]
    builder = PipelineBuilder().add_source(range(items)).pipe(function, concurrency=WORKERS, output_order="input")
    pipeline = builder.add_sink(64).build(num_threads=WORKERS)
    began = time.perf_counter()
    with pipeline.auto_stop():
        assert len(list(pipeline)) == items
    return {"seconds": time.perf_counter() - began}


def run() -> Outcome:
    rows = []

    given = {"name": "short"}
    found = alternate(__file__, {"alone": given, "penstock": given}, rounds=5)
    ours, work = need(found["penstock"], "penstock"), need(found["alone"], "the work alone")
    over = (ours["seconds"] - work["seconds"]) / SHORT * 1e6
    figure = f"{over:.2f} µs an item over the work"
    claim = f"{SHORT:,} calls of {work['seconds'] / SHORT * 1e6:.1f} µs in {WORKERS} threads"
    rows.append(
        Row(claim, figure, "the work in a loop", f"{work['seconds']:.2f} s", target="≤ 1.5 µs", met=over <= 1.5)
    )
    fewer = {"name": "short", "items": 5000}
    for name, peer in alternate(__file__, {"executor": fewer, "spdl": fewer}, rounds=3).items():
        told = "ThreadPoolExecutor.map" if name == "executor" else name
        row = versus("the same, 5,000 calls", figure, told, peer, lambda peer: over_work(peer, 5000, work))
        rows.append(row)

    given = {"name": "long"}
    variants = {
        "alone": given,
        "penstock": given,
        "executor": {**given, "items": LONG},
        "spdl": {**given, "items": LONG},
    }
    found = alternate(__file__, variants, rounds=3)
    ours, work = need(found["penstock"], "penstock"), need(found["alone"], "the work alone")
    share = work["seconds"] / WORKERS / ours["seconds"]
    claim = f"{LONG} calls of {work['seconds'] / LONG * 1e3:.1f} ms that free the interpreter, {WORKERS} threads"
    figure = f"{share:.0%} of both cores"
    rows.append(Row(claim, figure, "the work in a loop", f"{work['seconds']:.2f} s", "", "≥ 95 %", share >= 0.95))
    for name in ("executor", "spdl"):
        told = "ThreadPoolExecutor.map" if name == "executor" else name
        rows.append(
            versus("the same", figure, told, found[name], lambda peer: f"{work['seconds'] / 2 / peer['seconds']:.0%}")
        )

    given = {"name": "mixed"}
    variants = {
        "alone": given,
        "unordered": {"of": "penstock", **given, "ordered": False},
        "ordered": {"of": "penstock", **given},
        "executor": {**given, "items": MIXED},
        "spdl": {**given, "items": MIXED},
    }
    found = alternate(__file__, variants, rounds=3)
    work = need(found["alone"], "the work alone")
    ideal = work["seconds"] / WORKERS
    for ordered in ("unordered", "ordered"):
        ours = need(found[ordered], "penstock")
        row = Row(
            f"{MIXED:,} calls, 99 % of 10 µs and 1 % of 100 ms, {ordered}",
            f"{ours['seconds']:.2f} s",
            "ideal: the work / 2",
            f"{ideal:.2f} s",
            f"{ours['seconds'] / ideal - 1:+.0%}",
        )
        if ordered == "unordered":
            row.target, row.met = "+ 10 %", ours["seconds"] <= 1.1 * ideal
        rows.append(row)
    figure = f"{need(found['unordered'], 'penstock')['seconds']:.2f} s"
    for name in ("executor", "spdl"):
        told = "ThreadPoolExecutor.map" if name == "executor" else name
        rows.append(versus("the same", figure, told, found[name], lambda peer: f"{peer['seconds']:.2f} s"))
    return Outcome(rows)


def over_work(peer: Figures, items: int, work: Figures) -> str:
    return f"{(peer['seconds'] / items - work['seconds'] / SHORT) * 1e6:.1f} µs an item over the work"


if __name__ == "__main__":
    main(run, alone, penstock, executor, spdl)
