"""Fetch, then process: the first thing that everybody writes with asyncio, and the barrier that nobody sees in it.

    python examples/classics/fetch_then_process.py

With ``gather`` over the fetches and then over the processing, nothing is processed until everything is fetched. In a
flow each source goes on by itself, so the whole takes as long as the longest single chain. It is timed both ways: the
three sources of the tutorials, which take the same time each, and a hundred that don't.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable

import penstock as ps

Fetch = Callable[[int], Awaitable[str]]
Process = Callable[[str], Awaitable[str]]


async def fetch(source: int) -> str:
    await asyncio.sleep(2)
    return f"Data from source {source}"


async def process(data: str) -> str:
    await asyncio.sleep(1)
    return f"Processed: {data}"


async def with_gather(sources: Iterable[int], fetch: Fetch, process: Process) -> list[str]:
    """As it is usually written."""
    fetched = await asyncio.gather(*(fetch(source) for source in sources))
    return await asyncio.gather(*(process(data) for data in fetched))


async def with_penstock(sources: Iterable[int], fetch: Fetch, process: Process) -> list[str]:
    """The same as a flow; a hundred at once, which ``gather`` doesn't bound at all."""
    return await ps.Flow(sources, concurrency=100).map(fetch).map(process).collect()


class Uneven:
    """A hundred sources that take from half a second to two, and their processing, from a fifth of one to one."""

    def __init__(self, count: int = 100) -> None:
        draw = random.Random(1)
        self.sources = range(count)
        self.fetching = {source: draw.uniform(0.5, 2) for source in self.sources}
        self.processing = {source: draw.uniform(0.2, 1) for source in self.sources}

    async def fetch(self, source: int) -> str:
        await asyncio.sleep(self.fetching[source])
        return str(source)

    async def process(self, data: str) -> str:
        await asyncio.sleep(self.processing[int(data)])
        return f"Processed: {data}"

    @property
    def longest_chain(self) -> float:
        return max(self.fetching[source] + self.processing[source] for source in self.sources)

    @property
    def barrier(self) -> float:
        return max(self.fetching.values()) + max(self.processing.values())


async def timed(work: Awaitable[list[str]]) -> tuple[float, list[str]]:
    clock = asyncio.get_running_loop().time
    began = clock()
    results = await work
    return clock() - began, results


async def main() -> None:
    await with_penstock([], fetch, process)  # what is imported on first use isn't timed
    seconds, before = await timed(with_gather([1, 2, 3], fetch, process))
    print(f"three sources, gather:    {seconds:.2f} s")
    seconds, after = await timed(with_penstock([1, 2, 3], fetch, process))
    print(f"three sources, penstock:  {seconds:.2f} s, the same results: {before == after}")
    uneven = Uneven()
    seconds, before = await timed(with_gather(uneven.sources, uneven.fetch, uneven.process))
    print(f"a hundred, gather:        {seconds:.2f} s (longest fetch + longest processing: {uneven.barrier:.2f} s)")
    seconds, after = await timed(with_penstock(uneven.sources, uneven.fetch, uneven.process))
    print(f"a hundred, penstock:      {seconds:.2f} s (longest single chain: {uneven.longest_chain:.2f} s)")
    print(f"the same results: {before == after}")


if __name__ == "__main__":
    asyncio.run(main())
