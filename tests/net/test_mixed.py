"""Everything at once, at random: each source ends as what it is, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from typing import Any

import psutil
import pytest
from tests.net.hostile import Hostile, Seen, answer, bombs, failing_first, redirect

import penstock as ps
from penstock.errors import FetchError
from penstock.net.fetch import fetch
from penstock.net.fetched import Fetched
from penstock.net.fetcher import Fetcher
from penstock.net.repeating import as_fetch_retry
from penstock.net.timing import Timeout
from penstock.testing import run_virtual

ENDS: dict[str, set[str]] = {
    "/ok": {"ok"},
    "/encoded/gzip": {"ok"},
    "/encoded/zstd": {"ok"},
    "/unframed": {"ok"},
    "/store/100000": {"ok"},
    "/drip/3": {"ok"},
    "/around/5": {"status"},
    "/go": {"ok"},
    "/out": {"blocked"},
    "/shaky-status": {"ok"},
    "/shaky-reset": {"ok"},
    "/shaky-short": {"ok"},
    "/status/404": {"status"},
    "/status/500": {"status"},
    "/status/503": {"status"},
    "/throttle/429?Retry-After=1": {"throttled"},
    "/silent": {"timeout"},
    "/stall": {"timeout"},
    "/drip/1000": {"timeout"},
    "/reset-half-way": {"connect"},
    "/reset-at-once": {"connect"},
    "/hang-up": {"connect"},
    "/short": {"decode"},
    "/bad-chunks": {"decode"},
    "/not-http": {"decode"},
    "/not-gzip": {"decode"},
    "/endless": {"too_big"},
    "/bomb/gzip": {"too_big"},
    "/huge": {"too_big"},
}
SLOW = {"/silent", "/stall", "/drip/3", "/drip/1000", "/unframed"}  # rarer: each jump of the clock takes real time
NETWORKS = ["127.0.0.0/28"]
COUNT = 600


async def unavailable(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
    writer.write(answer(b"", "503 So"))
    return True


def routes() -> dict[str, Any]:
    from tests.net.hostile import BEHAVIOURS

    return {
        "go": redirect("/ok"),
        "out": redirect("http://127.0.0.99:9/"),
        "shaky-status": failing_first(1, unavailable),
        "shaky-reset": failing_first(1, BEHAVIOURS["reset-at-once"]),
        "shaky-short": failing_first(1, BEHAVIOURS["short"]),
    }


def end_of(found: Any) -> str:
    return "ok" if isinstance(found, Fetched) else str(found.error).partition(":")[0]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_each_of_many_ends_as_what_it_is(seed: int) -> None:
    dice = random.Random(seed)
    bombs("gzip")

    async def main() -> Any:
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(Hostile(f"127.0.0.{number}", routes=routes())) for number in range(1, 9)
            ]
            sources = []
            for number in range(COUNT):
                path = dice.choices(list(ENDS), [1 if path in SLOW else 20 for path in ENDS])[0]
                mark = "&" if "?" in path else "?"
                sources.append((path, dice.choice(servers).url(f"{path}{mark}n={number}")))
            flow = fetch(
                sources,
                request=lambda source: source[1],
                allow_private=NETWORKS,
                timeout=Timeout(connect=5, idle=5, total=8),
                retry=ps.Retry(1, backoff=0.1),
                max_bytes=500_000,
                concurrency=100,
                on_error="keep",
            )
            found = await flow.collect()
            return found, [server.open for server in servers]

    found, _ = run_virtual(main())
    assert len(found) == COUNT
    wrong = Counter()
    for one in found:
        source = one.source if isinstance(one, Fetched) else one.item
        if end_of(one) not in ENDS[source[0]]:
            wrong[source[0], end_of(one), getattr(one, "error", "")[:200]] += 1
    assert not wrong


@pytest.mark.soak
def test_a_hundred_thousand_over_a_thousand_hosts_in_flat_memory() -> None:
    """Names are all this machine; what is kept of hosts is bounded, so memory and descriptors are too."""
    sizes: list[int] = []
    descriptors: list[int] = []
    process = psutil.Process()
    paths = ["/ok", "/ok", "/ok", "/encoded/gzip", "/store/20000", "/status/404", "/short", "/reset-at-once"]

    async def main() -> Counter[str]:
        ends: Counter[str] = Counter()
        async with Hostile() as server:
            urls = (server.url(f"{paths[n % 8]}?n={n}", host=f"h{n * 7919 % 1000}.test") for n in range(100_000))
            fetcher = ps.per_worker(
                Fetcher, allow_private=True, lookup=lambda host, port: ["127.0.0.1"], retry=as_fetch_retry(1)
            )
            flow = ps.Flow(urls).map(
                fetcher, concurrency=64, ordered=False, on_error="keep", retry=as_fetch_retry(ps.Retry(1, backoff=0.01))
            )
            async for found in flow:
                ends[end_of(found)] += 1
                server.seen.clear()
                if ends.total() % 20_000 == 0:
                    gc.collect()
                    sizes.append(process.memory_info().rss)
                    descriptors.append(process.num_fds())
        return ends

    ends = asyncio.run(main())
    assert ends == {"ok": 62_500, "status": 12_500, "decode": 12_500, "connect": 12_500}
    assert max(sizes[1:]) - sizes[0] < 30_000_000, sizes
    assert max(descriptors) < 1_000, descriptors


@pytest.mark.parametrize("how", ["left", "stopped", "ended"])
def test_a_run_leaves_no_connection_however_it_ends(how: str) -> None:
    def connections(port: int) -> int:
        found = psutil.Process().net_connections("tcp4")
        return sum(1 for one in found if one.raddr and one.raddr.port == port and one.status == "ESTABLISHED")

    async def main() -> tuple[int, int]:
        async with Hostile() as server:
            urls = [server.url(path) for path in ("/ok", "/silent", "/stall", "/drip/1000", "/endless")] * 10
            last = ["http://10.0.0.1/"] if how == "stopped" else []
            flow = fetch(
                [*urls, *last],
                allow_private=["127.0.0.0/8"],
                concurrency=60,
                timeout=Timeout(idle=5, total=20),
                max_bytes=10**6,
                on_error="skip",
                retry=0,
            )
            count = 0
            try:
                async with aclosing(aiter(flow)) as pages:
                    async for _ in pages:
                        count += 1
                        if how == "left":
                            break
            except FetchError as error:
                assert error.stops_run
            return count, connections(server.port)

    count, left = run_virtual(main())
    assert count >= {"left": 1, "stopped": 0, "ended": 10}[how]
    assert left == 0
