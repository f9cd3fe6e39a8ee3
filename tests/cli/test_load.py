"""From FILE[:NAME] to a job: what counts as one, and what a file may be called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock as ps
from penstock.cli.load import load_file, load_job, split_target


@pytest.fixture(autouse=True)
def imports_as_before() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("penstock"):
            del sys.modules[name]


def write(directory: Path, text: str, name: str = "work.py") -> Path:
    path = directory / name
    path.write_text(f"import penstock as ps\n{text}\n")
    return path


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("jobs.py", (Path("jobs.py"), None)),
        ("a/jobs.py:nightly", (Path("a/jobs.py"), "nightly")),
        ("c:/jobs.py", (Path("c:/jobs.py"), None)),
        ("jobs.py:", (Path("jobs.py:"), None)),
    ],
)
def test_the_name_is_parted_from_the_file(target: str, expected: tuple[Path, str | None]) -> None:
    assert split_target(target) == expected


def test_one_job_under_two_names_is_one_job(tmp_path: Path) -> None:
    path = write(tmp_path, "job = ps.Flow([1]).to('a.jsonl')\nsame = job\n_hidden = ps.Flow([2]).to('b.jsonl')")
    assert load_job(str(path)).sink.identity == "jsonl:a.jsonl"


def test_a_name_chooses_also_what_is_hidden(tmp_path: Path) -> None:
    path = write(tmp_path, "job = ps.Flow([1]).to('a.jsonl')\n_hidden = ps.Flow([2]).to('b.jsonl')")
    assert load_job(f"{path}:_hidden").sink.identity == "jsonl:b.jsonl"


def test_two_flows_need_a_name_too(tmp_path: Path) -> None:
    path = write(tmp_path, "one = ps.Flow([1])\ntwo = ps.Flow([2])")
    with pytest.raises(ps.errors.PlanError, match="defines 2 flows: one, two"):
        load_job(str(path), "out.jsonl")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "job = ps.Flow([1]).to('a.jsonl')")
    with pytest.raises(ps.errors.PlanError, match="suffix"):
        load_job(str(path), "out.xyz")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ps.errors.PlanError, match="isn't a Python file"):
        load_job(str(tmp_path))


def test_a_missing_file_is_an_os_error_too(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*gone.py'"):
        load_job(str(tmp_path / "gone.py"))


def test_errors_say_where_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "x = 1\nflow = ps.Flow(5)")
    with pytest.raises(ps.errors.PlanError) as caught:
        load_file(path)
    assert caught.value.__notes__ == ["in work.py, line 3"]


def test_a_file_named_like_a_module_gets_another_name(tmp_path: Path) -> None:
    path = write(tmp_path, "job = ps.Flow([1]).to('a.jsonl')", "json.py")
    module = load_file(path)
    assert module.__name__ == "job_json"
    assert sys.modules["json"] is not module
