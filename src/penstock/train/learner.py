"""Learner: the sink of a training flow. What is written to it is applied, what it commits is a checkpoint.

*Exactly once.* A gradient is applied in ``write``, and nowhere else; a write is never cut short. So the weights always
hold exactly what was written, and a commit, which never runs during a write, saves the weights together with what was
settled by then. If a run ends without committing (a second Ctrl-C, a full disk), the weights hold more than the
progress says: they are taken back to the last checkpoint, so that the next run doesn't apply them twice.

*Rounds.* Under BSP the flow ends with a ``batch`` of as many gradients as there are workers, so an output is a round:
there is no partly applied round to be committed.

*Epochs.* (``fit`` gives them where it reads a source more than once.) Before the first gradient of a later epoch is
applied, a snapshot is taken, and evaluated in a thread of its own while training goes on. If the next epoch is over
before that is, the next gradient waits: there is one snapshot at a time. The scores are saved by the next checkpoint;
if a crash comes between, the epoch is evaluated with the first gradient that is applied afterwards.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from math import isfinite
from typing import Any

from penstock.errors import PlanError
from penstock.flow.blocking import Desk
from penstock.flow.contract import Delta, JobId, Origin
from penstock.flow.journal import Journal
from penstock.flow.output import OnDesk
from penstock.flow.progress import Positions, Progress
from penstock.train.epochs import epoch_of
from penstock.train.handle import AT_ONCE
from penstock.train.store import Store
from penstock.train.tickets import Tickets
from penstock.train.weights import Weights
from penstock.train.worker import Gradient

__all__ = ["Learner"]

_RECENT = 100  # gradients over which the shown loss is the mean


class Learner:
    """``evaluate`` is called with parameters after each epoch, ``stop`` with all scores so far. ``desk`` and ``disk``
    are the server's threads, for what would hold up the loop, and for the checkpoint."""

    def __init__(
        self,
        weights: Weights,
        tickets: Tickets,
        store: Store | None,
        desk: Desk,
        disk: Desk,
        *,
        epochs: int,
        evaluate: Callable[[Any], Any] | None,
        stop: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._weights = weights
        self._tickets = tickets
        self._store = store
        self._desk = desk
        self._disk = disk
        self._epochs = epochs
        self._evaluate = evaluate
        self._stop = stop
        self._evaluator = Desk("penstock-evaluate")
        self._evaluating: asyncio.Task[None] | None = None
        self._journal: Journal | None = None
        self._uncommitted = 0
        self._epoch = -1  # the last epoch of which a snapshot was taken
        self._scored_until = -1
        self._failure: Exception | None = None  # of an evaluation, to be raised when the run is over
        self._unscored = False  # whether anything was applied since the last snapshot
        self.scores: list[Any] = []
        self.stopped = False
        self.samples = 0
        self.losses: deque[float] = deque(maxlen=_RECENT)

    # -- the contract of a sink -------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        return f"training:{self._store.checkpoint.path}" if self._store is not None else "training"

    @property
    def exactly_once(self) -> bool:
        """Whether there is a checkpoint."""
        return self._store is not None

    @property
    def keeps_dead(self) -> bool:
        return self._store is not None

    @property
    def pace(self) -> float:
        """The seconds between checkpoints, or 0 when there were enough updates."""
        if self._store is None:
            return 0.0
        kept = self._store.checkpoint
        due = kept.updates is not None and self._weights.version - self._store.saved >= kept.updates
        return 0.0 if due else kept.seconds

    @property
    def weakness(self) -> str:
        """Why it is no more than at least once, where it isn't."""
        return "without checkpoint= nothing is kept for another run"

    async def open(self, job: JobId) -> Progress:
        """Take up the progress of this job. Raises ResumeMismatch, JournalError; PlanError for a late ``fresh``."""
        if self._store is None:
            return Progress()
        progress: Progress = await self._disk.call(self._open, self._store, job)
        if self.stopped:  # what another ``stop``, or none, may see otherwise
            self.stopped = self._stop is not None and bool(await self._called(self._stop, list(self.scores)))
        assert self._journal is not None
        known = OnDesk(self._disk, self._journal)
        progress.states = known
        if job.by_id:
            progress.ids = known
        return progress

    def _open(self, store: Store, job: JobId) -> Progress:
        if job.fresh:
            store.reset()
        elif store.saved < 0:  # an earlier run couldn't take back what it hadn't saved
            store.load()
        self._journal = store.journal(job)
        progress = self._journal.load(job)
        self.scores = [_restored(score) for score in self._journal.state.get("scores", ())]
        self.stopped = bool(self._journal.state.get("stopped"))
        self._epoch = self._scored_until = self._journal.state.get("epoch", -1)
        return progress

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        """Apply these gradients."""
        for epoch, group in groupby(outputs, self._epoch_of):
            if epoch > self._epoch + 1:
                await self._score_aside(epoch - 1)
            await self._learn(list(group))

    def status(self) -> str:
        """How training stands, in a few words, for whoever looks on."""
        told = [f"version {self._weights.version:,}"]
        if self.losses:
            told.insert(0, f"loss {self.loss:.4g}")
        late = self._weights.staleness
        if late:
            mean = sum(stale * count for stale, count in late.items()) / sum(late.values())
            told.append(f"gradients {mean:.1f} updates late")
        if self.scores:
            last = self.scores[-1]
            told.append(f"score {last:.4g}" if isinstance(last, float) else f"score {last}")
        return ", ".join(told)

    @property
    def loss(self) -> float | None:
        """The mean loss of the last gradients; None if none had one."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def _epoch_of(self, output: tuple[Origin, Sequence[Any]]) -> int:
        """The epoch that counts for evaluation; 0 where nothing is evaluated."""
        return epoch_of(output[0][0][0]) if self._epochs > 1 and self._evaluate is not None else 0

    async def _learn(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        self._uncommitted += len(outputs)
        self._unscored = True
        if self._weights.layout.bytes <= AT_ONCE:
            tickets, samples = self._apply(outputs)
        else:
            tickets, samples = await self._desk.call(self._apply, outputs)
        self.samples += samples
        self._tickets.applied(tickets)

    def _apply(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> tuple[list[int], int]:
        """Returns the tickets that are over, and how many samples were learned from: not those of dropped gradients."""
        weights = self._weights
        tickets: list[int] = []
        samples = 0
        for origin, units in outputs:
            learned = False
            for unit in units:
                gradients: Sequence[Gradient] = unit if isinstance(unit, list) else (unit,)
                if isinstance(unit, list):
                    weights.apply_mean([(one.vectors, one.version) for one in gradients])
                    applied = True
                else:
                    applied = weights.apply(unit.vectors, unit.version)
                learned = learned or applied
                tickets += [one.ticket for one in gradients]
                if applied:
                    self.losses.extend(one.loss for one in gradients if one.loss is not None)
            samples += len(origin) if learned else 0
        return tickets, samples

    async def commit(self, delta: Delta) -> Positions:
        """Make a checkpoint of the weights as they are, with this progress; the last one with the last score."""
        if delta.finished:
            try:
                await self.finish()
            except Exception as error:  # what was learned counts all the same; ``finish`` raises it afterwards
                self._failure = error
            if self.stopped:
                delta = replace(delta, finished=False)  # there is more, for a run that isn't stopped
        store = self._store
        if store is not None:
            journal = self._journal
            assert journal is not None
            small = self._weights.layout.bytes <= AT_ONCE
            snapshot = self._weights.snapshot() if small else await self._desk.call(self._weights.snapshot)
            state = {"scores": list(map(_stored, self.scores)), "epoch": self._scored_until, "stopped": self.stopped}
            await self._disk.call(store.save, snapshot, lambda: journal.transaction(delta, state))
        self._uncommitted = 0
        return Positions()

    async def close(self) -> None:
        """Take back what was applied and not committed."""
        journal, self._journal = self._journal, None
        if journal is not None and self._store is not None:
            if self._uncommitted:
                await self._disk.call(self._store.load)
            await self._disk.call(journal.close, clean=True)

    # -- scores -----------------------------------------------------------------------------------------------------

    async def _score_aside(self, epoch: int) -> None:
        """Have the weights, as they are now, evaluated for this epoch; wait only for the evaluation before."""
        await self._scored()
        if self.stopped:
            return
        self._epoch = epoch
        self._unscored = False
        self._evaluating = asyncio.get_running_loop().create_task(self._score(self._params(), epoch))

    async def _scored(self) -> None:
        """Wait for the evaluation that goes on; raises what it raised."""
        evaluating, self._evaluating = self._evaluating, None
        if evaluating is not None:
            await evaluating

    def _params(self) -> Any:
        return self._weights.layout.tree(self._weights.copy()[0])

    async def _score(self, params: Any, epoch: int) -> None:
        assert self._evaluate is not None
        scores = [*self.scores, _as_score(await self._called(self._evaluate, params))]
        self.stopped = self._stop is not None and bool(await self._called(self._stop, list(scores)))
        self.scores, self._scored_until = scores, epoch

    async def _called(self, function: Callable[[Any], Any], value: Any) -> Any:
        result = await self._evaluator.call(function, value)
        return await result if inspect.isawaitable(result) else result

    async def finish(self) -> None:
        """Evaluate what the last epoch has made of the parameters, if it isn't yet. Raises what ``evaluate`` raised."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        await self._scored()
        if self._evaluate is None or self.stopped:
            return
        if self._unscored or self._scored_until < self._epochs - 1:
            self._epoch = self._epochs - 1
            self._unscored = False
            await self._score(self._params(), self._epoch)

    async def end(self) -> None:
        """Let go of everything. Comes last."""
        evaluating, self._evaluating = self._evaluating, None
        if evaluating is not None:
            evaluating.cancel()
            await asyncio.gather(evaluating, return_exceptions=True)
        await self._evaluator.close()


def _as_score(value: Any) -> Any:
    """A score: a number, or a dict of numbers. Raises PlanError for anything else."""
    if isinstance(value, dict):
        return {str(name): _as_score(one) for name, one in value.items()}
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, (int, float)):
        return value
    told = f"evaluate returned a {type(value).__name__}, and scores are kept with the checkpoint"
    raise PlanError(told, "Return a number, or a dict of numbers")


def _stored(score: Any) -> Any:
    """A score as JSON holds it: what isn't finite as text."""
    if isinstance(score, dict):
        return {name: _stored(one) for name, one in score.items()}
    return score if isfinite(score) else repr(float(score))


def _restored(stored: Any) -> Any:
    """What ``_stored`` made of a score, as it was."""
    if isinstance(stored, dict):
        return {name: _restored(one) for name, one in stored.items()}
    return float(stored) if isinstance(stored, str) else stored
