"""Torture finds what is broken, and leaves what holds alone."""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.living import still_alive

import penstock as ps
from penstock.testing.comparing import Remains, first_difference, remains
from penstock.testing.killing import torture

DEADLINE = 120

pytestmark = pytest.mark.usefixtures("unmeasured")


def work(x: int) -> dict[str, Any]:
    """About a millisecond."""
    return {"x": x, "digest": hashlib.pbkdf2_hmac("sha256", b"%d" % x, b"salt", 2000).hex()}


def picky(x: int) -> dict[str, Any]:
    if x % 50 == 7:
        raise ValueError(f"{x} is refused")
    return work(x)


def odd(row: dict[str, Any]) -> bool:
    return bool(row["x"] % 3)


def doubled(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row, row]


_seen: list[bool] = []


def knows_that_it_was_resumed(x: int) -> dict[str, Any]:
    """What no function may do: answer differently after a crash. It looks at the output of the life it is in."""
    if not _seen:
        output = Path(sys.argv[3])
        _seen.append(output.exists() and output.stat().st_size > 0)
    return {**work(x), "resumed": _seen[0]}


def counts_its_calls(x: int) -> dict[str, Any]:
    """A function that isn't deterministic: it leaves a trace behind and reads it."""
    trace = Path(os.environ["PENSTOCK_TEST_TRACE"])
    with trace.open("ab") as file:
        file.write(b".")
        return {**work(x), "calls": file.tell()}


class Again:
    """Can be read again, but promises nothing about it."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(300))


@pytest.mark.parametrize(
    "job",
    [
        ps.Flow(range(300), name="ordered").map(picky, workers=2, on_error="dead_letter").filter(odd).to("out.jsonl"),
        ps.Flow(range(300), name="not").map(picky, ordered=False, on_error="skip").flat_map(doubled).to("out.sqlite"),
        pytest.param(ps.Flow(range(300), name="parts").map(work).to("out.parquet"), marks=pytest.mark.soak),
    ],
    ids=["jsonl", "sqlite", "parquet"],
)
def test_a_job_that_holds_passes(job: ps.Job) -> None:
    said: list[str] = []
    result = torture(job, kills=2, seed=1, say=said.append)
    assert result.passed, str(result)
    assert result.kills == 2
    assert result.rounds >= 1
    assert result.seed == 1
    assert "exactly once" in result.guarantee
    assert "kept: outputs, dead letters and counts" in str(result)
    assert said[0].startswith("undisturbed: ")
    assert not Path("out.jsonl").exists(), "the job's own output isn't touched"


def test_a_job_that_answers_differently_after_a_crash_is_found() -> None:
    result = torture(ps.Flow(range(600)).map(knows_that_it_was_resumed).to("out.jsonl"), kills=25, seed=3)
    assert not result.passed
    assert result.difference is not None
    assert "are missing, the first: " in result.difference
    assert "BROKEN" in str(result)
    assert result.scratch is not None
    scratch = Path(result.scratch)
    assert (scratch / "tortured" / "out.jsonl").exists()
    assert str(scratch) in str(result)
    subprocess.run(["rm", "-r", scratch], check=True)


def test_a_job_that_differs_from_itself_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_TEST_TRACE", str(tmp_path / "trace"))
    result = torture(ps.Flow(range(20)).map(counts_its_calls, workers=1).to("out.jsonl"), kills=1)
    assert not result.passed
    assert "two undisturbed runs differ from each other" in str(result)
    assert result.scratch is not None
    subprocess.run(["rm", "-r", result.scratch], check=True)


def test_at_least_once_is_said_and_checked_for_that() -> None:
    result = torture(ps.Flow(Again(), name="again").map(work).to("out.jsonl"), kills=2, seed=5)
    assert result.passed, str(result)
    assert "at least once" in str(result)


def test_a_job_that_fails_by_itself_is_shown() -> None:
    result = torture(ps.Flow(range(50)).map(picky).to("out.jsonl"), kills=2)
    assert not result.passed
    assert "failed by itself" in str(result)
    assert "7 is refused" in str(result)
    assert result.kills == 0


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        (ps.Flow([1]).to(print), "torture can't copy the output"),
        (ps.Flow(x for x in [1]).to("out.jsonl"), "can't be sent"),
        (ps.Flow().map(work).to("out.jsonl"), "unbound"),
    ],
)
def test_what_cant_be_tortured_is_refused(job: ps.Job, problem: str) -> None:
    with pytest.raises(ps.errors.PlanError, match=problem):
        torture(job)


def test_no_kills_is_refused() -> None:
    with pytest.raises(ps.errors.PlanError, match="kills=0"):
        torture(ps.Flow([1]).to("out.jsonl"), kills=0)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(
        "import penstock as ps\n"
        "good = ps.Flow(range(200)).map(lambda x: 2 * x).to('out.jsonl')\n"
        "bad = ps.Flow([1, 0]).map(lambda x: 1 / x).to('out.jsonl')\n"
    )
    good = command(tmp_path, "jobs.py:good")
    assert good.returncode == 0, good.stderr
    assert "kept" in good.stdout
    assert "killed 2 times" in good.stdout
    bad = command(tmp_path, "jobs.py:bad")
    assert bad.returncode == 1
    assert "ZeroDivisionError" in bad.stdout
    assert command(tmp_path, "nowhere.py").returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.py"]


def command(directory: Path, target: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-P", "-m", "penstock.cli", "torture", target, "--kills", "2", "--seed", "9"]
    return subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=DEADLINE)


def test_a_life_ends_with_torture_itself(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(
        "import itertools, os\n"
        "import penstock as ps\n"
        "def note(x):\n"
        "    if not x:\n"
        "        open(os.environ['BELL'], 'w').write(str(os.getpid()))\n"
        "    return x\n"
        "class Endless:\n"
        "    def __iter__(self):\n"
        "        return itertools.count()\n"
        "job = ps.Flow(Endless()).map(note).to('out.jsonl')\n"
    )
    bell = tmp_path / "bell"
    os.mkfifo(bell)
    ours = os.open(bell, os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "penstock.cli", "torture", "jobs.py"],
        cwd=tmp_path,
        env={**os.environ, "BELL": str(bell), "TMPDIR": str(tmp_path)},
    )
    try:
        assert select.select([ours], [], [], DEADLINE)[0], "no life has begun"
        life = psutil.Process(int(os.read(ours, 32)))
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert still_alive([life], within=DEADLINE) == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.csv", "out.parquet", "out.db"])
def test_what_a_job_left_is_read_back_whatever_its_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = ps.Flow(range(5)).map(lambda x: {"x": 1 // (x - 1), "text": "a\u2028b"}, on_error="dead_letter")
    rows.filter(lambda row: row["x"] >= 0).to(path).run_sync(progress=False)
    left = remains(path, "outputs" if name == "out.db" else None)
    assert len(left.outputs) == 3 + (name == "out.csv"), "the rows, and a header where there is one"
    assert len([line for line in left.outputs if "\u2028" in line]) == 3
    assert left.counts == {"delivered": 3, "filtered": 1, "skipped": 0, "dead": 1}
    assert len(left.dead) == 1
    assert "ZeroDivisionError" in left.dead[0]


LINES = ["a", "b", "c"]
EXPECTED = Remains(LINES, ["x"], {"delivered": 3, "filtered": 0, "skipped": 0, "dead": 1})


@pytest.mark.parametrize(
    ("outputs", "dead", "delivered", "ordered", "exactly_once", "difference"),
    [
        (["a", "b", "c"], ["x"], 3, True, True, None),
        (["c", "b", "a"], ["x"], 3, False, True, None),
        (["c", "b", "a"], ["x"], 3, True, True, "output 1 is c, and undisturbed it is a"),
        (["a", "c"], ["x"], 3, True, True, "1 outputs are missing, the first: b"),
        (["a", "c"], ["x"], 3, True, False, "1 outputs are missing, the first: b"),
        (
            ["a", "b", "b", "c"],
            ["x"],
            3,
            False,
            True,
            "1 outputs are there that shouldn't be, or doubled, the first: b",
        ),
        (["a", "b", "b", "c"], ["x", "x"], 4, True, False, None),
        (["a", "b", "c"], [], 3, True, False, "1 dead letters are missing, the first: x"),
        (["a", "b", "c"], ["x", "y"], 3, True, True, "1 dead letters are there that shouldn't be"),
        (["a", "b", "c"], ["x"], 4, True, True, "delivered: 4 counted, 3 undisturbed"),
    ],
)
def test_the_first_difference_is_named(
    outputs: list[str], dead: list[str], delivered: int, ordered: bool, exactly_once: bool, difference: str | None
) -> None:
    found = Remains(outputs, dead, {**EXPECTED.counts, "delivered": delivered})
    said = first_difference(EXPECTED, found, ordered=ordered, exactly_once=exactly_once)
    assert said is None if difference is None else (said or "").startswith(difference)


def test_what_is_at_another_address_in_another_process_is_no_difference(tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        path = tmp_path / name / "out.jsonl"
        path.parent.mkdir()
        items = [lambda: None, "\ud800", 3]
        ps.Flow(items, name="odd").map(bytes.upper, on_error="dead_letter").to(path).run_sync(progress=False)
        found.append(remains(path))
    assert found[0].dead
    assert first_difference(*found, ordered=True, exactly_once=True) is None


def test_at_least_once_allows_the_same_again_and_nothing_else() -> None:
    expected = Remains(["a", "b"], ["dead"], {"delivered": 2})
    again = Remains(["a", "b", "a"], ["dead", "dead"], {"delivered": 3})
    torn = Remains(["a", "b", '{"tor'], ["dead"], {"delivered": 3})
    poison = Remains(["a", "b"], ["dead", "other"], {"delivered": 2})
    assert first_difference(expected, again, ordered=True, exactly_once=False) is None
    for found in (torn, poison):
        assert "shouldn't be" in str(first_difference(expected, found, ordered=True, exactly_once=False))
