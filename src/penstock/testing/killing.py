"""Torture: a job is killed at random instants, run to its end, and compared with an undisturbed run.

A *life* is one process that runs the job (``penstock.testing.victim``), the leader of its own process group. A *round*
is a fresh output, up to five lives that are killed, and a last one that runs to the end; then what the round left is
compared. What may happen to a life, and what follows:

1. It is still running at its instant: it gets SIGKILL, half of the time with its whole group (a power cut), half of the
   time alone (its workers must notice by themselves), and is reaped. The round goes on with the next life.
2. It ended by itself, well, before its instant: the round goes on with its last life, which finds nothing to do.
3. It ended by itself, badly: torture ends and shows the last lines it said.
4. It runs ten times as long as the undisturbed run, and over a minute: it hangs. It is killed and torture says so.

However torture itself ends, no life stays: each holds the reading end of a pipe, and kills its group when that closes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from penstock.errors import PlanError
from penstock.flow.job import Job
from penstock.flow.output import Output
from penstock.flow.plan import make_plan
from penstock.place.pickling import dumps
from penstock.testing.comparing import Remains, first_difference, remains

__all__ = ["TortureResult", "torture"]

_LIVES = 5
_LEAST_DEADLINE = 60.0
_SAID = 20

# The life's own import path comes first: penstock itself may be reachable by it alone.
_BOOT = "import json, sys; sys.path[:] = json.load(open(sys.argv[1])); from penstock.testing.victim import main; main()"


@dataclass(frozen=True, slots=True)
class TortureResult:
    """What torture found. ``difference`` is None if every round left what an undisturbed run leaves.

    ``kills``: how often the job was killed. ``rounds``: how often it was then run to its end and compared.
    ``seconds``: the undisturbed run, startup included. ``guarantee``: what the job promises, and was checked for.
    ``doubled``: the most outputs a round had too many, where only *at least once* is promised.
    ``scratch``: where the outputs that differ were left.
    """

    kills: int
    rounds: int
    seed: int
    seconds: float
    guarantee: str
    difference: str | None = None
    doubled: int = 0
    scratch: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the job kept its promise."""
        return self.difference is None

    def __str__(self) -> str:
        verdict = "kept" if self.passed else "BROKEN"
        lines = [
            f"killed {self.kills} times in {self.rounds} rounds (seed {self.seed}; undisturbed: {self.seconds:.1f} s)",
            f"promise: {self.guarantee}",
        ]
        if self.difference is not None:
            lines.append(f"{verdict}: {self.difference}")
            if self.scratch is not None:
                lines.append(f"both outputs are in {self.scratch}")
        elif self.doubled:
            lines.append(f"{verdict}: nothing was lost; up to {self.doubled:,} outputs were there more than once")
        else:
            lines.append(f"{verdict}: outputs, dead letters and counts are those of an undisturbed run, every time")
        return "\n".join(lines)


def _packed(job: Job) -> bytes:
    try:
        return dumps(job, {})
    except Exception as error:
        raise PlanError(
            f"this job can't be sent to another process, as torture must ({error})",
            "Give it a source that can be read again: a list, a file, or a class with __iter__",
        ) from error


class _Ended(Exception):
    """Torture can't go on: why."""


def torture(
    job: Job, kills: int = 50, seed: int | None = None, say: Callable[[str], None] | None = None
) -> TortureResult:
    """Kill ``job`` at random instants in a scratch copy of its output, and compare with an undisturbed run.

    ``kills``: how often; up to five in a row before the job is run to its end and compared. ``seed`` repeats the choice
    of instants. ``say`` is told what happens. A job that promises *at least once* is checked for that: nothing
    lost. It takes about as long as ``kills`` undisturbed runs. The job's own output isn't touched; what its
    functions do elsewhere, they do.

    Raises PlanError for a job that can't be run, whose output isn't one of ``ps.write``, or that can't be sent to
    another process (as one over a generator). Interrupting it leaves nothing behind.
    """
    if kills < 1:
        raise PlanError(f"kills={kills}", "Give a whole number of at least 1")
    seed = random.randrange(2**32) if seed is None else seed
    tell = say or (lambda line: None)
    scratch = Path(tempfile.mkdtemp(prefix="penstock-torture-"))
    keep = False
    try:
        ordeal = _Ordeal(job, scratch, random.Random(seed), tell)
        result = ordeal.run(kills, seed)
        keep = result.scratch is not None
        return result
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)


class _Ordeal:
    """One torture: where things stand on disk, and how long a life takes."""

    def __init__(self, job: Job, scratch: Path, chance: random.Random, tell: Callable[[str], None]) -> None:
        plan = make_plan(job.flow, job)
        sink = job.sink
        if not isinstance(sink, Output):
            raise PlanError(
                f"torture can't copy the output of this job ({sink.identity}) to a scratch directory",
                "Give it a file, for example: job.flow.to('out.jsonl')",
            )
        self.exactly_once = plan.exactly_once
        self.guarantee = plan.guarantee
        self.ordered = all(segment.ordered for segment in plan.segments)
        self.scratch = scratch
        self.chance = chance
        self.tell = tell
        name = Path(sink.path).name
        self.table = getattr(sink, "table", None)
        self.undisturbed = scratch / "undisturbed" / name
        self.tortured = scratch / "tortured" / name
        self.payload = scratch / "job"
        self.import_path = scratch / "import-path"
        self.ready = scratch / "ready"
        self.said = scratch / "said"
        self.import_path.write_bytes(msgspec.json.encode([entry or os.getcwd() for entry in sys.path]))
        self.payload.write_bytes(_packed(job))

    def run(self, kills: int, seed: int) -> TortureResult:
        killed = rounds = doubled = 0
        self.seconds = self.startup = 0.0
        difference: str | None = None
        scratch: str | None = None
        try:
            self._measure()
            expected = remains(self.undisturbed, self.table)
            self.tell(f"undisturbed: {len(expected.outputs):,} outputs in {self.seconds:.1f} s; killing {kills} times")
            while killed < kills and rounds < 3 * kills + 10:  # a job may end before its instant, but not for ever
                killed += self._round(min(kills - killed, _LIVES))
                rounds += 1
                found = remains(self.tortured, self.table)
                difference = first_difference(expected, found, ordered=self.ordered, exactly_once=self.exactly_once)
                if difference is not None:
                    scratch = str(self.scratch)
                    difference = self._doubt(expected) or difference
                    break
                doubled = max(doubled, len(found.outputs) - len(expected.outputs))
                self.tell(f"round {rounds}: {killed} kills so far, nothing lost")
        except _Ended as ended:
            difference = str(ended)
        return TortureResult(killed, rounds, seed, self.seconds, self.guarantee, difference, doubled, scratch)

    def _measure(self) -> None:
        begun = time.time()
        self._life(self.undisturbed, None, deadline=None)
        self.seconds = time.time() - begun
        self.startup = min(self.seconds, max(0.0, self.ready.stat().st_mtime - begun))

    def _round(self, most: int) -> int:
        """A fresh output, up to ``most`` killed lives, and one that runs to the end; how many were killed."""
        shutil.rmtree(self.tortured.parent, ignore_errors=True)
        killed, done = 0, 0.0
        work = self.seconds - self.startup
        for _ in range(self.chance.randint(1, most)):
            if self.chance.random() < 0.2:
                instant = self.chance.uniform(0, self.startup)
            else:
                instant = self.startup + self.chance.uniform(0, 1.05 * work * max(0.05, 1 - done))
            if not self._life(self.tortured, instant, deadline=None):
                break
            killed += 1
            done += max(0.0, instant - self.startup) / work if work else 1.0
        self._life(self.tortured, None, deadline=max(_LEAST_DEADLINE, 10 * self.seconds))
        return killed

    def _life(self, output: Path, instant: float | None, deadline: float | None) -> bool:
        """One process that runs the job; whether it was killed at its instant. Raises _Ended for states 3 and 4."""
        paths = map(str, (self.import_path, self.payload, output, self.ready))
        command = [sys.executable, "-P", "-c", _BOOT, *paths]
        with self.said.open("wb") as said:
            life = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
            )
        alone = instant is not None and self.chance.random() < 0.5
        try:
            code = life.wait(deadline if instant is None else instant)
        except subprocess.TimeoutExpired:
            if instant is None:
                raise _Ended(f"the job hangs: killed and started again, it still runs after {deadline:.0f} s") from None
            return True
        finally:
            if life.returncode is None:
                (os.kill if alone else os.killpg)(life.pid, signal.SIGKILL)
                life.wait()
            if life.stdin is not None:
                life.stdin.close()
        if code != 0:
            last = self.said.read_text(errors="replace").splitlines()[-_SAID:]
            raise _Ended("\n".join([f"the job failed by itself (exit code {code}):", *last]))
        return False

    def _doubt(self, expected: Remains) -> str | None:
        """A job whose functions answer differently each time differs from itself: then torture proves nothing."""
        shutil.rmtree(self.undisturbed.parent, ignore_errors=True)
        self._life(self.undisturbed, None, deadline=None)
        if (
            first_difference(expected, remains(self.undisturbed, self.table), ordered=self.ordered, exactly_once=True)
            is None
        ):
            return None
        return "two undisturbed runs differ from each other: make its functions deterministic, then torture it again"
