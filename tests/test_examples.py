"""The examples, run as a reader would run them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEADLINE = 120

pytestmark = pytest.mark.usefixtures("unmeasured")


READING = EXAMPLES / "read_python.py"


def run(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=directory, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_enrich_pays_once_however_often_it_is_killed(tmp_path: Path) -> None:
    said = run(tmp_path, str(EXAMPLES / "enrich.py"), "--rows", "100", "--kill", "1")
    ours, theirs = (int(paid.replace(",", "")) for paid in re.findall(r"([\d,]+) calls paid", said))
    assert ours >= 99  # how many more depends on the disk; what counts isn't paid for again: tests/kills
    assert theirs >= 149  # all that came before each kill
    assert "redone: 1. run/enrich/enriched.jsonl has every row, exactly once" in said


def test_payments_are_scored_once_whatever_is_killed(tmp_path: Path) -> None:
    said = run(tmp_path, str(EXAMPLES / "score_events.py"), "--events", "1200", "--kill")
    assert "1,200 payments: 1,197 scored once each, 3 in the dead letters" in said


def test_a_queue_outlives_its_consumer(tmp_path: Path) -> None:
    said = run(tmp_path, str(EXAMPLES / "classics" / "queue_of_events.py"), "--kill")
    assert said.splitlines()[-5:] == [f'"Processed: Event {number}"' for number in range(5)]


def test_enrich_undisturbed(tmp_path: Path) -> None:
    said = run(tmp_path, str(EXAMPLES / "enrich.py"), "--rows", "100")
    assert "delivered 99, dead 1" in said
    assert "redone: 1" in said


def test_a_model_reads_a_little_python(tmp_path: Path) -> None:
    said = run(tmp_path, str(READING), "run", "--megabytes", "0.1")
    assert re.search(r"files scored once each and learned from once: (\d+) parts, \1 updates", said), said
    assert (tmp_path / "run" / "reading.svg").read_text().startswith("<svg")


@pytest.mark.soak
def test_a_model_reads_python_and_is_killed_half_way(tmp_path: Path) -> None:
    said = run(tmp_path, str(READING), "--megabytes", "0.25")
    scored, parts, updates = re.findall(
        r"(\d+) files scored once each and learned from once: (\d+) parts, (\d+)", said
    )[0]
    assert int(scored) > 5
    assert parts == updates
    ours, plain = (float(re.findall(rf"{name} +([\d.]+)", said)[0]) for name in ("this network", "by a plain loop"))
    assert 3 < plain < 5
    assert 3 < ours < 5
    assert (tmp_path / "run" / "reading.svg").read_text().startswith("<svg")


@pytest.mark.soak
def test_the_reading_survives_ten_kills(tmp_path: Path) -> None:
    """At random instants, and run again to the end, which says itself whether every file was read once."""
    draw = random.Random(5)
    for _ in range(10):
        life = subprocess.Popen(
            [sys.executable, str(READING), "run", "--megabytes", "2"], cwd=tmp_path, start_new_session=True
        )
        with suppress(subprocess.TimeoutExpired):
            life.wait(draw.uniform(1, 6))
        if draw.random() < 0.5:
            life.kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(life.pid, signal.SIGKILL)
        life.wait()
    said = run(tmp_path, str(READING), "run", "--megabytes", "2")
    assert re.search(r"files scored once each and learned from once: ([\d,]+) parts, \1 updates", said), said
