"""What the repository promises to whoever clones it: no addresses, no machine's paths, every version pinned."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
TEXT = {"", ".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".ipynb", ".svg", ".json"}
BUILT = {".git", ".venv", ".coverage", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def text_files() -> tuple[Path, ...]:
    found = []
    for directory, below, files in os.walk(ROOT):
        here = Path(directory)
        below[:] = [name for name in below if name not in BUILT and not name.startswith(".venv")]
        if here == ROOT:
            below[:] = [name for name in below if name not in ("build", "dist", "run", "site")]
        found += [here / name for name in files if Path(name).suffix in TEXT]
    return tuple(found)


def test_the_repository_is_found() -> None:
    assert ROOT / "Makefile" in text_files()


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"https?://[\w.-]*(pypi|pythonhosted|anaconda|simple/)[\w./-]*", "names a package registry"),
        (r"--(extra-)?index-url|find-links|trusted-host", "names a package registry"),
        (r"(?<![\w./-])/(home|Users|root|work)/\w+", "is a path of one machine"),
    ],
)
def test_no_addresses_and_no_machine_paths(pattern: str, why: str) -> None:
    for path in text_files():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.search(pattern, line)
            assert not found, f"{path.relative_to(ROOT)}, line {number}: {found and found[0]} {why}"


def test_constraints_are_plain_pins() -> None:
    for line in PINS:
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.!+]+", line), line


def test_every_dependency_is_pinned() -> None:
    pinned = {normal(line.split("==")[0]) for line in PINS if "==" in line}
    project = PROJECT["project"]
    wanted = [
        *PROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    names = {normal(re.match(r"[\w.-]+", one)[0]) for one in wanted}  # type: ignore[index]  # every one starts so
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"


def test_every_dependency_earns_its_place_in_a_line() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    project = PROJECT["project"]
    for one in [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]:
        name = re.match(r"[\w.-]+", one)
        assert name is not None
        assert f"`{name[0]}`" in page, f"docs/dependencies.md says nothing of {name[0]}"


def test_the_version_is_named_once() -> None:
    import penstock

    assert penstock.__version__ == PROJECT["project"]["version"]
    assert f"## [{penstock.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_types_are_shipped() -> None:
    assert (ROOT / "src" / "penstock" / "py.typed").exists()


def test_no_lock_files() -> None:
    assert not [path.name for path in ROOT.iterdir() if path.name.endswith(".lock") or path.name == "Pipfile"]


def test_ci_runs_the_tests() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", ROOT / ".ci" / "run"], timeout=60).returncode == 0


def test_make_knows_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "bench", "soak", "lint", "docs"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_make_names_the_missing_package(tmp_path: Path) -> None:
    """Where ``python3 -m venv`` fails, as on a Debian without ensurepip, make says what to install."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" != -m ]\n')  # runs -c, fails at -m venv
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    result = subprocess.run(
        ["make", "lint", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "python3-venv" in result.stdout
    assert not (tmp_path / ".venv").exists()
