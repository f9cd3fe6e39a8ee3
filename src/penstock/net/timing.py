"""``Timeout`` and the watch that keeps it: one timer for one attempt, which cancels it when a bound is reached.

States of a watch: *free* (between attempts; it is used again), *expecting* (the attempt waits for the other side: to be
connected, or for the next bytes), *resting* (the attempt does something of its own, and only the total runs on: a slow
disk is nobody's silence), *expired* (it has cancelled the attempt's task, once).

The timer isn't moved with each byte, nor stopped with each attempt, for that would cost more than all else here. When
it fires and the bound has moved on, it is set anew, or not if there is none. When it fires and the bound hasn't, the
watch doesn't believe it yet. Something may have come that the loop hasn't read (uvloop runs timers before it reads), or
that the attempt hasn't been woken for: the watch looks again after a few turns of the loop. A timer that comes much too
late tells of a loop that was blocked, during which nobody could have answered: the bound is moved once by as much as
was lost.

The cancelling is that of ``asyncio.timeout``: a cancellation from outside that comes meanwhile wins.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Any

from penstock.errors import PlanError

__all__ = ["Timeout", "Watch", "as_timeout"]

_TURNS = 4  # reading, the stream's reader, the task that waits, and one for the order within a turn
_LATE = 0.1


@dataclass(frozen=True, slots=True)
class Timeout:
    """Seconds that one attempt at a fetch may wait; None for no bound. ``timeout=30`` means ``Timeout(total=30)``.

    ``connect``: until a connection stands (name, TCP, TLS). ``idle``: between two signs of life of the other side, so
    also for the first byte of the answer; the time in which penstock itself doesn't read (a slow disk) doesn't
    count. ``total``: for the whole attempt with its redirects. A model that thinks for minutes before its first byte
    needs a larger ``idle``; a server that sends a byte a minute is ended by ``total`` alone.

    Raises PlanError for values out of range.

    >>> import penstock as ps
    >>> ps.Timeout(idle=300)
    Timeout(connect=10.0, idle=300, total=None)
    """

    connect: float | None = 10.0
    idle: float | None = 60.0
    total: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value <= 0:
                raise PlanError(f"Timeout({field.name}={value!r})", "Give seconds above 0, or None for no bound")


def as_timeout(value: Any) -> Timeout:
    """The Timeout that ``timeout=value`` means. Raises PlanError."""
    if value is None:
        return Timeout()
    if isinstance(value, Timeout):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"timeout={value!r}", "Give seconds for an attempt, or a Timeout(connect=, idle=, total=)")
    return Timeout(total=value)


class Watch:
    """Keeps one attempt's Timeout: ``begin`` and ``end`` it in the attempt's task. Can be used again after ``end``.

    ``expired`` names the bound that was reached (``connect``, ``idle`` or ``total``) once the task is cancelled.
    """

    __slots__ = (
        "_armed",
        "_before",
        "_bound",
        "_due",
        "_excused",
        "_handle",
        "_idle",
        "_loop",
        "_seconds",
        "_task",
        "_total_at",
        "_turns",
        "expired",
        "timeout",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: Timeout) -> None:
        self.timeout = timeout
        self.expired: str | None = None
        self._loop = loop
        self._idle = inf if timeout.idle is None else timeout.idle
        self._task: asyncio.Task[Any] | None = None
        self._before = 0
        self._total_at = self._due = self._armed = inf
        self._bound = "total"
        self._seconds = 0.0
        self._handle: asyncio.Handle | None = None
        self._turns = 0
        self._excused = False

    def begin(self) -> None:
        """Watch the attempt that the current task begins."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._before = task.cancelling()
        self.expired = None
        total = self.timeout.total
        if total is not None:
            self._total_at = self._loop.time() + total
        self.rest()
        if self._due < self._armed:
            self._arm()

    def expect_connection(self) -> None:
        """From now on a connection is waited for."""
        seconds = self.timeout.connect
        self._expect("connect", inf if seconds is None else seconds)

    def expect_bytes(self) -> None:
        """From now on the other side is waited for, anew."""
        self._expect("idle", self._idle)

    def rest(self) -> None:
        """Nothing is waited for: only the total runs on."""
        self._bound = "total"
        self._due = self._total_at

    def _expect(self, bound: str, seconds: float) -> None:
        due = self._loop.time() + seconds
        self._excused = False
        if due < self._total_at:
            self._bound = bound
            self._due = due
            self._seconds = seconds
        else:
            self._bound = "total"
            due = self._due = self._total_at
        if due < self._armed:
            self._arm()

    def _arm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._turns = 0
        self._armed = self._due
        self._handle = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._handle = None
        now = self._loop.time()
        if now < self._due:
            self._armed = inf
            if self._due < inf:
                self._arm()
            return
        late = now - self._due
        if late > _LATE and not self._turns and not self._excused and self._bound != "total":
            self._excused = True
            self._due = min(now + min(late, self._seconds), self._total_at)
            self._arm()
            return
        if self._turns < _TURNS:
            self._turns += 1
            self._handle = self._loop.call_soon(self._look)
            return
        self._armed = inf
        self.expired = self._bound
        assert self._task is not None
        self._task.cancel()

    def absorb(self) -> bool:
        """Whether what ends the attempt is this watch's own doing, and not a cancellation from outside."""
        return self.expired is not None and self._task is not None and self._task.uncancel() <= self._before

    def end(self) -> None:
        """The attempt is over. A timer that is set stays, for the next attempt: it fires into the void at worst."""
        self._task = None
        self._due = self._total_at = inf

    def close(self) -> None:
        """Stop the timer too."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._armed = inf
