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
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from statistics import median
from typing import Any

from harness import Figures, Outcome, Row, alternate, main, need, times

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


def pushes(handle: Any, address: Any, key: bytes) -> Figures:
    """In the worker: all variants in turn; medians, in microseconds."""
    import numpy as np

    gradient = np.random.default_rng(0).standard_normal(SIZE, np.float32)
    manager = Managed(address, key)
    manager.connect()
    held = manager.held()  # type: ignore[attr-defined]  # registered
    near, far = socket.socketpair()
    echo = subprocess.Popen([sys.executable, "-c", ECHO, str(far.fileno())], pass_fds=[far.fileno()])
    far.close()
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


def turns() -> Figures:
    """One server, one worker, one process that echoes, one manager."""
    import numpy as np

    import penstock as ps

    async def work(address: Any) -> Figures:
        async with ps.ParameterServer(np.zeros(SIZE, np.float32), ps.SGD(RATE), place="shared") as server:

            def measured(_: int) -> Figures:
                return pushes(server, address, key)

            flow = ps.Flow([0]).map(measured, place="process", workers=1)
            (found,) = await flow.collect()
            assert server.version == 2 * EACH * (TURNS + 1)
            return found

    key = b"penstock"
    with Managed(authkey=key) as manager:
        return asyncio.run(work(manager.address))


def run() -> Outcome:
    found = need(alternate(__file__, {"turns": {}}, rounds=3)["turns"], "a push")

    def told(name: str) -> str:
        return f"{found[name]:.1f} µs"

    published = Row(f"a push of {SIZE:,} floats from another process: published", told("published"))
    published.target, published.met = f"≤ {MOST_PUBLISHED:.0f} µs", found["published"] <= MOST_PUBLISHED
    visible = Row("the same: visible", told("visible"), "a bare socketpair's round trip", told("trip"))
    visible.ratio, visible.target = times(found["visible / trip"]), f"≤ {times(MOST_VISIBLE)}"
    visible.met = found["visible / trip"] <= MOST_VISIBLE
    proxied = Row("the same: visible", told("visible"), "a manager's proxy", told("manager"))
    proxied.ratio = times(found["manager"] / found["visible"])
    remark = f"The message that asks the server to apply it has been sent after {told('sent')}."
    return Outcome([published, visible, proxied], remarks=[remark])


if __name__ == "__main__":
    main(run, turns)
