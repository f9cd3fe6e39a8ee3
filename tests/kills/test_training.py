"""Training that is killed: workers, the whole process, and in the middle of a checkpoint; and then run again.

Each sample has a gradient that is 1 at its own place, so the weights say how often each one was applied. Beside it
there is a walk, whose every step depends on where it is: it comes out the same, bit for bit, only if everything was
applied once, in the same order, to the same parameters.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("numba")

pytestmark = pytest.mark.usefixtures("unmeasured")

DEADLINE = 120
SAMPLES = 240
EPOCHS = 2

PROGRAM = '''
import asyncio, json, os, signal, sys, time
import numpy as np
import penstock as ps
from penstock.train.store import Store

SAMPLES, EPOCHS = {samples}, {epochs}
given = json.loads(sys.argv[1])
consistency = {{"ASP": ps.ASP(), "SSP": ps.SSP(1), "BSP": ps.BSP()}}[given["consistency"]]
scale = given["workers"] if given["consistency"] == "BSP" else 1

def gradient(params, batch):
    count = np.zeros(SAMPLES)
    count[batch] = -scale
    time.sleep(given["seconds"])
    return float(len(batch)), {{"count": count, "walk": np.cos(params["walk"] + sum(batch))}}

def dies(after, what, times):
    """This process dies when it has done so often what a checkpoint consists of."""
    left = times
    def dying(*args, **kwargs):
        nonlocal left
        left -= 1
        result = None if left == 0 and not after else what(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return dying

if given["dies"]:
    where, after, times = given["dies"]
    if where == "replace":
        os.replace = dies(after, os.replace, times)
    else:
        setattr(Store, where, dies(after, getattr(Store, where), times))

async def main():
    params = {{"count": np.zeros(SAMPLES), "walk": np.arange(5.0)}}
    kept = ps.Checkpoint("run", seconds=0, updates=given["updates"])
    async with ps.ParameterServer(params, ps.SGD(lr=1), consistency, given["place"], kept) as server:
        open("begun", "w").close()
        flow = ps.Flow(range(SAMPLES)).batch(3)
        report = await server.fit(gradient, flow, workers=given["workers"], epochs=EPOCHS, shuffle=7)
        found, version = await server.pull()
        np.save("count.npy", found["count"])
        np.save("walk.npy", found["walk"])
        print(json.dumps([version, report.samples, report.earlier]))

asyncio.run(main())
'''


class Training:
    """A program in a directory of its own, and its lives."""

    def __init__(self, directory: Path, **given: Any) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        (directory / "program.py").write_text(PROGRAM.format(samples=SAMPLES, epochs=EPOCHS))
        self.given = {"seconds": 0.004, "workers": 2, "dies": None, "updates": None} | given

    def life(self, dies: Any = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "program.py", json.dumps(self.given | {"dies": dies})],
            cwd=self.directory,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def begun(self) -> subprocess.Popen[str]:
        """A life that has come as far as to train."""
        mark = self.directory / "begun"
        mark.unlink(missing_ok=True)
        life = self.life()
        until = time.monotonic() + DEADLINE
        while not mark.exists() and life.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        return life

    def ends(self, life: subprocess.Popen[str]) -> list[Any]:
        said, complained = life.communicate(timeout=DEADLINE)
        assert life.returncode == 0, complained
        found: list[Any] = json.loads(said)
        return found

    def dies(self, life: subprocess.Popen[str]) -> bool:
        """Whether it was killed; otherwise it has ended well."""
        _, complained = life.communicate(timeout=DEADLINE)
        assert life.returncode in (0, -signal.SIGKILL), complained
        return life.returncode != 0

    def counts(self) -> np.ndarray:
        counts: np.ndarray = np.load(self.directory / "count.npy")
        return counts

    def walk(self) -> bytes:
        return np.load(self.directory / "walk.npy").tobytes()

    def check(self) -> None:
        """Run it to the end: every sample was applied once an epoch."""
        version, _, _ = self.ends(self.life())
        updates = EPOCHS * SAMPLES // 3
        assert version == (updates // self.given["workers"] if self.given["consistency"] == "BSP" else updates)
        assert (self.counts() == EPOCHS).all(), self.counts()


@cache
def undisturbed(directory: Path, **given: Any) -> bytes:
    """The walk of a run that nobody disturbs."""
    training = Training(directory / str(len(list(directory.iterdir()))), **given)
    training.check()
    return training.walk()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


def kill_at_random(training: Training, draw: random.Random, kills: int) -> int:
    """Kill the whole process or single workers, at random instants, so often in all."""
    killed = 0
    while killed < kills:
        life = training.begun()
        process = psutil.Process(life.pid)
        until = time.monotonic() + draw.uniform(0.1, 0.9)
        while life.poll() is None and time.monotonic() < until and killed < kills - 1:
            time.sleep(draw.uniform(0.02, 0.4))
            try:
                workers = process.children()
                if workers:
                    draw.choice(workers).kill()
                    killed += 1
            except psutil.NoSuchProcess:
                break
        time.sleep(max(0.0, until - time.monotonic()))
        if life.poll() is None:
            if draw.random() < 0.5:
                os.killpg(life.pid, signal.SIGKILL)
            else:
                life.kill()
            killed += 1
        if not training.dies(life):
            return killed
    return killed


CASES = [
    {"place": "shared", "consistency": "ASP", "workers": 3},
    {"place": "shared", "consistency": "BSP", "workers": 2},
    pytest.param({"place": "local", "consistency": "SSP", "workers": 2}, marks=pytest.mark.soak),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['place']}-{case['consistency']}")
def test_every_sample_counts_once_an_epoch_whatever_is_killed(
    case: dict[str, Any], tmp_path: Path, quiet: Path
) -> None:
    draw = random.Random(3)
    training = Training(tmp_path / "killed", **case)
    kill_at_random(training, draw, 2)
    training.check()
    if case["consistency"] == "BSP":
        assert training.walk() == undisturbed(quiet, **case)


STEPS = [
    ("replace", True),
    ("save", True),
    *(
        pytest.param(*step, marks=pytest.mark.soak)
        for step in (("replace", False), ("save", False), ("_remove_stray", False))
    ),
]


@pytest.mark.parametrize(("where", "after"), STEPS, ids=str)
def test_a_kill_in_the_middle_of_a_checkpoint(where: str, after: bool, tmp_path: Path, quiet: Path) -> None:
    case = {"place": "local", "consistency": "ASP", "workers": 1, "seconds": 0, "updates": 10}
    training = Training(tmp_path / "killed", **case)
    assert training.dies(training.life((where, after, 3)))
    training.check()
    assert training.walk() == undisturbed(quiet, **case)
    kept = sorted(path.name for path in (tmp_path / "killed" / "run").iterdir())
    assert [name for name in kept if name.endswith((".part", ".lock"))] == []
    assert len([name for name in kept if name.startswith("model-")]) == 2


@pytest.mark.soak
@pytest.mark.parametrize("place", ["local", "shared"])
@pytest.mark.parametrize("consistency", ["ASP", "SSP", "BSP", "alone"])
def test_a_hundred_kills(place: str, consistency: str, tmp_path: Path, quiet: Path) -> None:
    """At random instants, in rounds of a dozen, each run to its end and looked at."""
    draw = random.Random(f"{place}{consistency}")
    workers = {"alone": 1, "BSP": 2}.get(consistency, 3)
    case = {"place": place, "consistency": "ASP" if consistency == "alone" else consistency, "workers": workers}
    exact = consistency in ("BSP", "alone")
    expected = undisturbed(quiet, **case) if exact else b""
    kills, rounds = 0, 0
    while kills < 100:
        training = Training(tmp_path / f"round {rounds}", **case)
        kills += kill_at_random(training, draw, draw.randint(1, 12))
        rounds += 1
        training.check()
        assert not exact or training.walk() == expected
