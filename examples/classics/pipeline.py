"""Preprocess, infer, postprocess: the third thing that everybody writes with asyncio, and what a task an item costs.

    python examples/classics/pipeline.py

One task an item is as fast as it gets, with five items. With a million it is a million tasks, all in progress at once,
and their results are held until the last is there. A flow has 32 in progress, unless it is told otherwise, and holds
no others. The memory of both is measured, each in a process of its own, over 200,000 items that don't sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterable
from pathlib import Path

import penstock as ps

DATA = [f"Data{number}" for number in range(1, 6)]


class Stages:
    """The three stages; ``sleeps`` is how long each takes."""

    def __init__(self, *sleeps: float) -> None:
        self.sleeps = sleeps or (0.0, 0.0, 0.0)

    async def preprocess(self, data: str) -> str:
        return await self._after(0, f"Preprocessed: {data}")

    async def inference(self, data: str) -> str:
        return await self._after(1, f"Inference: {data}")

    async def postprocess(self, data: str) -> str:
        return await self._after(2, f"Postprocessed: {data}")

    async def _after(self, stage: int, result: str) -> str:
        if self.sleeps[stage]:
            await asyncio.sleep(self.sleeps[stage])
        return result


async def one_by_one(stages: Stages, items: Iterable[str]) -> list[str]:
    return [await _through(stages, item) for item in items]


async def with_tasks(stages: Stages, items: Iterable[str]) -> list[str]:
    """As it is usually written: one task an item."""
    return await asyncio.gather(*(_through(stages, item) for item in items))


async def with_penstock(stages: Stages, items: Iterable[str]) -> list[str]:
    return await flow(stages, items).collect()


def flow(stages: Stages, items: Iterable[str]) -> ps.Flow[str]:
    return ps.Flow(items).map(stages.preprocess).map(stages.inference).map(stages.postprocess)


async def _through(stages: Stages, item: str) -> str:
    return await stages.postprocess(await stages.inference(await stages.preprocess(item)))


# -- memory ------------------------------------------------------------------------------------------------------------


async def count_with_tasks(count: int) -> int:
    return len(await with_tasks(Stages(), (f"Data{number}" for number in range(count))))


async def count_with_penstock(count: int) -> int:
    """Takes the results one by one, as they come."""
    counted = 0
    async for _ in flow(Stages(), (f"Data{number}" for number in range(count))):
        counted += 1
    return counted


COUNTING = {"tasks": count_with_tasks, "penstock": count_with_penstock}


def peak_memory() -> float:
    """The most memory this process has held, in MB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:  # not Linux
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(form: str, count: int) -> tuple[float, float]:
    """Seconds, and by how many MB the memory grew, after a run of a few items."""
    asyncio.run(COUNTING[form](100))
    before, began = peak_memory(), time.perf_counter()
    assert asyncio.run(COUNTING[form](count)) == count
    return time.perf_counter() - began, peak_memory() - before


async def timed(work: Awaitable[list[str]]) -> tuple[float, list[str]]:
    clock = asyncio.get_running_loop().time
    began = clock()
    results = await work
    return clock() - began, results


async def five() -> None:
    stages = Stages(0.1, 0.2, 0.1)
    await with_penstock(stages, [])  # what is imported on first use isn't timed
    for form in (one_by_one, with_tasks, with_penstock):
        seconds, results = await timed(form(stages, DATA))
        print(f"five items, {form.__name__:14} {seconds:.1f} s, the last: {results[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200_000, help="how many items the memory is measured over")
    parser.add_argument("--measure", choices=COUNTING, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        seconds, grown = measure(given.measure, given.count)
        print(f"{given.count:,} items, {given.measure:14} {seconds:.1f} s, memory grows by {grown:.1f} MB")
        return
    asyncio.run(five())
    for form in COUNTING:
        subprocess.run([sys.executable, __file__, "--measure", form, "--count", str(given.count)], check=True)


if __name__ == "__main__":
    main()
