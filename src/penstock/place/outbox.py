"""A worker's results on their way to the parent, and the thread that sees to it that they don't lie.

*Two threads.* The main thread adds and flushes; the watch thread flushes what has lain for a slice. ``results`` is a
deque, so that plain results are added without the lock; everything else is guarded by ``lock``: freezing (one
pickler, one arena), parts, sending. Frames never interleave. A parent that doesn't read holds up both, which is
back-pressure, but never the reading side.

*The watch thread* sleeps in ``poll`` until the parent's end of the socket closes or the main thread rings the bell
(one byte in a pipe, when results lie while another item starts). Rung, it looks every millisecond until nothing
lies. ``armed`` is cleared before it looks a last time, and the main thread reads it after it added: one of the two
sees the other. It is also this process's guard: once the parent is gone, it ends the process from wherever it is.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from math import inf
from typing import Any

from penstock.place.base import PART_SIZE, PARTS_OUT, SLICE
from penstock.place.remote import FrozenError
from penstock.place.wire import PART, PLAIN, RESULTS, Parcel, Postbox

__all__ = ["Odd", "Outbox"]

_HEAVY = 1024 * 1024
"""Bytes after which results are sent whatever the time."""


class Odd:
    """A result that isn't OK. ``value`` is what the step was given, if it travels along (``moved``)."""

    __slots__ = ("error", "moved", "outcome", "step", "value")

    def __init__(self, outcome: int, step: int, error: FrozenError | None, moved: bool, value: Any) -> None:
        self.outcome = outcome
        self.step = step
        self.error = error
        self.moved = moved
        self.value = value


class Outbox:
    """Results and parts of streams, each frozen as it is added."""

    def __init__(self, wire: socket.socket, postbox: Postbox) -> None:
        self.lock = threading.Lock()
        self.results: deque[Any] = deque()  # plain values, frozen ones (tuples), Odd
        self.timings: deque[tuple[int, list[float]]] = deque()  # by task number; each added after its result
        self.flush_at = 0.0
        self.armed = False
        self.busy = 0.0  # seconds of work that no frame has reported yet, without what sending took
        self._heavy = 0
        self._wire = wire
        self._postbox = postbox
        self._stream = 0  # the task whose outputs are collected
        self._part = Parcel(postbox)
        self._part_since = inf
        self._credit = 0
        self._bell_out, self._bell_in = os.pipe()
        threading.Thread(target=self._watch, name="penstock-watch", daemon=True).start()

    # -- the main thread --------------------------------------------------------------------------------------------

    def add(self, value: Any) -> None:
        """One good result. Raises what its pickling raises, and then nothing was added."""
        if type(value) in PLAIN:
            self.results.append(value)
            return
        with self.lock:
            data, sections = frozen = self._postbox.freeze(value)
            self.results.append(frozen)
            self._heavy += len(data)
            if sections:
                self._heavy += sum([size for _, size, _ in sections])
            if self._heavy >= _HEAVY:
                self._flush()

    def add_odd(self, outcome: int, step: int, error: FrozenError | None, *given: Any) -> None:
        """One other result, and perhaps what the step was given. Raises what pickling that raises."""
        value = given[0] if given else None
        if type(value) not in PLAIN:
            with self.lock:
                value = self._postbox.freeze(value)
        self.results.append(Odd(outcome, step, error, bool(given), value))

    def ring(self) -> None:
        """Have the watch thread look after what lies here: something that may take long is about to begin."""
        self.armed = True
        os.write(self._bell_in, b"!")

    def flush(self) -> None:
        """Send all results now."""
        with self.lock:
            self._flush()

    def send(self, kind: int, body: Any) -> None:
        """Send a frame without values, after the results."""
        with self.lock:
            self._flush()
            self._send(self._postbox.frame(kind, body))

    # -- streams ----------------------------------------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """The outputs that follow are those of this task."""
        with self.lock:
            self._flush()
            self._part.discard()  # of an expansion that failed
            self._part, self._part_since = Parcel(self._postbox), inf
            self._stream = number
            self._credit = PARTS_OUT

    def grant(self) -> None:
        """One more part may be out."""
        with self.lock:
            self._credit += 1

    def emit(self, output: Any) -> bool:
        """One output. False if no further one may be added before ``end_part`` succeeded."""
        with self.lock:
            self._part.add(output)
            now = time.monotonic()
            if self._part_since == inf:
                self._part_since = now
            full = len(self._part.values) >= PART_SIZE or self._part.size >= _HEAVY
            if (full or now - self._part_since >= SLICE) and self._credit:
                self._send_part()
                return True
            return not full

    def end_part(self) -> bool:
        """Hand over what lies here, however little. False if a grant has to come first."""
        with self.lock:
            if self._part.values and self._credit:
                self._send_part()
            return not self._part.values

    def _send_part(self) -> None:
        part, self._part, self._part_since = self._part, Parcel(self._postbox), inf
        self._credit -= 1
        self._send(self._postbox.frame(PART, self._stream, part))

    # -- sending ----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        timings = [self.timings.popleft() for _ in range(len(self.timings))]
        results = [self.results.popleft() for _ in range(len(self.results))]
        if not results:
            self.flush_at = time.monotonic() + SLICE
            return
        self._heavy = 0
        parcel = Parcel(self._postbox)
        odd: dict[int, tuple[int, int, FrozenError | None, bool]] = {}
        if PLAIN.issuperset(map(type, results)):
            parcel.values = results
        else:
            for index, result in enumerate(results):
                if type(result) is Odd:
                    odd[index] = (result.outcome, result.step, result.error, result.moved)
                    result = result.value
                if type(result) is tuple:
                    parcel.put(result)
                else:
                    parcel.values.append(result)
        body = (odd, timings, self.busy)
        self.busy = 0.0
        self._send(self._postbox.frame(RESULTS, body, parcel))
        self.flush_at = time.monotonic() + SLICE

    def _send(self, frame: bytes) -> None:
        try:
            self._wire.sendall(frame)
        except OSError:
            os._exit(1)  # the parent is gone

    # -- the watch thread -------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poll = select.poll()
        wire = self._wire.fileno()
        poll.register(wire, 0)  # nothing but its end
        poll.register(self._bell_out, select.POLLIN)
        busy = False
        while True:
            for descriptor, _ in poll.poll(1 if busy else None):
                if descriptor == wire:
                    os._exit(1)
                os.read(self._bell_out, 64)
                busy = True
            if busy:
                busy = self._flush_stale()

    def _flush_stale(self) -> bool:
        """Send what has lain for a slice; whether something still lies here that can be sent."""
        with self.lock:
            now = time.monotonic()
            if self.results and now >= self.flush_at:
                self._flush()
            if self._part_since <= now - SLICE and self._credit:
                self._send_part()
            self.armed = False
            self.armed = bool(self.results) or (bool(self._part.values) and self._credit > 0)
            return self.armed
