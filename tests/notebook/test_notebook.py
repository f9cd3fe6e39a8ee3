"""A notebook, executed by a kernel as Jupyter does: a loop runs already, and classes are those of its cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tests.living import still_alive

DEADLINE = 120

DEFINITIONS = """
import dataclasses, enum, os
import msgspec
import penstock as ps

class Kind(enum.Enum):
    EVEN = 0
    ODD = 1

@dataclasses.dataclass
class Point:
    x: int
    kind: Kind

class Label(msgspec.Struct):
    text: str
    point: Point

class Model:
    def __init__(self, prefix):
        self.prefix = prefix

    def __call__(self, point):
        assert isinstance(point, Point)
        return Label(f"{self.prefix} {point.x} in {os.getpid()}", point)

points = [Point(x, Kind(x % 2)) for x in range(100)]
flow = ps.Flow(points, name="points").map(ps.per_worker(Model, "point"), place="process", workers=2)

def check(labels):
    assert [label.point for label in labels] == points
    assert {type(label) for label in labels} == {Label}
    assert {type(label.point) for label in labels} == {Point}
    assert all(label.point.kind is Kind(label.point.x % 2) for label in labels)
    pids = {int(label.text.split()[-1]) for label in labels}
    assert os.getpid() not in pids and len(pids) <= 2
    assert [label.text.split(" in ")[0] for label in labels] == [f"point {x}" for x in range(100)]
"""

CELLS = {
    "await job.run()": """
job = flow.map(lambda label: label.point.x).to("awaited.jsonl")
report = await job.run()
assert report.delivered == 100
assert open("awaited.jsonl").read().split() == [str(x) for x in range(100)]
report
""",
    "job.run_sync()": """
report = flow.map(lambda label: label.point.x).to("sync.jsonl").run_sync()
assert report.delivered == 100
assert open("sync.jsonl").read().split() == [str(x) for x in range(100)]
print(report)
""",
    "async for": """
labels = []
async for label in flow:
    labels.append(label)
check(labels)
""",
    "for": """
labels = []
for label in flow:
    labels.append(label)
check(labels)
""",
    "collect": """
check(await flow.collect())
check(flow.collect_sync())
""",
    "break": """
async for label in flow:
    break
for label in flow:
    break
""",
    "a live call": """
work = ps.Flow().map(ps.per_worker(Model, "point"), place="process")
async with work.open() as call:
    label = await call(points[7])
assert type(label) is Label and label.point == points[7]
with work.open_sync() as call:
    assert call(points[8]).point == points[8]
""",
    "a cell is run again": """
class Label(msgspec.Struct):
    text: str
    point: Point
    more: int = 5

labels = await flow.collect()
check(labels)
assert {label.more for label in labels} == {5}
""",
    "an error is the user's own": """
class Mine(Exception):
    pass

def fails(point):
    raise Mine(point.x)

try:
    await ps.Flow(points).map(fails, place="process", workers=1).collect()
except Mine as error:
    assert error.args == (0,) and "fails" in "".join(error.__notes__)
else:
    raise AssertionError("it wasn't raised")
""",
    "nothing is left": """
import asyncio, threading, psutil
while others := {task for task in asyncio.all_tasks() if task.get_name().startswith("penstock")}:
    await asyncio.wait(others)
assert psutil.Process().children(recursive=True) == []
assert [t.name for t in threading.enumerate() if "penstock" in t.name] == ["penstock-loop"]
""",
}


class Kernel:
    """One kernel for all cells, as one notebook has it."""

    def __init__(self, directory: Path) -> None:
        self.notebook = nbformat.v4.new_notebook()
        self.client = NotebookClient(
            self.notebook, timeout=DEADLINE, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
        )

    def run(self, source: str) -> list[Any]:
        """Execute a cell; returns its outputs. Raises CellExecutionError with the cell's traceback."""
        self.notebook.cells.append(nbformat.v4.new_code_cell(source))
        number = len(self.notebook.cells) - 1
        cell = self.client.execute_cell(self.notebook.cells[number], number)
        outputs: list[Any] = cell.outputs
        return outputs


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    started = Kernel(tmp_path)
    before = set(psutil.Process().children())
    with started.client.setup_kernel():
        yield started
    assert still_alive(set(psutil.Process().children()) - before, within=10) == []


def test_a_notebook(kernel: Kernel) -> None:
    kernel.run(DEFINITIONS)
    shown: dict[str, list[Any]] = {}
    for name, source in CELLS.items():
        try:
            shown[name] = kernel.run(source)
        except CellExecutionError as error:
            pytest.fail(f"{name}: {error}")
    errors = {name: [one for one in outputs if one.get("name") == "stderr"] for name, outputs in shown.items()}
    assert not any(errors.values()), errors
    assert "delivered 100" in str(shown["job.run_sync()"])
