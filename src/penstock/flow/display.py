"""Progress while a run goes, where somebody looks on, and a warning when nothing moves.

A display lives on the run's event loop as at most two timers, and nothing else: no thread, no task, nothing to
await. ``start`` arms them, ``stop`` cancels them; neither waits. Each timer asks the run for a report, and arms
itself again.

- The *surface* is a bar in a terminal, an output of the cell in a notebook, or a line every half minute (through
  logging where that is set up, else on standard error). The first comes late enough that a short run shows and
  imports nothing. A surface that can't be written to (a closed pipe) is given up silently: the run goes on.
- The *watch* warns, by logging, when items are in flight and none has moved for a minute. It also watches a run that
  shows no progress.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

from penstock.flow.report import Report, StageReport
from penstock.flow.text import duration, number, percent, rate

__all__ = ["Display", "Surface", "stuck"]

logger = logging.getLogger("penstock")

_STALL = 60.0
"""Seconds without any movement after which the watch warns."""

_REFRESH = 0.25
_IDLE_REFRESH = 1.0
_FIRST_REFRESH = 0.5
_FIRST_LINE = 10.0
_LINES = 30.0
_SHARE = 0.01  # of the loop's time, at most, that drawing may take
_SPAN = 10.0  # seconds over which the shown rate is taken
_SETTLED = ("delivered", "filtered", "skipped", "dead")

_drawing: list[Display] = []
"""The one display that draws in this process: two bars in one terminal would overwrite each other."""


class Surface(Protocol):
    """Where progress is shown. Either method may raise anything; the display then gives the surface up."""

    first: float
    interval: float
    idle_interval: float

    def show(self, head: str, share: float | None, report: Report) -> None: ...

    def close(self, head: str, share: float | None, report: Report) -> None: ...


class Display:
    """Shows the progress of one run of ``total`` items (None: not known) until it is stopped.

    ``report`` is asked at most four times a second. ``progress=False`` shows nothing and only watches. ``status``:
    what the sink has to say about itself.
    """

    def __init__(
        self,
        name: str,
        report: Callable[[], Report],
        total: int | None = None,
        progress: bool | None = None,
        status: Callable[[], str] | None = None,
    ) -> None:
        self.name = name
        self._report = report
        self._total = total
        self._progress = progress
        self._status = status
        self._surface: Surface | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._shown: tuple[int, ...] = ()
        self._seen: tuple[int, ...] = ()
        self._seen_at = 0.0
        self._warned = False

    def start(self) -> None:
        """Arm the timers on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._seen_at = self._loop.time()
        self._recent.append((self._seen_at, 0))
        if self._progress is not False:
            self._surface = _surface()
            if not isinstance(self._surface, _Lines):
                if _drawing:
                    self._surface = None
                else:
                    _drawing.append(self)
        if self._surface is not None:
            self._arm("surface", self._surface.first, self._refresh)
        self._arm("watch", _STALL / 4, self._watch)

    def stop(self) -> None:
        """Cancel the timers and leave the surface as it should stay. Safe to call twice, and before ``start``."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._close_surface()
        if self in _drawing:
            _drawing.remove(self)

    def _arm(self, timer: str, delay: float, callback: Callable[[], None]) -> None:
        self._timers[timer] = self._loop.call_later(delay, callback)

    def _refresh(self) -> None:
        surface = self._surface
        if surface is None:
            return
        report = self._report()
        moved = _movement(report)
        begun = perf_counter()
        try:
            surface.show(*self._headline(report), report)
        except Exception:
            logger.debug("the progress display failed", exc_info=True)
            self._close_surface()
            return
        cost = perf_counter() - begun
        interval = surface.interval if moved != self._shown else surface.idle_interval
        self._shown = moved
        self._arm("surface", max(interval, cost / _SHARE), self._refresh)

    def _close_surface(self) -> None:
        surface, self._surface = self._surface, None
        if surface is None:
            return
        try:
            report = self._report()
            surface.close(*self._headline(report), report)
        except Exception:
            logger.debug("the progress display failed", exc_info=True)

    def _headline(self, report: Report) -> tuple[str, float | None]:
        """What is done of how much, how fast, and how long it will take; and the share that is done."""
        now = self._loop.time()
        recent = self._recent
        recent.append((now, report.settled))
        while len(recent) > 2 and now - recent[1][0] > _SPAN:
            recent.popleft()
        since, before = recent[0]
        passed = now - since
        pace = (report.settled - before) / passed if passed > 0 else 0.0
        done = report.settled + sum(report.earlier.get(key, 0) for key in _SETTLED)
        text, share = f"{number(done)} items", None
        if self._total:
            share = min(1.0, done / self._total)
            text = f"{number(done)} of {number(self._total)} items ({percent(share)})"
        text += f", {rate(pace)}"
        failed = report.skipped + report.dead
        if failed:
            text += f", {number(failed)} failed"
        if self._status is not None:
            text += f", {self._status()}"
        if share is not None and pace > 0 and share < 1:
            text += f", {duration(done * (1 / share - 1) / pace)} left"
        return text, share

    def _watch(self) -> None:
        report = self._report()
        now = self._loop.time()
        moved = _movement(report)
        if moved != self._seen or not report.in_flight:
            self._seen, self._seen_at, self._warned = moved, now, False
        elif not self._warned and now - self._seen_at >= _STALL:
            self._warned = True
            logger.warning("%s: nothing has moved for %s: %s", self.name, duration(now - self._seen_at), stuck(report))
        self._arm("watch", _STALL / 4, self._watch)


def stuck(report: Report) -> str:
    """Which stage of a run that doesn't move holds what is in flight, and what it waits for."""
    stages = report.stages
    holding = next((stage for stage in reversed(stages) if stage.in_progress), None)
    if holding is not None:
        names = " or ".join(repr(stage.name) for stage in stages if stage.segment == holding.segment)
        count = holding.in_progress
        items = "1 item is" if count == 1 else f"{number(count)} items are"
        return f"{items} in {names}, which waits for its function to return. timeout= would bound each attempt"
    if stages and stages[-1].state.startswith("blocked on"):
        return f"{stages[-1].name!r} waits for what takes its output"
    ordered = next((stage for stage in stages if "order" in stage.state), None)
    if ordered is not None:
        return f"{ordered.name!r} waits for the oldest item of its ordered window, which is waiting to be retried"
    held = next((stage for stage in stages if stage.state.startswith("held")), None)
    if held is not None:
        refused = f", having been refused {number(held.throttled)} times" if held.throttled else ""
        return f"{held.name!r} waits for its limit{refused}"
    count = report.in_flight
    return f"{number(count)} items wait to be retried, for their batch to fill, or to be committed"


def _movement(report: Report) -> tuple[int, ...]:
    """What changes whenever an item moves."""
    counts = [report.issued, report.settled, report.released, report.retried]
    for stage in report.stages:
        counts += (stage.taken, stage.emitted)
    return tuple(counts)


def _surface() -> Surface:
    if "ipykernel" in sys.modules and "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        if shell is not None and hasattr(shell, "kernel"):
            return _Notebook()
    if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        return _Terminal()
    return _Lines()


class _Lines:
    """Plain lines, far apart."""

    first = _FIRST_LINE
    interval = _LINES
    idle_interval = _LINES

    def show(self, head: str, share: float | None, report: Report) -> None:
        line = f"{report.name}: {head}"
        if logger.hasHandlers():
            logger.info("%s", line)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def close(self, head: str, share: float | None, report: Report) -> None:
        pass


class _Notebook:
    """Text under the cell, replaced in place."""

    first = _FIRST_REFRESH
    interval = _REFRESH
    idle_interval = _IDLE_REFRESH

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, head: str, share: float | None, report: Report) -> None:
        self._put("\n".join([f"{report.name}: {head}", *(_stage_line(stage) for stage in report.stages)]))

    def close(self, head: str, share: float | None, report: Report) -> None:
        if self._handle is not None:
            self._put(f"{report.name}: {head}")

    def _put(self, text: str) -> None:
        from IPython import display

        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display.display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(content, raw=True)


class _Terminal:
    """A bar and a line a stage, drawn by rich without its refreshing thread."""

    first = _FIRST_REFRESH
    interval = _REFRESH
    idle_interval = _IDLE_REFRESH

    def __init__(self) -> None:
        self._live: Any = None

    def show(self, head: str, share: float | None, report: Report) -> None:
        if self._live is None:
            self._live = self._open()
        self._live.update(self._draw(head, share, report.name, report.stages), refresh=True)

    def close(self, head: str, share: float | None, report: Report) -> None:
        live, self._live = self._live, None
        if live is not None:
            try:
                live.update(self._draw(head, share, report.name, ()), refresh=True)
            finally:
                live.stop()  # gives back the cursor and sys.stderr

    def _open(self) -> Any:
        from rich.console import Console
        from rich.live import Live

        # What the user prints must still reach a file or pipe that standard output was turned to.
        both = sys.stdout is not None and sys.stdout.isatty()
        live = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=both, redirect_stderr=True)
        live.start()
        return live

    def _draw(self, head: str, share: float | None, name: str, stages: tuple[StageReport, ...]) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        if share is None:
            line.add_row(Text(name, style="bold"), Text(head))
        else:
            line.add_row(Text(name, style="bold"), ProgressBar(total=1.0, completed=share, width=24), Text(head))
        return Group(line, *(Text(_stage_line(stage), style="dim", no_wrap=True) for stage in stages))


def _stage_line(stage: StageReport) -> str:
    line = f"  {stage.name}: {number(stage.taken)} in, {number(stage.emitted)} out, {percent(stage.busy)} busy"
    return f"{line}, {stage.state}" if stage.state not in ("", "busy") else line
