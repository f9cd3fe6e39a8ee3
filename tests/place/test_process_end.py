"""Process pools in scripts of their own: how they begin without a main guard, and end with their parent."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

# What a user's script would leave to a flow: values in, results out.
RUNNER = """
import asyncio
from penstock.place.base import Chain, Step, Task
from penstock.place.process import ProcessPool

started = asyncio.Event()

async def results(function, values):
    finished, all_done = [], asyncio.Event()
    def done(tasks):
        finished.extend(tasks)
        if len(finished) == len(values):
            all_done.set()
    pool = ProcessPool(Chain("stage", (Step("stage", function),)), 2, done=done, failed=print)
    await pool.open()
    tasks = [Task(value) for value in values]
    pool.submit(tasks)
    print("started", *pool.pids, flush=True)
    started.set()
    await all_done.wait()
    await pool.close()
    return [task.error or task.value for task in tasks]
"""


def script(directory: Path, body: str, name: str = "job.py") -> Path:
    path = directory / name
    path.write_text(RUNNER + body)
    return path


def start(path: Path, directory: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(path)],
        cwd=directory or path.parent,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_script_without_a_guard_and_with_classes_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    (tmp_path / "helper.py").write_text("class Box:\n    def __init__(self, x):\n        self.x = x\n")
    path = script(
        tmp_path,
        """
import enum
from dataclasses import dataclass
from functools import cached_property
import msgspec
from helper import Box

print("main runs")

@dataclass(frozen=True, slots=True)
class Point:
    x: int

class Row(msgspec.Struct, tag=True, rename="camel"):
    row_point: Point
    children: list["Row"] = []
    def __post_init__(self):
        assert isinstance(self.row_point, Point)
    def deeper(self):
        return Row(Point(self.row_point.x + 1), [self])

class Sub(Row, frozen=True):
    note: str = "n"
    @classmethod
    def make(cls, x):
        return cls(row_point=Point(x))

class Side(enum.Enum):
    LEFT = 1

class Lazy:
    @cached_property
    def seven(self):
        return 7

OFFSET = 5

def work(value):
    row, sub, side, lazy, box = value
    assert msgspec.json.decode(msgspec.json.encode(row), type=Row) == row
    return row.deeper(), Sub.make(row.row_point.x + OFFSET), Side(1), lazy.seven, Box(box.x + 1), Lazy

value = (Row(Point(1)), Sub.make(2), Side.LEFT, Lazy(), Box(3))
for row, sub, side, seven, box, lazy in asyncio.run(results(work, [value] * 50)):
    assert type(row) is Row and type(row.row_point) is Point and row.children == [Row(Point(1))]
    assert type(sub) is Sub and sub.row_point == Point(6) and sub.note == "n"
    assert side is Side.LEFT and lazy is Lazy and seven == 7
    assert type(box) is Box and box.x == 4
print("good")
""",
    )
    process = start(path)
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert out.split("\n")[0] == "main runs"
    assert out.count("main runs") == 1
    assert "good" in out


def test_files_in_the_directory_shadow_nothing(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("queue", "pickle", "select"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    path = script(tmp_path, "print(asyncio.run(results(abs, [-1])))\n")
    out, err = start(path, elsewhere).communicate(timeout=60)
    assert (err, out.split("\n")[1]) == ("", "[1]")


def test_classes_made_in_a_worker_arrive(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
def work(x):
    class Local:
        def __init__(self, x):
            self.x = x
    return Local(x), Local

for x, (local, kind) in enumerate(asyncio.run(results(work, range(20)))):
    assert local.x == x and type(local) is kind and kind.__name__ == "Local"
print("good")
""",
    )
    out, err = start(path).communicate(timeout=60)
    assert (err, out.split()[-1]) == ("", "good")


BUSY = {
    "sleep": "import time\ndef work(x):\n    time.sleep(3600)\n",
    "python": "def work(x):\n    while True:\n        pass\n",
    "a C call that holds the GIL": "def work(x):\n    return 7 ** (10 ** 9)\n",
}


def ended(pids: list[int], seconds: float) -> int:
    """How many of these processes end within so many seconds of each other; the others are killed."""
    watched = select.poll()
    running: set[int] = set()
    for pid in pids:
        try:
            running.add(os.pidfd_open(pid))
        except ProcessLookupError:
            pass
    for descriptor in running:
        watched.register(descriptor, select.POLLIN)
    left = set(running)
    while left and (heard := watched.poll(1000 * seconds)):
        for descriptor, _ in heard:
            watched.unregister(descriptor)
            left.discard(descriptor)
    for descriptor in left:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    for descriptor in running:
        os.close(descriptor)
    return len(pids) - len(left)


@pytest.mark.parametrize("body", BUSY.values(), ids=list(BUSY))
def test_law_it_ends_with_its_killed_parent(tmp_path: Path, body: str) -> None:
    with start(script(tmp_path, body + "asyncio.run(results(work, range(4)))\n")) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()[1:]]
        process.kill()
        assert ended(pids, 2) == 2


MAIN = """
async def main():
    working = asyncio.ensure_future(results(work, range(4)))
    await started.wait()
    END
asyncio.run(main())
"""
ENDS = {
    "returns from main": "return",
    "raises": "1 / 0",
    "exits": "import os; os._exit(0)",
    "is interrupted": "await working",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
def test_law_it_ends_however_its_parent_ends(tmp_path: Path, end: str) -> None:
    with start(script(tmp_path, BUSY["python"] + MAIN.replace("END", end))) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()[1:]]
        if end is ENDS["is interrupted"]:
            process.send_signal(signal.SIGINT)
        assert ended(pids, 20) == 2
        process.communicate(timeout=20)
