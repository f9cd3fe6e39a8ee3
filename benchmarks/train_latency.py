"""What a push of 1,024 floats from another process takes: until it is published, and until it is visible.

The server is in one process, a worker of a flow in another. *Published* is from the call of ``push_sync`` until the
gradient stands in shared memory and is counted there: from then on it is applied whatever becomes of the worker.
*Visible* is all of ``push_sync``, which returns when the update has been applied. Beside it, from the same worker and
in turns with it: 9 bytes to a third process and back over a bare ``socketpair``, and a ``multiprocessing`` manager
whose object has ``push`` (``w -= rate * gradient``), called through its proxy. Medians; each push follows at once upon
the answer to the one before, so the worker has just been woken.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from statistics import median
from typing import Any

from harness import Figures, NotRun, Outcome, Row, alternate, main, need, times

SIZE = 1024
TURNS, EACH = 60, 100
RATE = 1e-3
MOST_PUBLISHED, MOST_VISIBLE = 5.0, 2.0
ECHO = """
import socket, sys
with socket.socket(fileno=int(sys.argv[1])) as end:
    while asked := end.recv(64):
        end.sendall(asked)
"""
ASKED = bytes(9)
"""As long as the message of a push."""


class Held:
    """What the manager's process holds."""

    def __init__(self) -> None:
        import numpy as np

        self.weights = np.zeros(SIZE, np.float32)

    def push(self, gradient: Any) -> None:
        self.weights -= RATE * gradient


class Managed(BaseManager):
    """The peer: one object in a process of its own."""


Managed.register("held", Held)


class Stamped:
    """A handle's socket that notes when it is given a message, which is after publishing, and when that is sent."""

    def __init__(self, inner: socket.socket) -> None:
        self.inner = inner
        self.recv = inner.recv
        self.given = self.sent = 0

    def sendall(self, data: bytes) -> None:
        self.given = time.perf_counter_ns()
        self.inner.sendall(data)
        self.sent = time.perf_counter_ns()


def timed(call: Callable[[], object]) -> list[int]:
    """The nanoseconds of each of ``EACH`` calls."""
    spent = []
    for _ in range(EACH):
        began = time.perf_counter_ns()
        call()
        spent.append(time.perf_counter_ns() - began)
    return spent


def pin(core: int | None) -> None:
    """Have this process, and those it starts from now on, run on one core; anywhere for None."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def pushes(handle: Any, address: Any, key: bytes, here: int | None, there: int | None) -> Figures:
    """In the worker, on the core ``here``: all variants in turn; medians, in microseconds."""
    import numpy as np

    pin(there)
    gradient = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    manager = Managed(address, key)
    manager.connect()
    held = manager.held()  # type: ignore[attr-defined]  # registered
    near, far = socket.socketpair()
    echo = subprocess.Popen([sys.executable, "-c", ECHO, str(far.fileno())], pass_fds=[far.fileno()])
    far.close()
    pin(here)
    _, version = handle.pull_sync()
    bare = handle._socket
    stamped = Stamped(bare)

    def round_trip() -> None:
        near.sendall(ASKED)
        near.recv(64)

    def push() -> None:
        handle.push_sync(gradient, version=version)

    def stamped_pushes() -> tuple[list[int], list[int]]:
        published, sent = [], []
        handle._socket = stamped
        for _ in range(EACH):
            began = time.perf_counter_ns()
            push()
            published.append(stamped.given - began)
            sent.append(stamped.sent - began)
        handle._socket = bare
        return published, sent

    spent: dict[str, list[int]] = {}
    ratios = []
    with near, echo:
        for turn in range(TURNS + 1):
            published, sent = stamped_pushes()
            visible, trips = timed(push), timed(round_trip)
            proxied = timed(lambda: held.push(gradient))
            if turn:  # the first warms everything up
                found = {"published": published, "sent": sent, "visible": visible, "trip": trips}
                for name, each in (found | {"manager": proxied}).items():
                    spent.setdefault(name, []).extend(each)
                ratios.append(median(visible) / median(trips))
        near.shutdown(socket.SHUT_RDWR)
    return {name: median(each) / 1000 for name, each in spent.items()} | {"visible / trip": median(ratios)}


def turns(here: int | None = None, there: int | None = None) -> Figures:
    """A worker on one core; the server, the manager and the process that echoes on the other."""
    import numpy as np

    import penstock as ps

    async def work(address: Any) -> Figures:
        async with ps.ParameterServer(np.zeros(SIZE, np.float32), ps.SGD(RATE), place="shared") as server:

            def measured(_: int) -> Figures:
                return pushes(server, address, key, here, there)

            flow = ps.Flow([0]).map(measured, place="process", workers=1)
            (found,) = await flow.collect()
            assert server.version == 2 * EACH * (TURNS + 1)
            return found

    pin(there)
    key = b"penstock"
    with Managed(authkey=key) as manager:
        return asyncio.run(work(manager.address))


def run() -> Outcome:
    placed: dict[str, dict[str, Any]] = {
        "where the system puts them": {},
        "all on one core": {"here": 0, "there": 0},
        "the worker on a core of its own": {"here": 1, "there": 0},
    }
    measured = alternate(__file__, {where: {"of": "turns", **cores} for where, cores in placed.items()}, rounds=3)
    first = next(iter(placed))
    need(measured[first], "a push")
    rows, remarks = [], []
    for where, found in measured.items():
        if isinstance(found, NotRun):
            rows.append(Row(f"a push of {SIZE:,} floats, {where}", f"not run: {found.reason}"))
            continue

        def told(name: str, found: Figures = found) -> str:
            return f"{found[name]:.1f} µs"

        published = Row(f"a push of {SIZE:,} floats, {where}: published", told("published"))
        visible = Row("the same: visible", told("visible"), "a bare socketpair's round trip", told("trip"))
        visible.ratio = times(found["visible / trip"])
        proxied = Row("the same: visible", told("visible"), "a manager's proxy", told("manager"))
        proxied.ratio = times(found["manager"] / found["visible"])
        if where == first:
            published.target, published.met = f"≤ {MOST_PUBLISHED:.0f} µs", found["published"] <= MOST_PUBLISHED
            visible.target, visible.met = f"≤ {times(MOST_VISIBLE)}", found["visible / trip"] <= MOST_VISIBLE
            remarks.append(f"The message that asks the server to apply it has been sent after {told('sent')}.")
        rows += [published, visible, proxied]
    remarks.append(
        "As the figures tell, most of it is the waking of another core, and the ends of a bare socketpair share one "
        "where they may; server and worker don't. In the last rows nobody shares one."
    )
    return Outcome(rows, remarks=remarks)


if __name__ == "__main__":
    main(run, turns)
