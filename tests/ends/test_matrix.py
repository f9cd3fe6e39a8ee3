"""Law 9, it ends: every end × every place × every order, with nothing left behind.

Each test starts a program of its own in a session of its own, with a deadline. What a process can bring about by itself
(``inside.py``) shares one program; signals and the parent's death (``signalled.py``) have one each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.living import still_alive

from penstock.flow.letters import JournalReader

pytestmark = pytest.mark.usefixtures("unmeasured")

HERE = Path(__file__).parent
DEADLINE = 120  # the programs have stricter ones of their own, and say where they hang
OUTLIVES = 2.0
COUNT = 1000
HELD = 40

PLACES = ["loop", "thread", "process"]
ORDERS = ["ordered", "unordered", "keyed"]
matrix = [pytest.param(place, order, id=f"{place}-{order}") for place in PLACES for order in ORDERS]


class Program:
    """A program under way, in its own session, and what it says."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.gate: int | None = None
        os.mkfifo(directory / "gate")
        self.gate = os.open(directory / "gate", os.O_RDWR)
        self.process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", *arguments],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, words: str) -> str:
        """The next line with these words; those before it are dropped."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError(f"it ended without saying {words!r}:\n{self.process.communicate()[1]}")

    def wait_for_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.wait_for("{"))
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def open_the_gate(self) -> None:
        """What is held goes on."""
        if self.gate is not None:
            (self.directory / "gate").unlink()  # first: who comes now would wait for another writer
            os.close(self.gate)
            self.gate = None

    def end(self) -> str:
        """Wait for the end; returns what it said on stderr."""
        return self.process.communicate(timeout=DEADLINE)[1]

    def members(self) -> list[psutil.Process]:
        """The processes of its session that are alive."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.process.pid and pid != self.process.pid:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def clean_up(self) -> None:
        self.open_the_gate()
        if self.process.poll() is None:
            self.process.kill()
        for member in self.members():
            member.kill()
        self.process.communicate()


@contextlib.contextmanager
def program(directory: Path, *arguments: str) -> Iterator[Program]:
    started = Program(directory, *arguments)
    try:
        yield started
    finally:
        started.clean_up()


def signalled(directory: Path, place: str, order: str, how: str) -> contextlib.AbstractContextManager[Program]:
    return program(directory, str(HERE / "signalled.py"), place, order, how)


@pytest.mark.parametrize(("place", "order"), matrix)
def test_law_it_ends_by_itself(tmp_path: Path, place: str, order: str) -> None:
    """Break, raise (source, stage, sink, constructor), cancel, a worker killed."""
    with program(tmp_path, str(HERE / "inside.py"), place, order) as inside:
        said, errors = inside.process.communicate(timeout=DEADLINE)
        assert errors == ""
        cells = [json.loads(line) for line in said.splitlines()]
        assert [cell for cell in cells if cell[1] is not None] == []
        assert len(cells) == (23 if place == "process" else 19)
        assert inside.process.returncode == 0
        assert inside.members() == []


def started(directory: Path) -> set[int]:
    return {int(line) for line in (directory / "started").read_text().split()}


def outputs(directory: Path) -> list[int]:
    return [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]


def reports(directory: Path) -> list[dict[str, Any]]:
    reader = JournalReader(str(directory / "out.jsonl"))
    try:
        return reader.runs()
    finally:
        reader.close()


def check_completed(job: Program, order: str) -> None:
    """The job, run again, did the rest once, and the program left nothing behind."""
    again = job.wait_for_json()
    assert again["in_flight"] == 0
    found = outputs(job.directory)
    assert sorted(found) == list(range(COUNT))
    if order == "ordered":
        assert found == list(range(COUNT))
    if order == "keyed":
        for key in range(3):
            assert [x for x in found if x % 3 == key] == list(range(key, COUNT, 3))
    assert job.end() == ""
    assert job.process.returncode == 0
    assert job.members() == []


RAISED = {signal.SIGINT: "KeyboardInterrupt()", signal.SIGTERM: "SystemExit(143)"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("place", "order"), matrix)
def test_law_it_ends_at_a_signal(tmp_path: Path, place: str, order: str, number: signal.Signals) -> None:
    """The first signal drains and commits, then run_sync raises; run again, the job is completed."""
    with signalled(tmp_path, place, order, "run_sync") as job:
        job.wait_for("at work")
        job.signal(number)
        job.wait_for("draining")
        job.open_the_gate()
        ended = job.wait_for_json()
        assert ended["raised"] == RAISED[number]
        assert ended["left"] == []
        check_completed(job, order)
    first, second = reports(tmp_path)
    assert first["issued"] == first["delivered"] >= len(started(tmp_path))
    assert first["released"] == first["in_flight"] == 0
    assert first["delivered"] + second["delivered"] == COUNT
    assert second["earlier"]["delivered"] == first["delivered"]
    assert started(tmp_path) <= set(outputs(tmp_path)[: first["delivered"]])
    assert any("interrupted by" in line for line in first["notes"])


@pytest.mark.parametrize(("place", "order"), matrix)
def test_law_it_ends_at_the_second_signal(tmp_path: Path, place: str, order: str) -> None:
    """At once: what is held isn't waited for, but for the call that a thread is in."""
    with signalled(tmp_path, place, order, "run_sync") as job:
        job.wait_for("at work")
        job.signal(signal.SIGINT)
        job.wait_for("draining")
        job.signal(signal.SIGTERM)
        if place == "thread":
            job.open_the_gate()
        ended = job.wait_for_json()
        assert ended["raised"] == RAISED[signal.SIGINT]
        assert ended["left"] == []
        job.open_the_gate()
        check_completed(job, order)


@pytest.mark.parametrize("place", PLACES)
def test_law_it_ends_at_a_signal_when_awaited_with_signals(tmp_path: Path, place: str) -> None:
    with signalled(tmp_path, place, "ordered", "signals") as job:
        job.wait_for("at work")
        job.signal(signal.SIGINT)
        job.wait_for("draining")
        job.open_the_gate()
        ended = job.wait_for_json()
        assert ended["raised"] is None
        assert ended["report"]["issued"] == ended["report"]["delivered"] > HELD
        assert ended["left"] == []
        check_completed(job, "ordered")


@pytest.mark.parametrize("place", PLACES)
def test_law_it_ends_at_an_interrupt_when_awaited(tmp_path: Path, place: str) -> None:
    """Without signals=True an interrupt is a cancellation, made by asyncio.run."""
    with signalled(tmp_path, place, "ordered", "await") as job:
        job.wait_for("at work")
        job.signal(signal.SIGINT)
        if place == "thread":
            job.open_the_gate()
        ended = job.wait_for_json()
        assert ended["raised"] == RAISED[signal.SIGINT]
        assert ended["left"] == []
        job.open_the_gate()
        check_completed(job, "ordered")


@pytest.mark.parametrize("place", ["thread", "process"])
def test_law_it_ends_at_a_signal_while_opening(tmp_path: Path, place: str) -> None:
    """Nothing was taken, so there is nothing to finish: it doesn't wait for a constructor."""
    with signalled(tmp_path, place, "ordered", "opening") as job:
        job.wait_for("at work")
        job.signal(signal.SIGINT)
        job.wait_for("draining")
        if place == "thread":
            job.open_the_gate()
        ended = job.wait_for_json()
        assert ended["raised"] == RAISED[signal.SIGINT]
        assert ended["left"] == []
        job.open_the_gate()
        check_completed(job, "ordered")


@pytest.mark.parametrize(
    ("how", "number"),
    [("await", signal.SIGTERM), ("in_c", signal.SIGKILL), ("opening", signal.SIGKILL)],
    ids=["at work, SIGTERM", "in C, SIGKILL", "opening, SIGKILL"],
)
def test_law_no_worker_outlives_its_parent(tmp_path: Path, how: str, number: signal.Signals) -> None:
    """By SIGKILL, or by a SIGTERM that nobody handles; at work, in one long call into C, or being built."""
    with signalled(tmp_path, "process", "ordered", how) as job:
        job.wait_for("at work")
        workers = job.members()
        assert len(workers) == 2
        job.signal(number)
        assert job.process.wait(DEADLINE) == -number
        assert still_alive(workers, within=OUTLIVES) == []
        assert job.members() == []


@pytest.mark.parametrize(("place", "order"), matrix)
def test_law_it_ends_when_the_parent_is_killed(tmp_path: Path, place: str, order: str) -> None:
    """Run again from another process, the job is completed."""
    with signalled(tmp_path, place, order, "run_sync") as job:
        job.wait_for("at work")
        workers = job.members()
        assert len(workers) == (2 if place == "process" else 0)
        job.signal(signal.SIGKILL)
        job.process.wait(DEADLINE)
        assert still_alive(workers, within=OUTLIVES) == []
        job.open_the_gate()
    with signalled(tmp_path, place, order, "run_sync") as job:
        job.open_the_gate()
        assert job.wait_for_json()["left"] == []
        check_completed(job, order)
