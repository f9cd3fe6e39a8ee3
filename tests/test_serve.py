"""The example of one work run three ways, as a reader would run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
DEADLINE = 60


@pytest.mark.usefixtures("unmeasured")
def test_one_work_over_a_file_over_a_topic_and_behind_an_endpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("delivered 100") == 2
    written = (tmp_path / "run" / "serve" / "languages.jsonl").read_text(encoding="utf-8").splitlines()
    languages = ["English", "French", "German", "Spanish"]
    assert [json.loads(line)["language"] for line in written] == languages * 25

    loads = re.findall(
        r"(\d+) callers: (\d+) answered, p50 (\d+) ms, p99 (\d+) ms; (\d+) refused .*\n +batches: (.*)", done.stdout
    )
    (callers, answered, _, _, refused, _), (many, some, p50, p99, others, shared) = loads
    assert (int(answered), int(refused)) == (3 * int(callers), 0)
    assert int(some) + int(others) == 2 * int(many)
    assert int(others) > 0
    assert int(p50) <= int(p99)
    batches = {int(size): int(count) for count, size in re.findall(r"(\d+) of (\d+)", shared)}
    assert max(batches) == 32
    assert sum(size * count for size, count in batches.items()) == int(some)
