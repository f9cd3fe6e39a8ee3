"""Simulated servers, and a client that asks them as a gate does. All on the virtual clock, all deterministic.

A server is given a request by ``ask(loop, done)`` and calls ``done(signal)`` when it has answered. It can be changed
while it runs (``loop.call_at``), for steps of its capacity. The client has as many items as anybody could want, bounds
what is in progress by a search (anything with ``limit`` and ``ended``), asks a ``Pace`` before each start, and counts.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from math import floor, inf, log
from typing import Any, Protocol

from tests.measuring import unmeasured

from penstock.flow.limit import Pace
from penstock.flow.signals import OK, OVERLOADED, THROTTLED, Quota, Rates, Signal
from penstock.testing import run_virtual

__all__ = [
    "Client",
    "Fixed",
    "Outcome",
    "Queue",
    "Quota429",
    "Refusing",
    "Server",
    "Thrashing",
    "around",
    "heavy_tail",
    "simulate",
]

Done = Callable[[Signal], None]
GOOD = Signal()


class Server(Protocol):
    def ask(self, loop: asyncio.AbstractEventLoop, done: Done) -> None: ...


class Fixed:
    """A concurrency that somebody has set."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def ended(self, now: float, began: float, kind: int, saturated: bool) -> None:
        """Nothing is learned."""


class Queue:
    """So many slots, each serving one request at a time for ``service()`` seconds; the others wait in line."""

    def __init__(self, slots: int, service: Callable[[], float]) -> None:
        self.slots = slots
        self.service = service
        self.busy = 0
        self.line: deque[Done] = deque()

    def ask(self, loop: asyncio.AbstractEventLoop, done: Done) -> None:
        self.line.append(done)
        self.serve(loop)

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while self.line and self.busy < self.slots:
            self.busy += 1
            loop.call_later(self.service(), self.answer, loop, self.line.popleft())

    def answer(self, loop: asyncio.AbstractEventLoop, done: Done) -> None:
        self.busy -= 1
        self.serve(loop)
        done(GOOD)


class Refusing(Queue):
    """A queue that refuses with 503 what finds more than ``most`` before it, and fails at random now and then."""

    def __init__(self, slots: int, service: Callable[[], float], most: float = inf, failing: float = 0.0) -> None:
        super().__init__(slots, service)
        self.most = most
        self.failing = failing
        self.random = random.Random(5)

    def ask(self, loop: asyncio.AbstractEventLoop, done: Done) -> None:
        if self.busy + len(self.line) >= self.most or self.random.random() < self.failing:
            loop.call_later(0.02, done, Signal(OVERLOADED))
        else:
            super().ask(loop, done)


class Thrashing:
    """Serves up to ``knee`` requests at once in ``seconds``; beyond them all get slower, so that less is done."""

    def __init__(self, knee: int, seconds: float) -> None:
        self.knee = knee
        self.seconds = seconds
        self.busy = 0

    def ask(self, loop: asyncio.AbstractEventLoop, done: Done) -> None:
        self.busy += 1
        crowding = max(1.0, self.busy / self.knee)
        loop.call_later(self.seconds * crowding**2, self.answer, done)

    def answer(self, done: Done) -> None:
        self.busy -= 1
        done(GOOD)


class Quota429:
    """Any number at once in ``seconds`` each, but ``quota`` requests in ``window``; the rest are refused at once.

    ``kind``: how it counts. "fixed": in windows that begin at whole multiples; "sliding": in the window before each
    request; "bucket": a bucket that holds ``quota`` and fills evenly. ``says``: whether a refusal has a Retry-After;
    ``tells``: whether every answer has headers with what remains.
    """

    def __init__(
        self,
        kind: str,
        quota: float,
        window: float = 60.0,
        seconds: Callable[[], float] = lambda: 0.3,
        says: bool = True,
        tells: bool = False,
        offset: float = 17.0,
    ) -> None:
        self.kind = kind
        self.quota = quota
        self.window = window
        self.seconds = seconds
        self.says = says
        self.tells = tells
        self.offset = offset
        self.times: deque[float] = deque()
        self.window_number = -1
        self.used = 0.0
        self.at = 0.0

    def ask(self, loop: asyncio.AbstractEventLoop, done: Done) -> None:
        now = loop.time()
        wait = self.admit(now)
        rates = Rates(requests=self.left(now)) if self.tells else None
        if wait <= 0:
            loop.call_later(self.seconds(), done, Signal(OK, rates=rates))
        else:
            loop.call_later(0.05, done, Signal(THROTTLED, wait if self.says else None, rates=rates))

    def admit(self, now: float) -> float:
        """0 if a request is let through now, else the seconds until one would be."""
        if self.kind == "fixed":
            number = floor((now + self.offset) / self.window)
            if number != self.window_number:
                self.window_number, self.used = number, 0.0
            if self.used + 1 > self.quota:
                return (number + 1) * self.window - self.offset - now
        elif self.kind == "sliding":
            while self.times and self.times[0] <= now - self.window:
                self.times.popleft()
            self.used = len(self.times)
            if self.used + 1 > self.quota:
                return self.times[0] + self.window - now
            self.times.append(now)
        else:
            rate = self.quota / self.window
            self.used = max(0.0, self.used - rate * (now - self.at))
            self.at = now
            if self.used + 1 > self.quota:
                return (self.used + 1 - self.quota) / rate
        self.used += 1
        return 0.0

    def left(self, now: float) -> Quota:
        remaining = float(max(0, floor(self.quota - self.used)))
        if self.kind == "fixed":
            reset = (self.window_number + 1) * self.window - self.offset - now
        elif self.kind == "sliding":
            reset = self.times[0] + self.window - now if self.times else 0.0
        else:
            reset = self.used * self.window / self.quota
        return Quota(self.quota, remaining, reset, self.window, refills=self.kind == "bucket")


def heavy_tail(mean: float, seed: int, sigma: float = 1.0) -> Callable[[], float]:
    """Seconds of service as a language model's: most are short, some take ten times the mean (log-normal)."""
    draw = random.Random(seed)
    return lambda: draw.lognormvariate(log(mean) - sigma**2 / 2, sigma)


def around(mean: float, seed: int, share: float = 0.1) -> Callable[[], float]:
    """Seconds of service that differ by a share from the mean at most."""
    draw = random.Random(seed)
    return lambda: mean * draw.uniform(1 - share, 1 + share)


class Outcome:
    """What came of the requests that ended between ``after`` and ``before``."""

    def __init__(self, ended: Sequence[tuple[float, float, int]], after: float, before: float) -> None:
        within = [one for one in ended if after < one[1] <= before]
        self.seconds = before - after
        self.good = sum(kind == OK for _, _, kind in within)
        self.throttled = sum(kind == THROTTLED for _, _, kind in within)
        self.tried = len(within)
        waits = sorted(end - began for began, end, kind in within if kind == OK)
        self.latency = waits[len(waits) // 2] if waits else inf

    @property
    def goodput(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds

    @property
    def wasted(self) -> float:
        """The share of requests that were refused as too many."""
        return self.throttled / self.tried if self.tried else 0.0


class Client:
    """Asks one server for as long as it runs. ``arrivals``: items a second, evenly; None for as many as it can take."""

    def __init__(
        self,
        server: Server,
        search: Any,
        pace: Pace | None = None,
        *,
        arrivals: float | None = None,
        lateness: float = 0.0,
    ) -> None:
        self.server = server
        self.search = search
        self.pace = pace
        self.lateness = lateness
        self.ended: list[tuple[float, float, int]] = []
        self.limits: list[tuple[float, int]] = []
        self.granted: list[float] = []
        self.waiting = inf if arrivals is None else 0.0
        self.arrivals = arrivals
        self.in_progress = 0
        self.timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        if self.arrivals is not None:
            loop.call_later(1 / self.arrivals, self.arrive)
        self.pump()

    def arrive(self) -> None:
        assert self.arrivals is not None
        self.waiting += 1
        self.loop.call_later(1 / self.arrivals, self.arrive)
        self.pump()

    def pump(self) -> None:
        while self.waiting and self.timer is None and self.in_progress < self.search.limit:
            now = self.loop.time()
            wait = 0.0 if self.pace is None else self.pace.ask(now, self, 0.0)
            if wait > 0:
                self.timer = self.loop.call_later(wait + self.lateness, self.due)
                return
            self.waiting -= 1
            self.in_progress += 1
            self.granted.append(now)
            self.server.ask(self.loop, lambda signal, began=now: self.done(began, signal))  # type: ignore[misc]

    def due(self) -> None:
        self.timer = None
        self.pump()

    def done(self, began: float, signal: Signal) -> None:
        now = self.loop.time()
        saturated = self.in_progress >= self.search.limit
        self.in_progress -= 1
        self.ended.append((began, now, signal.kind))
        if self.pace is not None:
            self.pace.report(now, signal, 0.0, began)
        self.search.ended(now, began, signal.kind, saturated)
        if not self.limits or self.limits[-1][1] != self.search.limit:
            self.limits.append((now, self.search.limit))
        if signal.kind != OK:
            self.waiting += 1
        self.pump()

    def outcome(self, after: float, before: float) -> Outcome:
        return Outcome(self.ended, after, before)


def simulate(clients: Sequence[Client], seconds: float, *events: tuple[float, Callable[[], None]]) -> None:
    """Let the clients work for so long; each of ``events`` is called at its time."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        for at, event in events:
            loop.call_at(at, event)
        for client in clients:
            client.start(loop)
        await asyncio.sleep(seconds)

    with unmeasured():
        run_virtual(work())
