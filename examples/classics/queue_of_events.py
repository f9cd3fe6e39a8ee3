"""A queue of events and a consumer, the second thing that everybody writes with asyncio: and what a crash leaves of it.

    python examples/classics/queue_of_events.py           one at a time, then five at once, in memory
    python examples/classics/queue_of_events.py --kill    in a file, the consumer killed (SIGKILL) half way

With ``asyncio.Queue``, what was queued dies with the process. Here the queue is a topic of an event log: each event is
acknowledged when its result is written, so after the kill another run handles what is left, and nothing twice.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path

import penstock as ps

FOLDER = Path("run/queue")
QUEUE, RESULTS = FOLDER / "events.db", FOLDER / "results.jsonl"


async def process(event: str) -> str:
    await asyncio.sleep(1)
    return f"Processed: {event}"


async def produce(log: ps.EventLog) -> None:
    for number in range(5):
        await log.topic("events").publish(f"Event {number}")


async def in_memory(at_once: int) -> list[str]:
    """The results in the order they came; ends when the queue is drained."""
    results: list[str] = []
    async with ps.EventLog(":memory:") as log:
        await produce(log)
        events = log.topic("events").flow("consumer")
        await events.map(process, concurrency=at_once).to(results.append).run(until="drained")
    return results


def consume_file() -> ps.Report:
    """The events of the file, one at a time, into another."""
    events = ps.EventLog(QUEUE).topic("events").flow("consumer")
    return events.map(process, concurrency=1).to(RESULTS).run_sync(until="drained")


def killed_half_way() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)

    async def fill() -> None:
        async with ps.EventLog(QUEUE) as log:
            await produce(log)

    asyncio.run(fill())
    consumer = subprocess.Popen([sys.executable, __file__, "--consume"])
    while consumer.poll() is None and (not RESULTS.exists() or RESULTS.read_text().count("\n") < 2):
        time.sleep(0.01)
    assert consumer.poll() is None, "the consumer has ended before it could be killed"
    consumer.kill()
    consumer.wait()
    print(f"killed after {RESULTS.read_text().count(chr(10))} of 5; again:")
    print(consume_file())
    print(RESULTS.read_text(), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kill", action="store_true", help="in a file, killed half way")
    parser.add_argument("--consume", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.consume:
        consume_file()
    elif given.kill:
        killed_half_way()
    else:
        for at_once in (1, 5):
            began = time.perf_counter()
            results = asyncio.run(in_memory(at_once))
            print(f"{at_once} at once: {time.perf_counter() - began:.1f} s, {', '.join(results)}")


if __name__ == "__main__":
    main()
