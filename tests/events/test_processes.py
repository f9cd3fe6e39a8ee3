"""Several processes on one file: they wake each other, take over from the dead, and none acknowledges too late."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import apsw
import pytest
from tests.events.programs import Program, program

import penstock as ps

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


async def values_of(path: Path, topic: str = "t") -> list[int]:
    async with ps.EventLog(path) as log:
        return [event.value async for event in log.topic(topic).read()]


async def published(path: Path, *values: int, key: str | None = None) -> None:
    async with ps.EventLog(path) as log:
        await log.topic("t").publish_many(values, key=lambda _: key)


def is_intact(path: Path) -> bool:
    connection = apsw.Connection(str(path))
    try:
        return bool(connection.pragma("integrity_check") == "ok")
    finally:
        connection.close()


def test_a_process_that_waits_is_woken(path: Path) -> None:
    async def main() -> None:
        async with ps.EventLog(path) as log:
            with program("wait", path) as waiting:
                assert waiting.line() == "ready"
                for number in range(20):
                    await log.topic("t").publish(number)
                    assert await asyncio.to_thread(waiting.line) == str(number)

    asyncio.run(main())


@pytest.mark.parametrize("kills", [10, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("how", ["publish", "publish_together"])
def test_what_was_acknowledged_is_there_whenever_the_publisher_is_killed(path: Path, how: str, kills: int) -> None:
    draw = random.Random(kills)
    acknowledged: list[int] = []
    for kill in range(kills):
        with program(how, path, kill * 1_000_000, 7) as publisher:
            assert publisher.line() == "ready"
            time.sleep(draw.random() * 0.5 if kills > 100 else draw.random() * 0.1)
            publisher.kill()
            lines = publisher.lines()
        acknowledged += [int(line) for line in lines[:-1]]
    stored = asyncio.run(values_of(path))
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored))
    assert stored == sorted(stored)
    assert is_intact(path)


def test_a_dead_process_gives_back_what_it_held_at_once(path: Path) -> None:
    """The lease would take ten minutes."""
    asyncio.run(published(path, 1, 2))
    with program("hold", path, 600) as holder:
        assert holder.line() == "holds 1"
        with program("consume", path, 600, 5) as heir:
            assert heir.wait_for("end 2")
            holder.kill()
            assert heir.wait_for("begin 1") == "begin 1 2"


def test_a_stopped_process_loses_its_lease_and_cant_acknowledge(path: Path) -> None:
    asyncio.run(published(path, 1))
    with program("hold", path, 1) as holder:
        assert holder.line() == "holds 1"
        holder.process.send_signal(signal.SIGSTOP)
        with program("consume", path, 1, 5) as heir:
            assert heir.wait_for("begin 1") == "begin 1 2"
            heir.wait_for("end 1")
        holder.process.send_signal(signal.SIGCONT)
        holder.tell("go on")
        assert holder.line() == "lost"


def test_a_lease_is_kept_for_as_long_as_the_process_works(path: Path) -> None:
    asyncio.run(published(path, 1, 2))
    with program("hold", path, 0.3) as holder:
        assert holder.line() == "holds 1"
        with program("consume", path, 0.3, 5) as other:
            other.wait_for("end 2")
            time.sleep(2)
            holder.tell("go on")
            assert holder.line() == "acknowledged"
            other.kill()
            assert [line for line in other.lines() if line.startswith("begin 1")] == []


def test_a_deadly_event_takes_no_innocents_with_it(path: Path) -> None:
    asyncio.run(published(path, *range(30), -1, *range(30, 60)))
    handled: list[int] = []
    deaths = 0
    while True:
        with program("consume", path, 600, 3) as consumer:
            while line := consumer.line():
                if line.startswith("end"):
                    handled.append(int(line.split()[1]))
                if set(handled) == set(range(60)) and deaths == 3:
                    break
            else:
                assert consumer.end() == 3
                deaths += 1
                continue
        break

    async def dead() -> list[tuple[int, int, str]]:
        async with ps.EventLog(path) as log:
            return [(letter.event.value, letter.attempts, letter.reason) async for letter in log.topic("t").dead()]

    assert asyncio.run(dead()) == [(-1, 3, "died")]


@pytest.mark.parametrize(
    ("events", "kills"), [(3000, 4), pytest.param(100_000, 60, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_four_processes_in_a_group_one_killed_again_and_again(path: Path, events: int, kills: int) -> None:
    """Each event is handled to its end, those of a key in order, and none is in the dead letters."""
    draw = random.Random(events)

    async def publish() -> None:
        async with ps.EventLog(path) as log:
            topic = log.topic("t")
            for start in range(0, events, 500):
                numbers = range(start, min(events, start + 500))
                await topic.publish_many(numbers, key=lambda number: f"k{number % 1000}")

    outputs = [path.with_name(f"said-{number}") for number in range(4 + kills)]
    ready = iter(outputs)

    def start() -> Program:
        with open(next(ready), "w") as output:  # a pipe would be full
            return Program("consume", path, 600, 5, output=output)

    consumers = [start() for _ in range(4)]
    try:
        asyncio.run(publish())
        for _ in range(kills):
            time.sleep(1 if kills > 10 else 0.2)
            victim = draw.randrange(4)
            consumers[victim].stop()
            consumers[victim] = start()
        asyncio.run(drained(path))
    finally:
        for consumer in consumers:
            consumer.stop()
    said = [[line for line in output.read_text().splitlines(True) if line.endswith("\n")] for output in outputs]

    ended = {int(line.split()[1]) for lines in said for line in lines if line.startswith("end")}
    begun: dict[int, int] = defaultdict(int)
    for lines in said:
        last: dict[int, int] = {}
        for line in lines:
            if line.startswith("begin") and len(line.split()) == 3:
                number = int(line.split()[1])
                begun[number] += 1
                assert last.get(number % 1000, -1) <= number, "out of order within a key"
                last[number % 1000] = number
    assert len(ended) >= events - kills  # one may have been acknowledged and killed before it said so
    assert set(begun) == set(range(events))

    async def dead() -> int:
        async with ps.EventLog(path) as log:
            return len([letter async for letter in log.topic("t").dead()])

    assert asyncio.run(dead()) == 0


async def drained(path: Path) -> None:
    """Wait until a group has handled everything."""
    async with ps.EventLog(path) as log, log.topic("t").subscribe("g", until="drained") as deliveries:
        async for delivery in deliveries:
            await delivery.release()
            await asyncio.sleep(0.05)  # leave it to the others
