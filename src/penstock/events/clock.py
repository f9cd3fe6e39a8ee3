"""The clocks of a log: the machine's since it booted, for leases and delays; the calendar's, for what people read.

Leases must outlast a change of the date and count while the machine sleeps, so they run on the boot-wide clock, which
all processes share; what was written under another boot id has expired. A delay that a loop waits for runs on that
loop's time, so that on a virtual clock it takes none: there, the loop's time is the log's, and a moment that is given
(``at=``) lies as far ahead on that clock as it does on the calendar when it is given.
"""

from __future__ import annotations

import asyncio
import time
from functools import cache
from pathlib import Path

__all__ = ["boot_id", "boot_time", "calendar", "loop_calendar", "loop_time"]

_FAR = 1.0  # seconds


def boot_time() -> float:
    """Seconds since the machine booted, the same in every process, whatever the date is set to."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def loop_time(loop: asyncio.AbstractEventLoop) -> float:
    """``boot_time``, but on a loop with a clock of its own that loop's time."""
    return loop.time() if _has_own_clock(loop) else boot_time()


def loop_calendar(loop: asyncio.AbstractEventLoop) -> int:
    """``calendar``, but on a loop with a clock of its own the microseconds of that, so that both go on alike."""
    return int(loop.time() * 1e6) if _has_own_clock(loop) else calendar()


def _has_own_clock(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a loop's time is neither the machine's nor, as uvloop's is, that as the loop last looked at it."""
    kind = type(loop)
    if kind.time is asyncio.BaseEventLoop.time or kind.__module__.startswith("uvloop"):
        return False
    return abs(loop.time() - time.monotonic()) > _FAR


@cache
def boot_id() -> str:
    """What tells this boot of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # macOS: the moment of booting, to ten seconds
        return str(round((time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)) / 10))


def calendar() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000
