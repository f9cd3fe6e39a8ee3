"""``penstock dead``: what failed for good, for people and for programs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import penstock as ps

DEADLINE = 60
PENSTOCK = [sys.executable, "-P", "-m", "penstock.cli"]


def half(x: int) -> float:
    if x % 2:
        raise ValueError(f"[bold]odd[/bold]: {x}")
    return x / 2


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    ps.Flow([0, 1, 2, 3], name="numbers").map(half, on_error="dead_letter").to(path).run_sync(progress=False)
    return path


def dead(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*PENSTOCK, "dead", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def test_json_lines_for_programs(output: Path) -> None:
    result = dead(output)
    assert result.returncode == 0, result.stderr
    letters = [json.loads(line) for line in result.stdout.splitlines()]
    assert [letter["item"] for letter in letters] == [1, 3]
    assert letters[0]["stage"] == "half"
    assert letters[0]["reason"] == "ValueError"
    assert letters[0]["error"] == "[bold]odd[/bold]: 1"


def test_a_table_for_people(output: Path) -> None:
    said = on_a_terminal([*PENSTOCK, "dead", str(output)])
    assert "2 dead letters" in said
    assert "[bold]odd[/bold]: 1" in said
    assert "half" in said


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def test_items_that_json_has_no_form_for_are_shown_in_words(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    items = [{(1, 2): 3}, 2**70, "\ud800", b"\xff", {"a": ["\ud800"]}, complex(1, 2), Mute(), 5]
    ps.Flow(items, name="odd").map(refuse, on_error="dead_letter").to(path).run_sync(progress=False)
    result = dead(path)
    assert result.returncode == 0, result.stderr
    shown = [json.loads(line)["item"] for line in result.stdout.splitlines()]
    assert len(shown) == len(items)
    assert (shown[1], shown[2], shown[5], shown[-1]) == (2**70, "'\\ud800'", "(1+2j)", 5)
    assert "8 dead letters" in on_a_terminal([*PENSTOCK, "dead", str(path)])


def refuse(item: object) -> None:
    raise ValueError("no")


def test_nothing_dead_is_said_too(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    ps.Flow([0, 2]).map(half).to(path).run_sync(progress=False)
    assert dead(path).stdout == ""
    assert "0 dead letters" in on_a_terminal([*PENSTOCK, "dead", str(path)])


def test_requeue_belongs_to_logs(output: Path) -> None:
    result = dead(output, "--requeue")
    assert result.returncode == 2
    assert "ps.read.dead(" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_output_without_a_journal(tmp_path: Path) -> None:
    result = dead(tmp_path / "gone.jsonl")
    assert result.returncode == 2
    assert result.stderr.startswith("penstock: ")
    assert "Traceback" not in result.stderr


def on_a_terminal(command: list[str]) -> str:
    """What a command prints where a person looks on, 200 columns wide."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    try:
        while chunk := _read(ours):
            said += chunk
        assert process.wait(DEADLINE) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return said.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""
