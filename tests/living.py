"""Whether processes have ended. A zombie has: it only waits for somebody to ask how, and an orphan's init may never."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil

__all__ = ["still_alive"]


def still_alive(processes: Iterable[psutil.Process], within: float) -> list[psutil.Process]:
    """Those that are still at work after so many seconds, or at once none."""
    until = time.monotonic() + within
    alive = [process for process in processes if _alive(process)]
    while alive and time.monotonic() < until:
        _, alive = psutil.wait_procs(alive, timeout=0.05)
        alive = [process for process in alive if _alive(process)]
    return alive


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
