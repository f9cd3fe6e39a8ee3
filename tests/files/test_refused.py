"""What the system refuses: a directory that can't be made or written, a journal that may only be read."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock as ps
from penstock.errors import WriteFailed


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    with pytest.raises(WriteFailed, match=r"x\.jsonl can't be written: Not a directory \(.*/a\.py\)"):
        ps.Flow([1]).to(f"{tmp_path}/a.py/deep/x.jsonl").run_sync(progress=False)
    assert os.listdir(tmp_path) == ["a.py"]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user of this machine may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name).resolve()


def as_another_user(code: str, directory: Path) -> str:
    """What a program prints that may read ``directory`` and not write it."""
    directory.chmod(0o555)
    # Root may do everything, so it becomes somebody else once all is loaded.
    code = f"""
import os, sys
import penstock as ps, apsw, cloudpickle, msgspec, numpy
import penstock.cli.dead, penstock.flow.run, penstock.flow.sync
from penstock.files import csvfile, jsonl, parquet, sqlite
ps.Flow([1]).to(ps.write.jsonl(sys.argv[1])).run_sync(progress=False)
ps.read.dead(sys.argv[1]).collect_sync()
if os.geteuid() == 0:
    os.seteuid(65534)
{textwrap.dedent(code)}"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as other:
        command = [sys.executable, "-c", code, f"{other}/out.jsonl"]
        shown = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=60, env=environment, check=False
        )
    directory.chmod(0o755)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet", "x.db"])
def test_a_directory_that_may_not_be_written(name: str, shared: Path) -> None:
    code = f"""
    try:
        ps.Flow([{{"a": 1}}]).to({name!r}).run_sync(progress=False)
    except ps.errors.WriteFailed as error:
        print(error)
    """
    said = as_another_user(code, shared)
    assert said.startswith(f"{name} can't be written: Permission denied ({shared}/{name}.lock). Make space, give")


def fails(x: int) -> int:
    if x % 2:
        raise ValueError(x)
    return x


@pytest.mark.parametrize("name", ["out.jsonl", "out.db"])
def test_the_dead_letters_of_another_user_can_be_read(name: str, shared: Path) -> None:
    ps.Flow([{"n": n} for n in range(4)]).map(lambda row: {"n": fails(row["n"])}, on_error="dead_letter").to(
        f"{shared}/{name}"
    ).run_sync(progress=False)
    code = f"""
    print(len(ps.read.dead({name!r}).collect_sync()), flush=True)
    from pathlib import Path
    print(penstock.cli.dead.show_dead(Path({name!r}), requeue=False))
    """
    lines = as_another_user(code, shared).splitlines()
    assert lines[0] == "2"
    assert lines[-1] == "0"
    assert len(lines) == 4
    assert sorted(os.listdir(shared)) == sorted({name, name if name == "out.db" else f"{name}.journal"})


def test_the_dead_letters_of_another_user_s_running_job_can_be_read(shared: Path) -> None:
    program = f"""
import penstock as ps, sys
def work(x):
    if x == 0:
        raise ValueError(x)
    return x
def source():
    yield 0
    while True:
        line = sys.stdin.readline()
        if not line:
            return
        yield 1
ps.Flow(source(), name="n").map(work, on_error="dead_letter").to(r"{shared}/out.jsonl").run_sync(progress=False)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, env=environment) as job:
        assert job.stdin is not None
        while not (shared / "out.jsonl.journal").exists() or not dead_count(f"{shared}/out.jsonl"):
            assert job.poll() is None
        said = as_another_user("print(len(ps.read.dead('out.jsonl').collect_sync()))", shared)
        job.stdin.close()
        assert job.wait(60) == 0
    assert said == "1\n"


def dead_count(path: str) -> int:
    try:
        return len(ps.read.dead(path).collect_sync())
    except ps.errors.JournalError:  # it is being made
        return 0


def test_a_journal_that_may_not_be_read_is_not_to_be_destroyed(shared: Path) -> None:
    ps.Flow([1]).to(f"{shared}/out.jsonl").run_sync(progress=False)
    (shared / "out.jsonl.journal").chmod(0o600)
    code = """
    try:
        ps.read.dead("out.jsonl")
    except ps.errors.JournalError as error:
        print(error)
    """
    if os.geteuid():
        (shared / "out.jsonl.journal").chmod(0)
    said = as_another_user(code, shared)
    assert "fresh" not in said
    assert "Look whether you may read it" in said
