"""What README.md says works when typed, as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
CODE = [text for language, text in BLOCKS if language == "python"]
FIRST = next(text for text in CODE if "varieties.jsonl" in text)

pytestmark = pytest.mark.usefixtures("unmeasured")


def run(text: str, directory: Path) -> str:
    if not (directory / "README.md").exists():
        shutil.copy(ROOT / "README.md", directory)
    script = directory / "script.py"
    script.write_text(text, encoding="utf-8")
    (directory / "reviews.csv").write_text("id,text\nr1,fine\n", encoding="utf-8")
    command = [sys.executable, "-W", "error", script.name]
    environment = {**os.environ, "OPENAI_API_KEY": "none is needed to describe a job"}
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("number", range(len(CODE)))
def test_the_code_runs(number: int, tmp_path: Path) -> None:
    said = run(CODE[number], tmp_path)
    for promised in re.findall(r"#\s+(\[.*\])$", CODE[number], re.MULTILINE):
        assert promised in said


def test_the_first_flow_writes_what_it_says_and_has_nothing_to_do_again(tmp_path: Path) -> None:
    run(FIRST, tmp_path)
    lines = (tmp_path / "varieties.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(line.split()) for line in README.splitlines()]
    assert [json.loads(line)["text"] for line in lines] == [text for text in texts if text]
    assert "nothing to do" in run(FIRST, tmp_path)
    assert (tmp_path / "varieties.jsonl").read_text(encoding="utf-8").splitlines() == lines


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`?make (\w+)", README)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    commands = set(re.findall(r"`penstock (\w+)", README))
    assert commands == {"run", "fetch", "dead", "torture", "log"}
    for command in commands:
        call = [sys.executable, "-m", "penstock.cli", command, "--help"]
        assert subprocess.run(call, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert (path.parent / link).exists(), link
