"""Law 4, step by step: a process that ends right before or after each of its disk operations, one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("unmeasured")

# Forks a child for every step: the n-th child ends at its n-th disk operation. Another child then looks at what is
# there and goes on to the end.
SCRIPT = """
import asyncio, os, sys, traceback
from tests.files.sinks import *
from penstock.flow import disk
from penstock.flow.journal import Journal
from penstock.flow.letters import JournalReader
import pyarrow.parquet

name = sys.argv[1]
steps = 0

def ends_at(last, module, function):
    real = getattr(module, function)
    def counted(*args, **kwargs):
        step(last)
        result = real(*args, **kwargs)
        step(last)
        return result
    setattr(module, function, counted)

def step(last):
    global steps
    steps += 1
    if steps == last:
        os._exit(9)

async def job(committed=None):
    sink = sink_of(name)
    progress = await sink.open(JOB)
    n = progress.settled.of("in").watermark
    assert len(progress.settled) == n and n % 10 == 0, progress
    if committed is not None:
        assert n in committed, (n, committed)
    for start in range(n, 20, 10):
        await sink.write(outputs(range(start, start + 9)))
        await sink.commit(settled(range(start, start + 9), [start + 9]))
        os.write(said, b"%d\\n" % (start + 10))
    await sink.close()

def forked(function, *args):
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def crash(last):
    for module, function in (
        (os, "write"), (os, "fdatasync"), (os, "fsync"), (os, "rename"), (os, "ftruncate"), (os, "unlink"),
        (Journal, "begin"), (Journal, "transaction"), (Journal, "close"),
    ):
        if hasattr(module, function):
            ends_at(last, module, function)
    asyncio.run(job())

def look(committed):
    asyncio.run(job(committed))
    assert rows_of(name) == [n for n in range(20) if n % 10 != 9], rows_of(name)
    reader = JournalReader(name)
    assert [letter.item["n"] for _, letter in reader.letters(0, 99, 99)] == [9, 19]
    assert reader.counts() == {"delivered": 18, "dead": 2}
    reader.close()
    assert not [entry for entry in os.listdir(name) if entry.startswith(".")] if os.path.isdir(name) else True

for last in range(1, 1000):
    os.makedirs(str(last))
    os.chdir(str(last))
    heard, said = os.pipe()
    code = forked(crash, last)
    os.close(said)
    told = [int(line) for line in os.read(heard, 1000).split()]
    os.close(heard)
    assert code in (0, 9), code
    promised = max(told, default=0)
    said = os.open(os.devnull, os.O_WRONLY)
    # What a commit promised counts; the one that was in progress counts or doesn't.
    assert forked(look, {promised, promised + 10}) == 0, last
    os.close(said)
    os.chdir("..")
    if code == 0:
        break
print(last)
"""


@pytest.mark.parametrize(
    "name",
    ["out.jsonl", "out.db", *(pytest.param(name, marks=pytest.mark.soak) for name in ("out.jsonl.gz", "out.parquet"))],
)
def test_law_exactly_once_ending_at_every_step(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, name]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout) > 10
