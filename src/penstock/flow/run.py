"""A plan at work: one supervisor task that opens, watches and shuts down everything else.

The contract of starting and ending. If the code is inconsistent with the following, the code is wrong.

1. The supervisor is a task of its own, so it is no part of the caller's cancellation: whoever iterates or awaits only
   waits for it. Nobody but the supervisor starts or stops anything; everybody else sets what it is to do and wakes it.
2. Opening goes: the sink (which undoes what doesn't count), the comparison of the input with what was read before,
   then all pools at once. What fails in it comes out as itself; what was opened is closed again; nothing was written.
3. A run ends in one of four ways. *Done*: the source ended and everything in it settled. *Drained* (the first signal,
   or ``drain()``): the reader stops, what was issued is finished. *Failed*: the first exception that no ``on_error``
   took. *Stopped*: the caller left, was cancelled, or a second signal came.
4. Done and drained, the segments close in the order of the flow: their channels are empty by then. Failed and stopped,
   the reader is cancelled first, then all segments abort at once and are awaited: no new call starts from the moment
   of failure, and the exception is raised only when nothing of the run is at work any more.
5. Then what was written and settled is committed, however the run ended, unless the sink itself failed or the stop
   was to be immediate. What is still open is released and given back to the source. The sink closes last.
6. Every step of the shutdown is taken even if one before it raised; the first exception is the one to be raised, and
   later ones are logged. Cancelling whoever waits for the shutdown doesn't cut it short.
7. A failure is told once at least: raised by what waits for the end, else by leaving the block; logged if an exception
   of the caller's own leaves it already, or an iterator that wants no more.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

from penstock.errors import Closed, PlanError, ResumeMismatch
from penstock.flow.build import build_segments
from penstock.flow.channel import Channel
from penstock.flow.commit import Committer, cancel_once, uninterrupted
from penstock.flow.contract import Delta, Until
from penstock.flow.display import Display
from penstock.flow.failing import Policy
from penstock.flow.interrupts import heard_on
from penstock.flow.ledger import FATES, Ledger
from penstock.flow.meter import SegmentMeter, StageMeter
from penstock.flow.plan import Plan, stage_takes
from penstock.flow.progress import Progress
from penstock.flow.reader import Reader
from penstock.flow.report import ErrorLog, Report, build
from penstock.flow.segment import Runner, open_all
from penstock.place.base import Pool, as_failure, cores
from penstock.place.loop import clock_of, is_cancelled

__all__ = ["Run"]

logger = logging.getLogger("penstock")

_SINK_ROOM = 256


class Run:
    """A running flow: ``async with job.start() as run``. ``report()`` is live; ``await finish()`` waits for the end."""

    def __init__(
        self,
        plan: Plan,
        *,
        fresh: bool = False,
        inline: bool = False,
        signals: bool = False,
        progress: bool | None = None,
        outlet_room: int = 64,
        refuse: Callable[[Any, BaseException], bool] | None = None,
        until: Until = None,
    ) -> None:
        self.plan = plan
        self._source, self._sink, self._reading_of = plan.begin(until)
        self._refuse = refuse
        self._outlet_room = outlet_room
        self._fresh = fresh
        self._inline = inline
        self._signals = signals
        self._show = progress
        self.ledger = Ledger(
            holds=plan.commits, commits=plan.sink is not None, keeps_items=plan.keeps_items, in_turn=plan.in_turn
        )
        self.errors = ErrorLog()
        self.notes: list[str] = []
        self.interrupted: signal.Signals | None = None
        self.ended = False
        self.failure: BaseException | None = None
        self._told = False
        self._immediate = False
        self._has_read_all = False
        self._supervisor: asyncio.Task[None] | None = None
        self.segments: list[Runner] = []
        self._pools: list[Pool] = []
        self._meters: list[SegmentMeter] = []
        self._committer: Committer | None = None
        self._reading: asyncio.Task[None] | None = None
        self._cutting: list[asyncio.Task[None]] = []
        self._earlier: dict[str, int] = {}
        self.clock: Callable[[], float] = lambda: 0.0
        self._began = self._finished_at = 0.0
        self._thread = 0
        self._computed_before = self._computed = 0.0
        self._is_over = False
        self._last_report: Report | None = None
        self.on_end: Callable[[], None] = lambda: None

    # -- what the caller does ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Open everything; raises what opening raised. Cancelling closes it again. A second time is a PlanError."""
        if self._supervisor is not None:
            raise PlanError("a run was entered a second time", "Call job.start() again for each 'async with'")
        self.loop = asyncio.get_running_loop()
        self.clock = clock_of(self.loop)
        self._began = self.clock()
        self._thread, self._computed_before = threading.get_ident(), time.thread_time()
        self._opened: asyncio.Future[None] = self.loop.create_future()
        self._over: asyncio.Future[None] = self.loop.create_future()
        self._supervisor = self.loop.create_task(self._supervise(), name=f"penstock run {self.plan.name}")
        try:
            await asyncio.shield(self._opened)
        except asyncio.CancelledError:
            self.stop()
            await uninterrupted(self._wait_for_supervisor())
            raise
        if self._supervisor.done():
            self._raise_failure()
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End the run if it hasn't ended; when this returns, nothing of it runs any more.

        Raises what the run failed with, unless ``finish`` has done so; on the way of another exception that is logged.
        """
        await self._end_of_all()
        if not self._told and error is None:
            self._raise_failure()
        if not self._told and self.failure is not None:
            logger.error("%s: the run had failed: %r", self.plan.name, self.failure, exc_info=self.failure)

    async def _end_of_all(self) -> None:
        self.stop()
        await uninterrupted(self._wait_for_supervisor())

    async def _wait_for_supervisor(self) -> None:
        if self._supervisor is None:
            raise Closed("the run")
        await asyncio.wait([self._supervisor])

    def _raise_failure(self) -> None:
        if self.failure is not None:
            self._told = True
            raise self.failure

    async def finish(self) -> Report:
        """Wait for the end of the run and return its report. Raises what the run failed with.

        Cancelling it stops the run and returns when nothing of it is at work any more.
        """
        await self.wait()
        return self.report()

    async def wait(self) -> None:
        """Wait for the end, as ``finish`` does."""
        await self.over()
        self._raise_failure()

    async def over(self) -> None:
        """Wait for the end, and raise nothing of it."""
        try:
            await self._wait_for_supervisor()
        except asyncio.CancelledError:
            await self._end_of_all()
            raise

    def drain(self) -> None:
        """Take no more items; finish and commit what was taken. The run then ends by itself. From any thread."""
        self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self.ended:
            return
        if self._reading is None:  # still opening: nothing was taken
            self._end()
        else:
            cancel_once(self._reading)

    def stop(self, *, immediately: bool = False) -> None:
        """End the run now: what is at work is cancelled. ``immediately``: don't even commit what is finished."""
        self._immediate = self._immediate or immediately
        self._end()

    def report(self) -> Report:
        """How the run stands now: counts, rates, errors by kind, and the stage to fix."""
        if self._last_report is not None:
            return self._last_report
        now = self.clock()
        ledger = self.ledger
        counts = {name: ledger.fates[fate] for fate, name in enumerate(FATES)}
        counts |= {"issued": ledger.issued, "released": ledger.released, "in_flight": ledger.open}
        counts["retried"] = ledger.retried
        elapsed = (self._finished_at or now) - self._began
        if not self._is_over and threading.get_ident() == self._thread:
            self._computed = time.thread_time() - self._computed_before
        hanging = [name for pool in self._pools for name in getattr(pool, "abandoned", ())]
        notes = [f"threads that hang past their timeout: {', '.join(hanging)}"] if hanging else []
        report = build(
            name=self.plan.name,
            counts=counts,
            elapsed=elapsed,
            segments=self._meters,
            errors=self.errors,
            now=self._finished_at or now,
            guarantee=self.plan.guarantee,
            earlier=self._earlier,
            notes=[*self.notes, *notes],
            source=self.plan.source.identity if self.plan.source is not None else "the callers",
            sink=self.plan.sink.identity if self.plan.sink is not None else None,
            cores=cores(),
            loop_busy=min(1.0, self._computed / elapsed) if elapsed > 0 else 0.0,
        )
        if self._is_over:
            self._last_report = report
        return report

    # -- what segments do -------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Stop the run with this exception; the first one counts."""
        if self.ended:
            return
        self.failure = error
        self._end()

    def _end(self) -> None:
        self.ended = True
        for segment in self.segments:
            segment.halt()
        if self._supervisor is not None and not self._over.done():
            self._over.set_result(None)
        self.on_end()

    @property
    def failed(self) -> bool:
        """Whether an exception ended the run."""
        return self.failure is not None

    def refuse(self, origin: Any, error: BaseException) -> bool:
        """Whether somebody waits for this very item and takes its error, so that the run goes on."""
        return self._refuse is not None and self._refuse(origin, error)

    def satisfied(self, segment: Runner) -> None:
        """A ``take`` has enough: everything before it stops; what comes after goes on."""
        if self._reading is not None:
            cancel_once(self._reading)
        for before in self.segments[: self.segments.index(segment)]:
            before.stopped = True
            self._cutting.append(self.loop.create_task(before.abort()))

    # -- the supervisor ---------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        restore = heard_on(self.loop, self.interrupt) if self._signals else None
        total = self.plan.source.total if self.plan.source is not None else None
        display = Display(self.plan.name, self.report, total, self._show, getattr(self._sink, "status", None))
        try:
            try:
                progress = await self._open()
                if not self._opened.done():
                    self._opened.set_result(None)
                if progress is not None and not self.ended:
                    display.start()
                    await self._work(progress)
            except BaseException as error:
                self._keep_first(error)
            await self._shut_down()
        finally:
            display.stop()
            if restore is not None:
                restore()
            self.ended = True
            self._finished_at = self.clock()
            self._computed = time.thread_time() - self._computed_before
            self._is_over = True
            self.on_end()
            if not self._opened.done():
                self._opened.set_result(None)

    def _keep_first(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
        elif error is not self.failure:
            logger.warning("while the run was ending: %s: %s", type(error).__name__, error, exc_info=error)
        self._end()

    async def _open(self) -> Progress | None:
        """Open sink and pools; None if there is nothing to do."""
        plan = self.plan
        progress, first = Progress(), Delta()
        source, sink = self._source, self._sink
        if sink is not None and source is not None:
            job = plan.job(fresh=self._fresh)
            sink_channel = Channel(_SINK_ROOM)
            meter = StageMeter("to", "sink", 1)
            policy = Policy("to", meter, self.errors, on_error=plan.sink_on_error)
            segment_meter = SegmentMeter([meter], 1, self.clock())
            progress = await sink.open(job)
            self._earlier = dict(progress.counts)
            self._committer = Committer(
                self, sink, source, sink_channel, policy, segment_meter, first, self._reading_of
            )  # from here on the sink is closed by the shutdown
            if await self._nothing_to_do(progress, first):
                return None
            self.outlet = sink_channel
        else:
            self.outlet = Channel(self._outlet_room)
        self._build(progress)
        if self._committer is not None:
            self._meters.append(self._committer.meter)
        await open_all(self.segments, self._over)
        for each in self._meters:
            each.start(self.clock())
        return progress

    async def _nothing_to_do(self, progress: Progress, first: Delta) -> bool:
        """Compare input and plan with what an earlier run saw. Raises ResumeMismatch for a changed input."""
        plan = self.plan
        assert plan.source is not None
        assert plan.sink is not None
        if not plan.exactly_once:
            return False
        snapshot = await plan.source.snapshot()
        first.snapshot, first.plan = snapshot, plan.fingerprint
        if progress.snapshot is not None and progress.ids is None and snapshot != progress.snapshot:
            how = await plan.source.changed(progress.snapshot)
            if how is not None:
                raise ResumeMismatch(plan.sink.identity, how)
        if progress.plan is not None and progress.plan != plan.fingerprint:
            note = "the plan has changed since the earlier run; what that run finished stays as it is"
            self.notes.append(note)
            logger.warning("%s: %s", plan.name, note)
        has_all = progress.finished and snapshot is not None and snapshot == progress.snapshot
        progress.snapshot = snapshot
        if has_all or (progress.taken and 0 in progress.left(stage_takes(plan)).values()):
            self.notes.append("nothing to do: an earlier run finished the job")
            return True
        return False

    def _build(self, progress: Progress) -> None:
        meter = StageMeter("read", "loop", 1)
        self._policy = Policy(
            "read",
            meter,
            self.errors,
            on_error=self.plan.read_on_error,
            max_failures=self.plan.read_max_failures,
        )
        built = build_segments(
            self, self.plan, self.outlet, self.errors, progress, self._reading_of, inline=self._inline
        )
        self.inlet = built.inlet
        self.segments = built.segments
        self._pools = built.pools
        self._meters = built.meters
        self.ledger.freed = built.pump_gate

    async def _work(self, progress: Progress) -> None:
        """From the first item to the last, or to the first reason to end."""
        plan = self.plan
        tasks: list[asyncio.Task[None]] = []
        if plan.source is not None:
            output = plan.sink.identity if plan.sink is not None else plan.name
            assert self._source is not None
            reader = Reader(
                self, self._source, progress, self.inlet, self._policy, plan.id, output, digests=plan.streams
            )
            self._reading = self._begin("read", lambda: self._read(reader))
            self._reading.add_done_callback(self._no_more_items)
            tasks.append(self._reading)
        if self._committer is not None:
            tasks.append(self._begin("to", self._commit_all))
        self._pump_all()  # a take of nothing is satisfied before anything came
        try:
            await self._over
        finally:
            for task in tasks:
                cancel_once(task)
            if not self._all_came_out():  # at once: no call may start while a sink still writes
                tasks.append(self.loop.create_task(self._stop_segments()))
            for task in tasks:
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    self._keep_first(error)

    def _begin(self, stage: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """A part of the run as a task: what it raises by itself fails the run."""

        async def watched() -> None:
            try:
                await work()
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and is_cancelled():
                    raise
                self.fail(as_failure(stage, error))

        return self.loop.create_task(watched(), name=f"penstock {stage} {self.plan.name}")

    async def _read(self, reader: Reader) -> None:
        await reader.run()
        self._has_read_all = True

    def _no_more_items(self, reading: asyncio.Task[None]) -> None:
        """The source has ended, or was stopped by a drain or a ``take``: what was issued goes on."""
        if not self.ended:
            self.inlet.close()

    def hurry(self) -> None:
        """Something waits for room that partial batches could make."""
        self.loop.call_soon(self._pump_all)

    def _pump_all(self) -> None:
        for segment in self.segments:
            segment.pump()

    async def _commit_all(self) -> None:
        assert self._committer is not None
        await self._committer.run()
        self._end()

    def outlet_closed(self) -> None:
        """Nothing more will come out; called by whoever consumes the outputs when it has them all."""
        self._end()

    async def _shut_down(self) -> None:
        steps: list[Callable[[], Awaitable[Any]]] = [self._stop_segments, self._give_back]
        if self._committer is not None:
            steps[1:] = [self._last_commit, self._give_back, self._committer.close]
        if self._reading_of is not None:
            steps.append(self._reading_of.close)
        for step in steps:
            try:
                await step()
            except BaseException as error:
                self._keep_first(error)

    async def _stop_segments(self) -> None:
        for result in await asyncio.gather(*self._cutting, return_exceptions=True):
            if isinstance(result, BaseException):
                self._keep_first(result)
        whole = self.failure is None and self._all_came_out()
        if whole:
            for segment in self.segments:
                await segment.close()
        else:
            results = await asyncio.gather(*(segment.abort() for segment in self.segments), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    self._keep_first(result)

    def _all_came_out(self) -> bool:
        outlet = getattr(self, "outlet", None)
        return outlet is not None and outlet.ended

    async def _last_commit(self) -> None:
        committer = self._committer
        assert committer is not None
        if committer.broken or self._immediate or not hasattr(self, "outlet"):
            return
        self._finished_at = self.clock()
        report = self._report_for_journal()
        finished = self._has_read_all and not report["released"] and self._reading_of is None
        await committer.commit(finished=finished, report=report)
        self._finished_at = 0.0

    def _report_for_journal(self) -> dict[str, Any]:
        """The report as it will be when the last commit counts."""
        with self.ledger.as_committed():
            return self.report().to_dict()

    async def _give_back(self) -> None:
        self.ledger.release()
        if self._source is not None and self._sink is not None:
            left = self.ledger.unfinished
            if left:
                await self._source.give_back(left)

    # -- signals ----------------------------------------------------------------------------------------------------

    def interrupt(self, number: signal.Signals) -> None:
        """What a signal does: the first drains, the second stops at once."""
        if self.ended and self.interrupted is None:  # it came too late to change anything, but the caller is told
            self.interrupted = number
        elif self.interrupted is None:
            self.interrupted = number
            self.notes.append(f"interrupted by {number.name}: drained and committed; run again to go on")
            logger.warning("%s: %s: draining; once more stops at once", self.plan.name, number.name)
            self._drain()
        else:
            self.stop(immediately=True)
