"""The classics of asynchronous AI, as they stand in every tutorial, on the virtual clock."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from penstock.testing import run_virtual
from penstock.train.tickets import Tickets

CLASSICS = Path(__file__).resolve().parents[1] / "examples" / "classics"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CLASSICS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_fetch_then_process_has_the_results_of_the_tutorial_in_its_time() -> None:
    classic = load("fetch_then_process")
    expected = [f"Processed: Data from source {source}" for source in (1, 2, 3)]
    for form in (classic.with_gather, classic.with_penstock):
        seconds, results = run_virtual(classic.timed(form([1, 2, 3], classic.fetch, classic.process)))
        assert results == expected
        assert seconds == pytest.approx(3.0)


def test_without_the_barrier_the_longest_chain_is_all_it_takes() -> None:
    classic = load("fetch_then_process")
    uneven = classic.Uneven()
    before, with_barrier = run_virtual(classic.timed(classic.with_gather(uneven.sources, uneven.fetch, uneven.process)))
    after, without = run_virtual(classic.timed(classic.with_penstock(uneven.sources, uneven.fetch, uneven.process)))
    assert without == with_barrier
    assert before == pytest.approx(uneven.barrier)
    assert after == pytest.approx(uneven.longest_chain)
    assert after < before


def test_a_queue_of_events_has_the_results_of_the_tutorial_and_five_at_once_take_the_time_of_one() -> None:
    classic = load("queue_of_events")

    async def timed(at_once: int) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await classic.in_memory(at_once) == [f"Processed: Event {number}" for number in range(5)]
        return loop.time() - began

    assert run_virtual(timed(1)) == pytest.approx(5, abs=0.9)  # opening and committing take some real time
    assert run_virtual(timed(5)) == pytest.approx(1, abs=0.9)


def test_a_pipeline_has_the_results_of_the_tutorial_and_overlaps_as_tasks_do() -> None:
    classic = load("pipeline")
    stages = classic.Stages(0.1, 0.2, 0.1)
    expected = [f"Postprocessed: Inference: Preprocessed: Data{number}" for number in range(1, 6)]
    for form, takes in ((classic.one_by_one, 2.0), (classic.with_tasks, 0.4), (classic.with_penstock, 0.4)):
        seconds, results = run_virtual(classic.timed(form(stages, classic.DATA)))
        assert results == expected
        assert seconds == pytest.approx(takes)


@pytest.mark.usefixtures("unmeasured")
def test_a_pipeline_holds_what_is_in_progress_where_tasks_hold_everything() -> None:
    grown = {}
    for form in ("tasks", "penstock"):
        command = [sys.executable, CLASSICS / "pipeline.py", "--measure", form, "--count", "30000"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        grown[form] = float(re.findall(r"grows by ([\d.]+) MB", said)[0])
    assert grown["tasks"] > 15
    assert grown["penstock"] < 5


def test_asynchronous_updates_end_with_all_gradients_and_nobody_waits() -> None:
    classic = load("asynchronous_updates")
    work = classic.Work()

    async def timed(form: Any) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert np.allclose(await form(work), work.expected)
        return loop.time() - began

    run_virtual(timed(classic.with_penstock))  # what is compiled on first use takes real time
    assert run_virtual(timed(classic.in_lock_step)) == pytest.approx(work.seconds.max(axis=0).sum())
    assert run_virtual(timed(classic.with_penstock)) == pytest.approx(work.seconds.sum(axis=1).max(), abs=0.5)


def test_asynchronous_updates_keep_their_bound_in_both_placements(monkeypatch: pytest.MonkeyPatch) -> None:
    classic = load("asynchronous_updates")
    ahead: list[int] = []

    class Watched(Tickets):
        def start(self) -> int:
            ticket = super().start()
            ahead.append(ticket - min(self.out))
            return ticket

    monkeypatch.setattr("penstock.train.server.Tickets", Watched)
    work = classic.Work()
    assert np.allclose(run_virtual(classic.as_a_flow(work)), work.expected)
    work = classic.Work(longest=0.02)
    assert np.allclose(asyncio.run(classic.in_processes(work)), work.expected)
    assert len(ahead) == 60
    assert 0 < max(ahead) <= 3


def test_asynchronous_updates_are_killed_and_go_on(tmp_path: Path) -> None:
    """Killed with its workers in the middle, at the fourth checkpoint; then every step counts once."""
    program = f"""
import asyncio, os, signal, sys
sys.path.insert(0, {str(CLASSICS)!r})
import asynchronous_updates as classic, penstock as ps
from penstock.train.store import Store
save, left = Store.save, 4
def dying(*args, **kwargs):
    global left
    save(*args, **kwargs)
    left -= 1
    if left == 0 and not os.path.exists("died"):
        open("died", "w").close()
        os.killpg(0, signal.SIGKILL)
Store.save = dying
kept = ps.Checkpoint("run", seconds=0)
work = classic.Work(longest=0.1)
found = asyncio.run(classic.as_a_flow(work, "shared", kept))
print(abs(found - work.expected).max() < 1e-12)
"""
    for code, said in ((-signal.SIGKILL, ""), (0, "True\n")):
        life = subprocess.run(
            [sys.executable, "-P", "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,
        )
        assert (life.returncode, life.stdout) == (code, said), life.stderr
