"""Training ends, however it ends: in time, with nothing left running, and with what was applied saved."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.living import still_alive

pytestmark = pytest.mark.usefixtures("unmeasured")

DEADLINE = 60

PROGRAM = """
import asyncio, os, sys, threading, time
import numpy as np
import penstock as ps

place, how = sys.argv[1:3]

def gradient(params, batch):
    if batch >= 10:
        open("begun", "w").close()
        if how == "raises":
            raise ValueError("deliberate")
        if how == "exits":
            os._exit(3)
        time.sleep(0.01)
    return -np.ones(1)

async def main():
    kept = ps.Checkpoint("run", seconds=0)
    async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), ps.SSP(1), place, kept) as server:
        given = {"workers": 2, "epochs": 2}
        if how == "evaluates":
            given["evaluate"] = lambda params: 1 / 0
        fitting = server.fit(gradient, ps.Flow(range(20 if how == "evaluates" else 10_000)), **given)
        try:
            if how == "times out":
                async with asyncio.timeout(1.5):
                    await fitting
            else:
                await fitting
        finally:
            params, version = await server.pull()
            assert params[0] == version, (params, version)
    print("closed")

try:
    asyncio.run(main())
except BaseException as error:
    print(type(error).__name__, len(threading.enumerate()))
    if isinstance(error, SystemExit):
        raise
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def started(program: Path, *given: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", program.name, *given],
        cwd=program.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raises", "ValueError"),
        ("exits", "WorkerDied"),
        ("evaluates", "ZeroDivisionError"),
        ("times out", "TimeoutError"),
    ],
)
@pytest.mark.parametrize("place", ["local", "shared"])
def test_a_training_that_fails_ends(place: str, how: str, error: str, program: Path) -> None:
    if (place, how) == ("local", "exits"):
        return  # it would be this very process
    said, complained = started(program, place, how).communicate(timeout=DEADLINE)
    assert said.split() == [error, "1"], complained
    assert complained == ""


@pytest.mark.parametrize(
    ("place", "number"), [("local", signal.SIGINT), ("shared", signal.SIGINT), ("shared", signal.SIGKILL)]
)
def test_a_training_that_gets_a_signal_ends_with_its_workers(place: str, number: signal.Signals, program: Path) -> None:
    life = started(program, place, "goes on")
    until = time.monotonic() + DEADLINE
    while not (program.parent / "begun").exists():
        assert life.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    workers = psutil.Process(life.pid).children()
    assert len(workers) == (2 if place == "shared" else 0)
    life.send_signal(number)
    said, _ = life.communicate(timeout=DEADLINE)
    assert life.returncode == (0 if number == signal.SIGINT else -number)
    assert said.split() == (["KeyboardInterrupt", "1"] if number == signal.SIGINT else [])
    assert not still_alive(workers, within=20)
