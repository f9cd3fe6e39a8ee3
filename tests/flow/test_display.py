"""Progress: when it speaks, where, that a stall is warned of, and that no run is disturbed and nothing left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from penstock.flow import display as display_module
from penstock.flow.display import Display, stuck
from penstock.flow.meter import BLOCKED_HEAD, BLOCKED_OUTPUT, BUSY, SegmentMeter, StageMeter
from penstock.flow.report import ErrorLog, Report, build

DEADLINE = 60


class JumpingLoop(asyncio.SelectorEventLoop):
    """Time jumps to the next timer whenever nothing else is ready."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]  # asyncio's own

        def jump(timeout: float | None) -> Any:
            self._now += timeout or 0.0
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


class Work:
    """A run of which a hundred items are done each second until ``until``."""

    def __init__(self, until: float = 1e9, in_flight: int = 5) -> None:
        self.until = until
        self.in_flight = in_flight
        self.segment = SegmentMeter([StageMeter("ask", "loop", 4)], 4, 0.0)
        self.asked = 0

    def report(self) -> Report:
        self.asked += 1
        now = asyncio.get_running_loop().time()
        done = int(min(now, self.until) * 100)
        self.segment.first.taken, self.segment.first.emitted = done + self.in_flight, done
        self.segment.first.in_progress = self.in_flight
        self.segment.set_state(BUSY, now)
        counts = {"issued": done + self.in_flight, "delivered": done, "in_flight": self.in_flight}
        return build(
            name="out.jsonl", counts=counts, elapsed=now, segments=[self.segment], errors=ErrorLog(), now=now, cores=2
        )


def watch(seconds: float, work: Work, total: int | None = None, progress: bool | None = None) -> None:
    """Display ``work`` for this long; nothing may be left on the loop."""

    async def main() -> None:
        display = Display("out.jsonl", work.report, total, progress)
        display.start()
        await asyncio.sleep(seconds)
        display.stop()
        display.stop()
        assert all(handle.cancelled() for handle in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(main())


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.mark.usefixtures("lines")
def test_lines_come_after_ten_seconds_and_then_each_half_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock")
    watch(75, Work(), total=10_000)
    assert messages(caplog, logging.INFO) == [
        "out.jsonl: 1,000 of 10,000 items (10 %), 100 items/s, 1 min 30 s left",
        "out.jsonl: 4,000 of 10,000 items (40 %), 100 items/s, 1 min left",
        "out.jsonl: 7,000 of 10,000 items (70 %), 100 items/s, 30 s left",
    ]


@pytest.mark.usefixtures("lines")
def test_a_short_run_says_nothing_and_asks_for_no_report(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock")
    work = Work()
    watch(9, work)
    assert not caplog.records
    assert work.asked == 1  # at the end


@pytest.mark.usefixtures("lines")
def test_where_logging_is_not_set_up_lines_go_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("penstock"), "propagate", False)
    watch(15, Work())
    assert capsys.readouterr().err == "out.jsonl: 1,000 items, 100 items/s\n"


def test_progress_false_shows_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "penstock")
    watch(300, Work(), progress=False)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [None, False])
@pytest.mark.usefixtures("lines")
def test_a_stall_is_warned_of_once(progress: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    watch(300, Work(until=20), progress=progress)
    (warning,) = messages(caplog, logging.WARNING)
    assert "nothing has moved for 1 min: 5 items are in 'ask', which waits for its function to return" in warning


def test_two_stalls_are_warned_of_twice(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(until=20)

    async def main() -> None:
        display = Display("out.jsonl", work.report, progress=False)
        display.start()
        await asyncio.sleep(200)
        work.until = 210
        await asyncio.sleep(200)
        display.stop()

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(main())
    assert len(messages(caplog, logging.WARNING)) == 2


@pytest.mark.usefixtures("lines")
def test_an_idle_service_is_no_stall(caplog: pytest.LogCaptureFixture) -> None:
    watch(300, Work(until=20, in_flight=0))
    assert not messages(caplog, logging.WARNING)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (BLOCKED_OUTPUT, "'ask' waits for what takes its output"),
        (BLOCKED_HEAD, "'ask' waits for the oldest item of its ordered window"),
        (BUSY, "7 items wait to be retried, for their batch to fill, or to be committed"),
    ],
)
def test_a_stall_without_anything_in_progress_says_what_is_waited_for(state: int, said: str) -> None:
    segment = SegmentMeter([StageMeter("ask", "loop", 4)], 4, 0.0)
    segment.set_state(state, 1.0)
    report = build(
        name="out.jsonl",
        counts={"issued": 7, "in_flight": 7},
        elapsed=60,
        segments=[segment],
        errors=ErrorLog(),
        now=60,
    )
    assert stuck(report).startswith(said)


def test_a_stall_in_fused_stages_names_them_all() -> None:
    segment = SegmentMeter([StageMeter("ask", "loop", 4), StageMeter("parse", "loop", 4)], 4, 0.0)
    segment.first.in_progress = 1
    report = build(name="x", counts={"in_flight": 1}, elapsed=60, segments=[segment], errors=ErrorLog(), now=60)
    assert stuck(report).startswith("1 item is in 'ask' or 'parse'")


def test_what_earlier_runs_did_counts_as_done(caplog: pytest.LogCaptureFixture, lines: None) -> None:
    caplog.set_level(logging.INFO, "penstock")
    work = Work()
    plain: Callable[[], Report] = work.report
    work.report = lambda: replace(plain(), earlier={"delivered": 4000, "dead": 0}, dead=3)  # type: ignore[method-assign]
    watch(15, work, total=10_000)
    (line,) = messages(caplog, logging.INFO)
    assert "5,003 of 10,000 items (50 %)" in line
    assert "3 failed" in line


SCRIPT = """
import asyncio, sys, threading
sys.path.insert(0, {here!r})
from test_display import Display, JumpingLoop, Work

async def main():
    work = Work()
    first, second = Display("out.jsonl", work.report, 10_000), Display("other.jsonl", work.report)
    first.start(); second.start()
    await asyncio.sleep(0.4)
    print("rich before the first refresh:", "rich" in sys.modules)
    await asyncio.sleep(50)
    print("asked", work.asked)
    first.stop(); second.stop()
    print("threads", threading.active_count())
    print("restored", type(sys.stderr).__name__)

with asyncio.Runner(loop_factory=JumpingLoop) as runner:
    runner.run(main())
print("done")
"""


def start(stderr: int | None) -> subprocess.Popen[str]:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = SCRIPT.format(here=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    )


def read_all(descriptor: int, chunks: list[bytes]) -> None:
    """Read what the other end of a terminal writes, until it is closed."""
    try:
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    except OSError:  # Linux reports a closed terminal so
        pass


def finish(process: subprocess.Popen[str]) -> str:
    """Its standard output; it must end in time and well."""
    try:
        out, _ = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0
    return out


def test_a_terminal_shows_a_bar_without_a_thread() -> None:
    """One of two runs draws; what is printed reaches the pipe it was meant for; nothing is left behind."""
    ours, theirs = os.openpty()
    process = start(theirs)
    os.close(theirs)
    chunks: list[bytes] = []
    reading = threading.Thread(target=read_all, args=(ours, chunks))
    reading.start()
    lines = finish(process).splitlines()
    reading.join()
    os.close(ours)
    drawn = b"".join(chunks).decode()
    assert lines[0] == "rich before the first refresh: False"
    assert lines[2:] == ["threads 1", "restored TextIOWrapper", "done"]
    assert 0 < int(lines[1].split()[1]) <= 220  # four times a second, at most
    assert "━" in drawn
    assert "5,040 of 10,000 items" in drawn
    assert "100 items/s" in drawn
    assert "ask: " in drawn
    assert "other.jsonl" not in drawn
    assert drawn.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_closed_pipe_never_breaks_a_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(writer)
    os.close(writer)
    assert finish(process).splitlines()[-1] == "done"


def test_a_terminal_that_goes_away_never_breaks_a_run() -> None:
    """Writing fails from then on; standard error is given back all the same."""
    ours, theirs = os.openpty()
    process = start(theirs)
    os.close(theirs)
    os.close(ours)
    assert finish(process).splitlines()[-2:] == ["restored TextIOWrapper", "done"]


def test_a_surface_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        first = interval = idle_interval = 1.0
        calls: ClassVar[list[str]] = []

        def show(self, head: str, share: float | None, report: Report) -> None:
            self.calls.append("show")
            raise BrokenPipeError

        def close(self, head: str, share: float | None, report: Report) -> None:
            self.calls.append("close")
            raise BrokenPipeError

    monkeypatch.setattr(display_module, "_surface", Broken)
    watch(100, Work())
    assert Broken.calls == ["show", "close"]
    assert not display_module._drawing
    assert not messages(caplog, logging.WARNING)


NOTEBOOK = """
import nbformat
from nbclient import NotebookClient
cell = '''
import threading
def work():
    import asyncio, sys
    sys.path.insert(0, {here!r})
    from test_display import Display, JumpingLoop, Work
    async def main():
        display = Display("out.jsonl", Work().report, 10_000)
        display.start()
        await asyncio.sleep(50)
        display.stop()
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(main())
thread = threading.Thread(target=work)
thread.start()
thread.join()
'''
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
NotebookClient(notebook, timeout=50, kernel_name="python3").execute()
print(notebook.cells[0].outputs)
"""


def test_a_notebook_shows_one_output_replaced_in_place() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "127.0.0.1,localhost"}
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK.format(here=str(Path(__file__).parent))],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("display_data") == 1, done.stdout
    assert "out.jsonl: 5,000 of 10,000 items (50 %), 100 items/s" in done.stdout
