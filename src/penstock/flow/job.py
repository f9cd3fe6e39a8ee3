"""Job: a flow and where its outputs go, described; running it is a matter of ``penstock.flow.run``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from penstock.errors import PlanError
from penstock.flow.contract import Sink, Until

if TYPE_CHECKING:
    from penstock.flow.flow import Flow
    from penstock.flow.report import Report
    from penstock.flow.run import Run

__all__ = ["Job"]


@dataclass(frozen=True, slots=True)
class Job:
    """A flow and where its outputs go: what can be run, and run again after a crash. Made by ``Flow.to``."""

    flow: Flow[Any]
    sink: Sink[Any]
    name: str | None = None
    on_error: str = "raise"

    def __repr__(self) -> str:
        return f"Job({self.flow!r} to {self.sink.identity})"

    def explain(self) -> str:
        """Say how the job would run: segments, placements, ceilings, and the guarantee with its reason.

        Raises PlanError for a job that can't run.

        >>> import penstock as ps
        >>> print(ps.Flow([1, 2]).map(str, workers=2).to(print).explain().splitlines()[-1])
        guarantee: at least once: a function can't commit progress together with its effect
        """
        from penstock.flow.plan import make_plan

        return make_plan(self.flow, self).explain()

    async def run(
        self,
        *,
        fresh: bool = False,
        inline: bool = False,
        signals: bool = False,
        progress: bool | None = None,
        until: Until = None,
    ) -> Report:
        """Run the job to its end and return the report. Run again after a crash, it goes on where it was.

        ``fresh``: discard the output and its progress first. ``inline``: no threads or processes, so that
        ``breakpoint()`` works. ``signals``: drain and commit on the first SIGINT or SIGTERM and stop at once on the
        second (main thread only). ``progress``: show it; None shows it where a person looks on. ``until="drained"``:
        over a topic, end when nothing is left to be delivered; ``until=task``: do so once that is done (whoever fills
        the topic). By default such a job runs until it is stopped.

        Raises what a stage raised by default (see ``on_error``), after the rest was cancelled and awaited; what
        was finished before is committed. Raises PlanError, ResumeMismatch, OutputInUse and their like before
        anything is written, SourceExhausted for a second pass over an iterator. Cancelling it stops the run,
        commits what is finished and leaves the rest to a next run.

        >>> import asyncio, penstock as ps
        >>> asyncio.run(ps.Flow([1, 2, 3]).to(lambda x: None).run()).delivered
        3
        """
        async with self.start(fresh=fresh, inline=inline, signals=signals, progress=progress, until=until) as run:
            return await run.finish()

    def run_sync(
        self,
        *,
        fresh: bool = False,
        inline: bool = False,
        progress: bool | None = None,
        until: Literal["drained"] | None = None,
    ) -> Report:
        """``run`` for code that isn't async; it works while an event loop runs, too (in a notebook).

        On the main thread the first Ctrl-C or SIGTERM drains and commits, then KeyboardInterrupt (or SystemExit with
        143) is raised; the second stops at once. The handlers that stood before are restored.
        """
        from penstock.flow.sync import run_job_blocking

        return run_job_blocking(self, fresh=fresh, inline=inline, progress=progress, until=until)

    def start(
        self,
        *,
        fresh: bool = False,
        inline: bool = False,
        signals: bool = False,
        progress: bool | None = None,
        until: Until = None,
    ) -> Run:
        """Run the job inside ``async with job.start() as run``: ``run.report()`` is live, leaving the block ends it.

        ``await run.finish()`` waits for the end. Leaving the block earlier cancels the run; when it is left, nothing
        of it runs any more, and what it failed with is raised if ``finish`` hasn't. Parameters and errors: see ``run``.

        >>> import asyncio, penstock as ps
        >>> async def main() -> int:
        ...     async with ps.Flow([1, 2]).to(lambda x: None).start() as run:
        ...         await run.finish()
        ...         return run.report().delivered
        >>> asyncio.run(main())
        2
        """
        from penstock.flow.plan import make_plan
        from penstock.flow.run import Run

        if not (until is None or until == "drained" or isinstance(until, asyncio.Future)):
            raise PlanError(
                f"run(until={until!r:.60})", 'Give "drained", or a task to be drained after, or leave it out'
            )
        plan = make_plan(self.flow, self)
        return Run(plan, fresh=fresh, inline=inline, signals=signals, progress=progress, until=until)

    def with_sink(self, sink: Sink[Any]) -> Job:
        """The same job with its outputs going elsewhere."""
        return replace(self, sink=sink)
