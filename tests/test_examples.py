"""The examples, run as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEADLINE = 120


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
