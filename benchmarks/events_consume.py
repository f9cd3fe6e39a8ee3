"""What a group reads: 50,000 events of 200 bytes claimed, handed to a function that does nothing, and acknowledged.

penstock as a flow (``topic.flow("g").map(f).to(g)``) and as a loop (100 tasks over one subscription, each event
acknowledged by itself); claims and acknowledgements are on the disk. Redis: XREADGROUP of 500, and one XACK for them.
NATS: a pull consumer's ``fetch(500)``, and an ack for each.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from brokers import SERVERS, folder, serving, versions
from harness import Figures, NotRun, Outcome, alternate, main, need, times, versus

EVENTS = 50_000
BODY = bytes(range(200))
BATCH = 500
TASKS = 100
ROUNDS = 3
TARGET = 2
OURS = {"flow": "a flow", "loop": f"a loop, {TASKS} tasks"}


async def noop(value: bytes) -> bytes:
    return value


async def filled(path: Path) -> Any:
    """A log with the events in it, opened."""
    import penstock as ps

    log = await ps.EventLog(path).open()
    for first in range(0, EVENTS, 1_000):
        await log.topic("events", bytes).publish_many([BODY] * min(1_000, EVENTS - first))
    return log


def flow() -> Figures:
    async def work(path: Path) -> Figures:
        log = await filled(path)
        seen: list[bytes] = []
        job = log.topic("events", bytes).flow("g").map(noop).to(seen.append)
        began = time.perf_counter()
        await job.run(until="drained", progress=False)
        seconds = time.perf_counter() - began
        await log.close()
        assert len(seen) == EVENTS
        return {"rate": EVENTS / seconds}

    with folder() as place:
        return asyncio.run(work(Path(place, "log")))


def loop() -> Figures:
    async def work(path: Path) -> Figures:
        log = await filled(path)
        seen = 0

        async def one(deliveries: Any) -> None:
            nonlocal seen
            async for delivery in deliveries:
                async with delivery as value:
                    await noop(value)
                    seen += 1

        began = time.perf_counter()
        async with log.topic("events", bytes).subscribe("g", in_flight=TASKS, until="drained") as deliveries:
            await asyncio.gather(*(one(deliveries) for _ in range(TASKS)))
        seconds = time.perf_counter() - began
        await log.close()
        assert seen == EVENTS
        return {"rate": EVENTS / seconds}

    with folder() as place:
        return asyncio.run(work(Path(place, "log")))


def redis(port: int) -> Figures:
    from redis.asyncio import Redis

    async def work() -> Figures:
        client: Any  # its types say that an answer may be anything
        async with Redis(port=port) as client:
            await client.delete("events")
            for first in range(0, EVENTS, 1_000):
                async with client.pipeline(transaction=False) as pipeline:
                    for _ in range(min(1_000, EVENTS - first)):
                        pipeline.xadd("events", {"body": BODY})
                    await pipeline.execute()
            await client.xgroup_create("events", "g", id="0")
            seen = 0
            began = time.perf_counter()
            while found := await client.xreadgroup("g", "one", {"events": ">"}, count=BATCH):
                (_, messages), *_ = found
                for _, fields in messages:
                    await noop(fields[b"body"])
                    seen += 1
                await client.xack("events", "g", *(number for number, _ in messages))
            seconds = time.perf_counter() - began
            pending = (await client.xpending("events", "g"))["pending"]
            await client.delete("events")
            assert (seen, pending) == (EVENTS, 0)
            return {"rate": EVENTS / seconds}

    return asyncio.run(work())


def nats(port: int) -> Figures:
    import nats as client

    async def work() -> Figures:
        async with await client.connect(f"nats://127.0.0.1:{port}") as connection:
            stream = connection.jetstream()
            await stream.add_stream(name="events", subjects=["events"])
            for first in range(0, EVENTS, BATCH):
                await asyncio.gather(*(stream.publish("events", BODY) for _ in range(min(BATCH, EVENTS - first))))
            consumer = await stream.pull_subscribe("events", durable="g", stream="events")
            seen = 0
            began = time.perf_counter()
            while seen < EVENTS:
                for message in await consumer.fetch(BATCH, timeout=10):
                    await noop(message.data)
                    await message.ack()
                    seen += 1
            pending: int | None = EVENTS
            while pending:  # until the server knows of all
                pending = (await consumer.consumer_info()).num_ack_pending
            seconds = time.perf_counter() - began
            await stream.delete_stream("events")
            assert seen == EVENTS
            return {"rate": EVENTS / seconds}

    return asyncio.run(work())


def told(figures: Figures) -> str:
    return f"{figures['rate']:,.0f} events/s"


def run() -> Outcome:
    rows = []
    with serving() as ports:
        variants: dict[str, dict[str, Any]] = {name: {} for name in OURS}
        variants |= {
            name: {"of": SERVERS[name][0].partition("-")[0], "port": port}
            for name, port in ports.items()
            if not isinstance(port, NotRun)
        }
        found: dict[str, Figures | NotRun] = alternate(__file__, variants, ROUNDS)
        found |= {name: port for name, port in ports.items() if isinstance(port, NotRun)}
    for name, claim in OURS.items():
        ours = need(found[name], f"penstock, {claim}")
        for peer in SERVERS:
            beside = found[peer]
            row = versus(claim, told(ours), peer, beside, told)
            if not isinstance(beside, NotRun):
                ratio = ours["rate"] / beside["rate"]
                row.ratio, row.target, row.met = times(ratio), f"≥ {TARGET}×", ratio >= TARGET
            rows.append(row)
    remark = f"{EVENTS:,} events, published before the clock starts; {ROUNDS} times. {versions()}"
    return Outcome(rows, remarks=[remark.rstrip()])


if __name__ == "__main__":
    main(run, flow, loop, redis, nats)
