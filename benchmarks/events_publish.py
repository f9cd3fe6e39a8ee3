"""Durable publishes of 200 bytes by 1, 100 and 1,000 tasks, each awaiting one after the other: events a second.

penstock's are on the disk (fsync) when ``publish`` returns, and so are Redis' with ``appendfsync always``. Redis by
default (AOF off) and NATS (fsync every two minutes) lose the last ones in a power cut. The limit: the same rows by
apsw's ``executemany`` into a table (WAL, synchronous=FULL), a transaction for each as many as there are publishers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from brokers import SERVERS, folder, serving, versions
from harness import Figures, NotRun, Outcome, alternate, main, need, times, versus

PUBLISHERS = (1, 100, 1_000)
BODY = bytes(range(200))
WARM = 0.5
SECONDS = 3.0
ROUNDS = 3
LIMIT = "apsw, executemany (the limit)"
TARGET = 4
OF_LIMIT = 0.5


async def pressed(publish: Callable[[], Awaitable[Any]], publishers: int) -> Figures:
    """Have so many tasks publish all the time; how many were published a second, once all are at it."""
    count = 0
    over = False

    async def one() -> None:
        nonlocal count
        while not over:
            await publish()
            count += 1

    tasks = [asyncio.create_task(one()) for _ in range(publishers)]
    await asyncio.wait(tasks, timeout=WARM, return_when=asyncio.FIRST_EXCEPTION)
    before, began = count, time.perf_counter()
    await asyncio.wait(tasks, timeout=SECONDS, return_when=asyncio.FIRST_EXCEPTION)
    rate = (count - before) / (time.perf_counter() - began)
    over = True
    await asyncio.gather(*tasks)
    return {"rate": rate}


def penstock(publishers: int) -> Figures:
    import penstock as ps

    async def work(path: Path) -> Figures:
        async with ps.EventLog(path) as log:
            topic = log.topic("events", bytes)
            return await pressed(lambda: topic.publish(BODY), publishers)

    with folder() as place:
        return asyncio.run(work(Path(place, "log")))


def limit(publishers: int) -> Figures:
    import apsw

    columns = "place INTEGER PRIMARY KEY, time INTEGER, due INTEGER, key TEXT, id TEXT, headers TEXT, body BLOB, crc"
    with folder() as place:
        connection = apsw.Connection(str(Path(place, "table")))
        connection.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL").fetchall()
        connection.execute("PRAGMA wal_autocheckpoint = 4000").fetchall()
        connection.execute(f"CREATE TABLE events({columns})")
        rate, first, before, began = 0.0, 0, 0, time.perf_counter()
        for warm in (True, False):
            before, began = first, time.perf_counter()
            while time.perf_counter() - began < (WARM if warm else SECONDS):
                now = time.time_ns() // 1_000
                rows = [(first + seq, now, None, None, None, None, BODY, 1 << 31) for seq in range(publishers)]
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
                connection.execute("COMMIT")
                first += publishers
            rate = (first - before) / (time.perf_counter() - began)
        connection.close()
        return {"rate": rate}


def redis(port: int, publishers: int) -> Figures:
    from redis.asyncio import ConnectionPool, Redis

    async def work() -> Figures:
        pool = ConnectionPool(port=port, max_connections=publishers)  # fewer, waited for, are no faster
        async with Redis.from_pool(pool) as client:
            await client.delete("events")
            figures = await pressed(lambda: client.xadd("events", {"body": BODY}), publishers)
            await client.delete("events")
            return figures

    return asyncio.run(work())


def nats(port: int, publishers: int) -> Figures:
    import nats as client

    async def work() -> Figures:
        async with await client.connect(f"nats://127.0.0.1:{port}") as connection:
            stream = connection.jetstream()
            await stream.add_stream(name="events", subjects=["events"])
            try:
                return await pressed(lambda: stream.publish("events", BODY), publishers)
            finally:
                await stream.delete_stream("events")

    return asyncio.run(work())


def told(figures: Figures) -> str:
    return f"{figures['rate']:,.0f} events/s"


def run() -> Outcome:
    rows = []
    with serving() as ports:
        for publishers in PUBLISHERS:
            variants: dict[str, dict[str, Any]] = {"penstock": {}, LIMIT: {"of": "limit"}}
            variants |= {
                name: {"of": SERVERS[name][0].partition("-")[0], "port": port}
                for name, port in ports.items()
                if not isinstance(port, NotRun)
            }
            for parameters in variants.values():
                parameters["publishers"] = publishers
            found: dict[str, Figures | NotRun] = alternate(__file__, variants, ROUNDS)
            found |= {name: port for name, port in ports.items() if isinstance(port, NotRun)}
            ours = need(found.pop("penstock"), "penstock")
            for name, peer in found.items():
                row = versus(
                    f"{publishers:,} publishers" if publishers > 1 else "1 publisher", told(ours), name, peer, told
                )
                if not isinstance(peer, NotRun):
                    ratio = ours["rate"] / peer["rate"]
                    row.ratio = f"{ratio:.0%}" if name == LIMIT else times(ratio)
                    if publishers > 1:
                        least = OF_LIMIT if name == LIMIT else TARGET
                        row.target = f"≥ {least:.0%}" if name == LIMIT else f"≥ {least}×"
                        row.met = ratio >= least
                rows.append(row)
    return Outcome(rows, remarks=[f"{SECONDS:.0f} s each after {WARM} s, {ROUNDS} times. {versions()}".rstrip()])


if __name__ == "__main__":
    main(run, penstock, limit, redis, nats)
