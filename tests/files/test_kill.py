"""Law 4: a child that writes and commits is killed at random instants; what then counts is what was committed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.files.sinks import JOB, rows_of, run, sink_of

from penstock.files.dead import DeadSource
from penstock.flow.contract import JobId
from penstock.flow.letters import JournalReader

pytestmark = pytest.mark.usefixtures("unmeasured")

# Settles 1 … 9 items at a time, from where the last child stopped; every item of 100 dies. In its own words it says
# what it has committed: a line for each commit that returned.
CHILD = """
import asyncio, random, sys
from tests.files.sinks import *
name, seed = sys.argv[1], int(sys.argv[2])
pick = random.Random(seed)
async def main():
    sink = sink_of(name)
    progress = await sink.open(JOB)
    n = progress.settled.of("in").watermark
    assert list(progress.settled.of("in")) == ([(0, n)] if n else []), progress
    print("opened", n, flush=True)
    while True:
        numbers = range(n, n + pick.randrange(1, 10))
        dead = [number for number in numbers if number % 100 == 50]
        alive = [number for number in numbers if number % 100 != 50]
        padding = "x" * pick.choice([1, 100, 30_000])
        for number in alive:
            await sink.write([((("in", number),), [{"n": number, "text": padding}])])
        await sink.commit(settled(alive, dead))
        n = numbers.stop
        print("committed", n, flush=True)
asyncio.run(main())
"""

KILLS = 6


@pytest.mark.parametrize(
    "name",
    [
        "out.jsonl",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("out.jsonl.gz", "out.csv")),
        "out.parquet",
        "out.db",
    ],
)
def test_law_exactly_once_after_kills_at_random_instants(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pick = random.Random(name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for kill in range(KILLS):
        command = [sys.executable, "-c", CHILD, name, str(kill)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout is not None
            opened = child.stdout.readline().split()
            assert opened[:1] == ["opened"], "the child could not go on"
            delay = pick.random() ** 2 * 0.15
            deadline = time.monotonic() + delay
            said = int(opened[1])
            while time.monotonic() < deadline:
                said = int(child.stdout.readline().split()[1])
            child.send_signal(signal.SIGKILL)
            said = max(
                [said, *(int(line.split()[1]) for line in child.stdout.read().splitlines() if line[-1:].isdigit())]
            )
        progress = asyncio.run(run(sink_of(name), []))
        n = progress.settled.of("in").watermark
        assert n >= said, "what a commit had promised is lost"
        assert len(progress.settled) == n
        expected = [number for number in range(n) if number % 100 != 50]
        assert rows_of(name) == expected
        dead = [number for number in range(n) if number % 100 == 50]
        assert progress.counts == {"delivered": len(expected), "dead": len(dead)} or n == 0
        reader = JournalReader(name)
        assert [letter.item for _, letter in reader.letters(0, reader.last_letter(), 10_000)] == [
            {"n": number} for number in dead
        ]
        reader.close()
    assert not [entry for entry in os.listdir() if entry not in (name, f"{name}.journal")]


REDOING = """
import asyncio, sys
from tests.files.sinks import *
from penstock.files.dead import DeadSource
name = sys.argv[1]
async def main():
    source = DeadSource(name)
    sink = sink_of(name)
    await sink.open(JobId("redo", source.identity))
    print("opened", flush=True)
    async for batch in source.read(Progress()):
        for position, failed in batch:
            await sink.write([((position,), [{"n": failed.item["n"], "text": "mended"}])])
            delta = Delta(counts={"delivered": 1})
            delta.settled.add(position)
            await sink.commit(delta)
            print("redone", flush=True)
    await sink.close()
asyncio.run(main())
"""


@pytest.mark.parametrize("name", ["out.jsonl", "out.db"])
def test_law_exactly_once_redoing_the_dead_after_kills(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    setup = (
        "import asyncio, sys\nfrom tests.files.sinks import *\n"
        "async def main():\n"
        "    sink = sink_of(sys.argv[1])\n"
        "    await sink.open(JOB)\n"
        "    await sink.commit(settled([], range(40)))\n"
        "    await sink.close()\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", setup, name], check=True, env=environment, timeout=30)
    pick = random.Random(name)
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", REDOING, name], stdout=subprocess.PIPE, text=True, env=environment
        ) as child:
            assert child.stdout is not None
            for _ in range(pick.randrange(1, 12)):
                child.stdout.readline()
            child.send_signal(signal.SIGKILL)
    subprocess.run([sys.executable, "-c", REDOING, name], check=True, env=environment, timeout=30, capture_output=True)
    assert sorted(rows_of(name)) == list(range(40))
    reader = JournalReader(name)
    assert reader.last_letter() == 0
    assert reader.counts() == {"delivered": 40, "dead": 0}
    reader.close()
    redo = JobId("redo", DeadSource(name).identity)
    assert not asyncio.run(run(sink_of(name), [], redo)).settled
    assert asyncio.run(run(sink_of(name), [], JOB)).settled.of("in").watermark == 40
