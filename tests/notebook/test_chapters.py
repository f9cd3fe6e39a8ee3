"""The notebook of four chapters, executed from its first cell to its last as Jupyter does."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from tests.living import still_alive

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "asynchronous_ai.ipynb"
DEADLINE = 120


def test_it_is_kept_without_outputs_and_its_cells_have_names() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id) for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@pytest.mark.usefixtures("unmeasured")
def test_the_chapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "TMPDIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = set(psutil.Process().children())
    NotebookClient(
        notebook, timeout=DEADLINE, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert still_alive(set(psutil.Process().children()) - before, within=10) == []

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    complaints = {cell.id: one.text for cell in code for one in cell.outputs if one.get("name") == "stderr"}
    assert complaints == {}
    said = {cell.id: "".join(one.text for one in cell.outputs if "text" in one) for cell in code}
    fetched, counted = re.findall(r"(\d+) addresses.*|in (\d+) files", said["fetch-server"] + said["fetch-real-plain"])
    assert int(fetched[0]) == int(counted[1]) + 1  # one address is wrong
    assert "404 Not Found" in said["fetch-real-again"]
    assert "run again: 0 items issued" in said["fetch-real-again"]
    assert "killed (SIGKILL) after 100 bills, exit code -9" in said["queue-killed"]
    assert "200 bills, each order once, every total right" in said["queue-checked"]
    tasks, flow = (float(peak) for peak in re.findall(r"at most ([\d.]+) MB", said["pipeline-measured"]))
    assert tasks > 10
    assert flow < 3
    for cell in ("pipeline-real-plain", "updates-real-plain", "updates-real-penstock"):
        assert float(re.findall(r"([\d.]+)% right", said[cell])[0]) > 93, said[cell]
    assert "720 updates in all" in said["updates-real-penstock"]
    assert list((tmp_path / "TMPDIR").glob("penstock-*")) == []
