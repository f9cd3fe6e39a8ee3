"""What fetching costs the processor, beside bare aiohttp with a semaphore and httpx: GETs from one nginx worker.

CPU time of the client's process, a request, all bodies read whole. wrk, which parses next to nothing, is the limit.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from collections.abc import Callable, Coroutine
from typing import Any

from harness import Figures, NotRun, Outcome, Row, judged, main, measure, need, paired, times, versus
from nginx import missing, serving

SIZES = {"1k": 1_000, "100k": 100_000, "10m": 10_000_000}
COUNTS = {"1k": 20_000, "100k": 5_000, "10m": 200}
AT_ONCE = {"1k": 64, "100k": 64, "10m": 8}
TOLD = {"1k": "20,000 × 1 KB", "100k": "5,000 × 100 KB", "10m": "200 × 10 MB"}
PAIRS = {"1k": 10, "100k": 10, "10m": 10}
"""How often a part of the requests is made with each client, in turns, in one process."""

Work = Callable[[str, int, int], Coroutine[Any, Any, int]]


async def with_penstock(url: str, count: int, at_once: int) -> int:
    import penstock as ps

    size = 0
    async for page in ps.fetch([url] * count, concurrency=at_once, allow_private=True):
        size += len(page.body)
    return size


async def with_auto(url: str, count: int, at_once: int) -> int:
    import penstock as ps

    size = 0
    async for page in ps.fetch([url] * count, allow_private=True):
        size += len(page.body)
    return size


async def with_aiohttp(url: str, count: int, at_once: int) -> int:
    import aiohttp

    gate = asyncio.Semaphore(at_once)

    async def one() -> int:
        async with gate, session.get(url) as response:
            response.raise_for_status()
            return len(await response.read())

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return sum(await asyncio.gather(*(one() for _ in range(count))))


async def with_httpx(url: str, count: int, at_once: int) -> int:
    import httpx

    gate = asyncio.Semaphore(at_once)

    async def one() -> int:
        async with gate:
            response = await client.get(url)
            response.raise_for_status()
            return len(response.content)

    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        return sum(await asyncio.gather(*(one() for _ in range(count))))


def used(work: Work, url: str, count: int, at_once: int, size: int) -> float:
    """CPU seconds a request."""
    began = time.process_time()
    assert asyncio.run(work(url, count, at_once)) == count * size
    return (time.process_time() - began) / count


def beside_aiohttp(url: str, name: str, auto: bool) -> Figures:
    """In one process and in turns: a few per cent can't be seen otherwise."""
    count, at_once, size = COUNTS[name] // PAIRS[name], AT_ONCE[name], SIZES[name]
    work = with_auto if auto else with_penstock
    for warm in (work, with_aiohttp):
        asyncio.run(warm(url, min(count, 64), at_once))
    return paired(
        lambda: used(work, url, count, at_once, size),
        lambda: used(with_aiohttp, url, count, at_once, size),
        PAIRS[name],
    )


def httpx(url: str, name: str) -> Figures:
    count, at_once, size = COUNTS[name] // 5, AT_ONCE[name], SIZES[name]
    asyncio.run(with_httpx(url, 32, at_once))
    return {"cpu": used(with_httpx, url, count, at_once, size)}


def wrk(url: str, name: str) -> Figures | NotRun:
    lacking = missing("wrk")
    if lacking:
        return NotRun(lacking)
    before = os.times()
    command = ["wrk", "-t1", f"-c{AT_ONCE[name]}", "-d3s", f"{url}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    requests = int(re.search(r"(\d+) requests in", said)[1])  # type: ignore[index]  # or it has failed
    return {"cpu": cpu / requests}


def told(figures: Figures) -> str:
    return f"{figures['cpu'] * 1e6:,.0f} µs CPU"


def run() -> Outcome:
    lacking = missing("nginx")
    if lacking:
        raise SystemExit(f"fetch_overhead: {lacking}")
    rows = []
    with serving(SIZES) as root:
        for name in SIZES:
            url = f"{root}/{name}"
            found = need(measure(__file__, "beside_aiohttp", url=url, name=name, auto=False), "penstock")
            ours = f"{found['some'] * 1e6:,.0f} µs CPU"
            row = Row(TOLD[name], ours, "aiohttp, a semaphore", f"{found['others'] * 1e6:,.0f} µs CPU")
            rows.append(judged(row, found, 0.10))
            auto = need(measure(__file__, "beside_aiohttp", url=url, name=name, auto=True), "penstock")
            row = Row(f'{TOLD[name]}, concurrency="auto"', f"{auto['some'] * 1e6:,.0f} µs CPU", "aiohttp, a semaphore")
            row.beside, row.ratio = f"{auto['others'] * 1e6:,.0f} µs CPU", f"{auto['cost']:+.1%}"
            rows.append(row)
            peer = measure(__file__, "httpx", url=url, name=name)
            row = versus(TOLD[name], ours, "httpx, a semaphore", peer, told)
            if not isinstance(peer, NotRun):
                ratio = peer["cpu"] / found["some"]
                row.ratio = times(ratio)
                if name == "1k":
                    row.target, row.met = "≥ 3×", ratio >= 3
            rows.append(row)
            rows.append(versus(TOLD[name], ours, "wrk (the limit)", wrk(url, name), told))
    return Outcome(rows, remarks=["64 at once (10 MB: 8). In turns, in one process; httpx in a process of its own."])


if __name__ == "__main__":
    main(run, beside_aiohttp, httpx)
