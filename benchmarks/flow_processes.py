"""What goes to a process and back: 100 bytes, 100 kilobytes, 3 megabytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from harness import Figures, NotRun, Outcome, Row, alternate, main, need, times, versus

ITEMS = {"100 B": 100_000, "100 KB": 3_000, "3 MB": 300}
FEWER = {"100 B": 3_000, "100 KB": 500, "3 MB": 60}
"""For peers that take a hundred times as long."""


def answer_bytes(data: bytes) -> bytes:
    return data[1:] + data[:1]


def answer_array(data: Any) -> Any:
    """A new array: nothing can be handed back as it came."""
    return data + 1


def work_of(size: str) -> tuple[Callable[[Any], Any], Any]:
    """The function, and what it is called with."""
    if size == "100 B":
        return answer_bytes, bytes(100)
    import numpy as np

    return answer_array, np.zeros(100_000 if size == "100 KB" else 3_000_000, np.uint8)


def alone(size: str, items: int) -> Figures:
    """The work itself, without going anywhere."""
    function, value = work_of(size)
    return timed([function(value) for _ in range(1)], (function(value) for _ in range(items)), items)


def penstock(size: str, items: int) -> Figures:
    import penstock as ps

    function, value = work_of(size)
    warm = items // 10

    async def work() -> Figures:
        seen, began = 0, 0.0
        async for _ in ps.Flow(value for _ in range(items + warm)).map(function, place="process", workers=1):
            seen += 1
            if seen == warm:  # from here on the worker runs and its chunks have found their size
                began = time.perf_counter()
        assert seen == items + warm
        return {"microseconds": (time.perf_counter() - began) / items * 1e6}

    return asyncio.run(work())


def executor(size: str, items: int, chunksize: int = 1) -> Figures:
    from concurrent.futures import ProcessPoolExecutor

    function, value = work_of(size)
    with ProcessPoolExecutor(1) as pool:
        return timed(list(pool.map(function, [value])), pool.map(function, [value] * items, chunksize=chunksize), items)


def joblib(size: str, items: int) -> Figures:
    from joblib import Parallel, delayed

    function, value = work_of(size)
    # Two, for with one joblib runs everything in the calling process.
    with Parallel(n_jobs=2, return_as="generator") as parallel:
        warm = list(parallel(delayed(function)(value) for _ in range(4)))
        return timed(warm, parallel(delayed(function)(value) for _ in range(items)), items)


def pypeln(size: str, items: int) -> Figures:
    import pypeln as pl

    function, value = work_of(size)
    warm = items // 10
    seen, began = 0, 0.0
    for _ in pl.process.map(function, (value for _ in range(items + warm)), workers=1, maxsize=64):
        seen += 1
        if seen == warm:
            began = time.perf_counter()
    assert seen == items + warm
    return {"microseconds": (time.perf_counter() - began) / items * 1e6}


def timed(warm: Sequence[Any], results: Iterable[Any], items: int) -> Figures:
    """``warm`` was worked on before: the workers run."""
    assert warm
    began = time.perf_counter()
    assert sum(1 for _ in results) == items
    return {"microseconds": (time.perf_counter() - began) / items * 1e6}


def told(figures: Figures) -> str:
    value = figures["microseconds"]
    return f"{value / 1000:.2f} ms an item" if value >= 1000 else f"{value:.{0 if value >= 100 else 1}f} µs an item"


def run() -> Outcome:
    rows = []
    for size, items in ITEMS.items():
        fewer = {"size": size, "items": FEWER[size]}
        variants: dict[str, dict[str, Any]] = {
            "penstock": {"size": size, "items": items},
            "alone": {"size": size, "items": items},
            "ProcessPoolExecutor, chunksize 1": {"of": "executor", **fewer},
        }
        for chunksize in (4, 16) if size == "3 MB" else (16, 256):
            count = items if size == "100 B" else FEWER[size] * 2
            variants[f"ProcessPoolExecutor, chunksize {chunksize}"] = {
                "of": "executor", "size": size, "items": count, "chunksize": chunksize
            }  # fmt: skip
        variants |= {"joblib": fewer, "pypeln": fewer}
        found = alternate(__file__, variants, rounds=3)
        ours, work = need(found.pop("penstock"), "penstock"), need(found.pop("alone"), "the work alone")
        rows.append(Row(f"{size} to a process and back", told(ours), "the work alone", told(work)))
        if size == "100 B":
            over = ours["microseconds"]
            rows[-1].target, rows[-1].met = "≤ 3 µs an item", over <= 3
        best = min(
            (name for name in found if name.startswith("Process") and not isinstance(found[name], NotRun)),
            key=lambda name: need(found[name], name)["microseconds"],
        )
        for name, peer in found.items():
            if name.startswith("Process") and not name.endswith(" 1") and name != best:
                continue
            row = versus(size, told(ours), name, peer, told)
            if not isinstance(peer, NotRun):
                ratio = peer["microseconds"] / ours["microseconds"]
                row.ratio = times(ratio)
                least = {"100 B": 30, "3 MB": 8}.get(size)
                if least and name.endswith("chunksize 1"):
                    row.target, row.met = f"≥ {least}×", ratio >= least
            rows.append(row)
    return Outcome(
        rows,
        remarks=["One worker each (joblib: two). The function makes a new value of the same size."],
    )


if __name__ == "__main__":
    main(run, alone, penstock, executor, joblib, pypeln)
