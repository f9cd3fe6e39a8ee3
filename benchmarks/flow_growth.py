"""What more items cost: the time an item and the memory, from ten thousand items to ten million."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from flow_overhead import first, second, third
from harness import Figures, NotRun, Outcome, Picture, Row, alternate, main, need, peak_memory

SIZES = {10**4: 9, 10**5: 5, 10**6: 3, 10**7: 1}
"""How many items, and how many rounds of them."""

GATHER_TO = 10**6


def penstock(items: int) -> Figures:
    import penstock as ps

    async def work(items: int) -> int:
        count = 0
        async for _ in ps.Flow(range(items)).map(first).map(second).map(third):
            count += 1
        return count

    return timed(work, items)


def gather(items: int) -> Figures:
    async def one(x: int) -> int:
        return await third(await second(await first(x)))

    async def work(items: int) -> int:
        return len(await asyncio.gather(*(one(x) for x in range(items))))

    return timed(work, items)


def timed(work: Callable[[int], Coroutine[Any, Any, int]], items: int) -> Figures:
    """A run of a hundred items goes before, so that imports and first calls don't count."""
    asyncio.run(work(100))
    began = time.perf_counter()
    assert asyncio.run(work(items)) == items
    seconds = time.perf_counter() - began
    return {"microseconds": seconds / items * 1e6, "megabytes": peak_memory()}


def run() -> Outcome:
    rows = []
    lines: dict[str, list[tuple[float, float]]] = {"penstock": [], "gather": []}
    memory: dict[str, list[tuple[float, float]]] = {"penstock": [], "gather": []}
    for size, rounds in SIZES.items():
        found = alternate(__file__, {"penstock": {"items": size}}, rounds=rounds)
        if size <= GATHER_TO:
            found |= alternate(__file__, {"gather": {"items": size}}, rounds=min(rounds, 10**6 // size))
        for name, figures in found.items():
            if not isinstance(figures, NotRun):
                lines[name].append((size, figures["microseconds"]))
                memory[name].append((size, figures["megabytes"]))
        ours = need(found["penstock"], f"penstock at {size:,}")
        beside = found.get("gather")
        told = ""
        if beside is not None and not isinstance(beside, NotRun):
            told = f"{beside['microseconds']:.2f} µs an item, {beside['megabytes']:.0f} MB"
        figure = f"{ours['microseconds']:.2f} µs an item, {ours['megabytes']:.1f} MB"
        rows.append(Row(f"{size:,} items", figure, "gather" if told else "", told))
    costs = [cost for _, cost in lines["penstock"]]
    middle = sorted(costs)[len(costs) // 2]
    spread = max(abs(cost / middle - 1) for cost in costs)
    rows.append(
        Row("µs an item from 10⁴ to 10⁷", f"within {spread:.0%} of the median", target="± 10 %", met=spread <= 0.10)
    )
    growth = memory["penstock"][-1][1] - memory["penstock"][0][1]
    rows.append(Row("peak memory from 10⁴ to 10⁷", f"{growth:+.1f} MB", target="≤ 5 MB", met=growth <= 5))
    return Outcome(
        rows,
        [
            Picture("flow_growth_time", "Time an item", "items", "µs an item", lines, log_across=True),
            Picture("flow_growth_memory", "Peak memory", "items", "MB", memory, log_across=True, log_up=True),
        ],
    )


if __name__ == "__main__":
    main(run, penstock, gather)
