"""What can be wrong with a file, a disk and a clock: a typed error, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import apsw
import pytest

import penstock as ps
from penstock.errors import LogError, PenstockError, WriteFailed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


async def publish(path: Path, count: int, size: int = 10) -> None:
    async with ps.EventLog(path) as log:
        await log.topic("t").publish_many([f"{number:{size}}" for number in range(count)])


async def values_of(path: Path) -> list[str]:
    async with ps.EventLog(path) as log:
        return [event.value async for event in log.topic("t").read()]


async def opened(path: Path) -> None:
    async with ps.EventLog(path):
        pass


def test_it_is_there_again(path: Path) -> None:
    asyncio.run(publish(path, 3))
    assert [int(value) for value in asyncio.run(values_of(path))] == [0, 1, 2]


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"some text that is no database at all" * 100)
    with pytest.raises(LogError, match="no intact log"):
        asyncio.run(opened(path))
    assert path.read_bytes().startswith(b"some text")
    assert os.listdir(path.parent) == [path.name]


def test_a_database_of_something_else(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE mine(a); INSERT INTO mine VALUES (1)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LogError, match="it holds 'mine'"):
        asyncio.run(opened(path))
    assert path.read_bytes() == before, "its journal mode was changed"
    assert os.listdir(path.parent) == [path.name]


def test_a_newer_format(path: Path) -> None:
    asyncio.run(opened(path))
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE meta SET value = 99 WHERE name = 'format'")
    connection.close()
    with pytest.raises(LogError, match=r"newer penstock wrote it \(format 99"):
        asyncio.run(opened(path))


def test_a_directory_that_isnt_there(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="nowhere"):
        asyncio.run(opened(tmp_path / "nowhere" / "events.db"))
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_event_is_never_read_as_something_else(path: Path) -> None:
    asyncio.run(publish(path, 3))
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE events SET body = CAST('\"         X\"' AS BLOB) WHERE place % 16 = 1")
    connection.close()

    async def main() -> None:
        async with ps.EventLog(path) as log:
            topic = log.topic("t")
            with pytest.raises(LogError, match=r"event 1 .* damaged"):
                [event async for event in topic.read()]
            values = []
            async with topic.subscribe("g", until="drained") as deliveries:
                async for delivery in deliveries:
                    async with delivery as value:
                        values.append(int(value))
            assert values == [0, 2]
            assert [letter.reason async for letter in topic.dead()] == ["LogError"]

    asyncio.run(main())


@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=pytest.mark.soak)])
def test_flipped_bits_are_an_error_or_change_nothing(path: Path, flips: int) -> None:
    asyncio.run(publish(path, 200, 100))
    whole = path.read_bytes()
    expected = asyncio.run(values_of(path))
    draw = random.Random(flips)
    for _ in range(flips):
        data = bytearray(whole)
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        for rest in ("-wal", "-shm"):
            Path(f"{path}{rest}").unlink(missing_ok=True)
        try:
            found = asyncio.run(values_of(path))
        except PenstockError:
            continue
        assert found == expected[: len(found)] or set(found) <= set(expected), f"a bit of byte {at}"


FULL = """
import asyncio, resource, signal, sys
import penstock as ps

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with ps.EventLog(sys.argv[1]) as log:
        topic = log.topic("t")
        await topic.publish(-1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        number = 0
        try:
            while True:
                await topic.publish(f"{number:1000}")
                number += 1
        except ps.errors.WriteFailed as error:
            assert sys.argv[1] in str(error), error
        try:
            await topic.publish("still full" * 10_000)
        except ps.errors.WriteFailed:
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await topic.publish("after")
        print(number)

asyncio.run(main())
"""


@pytest.mark.parametrize("limit", [100_000, 300_000, 1_000_000])
def test_a_full_disk_loses_nothing_and_it_goes_on_when_there_is_room(path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(limit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    values = asyncio.run(values_of(path))
    assert values[: count + 1] == [-1, *[f"{number:1000}" for number in range(count)]]
    assert values[-1] == "after"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


def test_times_never_fall_whatever_the_clock_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    steps = iter([0, 86_400, 0, -86_400, 5])

    async def main() -> list[datetime]:
        async with ps.EventLog(path) as log:
            topic = log.topic("t")
            await topic.publish("so that it is there")
            for step in steps:
                monkeypatch.setattr(time, "time_ns", lambda step=step: now + step * 10**9)
                await topic.publish(step)
            async with topic.subscribe("g", lease=30, until="drained") as deliveries:
                async for delivery in deliveries:
                    await delivery.ack()
            return [event.time async for event in topic.read()]

    times = asyncio.run(main())
    assert times == sorted(times)
    assert times[2] > datetime.now(UTC)


def test_space_is_given_back(path: Path) -> None:
    async def main() -> None:
        async with ps.EventLog(path) as log:
            topic = log.topic("t", type=bytes)
            await topic.publish_many([os.urandom(10_000) for _ in range(500)])
            await topic.trim(keep=1)

    asyncio.run(main())
    assert path.stat().st_size < 1_000_000


def test_process_durability(path: Path) -> None:
    async def main() -> None:
        async with ps.EventLog(path, durability="process") as log:
            assert log.capabilities.durability == "process"
            await log.topic("t").publish("a")

    asyncio.run(main())
    assert asyncio.run(values_of(path)) == ["a"]


def test_a_failed_commit_fails_only_what_was_in_it(path: Path) -> None:
    """A file whose pages can't be written any more; then it is whole again."""
    asyncio.run(publish(path, 1))

    async def main() -> None:
        async with ps.EventLog(path) as log:
            topic = log.topic("t")
            assert await topic.publish("b") == 1
            store = log.store
            store._connection.close()
            with pytest.raises((WriteFailed, LogError, apsw.Error)):
                await topic.publish("c")

    asyncio.run(main())
    assert len(asyncio.run(values_of(path))) == 2
