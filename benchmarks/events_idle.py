"""What it costs a group to wait in another process, and how soon it has what is published here.

penstock: a subscription to an empty topic of a file. Beside it a queue written by hand, an SQLite table (WAL,
synchronous=FULL) at which the other process looks every millisecond. Both put on the disk what was published, and
then that it was taken, before the handler has it: two commits between the clocks, CLOCK_MONOTONIC in both processes.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

from brokers import folder
from harness import Figures, NotRun, Outcome, Row, alternate, main, need, versus

SECONDS = 5.0
"""How long nothing is published, while the other process' CPU time is counted."""
EVENTS = 100
ROUNDS = 3
DEADLINE = 60
MOST_CPU = 0.01
MOST_MS = 5.0

Publish = Callable[[bytes], Awaitable[Any]]


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


# -- the process that waits --------------------------------------------------------------------------------------------


async def received(events: AsyncIterator[tuple[bytes, Callable[[], Awaitable[Any]]]]) -> Figures:
    """What the waiting process measures: one event, a long wait, then one after the other."""
    print("waiting", flush=True)
    delays: list[float] = []
    cpu, began, share = 0.0, 0.0, 0.0
    count = 0
    async with asyncio.timeout(DEADLINE):  # or it would wait for a publisher that was killed
        async for body, done in events:
            arrived = now()
            if count == 0:
                cpu, began = time.process_time(), time.perf_counter()
            elif count == 1:
                share = (time.process_time() - cpu) / (time.perf_counter() - began)
            if count > 1:
                delays.append((arrived - int(body)) / 1e6)
            await done()
            count += 1
            if count == EVENTS + 2:
                break
    delays.sort()
    return {"cpu": share, "p50": median(delays), "p95": delays[int(len(delays) * 0.95)]}


def subscriber(path: str) -> Figures:
    import penstock as ps

    async def work() -> Figures:
        async with ps.EventLog(path) as log, log.topic("events", bytes).subscribe("g") as deliveries:
            return await received((delivery.value, delivery.ack) async for delivery in deliveries)

    return asyncio.run(work())


def poller(path: str) -> Figures:
    connection = table(path)

    async def events() -> AsyncIterator[tuple[bytes, Callable[[], Awaitable[Any]]]]:
        while True:
            found = connection.execute("SELECT seq, body FROM queue WHERE taken = 0 ORDER BY seq LIMIT 1").fetchone()
            if found is None:
                await asyncio.sleep(0.001)
                continue
            seq, body = found
            connection.execute("UPDATE queue SET taken = 1 WHERE seq = ?", (seq,))

            async def done(seq: int = seq) -> None:
                connection.execute("DELETE FROM queue WHERE seq = ?", (seq,))

            yield body, done

    return asyncio.run(received(events()))


def table(path: str) -> Any:
    import apsw

    connection = apsw.Connection(path)
    connection.set_busy_timeout(10_000)
    connection.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL").fetchall()
    connection.execute("CREATE TABLE IF NOT EXISTS queue(seq INTEGER PRIMARY KEY, body BLOB, taken INTEGER)")
    connection.execute("CREATE INDEX IF NOT EXISTS untaken ON queue(seq) WHERE taken = 0")
    return connection


# -- the process that publishes ----------------------------------------------------------------------------------------


async def published(waiting: subprocess.Popen[str], publish: Publish) -> Figures:
    """Publish what ``received`` expects; its figures, and how long it takes until it is published."""
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "waiting\n"
    await publish(b"0")
    await asyncio.sleep(SECONDS)
    await publish(b"0")
    took = []
    chance = random.Random(7)
    for _ in range(EVENTS):
        await asyncio.sleep(chance.uniform(0.02, 0.04))
        began = now()
        await publish(str(began).encode())
        took.append((now() - began) / 1e6)
    said = await asyncio.to_thread(waiting.stdout.read)
    figures: Figures = json.loads(said.splitlines()[-1])
    return {**figures, "publish": median(took)}


def started(variant: Callable[..., Figures], path: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--one", variant.__name__, json.dumps({"path": path})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def penstock() -> Figures:
    import penstock as ps

    async def work(path: str) -> Figures:
        async with ps.EventLog(path) as log:
            topic = log.topic("events", bytes)
            with started(subscriber, path) as waiting:
                return await published(waiting, topic.publish)

    with folder() as place:
        return asyncio.run(work(str(Path(place, "log"))))


def polling() -> Figures:
    async def work(path: str) -> Figures:
        connection = table(path)

        async def publish(body: bytes) -> None:
            connection.execute("INSERT INTO queue(body, taken) VALUES (?, 0)", (body,))

        with started(poller, path) as waiting:
            return await published(waiting, publish)

    with folder() as place:
        return asyncio.run(work(str(Path(place, "table"))))


def run() -> Outcome:
    found = alternate(__file__, {"penstock": {}, "polling": {}}, ROUNDS)
    ours, peer = need(found["penstock"], "penstock"), found["polling"]
    rows = [
        beside("CPU while nothing comes", ours, peer, "cpu", lambda share: f"{share:.2%}", MOST_CPU),
        beside("published here, in hand there (p50)", ours, peer, "p50", lambda delay: f"{delay:.2f} ms", MOST_MS),
    ]
    remark = (
        f"{SECONDS:.0f} s without events, then {EVENTS} one by one; {ROUNDS} times. p95: {ours['p95']:.2f} ms; until "
        f"publish() returns: {ours['publish']:.2f} ms."
    )
    return Outcome(rows, remarks=[remark])


def beside(
    claim: str, ours: Figures, peer: Figures | NotRun, figure: str, told: Callable[[float], str], most: float
) -> Row:
    row = versus(claim, told(ours[figure]), "a table, looked at every ms", peer, lambda its: told(its[figure]))
    row.target, row.met = f"≤ {told(most)}", ours[figure] <= most
    return row


if __name__ == "__main__":
    main(run, penstock, polling, subscriber, poller)
