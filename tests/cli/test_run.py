"""``penstock run``, as a user types it: exit codes, one sentence for what is wrong, what is printed where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DEADLINE = 60
PENSTOCK = [sys.executable, "-P", "-m", "penstock.cli"]


def penstock(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PENSTOCK, *arguments], cwd=directory, capture_output=True, text=True, timeout=DEADLINE)


def write(directory: Path, text: str, name: str = "jobs.py") -> Path:
    path = directory / name
    path.write_text("import penstock as ps\n" + textwrap.dedent(text))
    return path


def test_a_job_runs_and_reports(tmp_path: Path) -> None:
    write(tmp_path, "job = ps.Flow([1, 2, 3], name='numbers').map(lambda x: 2 * x).to('out.jsonl')")
    result = penstock(tmp_path, "run", "jobs.py", "--no-progress")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.jsonl").read_text() == "2\n4\n6\n"
    assert "delivered 3" in result.stdout
    assert result.stderr == ""


def test_run_again_has_nothing_to_do_and_fresh_starts_over(tmp_path: Path) -> None:
    write(tmp_path, "job = ps.Flow([1, 2, 3], name='numbers').map(lambda x: 2 * x).to('out.jsonl')")
    assert penstock(tmp_path, "run", "jobs.py").returncode == 0
    again = penstock(tmp_path, "run", "jobs.py")
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    fresh = penstock(tmp_path, "run", "jobs.py", "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert "delivered 3" in fresh.stdout
    assert (tmp_path / "out.jsonl").read_text() == "2\n4\n6\n"


def test_a_job_is_chosen_by_name(tmp_path: Path) -> None:
    write(tmp_path, "one = ps.Flow([1]).to('one.jsonl')\ntwo = ps.Flow([2]).to('two.jsonl')")
    result = penstock(tmp_path, "run", "jobs.py:two")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "two.jsonl").exists()
    assert not (tmp_path / "one.jsonl").exists()


@pytest.mark.parametrize("work", ["flow", "flow.to('elsewhere.jsonl')"])
def test_to_gives_a_flow_an_output_and_a_job_another(tmp_path: Path, work: str) -> None:
    write(tmp_path, f"flow = ps.Flow([1, 2])\nwork = {work}\nif work is not flow:\n    del flow")
    result = penstock(tmp_path, "run", "jobs.py", "--to", "here.jsonl")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here.jsonl").read_text() == "1\n2\n"
    assert not (tmp_path / "elsewhere.jsonl").exists()


def test_inline_runs_everything_in_one_thread(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
        import threading
        job = ps.Flow([1, 2]).map(lambda x: threading.current_thread().name, place="process").to("out.jsonl")
        """,
    )
    result = penstock(tmp_path, "run", "jobs.py", "--inline")
    assert result.returncode == 0, result.stderr
    assert len(set((tmp_path / "out.jsonl").read_text().splitlines())) == 1


def test_neighbours_are_found_and_never_shadow_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "queue.py").write_text("raise RuntimeError('this is not the standard library')\n")
    write(tmp_path, "from helpers import double\njob = ps.Flow([4]).map(double, place='process').to('out.jsonl')")
    result = penstock(tmp_path, "run", "jobs.py")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.jsonl").read_text() == "8\n"


@pytest.mark.parametrize("name", ["jobs.py", "code.py"])
def test_the_file_is_no_main_and_no_worker_runs_it_again(tmp_path: Path, name: str) -> None:
    write(
        tmp_path,
        """
        from dataclasses import dataclass

        with open("loads", "a") as file:
            file.write("x")

        @dataclass
        class Point:
            x: int

        def point(x):
            return Point(x)

        def plain(point):
            return isinstance(point, Point)

        job = ps.Flow([1, 2]).map(point, place="process").map(plain).to("out.jsonl")
        if __name__ == "__main__":
            raise RuntimeError("it is loaded, not run")
        """,
        name,
    )
    result = penstock(tmp_path, "run", name)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.jsonl").read_text() == "true\ntrue\n"
    assert (tmp_path / "loads").read_text() == "x"


@pytest.mark.parametrize(
    ("target", "text", "sentence"),
    [
        ("nowhere.py", "", "there is no file 'nowhere.py'"),
        ("notes.txt", "", "notes.txt isn't a Python file"),
        ("jobs.py", "x = 1", "jobs.py defines no job"),
        ("jobs.py", "flow = ps.Flow([1])", "jobs.py:flow --to"),
        ("jobs.py:flow", "flow = ps.Flow([1])", "flow in jobs.py is a Flow, which has no output"),
        ("jobs.py:x", "x = 1", "x in jobs.py is a int, not a job"),
        ("jobs.py:third", "job = ps.Flow([1]).to('a.jsonl')", "jobs.py defines no 'third'"),
        (
            "jobs.py",
            "one = ps.Flow([1]).to('1.jsonl')\ntwo = ps.Flow([2]).to('2.jsonl')",
            "jobs.py defines 2 jobs: one, two",
        ),
        ("jobs.py", "job = ps.Flow([1]).map(str, workers=0).to('a.jsonl')", "workers=0"),
        (
            "jobs.py",
            "async def f(x): return x\njob = ps.Flow([1]).map(f, workers=2).to('a.jsonl')",
            "workers= is for threads and processes",
        ),
        ("jobs.py", "job = ps.Flow(5).to('a.jsonl')", "Flow(5)"),
        ("jobs.py", "job = ps.Flow([1]).map('upper').to('a.jsonl')", "isn't callable"),
        ("jobs.py", "job = ps.Flow().map(str).to('a.jsonl')", "unbound"),
        ("jobs.py", "job = ps.Flow([1]).to('a.txt')", "a.txt"),
        (
            "jobs.py",
            "flow = ps.Flow(x for x in [1])\nflow.collect_sync()\njob = flow.to('a.jsonl')",
            "an iterator can be read only once",
        ),
        ("jobs.py", "job = ps.read.jsonl('nowhere.jsonl').to('a.jsonl')", "there is no file 'nowhere.jsonl'"),
    ],
)
def test_what_cant_be_run_is_said_in_one_sentence(tmp_path: Path, target: str, text: str, sentence: str) -> None:
    (tmp_path / "notes.txt").write_text("no job\n")
    write(tmp_path, text)
    result = penstock(tmp_path, "run", target)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (said,) = result.stderr.splitlines()
    assert said.startswith("penstock: ")
    assert said.endswith(".")
    assert sentence in said
    if "workers=0" in text:
        assert said.endswith("(in jobs.py, line 2).")
    assert result.stdout == ""
    assert not (tmp_path / "a.jsonl").exists() or not (tmp_path / "a.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "begins", "ends"),
    [
        ("job = ps.Flow([1]).to('x.jsonl'", '  File "{file}", line 2', "SyntaxError: '(' was never closed"),
        (
            "def f():\n    1 / 0\nf()",
            'Traceback (most recent call last):\n  File "{file}", line 4, in <module>',
            "ZeroDivisionError: division by zero",
        ),
        (
            "def f(x):\n    return 1 / x\njob = ps.Flow([0]).map(f).to('x.jsonl')",
            'Traceback (most recent call last):\n  File "{file}", line 3, in f',
            "at stage 'f', item 0: 0",
        ),
    ],
)
def test_the_traceback_begins_in_the_user_s_file(tmp_path: Path, text: str, begins: str, ends: str) -> None:
    file = write(tmp_path, text)
    result = penstock(tmp_path, "run", "jobs.py")
    assert result.returncode == 1
    assert result.stderr.startswith(begins.format(file=file))
    assert result.stderr.rstrip().endswith(ends)


def test_an_output_that_cannot_be_made_is_said_in_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "job = ps.Flow([1]).to('jobs.py/x.jsonl')")
    result = penstock(tmp_path, "run", "jobs.py")
    assert result.returncode == 1
    (said,) = result.stderr.splitlines()
    assert said.startswith("penstock: jobs.py/x.jsonl can't be written: Not a directory")


def test_bad_arguments_exit_2(tmp_path: Path) -> None:
    for arguments in (["run"], ["run", "jobs.py", "--frsh"], ["walk"], ["torture", "jobs.py", "--kills", "0"]):
        result = penstock(tmp_path, *arguments)
        assert result.returncode == 2, arguments
        assert "Traceback" not in result.stderr


def test_a_failing_function_keeps_its_traceback_and_exits_1(tmp_path: Path) -> None:
    write(tmp_path, "def half(x):\n    return 1 / x\n\njob = ps.Flow([1, 0]).map(half).to('out.jsonl')")
    result = penstock(tmp_path, "run", "jobs.py")
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    assert "return 1 / x" in result.stderr
    assert "half" in result.stderr


def test_a_file_that_breaks_while_it_loads_exits_1_and_shows_where(tmp_path: Path) -> None:
    write(tmp_path, "nonsense")
    result = penstock(tmp_path, "run", "jobs.py")
    assert result.returncode == 1
    assert "NameError: name 'nonsense' is not defined" in result.stderr
    assert "jobs.py" in result.stderr


def test_a_refused_output_is_one_sentence_and_exits_1(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("a line that no journal accounts for\n")
    write(tmp_path, "job = ps.Flow([1]).to('out.jsonl')")
    result = penstock(tmp_path, "run", "jobs.py")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "out.jsonl" in result.stderr


ENDLESS = """
    import itertools

    def note(x):
        if x == 0:
            print("begun", flush=True)
        return x

    job = ps.Flow(itertools.count(), name="endless").map(note, workers=2).to("out.jsonl")
    """


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_commits(tmp_path: Path, number: int) -> None:
    write(tmp_path, ENDLESS)
    process = subprocess.Popen(
        [*PENSTOCK, "run", "jobs.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "committed" in said
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == list(range(len(lines)))


def test_help_and_version(tmp_path: Path) -> None:
    result = penstock(tmp_path, "--help")
    assert result.returncode == 0
    for command in ("run", "dead", "torture"):
        assert command in result.stdout
    import penstock as package

    assert penstock(tmp_path, "--version").stdout == f"penstock {package.__version__}\n"


def test_the_script_is_the_same_command() -> None:
    script = Path(sys.executable).parent / "penstock"
    command = [script] if os.access(script, os.X_OK) else PENSTOCK
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 0
