"""The end of a flow that has a sink: writes what arrives and commits it, together with what is settled.

One coroutine does both, so ``write`` is never called during ``commit``. It is in one of three states: *waiting* (for
outputs, for something to commit, or for the time of the next commit), *writing*, *committing*. It can be cancelled
while it waits; a write and a commit run in tasks of their own and are awaited to their end first, so a sink never
sees half a call. After a cancelled wait, ``finish`` writes nothing more and commits what was written.

Pacing: commits that take t seconds are 19 t apart at the least, so they take at most 5 % of the time; no timer runs
while there is nothing to commit. A sink may ask for more time between two (``pace``, which it may change). The quickest
of the last few says what t is: on a busy machine the others have mostly waited for a processor, and what is repeated
after a crash must not grow with that. When too much is written and uncommitted, a commit is forced.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from time import perf_counter
from typing import Any, TypeVar

from penstock.errors import OutputRejected
from penstock.flow.channel import Channel
from penstock.flow.contract import Delta, Origin, Reading, Sink, Source
from penstock.flow.failing import DEAD_LETTER, RAISE, Policy
from penstock.flow.ledger import DEAD, SKIPPED
from penstock.flow.meter import BUSY, WAITING_INPUT, SegmentMeter
from penstock.flow.origin import positions_of
from penstock.flow.progress import Positions
from penstock.flow.segment import Host

__all__ = ["MOST_UNCOMMITTED", "Committer", "cancel_once", "uninterrupted"]

T = TypeVar("T")

MOST_UNCOMMITTED = 65_536
"""Items settled and not committed, at which a commit is forced."""

_FIRST_AFTER = 0.03
_SHARE = 20.0
_RECENT = 8


async def uninterrupted(work: Awaitable[T]) -> T:
    """Await ``work`` to its end even if the caller is cancelled meanwhile; the cancellation is raised then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        failure = None if task.cancelled() else task.exception()
        raise failure or cancelled
    return task.result()


def cancel_once(task: asyncio.Task[None]) -> None:
    """Cancel, unless that was done: a second time would cut short the cleaning up that the first began."""
    if not task.cancelling():
        task.cancel()


class Committer:
    """Takes from ``channel`` until it has ended; ``first`` is merged into the first commit.

    ``reading``: ``source``, if that is the reading of a subscription.
    """

    def __init__(
        self,
        host: Host,
        sink: Sink[Any],
        source: Source[Any],
        channel: Channel,
        policy: Policy,
        meter: SegmentMeter,
        first: Delta,
        reading: Reading[Any] | None = None,
    ) -> None:
        self.host = host
        self.ledger = host.ledger
        self.sink = sink
        self.source = source
        self.channel = channel
        self.policy = policy
        self.meter = meter
        self.broken = False
        self._first: Delta | None = first
        self._joined = source.joins(sink)
        self._reading = reading
        self._wanted: asyncio.Future[None] | None = None
        self._since = host.clock()
        self._apart = _FIRST_AFTER
        self._recent: deque[float] = deque(maxlen=_RECENT)
        channel.on_items = self._wake
        self.ledger.changed = self._wake

    def _wake(self) -> None:
        wanted = self._wanted
        if wanted is not None and not wanted.done():
            wanted.set_result(None)

    async def run(self) -> None:
        """Write and commit until the input has ended and everything is written."""
        while True:
            tasks = self.channel.take(len(self.channel))
            if tasks:
                self.meter.first.taken += len(tasks)
                self.ledger.arrive(tasks)
            if self.ledger.entries:
                await uninterrupted(self._write())  # what is written must be entered as such
            elif self.channel.ended:
                return
            now = self.host.clock()
            if self.ledger.uncommitted and (now >= self._due() or self.ledger.uncommitted >= MOST_UNCOMMITTED):
                await self.commit()
            if not self.channel.items and not self.ledger.entries and not self.channel.closed:
                await self._wait()

    async def _wait(self) -> None:
        """Sleep until something came, or until it is time to commit what there is. Cancelling leaves nothing."""
        self.meter.set_state(WAITING_INPUT, self.host.clock())
        loop = self.host.loop
        wanted = self._wanted = loop.create_future()
        timer: asyncio.TimerHandle | None = None
        if self.ledger.uncommitted:
            timer = loop.call_later(max(0.0, self._due() - self.host.clock()), self._wake)
        try:
            await wanted
        finally:
            self._wanted = None
            if timer is not None:
                timer.cancel()
            self.meter.set_state(BUSY, self.host.clock())

    def _due(self) -> float:
        """When to commit. What was taken from a subscription, and is all there is, isn't kept waiting by a pace."""
        pace = self.sink.pace
        if self._reading is not None and not self.ledger.ahead:
            return self._since + self._apart if pace else 0.0
        return self._since + max(self._apart, pace)

    async def _write(self) -> None:
        entries, self.ledger.entries = self.ledger.entries, []
        outputs: list[tuple[Origin, Sequence[Any]]] = [(positions_of(origin), values) for origin, values in entries]
        began = perf_counter()
        while entries:
            try:
                await self._call(self.sink.write(outputs))
                break
            except OutputRejected as refusal:
                entries, outputs = self._refuse(entries, outputs, refusal)
        self.meter.first.emitted += len(entries)
        self.meter.first.calls += 1
        self.meter.first.add_sample(perf_counter() - began)
        self.ledger.delivered(entries)

    async def _call(self, call: Awaitable[T]) -> T:
        """Whatever else than a refusal is raised means that nothing can be committed any more."""
        try:
            return await call
        except OutputRejected:
            raise
        except BaseException:
            self.broken = True
            raise

    def _refuse(
        self, entries: list[Any], outputs: list[Any], refusal: OutputRejected
    ) -> tuple[list[tuple[Any, Sequence[Any]]], list[tuple[Origin, Sequence[Any]]]]:
        """Deal with the outputs that the sink can't take; returns the others."""
        refused = dict(refusal.rejected)
        for index, error in refused.items():
            origin, values = entries[index]
            value = values[0] if len(values) == 1 else values
            verdict = self.policy.give_up(value, origin, error, 1)
            if verdict.kind == RAISE:
                raise verdict.error
            fate = DEAD if verdict.kind == DEAD_LETTER else SKIPPED
            self.ledger.settle(origin, fate, verdict.failed)
        left = [index for index in range(len(entries)) if index not in refused]
        return [entries[index] for index in left], [outputs[index] for index in left]

    async def commit(self, *, finished: bool = False, report: dict[str, Any] | None = None) -> None:
        """Commit what is written and settled. Cancelling waits for its end."""
        await uninterrupted(self._commit(finished, report))

    async def _commit(self, finished: bool, report: dict[str, Any] | None) -> None:
        delta = self.ledger.take_delta()
        if self._first is not None:
            delta.snapshot, delta.plan = self._first.snapshot, self._first.plan
        delta.finished = finished
        delta.report = report
        if self._reading is not None and not self._joined and delta.dead:
            await self._call(self._reading.dead(delta.dead))
            gone = Positions()
            for letter in delta.dead:
                gone.add(letter.position)
            self.ledger.unfinished.remove(gone)
            delta.settled.remove(gone)  # kept in the journal, they would be taken for done once they are requeued
            delta.dead = []
        began = perf_counter()
        fenced = await self._call(self.sink.commit(delta))
        took = perf_counter() - began
        if self._first is None:
            self._recent.append(took)
        self._first = None  # that commit also laid out the journal, and says little about the others
        self.meter.first.calls += 1
        self.meter.first.add_sample(took)
        self._apart = (_SHARE - 1) * min(self._recent) if self._recent else _FIRST_AFTER
        self._since = self.host.clock()
        self.ledger.committed(delta, fenced)
        if delta.settled and not self._joined:
            await self._call(self.source.settle(delta.settled))

    async def close(self) -> None:
        """Release the sink; what wasn't committed doesn't count."""
        await uninterrupted(self.sink.close())
