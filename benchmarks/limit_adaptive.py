"""How near the controllers come to what a server can do, beside fixed concurrency and three textbook methods.

Nothing is timed: the servers are simulated on the virtual clock, so every figure is the same on every machine. What is
compared is the controllers alone: all stand in the same client. penstock's has a search for the concurrency and a pace
for the rate; the others have one number to turn, and send again what was refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import inf, log10, sqrt
from typing import Any

from harness import HOUSE, Figures, Outcome, Row, alternate, main, need

sys.path.insert(0, str(HOUSE))  # the servers are those of the tests

from tests.flow.servers import Client, Fixed, Queue, Quota429, Server, Thrashing, around, heavy_tail, simulate

from penstock.flow.limit import Limit
from penstock.flow.search import Search
from penstock.flow.signals import OK

MOST = 256


class Aimd:
    """One more for each window that went well, half for one that didn't."""

    def __init__(self) -> None:
        self.size = 16.0
        self.cut_at = -inf

    @property
    def limit(self) -> int:
        return int(self.size)

    def ended(self, now: float, began: float, kind: int, saturated: bool) -> None:
        if kind == OK:
            if saturated:
                self.size = min(MOST, self.size + 1 / self.size)
        elif began > self.cut_at:
            self.cut_at = now
            self.size = max(1.0, self.size / 2)


class Vegas(Aimd):
    """Keeps an estimated queue, ``limit × (1 − least / latency)``, between two bounds; judged once a window."""

    def __init__(self) -> None:
        super().__init__()
        self.least = inf
        self.seen: list[float] = []

    def ended(self, now: float, began: float, kind: int, saturated: bool) -> None:
        if kind != OK:
            super().ended(now, began, kind, saturated)
            return
        self.least = min(self.least, now - began)
        self.seen.append(now - began)
        if len(self.seen) < self.size:
            return
        queue = self.size * (1 - self.least * len(self.seen) / sum(self.seen))
        self.seen.clear()
        unit = max(1.0, log10(self.size))
        if queue < 3 * unit:
            self.size = min(MOST, self.size + unit)
        elif queue > 6 * unit:
            self.size = max(1.0, self.size - unit)


class Gradient2(Aimd):
    """Shrinks as the latency of late exceeds that of long, and always allows a queue of the limit's root."""

    def __init__(self) -> None:
        super().__init__()
        self.short = self.long = 0.0

    def ended(self, now: float, began: float, kind: int, saturated: bool) -> None:
        if kind != OK:
            return  # it knows latency alone
        took = now - began
        self.short += (took - self.short) * (0.1 if self.short else 1.0)
        self.long += (took - self.long) * (1 / 600 if self.long else 1.0)
        gradient = max(0.5, min(1.0, 1.5 * self.long / self.short))
        wanted = self.size * gradient + sqrt(self.size)
        self.size = max(1.0, min(MOST, 0.98 * self.size + 0.02 * wanted)) if saturated else self.size


CONTROLLERS: dict[str, Callable[[], Any]] = {
    "penstock": lambda: Search(most=MOST),
    "fixed 32": lambda: Fixed(32),
    "fixed 128": lambda: Fixed(128),
    "AIMD": Aimd,
    "Gradient2": Gradient2,
    "Vegas": Vegas,
}


def client(controller: str, server: Server) -> Client:
    pace = Limit().pace("") if controller == "penstock" else None
    return Client(server, CONTROLLERS[controller](), pace)


def simulated(controller: str) -> Figures:
    """Every scene once: good answers a second, the share of requests refused as too many, the median latency."""
    figures: Figures = {}

    def scene(name: str, clients: list[Client], after: float, before: float, *events: Any) -> None:
        simulate(clients, before, *events)
        found = [one.outcome(after, before) for one in clients]
        tried = sum(one.tried for one in found)
        figures[f"{name}: goodput"] = sum(one.goodput for one in found)
        figures[f"{name}: wasted"] = sum(one.throttled for one in found) / tried if tried else 0.0
        figures[f"{name}: latency"] = max(one.latency for one in found)

    scene("queue", [client(controller, Queue(32, around(0.5, 1)))], 30, 180)
    scene("tail", [client(controller, Queue(32, heavy_tail(5, 3)))], 300, 1800)
    scene("thrash", [client(controller, Thrashing(32, 0.5))], 30, 180)
    scene("quota", [client(controller, Quota429("fixed", 600))], 120, 420)
    stepping = Queue(32, around(0.5, 1))
    scene("up", [client(controller, stepping)], 130, 200, (80, lambda: setattr(stepping, "slots", 64)))
    falling = Queue(32, around(0.5, 1))
    scene("down", [client(controller, falling)], 130, 200, (80, lambda: setattr(falling, "slots", 16)))
    hosts: list[Server] = [
        Queue(32, around(0.5, 1)),
        Queue(200, around(2, 2)),
        Queue(4, around(0.2, 3)),
        Thrashing(16, 0.5),
        Quota429("bucket", 600),
        Quota429("sliding", 60),
    ]
    scene("hosts", [client(controller, host) for host in hosts], 120, 300)
    return figures


SCENES = {  # what it is, the most that is possible a second
    "queue": ("32 slots of 0.5 s", 64.0),
    "tail": ("32 slots, a language model's service times (mean 5 s)", 6.4),
    "thrash": ("0.5 s, thrashing past 32 at once", 64.0),
    "quota": ("600 a minute, counted by the minute, not told", 10.0),
    "up": ("32 slots, then 64: 100 round trips later", 128.0),
    "down": ("32 slots, then 16: 100 round trips later", 32.0),
    "hosts": ("six hosts, each with its own optimum", 64.0 + 100.0 + 20.0 + 32.0 + 10.0 + 1.0),
}


def told(figures: Figures, scene: str) -> str:
    """The share of what is possible, the refused, and how long the median request (of the slowest host) took."""
    goodput, wasted, latency = (figures[f"{scene}: {what}"] for what in ("goodput", "wasted", "latency"))
    refused = f", {wasted:.2%} refused" if wasted else ""
    return f"{goodput / SCENES[scene][1]:.0%} in {latency:.2g} s{refused}"


def run() -> Outcome:
    variants = {name: {"of": "simulated", "controller": name} for name in CONTROLLERS}
    found = {name: need(figures, name) for name, figures in alternate(__file__, variants, rounds=1).items()}
    ours = found.pop("penstock")
    rows = []
    for scene, (words, most) in SCENES.items():
        share, wasted = ours[f"{scene}: goodput"] / most, ours[f"{scene}: wasted"]
        rows.append(
            Row(
                words,
                told(ours, scene),
                "; ".join(found),
                "; ".join(told(figures, scene) for figures in found.values()),
                f"{share:.0%} of {most:g}/s",
                "≥ 90 %, < 1 % refused",
                share >= 0.9 and wasted < 0.01,
            )
        )
    remark = "Simulated on the virtual clock: the same figures on every machine. The seconds are a median request's."
    return Outcome(rows, remarks=[remark])


if __name__ == "__main__":
    main(run, simulated)
