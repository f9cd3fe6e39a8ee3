"""ParameterServer: weights that many workers read and change at once, each at its own pace.

*States.* A server is closed, opening, open (inside ``async with``, of which there may be several) or closing; whoever
comes in between waits for the change to be over, and then looks again. There is one set of weights, of the optimizer's
arrays, and one version, all behind one lock (``train/weights.py``). A push is checked before the lock is taken, so that
what can fail has failed before anything changes.

*Threads.* Small models are worked on at once, on the thread that asks. Large ones (a copy takes longer than a hop) on
the server's *desk*, in the order in which they were asked, and the event loop goes on meanwhile. Another thread, the
*disk*, has the checkpoint, so that nothing waits for it; with ``place="shared"``, a third answers other processes.

*Cancelling.* A pull leaves nothing behind. A push is applied or isn't, never in part: one that was handed to a thread
is applied whoever waits for it, and the version says so. A cancelled ``fit`` stops the workers, applies nothing more,
and makes a checkpoint of what was applied.

*The checkpoint.* It is read when the server opens and written while it trains. Weights and progress belong together:
while ``fit`` runs, it alone saves. What ``push`` changes outside of it is saved as often as the checkpoint asks, and at
the end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Self, TypeVar

from penstock.errors import Closed, PlanError, WriteFailed
from penstock.flow.blocking import Desk, Ending
from penstock.flow.commit import uninterrupted
from penstock.flow.contract import Until
from penstock.flow.flow import Flow
from penstock.place.base import cores
from penstock.train.checkpoint import Checkpoint, as_checkpoint
from penstock.train.consistency import ASP, Consistency
from penstock.train.fit import Fit, check_fit, job_of
from penstock.train.handle import AT_ONCE, Handle, handle_of
from penstock.train.kernels import Array
from penstock.train.learner import Learner
from penstock.train.optimizer import SGD, Optimizer
from penstock.train.report import TrainingReport, training_report
from penstock.train.shared import Listener
from penstock.train.store import Store
from penstock.train.tickets import Tickets
from penstock.train.weights import Weights
from penstock.train.worker import one_thread

__all__ = ["ParameterServer"]

T = TypeVar("T")

_log = logging.getLogger("penstock")

_PLACES = ("local", "shared")
_NO_TICKET = PlanError(
    "push() to a server with ps.BSP(), whose rounds are of gradients that fit has given out the batches for",
    "Train with fit(), or make the server with ps.ASP()",
)


class ParameterServer:
    """The parameters of a model, for workers that pull them, compute gradients, and push those without waiting.

    ``params``: an array of float32 or float64, or nested dicts of such arrays; they are copied. NumPy's, or any that
    cross by DLPack (PyTorch's, JAX's). ``optimizer``: ``SGD(0.01)`` by default; it runs in the server, in place, once
    for each push, so that momentum and means are those of all workers together.

    ``consistency``: how far workers may be apart in ``fit``. ``ASP()``, the default: nobody waits for anybody, and how
    many updates late a gradient is, its *staleness*, is counted; see ``ASP`` for what else may be done about it.
    ``SSP(s)``: nobody gets further ahead than so many rounds. ``BSP()``: rounds, and the same bits every time.

    ``place``: where workers are. ``"local"``: in threads of this process (an ``async def`` on its loop). ``"shared"``:
    in processes, which get the parameters through shared memory; the server can then be taken into the functions of any
    flow's process stage, and be pulled from and pushed to there.

    ``checkpoint``: a directory (or a ``Checkpoint``, which also says how often), in which weights and the progress of
    ``fit`` are kept. A server that finds one there goes on from it.

    It belongs to no event loop: it may be used from several at once. Raises PlanError for parameters that can't be
    trained; ``async with`` raises MissingDependency where numba isn't installed, and CheckpointRejected for a
    checkpoint of another model.

    >>> import asyncio, numpy as np, penstock as ps
    >>> async def main() -> None:
    ...     async with ps.ParameterServer(np.zeros(3, np.float32), ps.SGD(lr=0.1)) as server:
    ...         params, version = await server.pull()
    ...         print(await server.push(params + 1, version=version))
    ...         print((await server.pull())[0])
    >>> asyncio.run(main())
    1
    [-0.1 -0.1 -0.1]
    """

    def __init__(
        self,
        params: Any,
        optimizer: Optimizer | None = None,
        consistency: Consistency | None = None,
        place: Literal["local", "shared"] = "local",
        checkpoint: str | Checkpoint | None = None,
    ) -> None:
        optimizer = SGD(lr=0.01) if optimizer is None else optimizer
        if not isinstance(optimizer, Optimizer):
            raise PlanError(
                f"ParameterServer(optimizer={optimizer!r:.60})", "Give ps.SGD(…), ps.Adam(…) or ps.AdamW(…)"
            )
        consistency = ASP() if consistency is None else consistency
        if not isinstance(consistency, Consistency):
            raise PlanError(f"ParameterServer(consistency={consistency!r:.60})", "Give ps.ASP(), ps.SSP(3) or ps.BSP()")
        if place not in _PLACES:
            raise PlanError(f"ParameterServer(place={place!r})", f"Give one of {', '.join(map(repr, _PLACES))}")
        self.optimizer = optimizer
        self.consistency = consistency
        self.place = place
        self.checkpoint = as_checkpoint(checkpoint)
        self._weights = Weights(params, optimizer, consistency)
        self._refusal = _NO_TICKET if consistency.in_rounds else None
        self._lock = threading.Lock()
        self._opened = 0
        self._changing: Ending | None = None  # set while it is being opened or closed
        self._desk: Desk | None = None
        self._disk: Desk
        self._store: Store | None = None
        self._saved_at = 0.0
        self._listener: Listener | None = None
        self._fitting = False

    @property
    def version(self) -> int:
        """How many updates there were: one for each push that was applied, or for each round."""
        return self._weights.version

    @property
    def staleness(self) -> dict[int, int]:
        """How many gradients that were applied were how stale: the updates between a gradient's version and itself.

        What was staler than 1,000 is counted there.
        """
        return self._weights.staleness

    @property
    def dropped(self) -> int:
        """How many gradients were too stale to be applied."""
        return self._weights.dropped

    def __repr__(self) -> str:
        return (
            f"ParameterServer({len(self._weights.layout.names)} parameters, {self.optimizer!r}, version {self.version})"
        )

    def __reduce__(self) -> Any:
        if self.place != "shared":
            raise PlanError(
                'a ParameterServer with place="local" was taken into another process',
                'Make it with place="shared", or run the stage that uses it in threads',
            )
        if self._listener is None:
            raise Closed("the parameter server")
        return handle_of, (self._listener.address, self._weights.layout)

    # -- opening and closing ----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Compile what is needed, if it isn't yet, and read the checkpoint. Cancelling leaves the server closed.

        Raises OutputInUse while another server has the checkpoint, CheckpointRejected for one of another model.
        """
        while True:
            with self._lock:
                changing = self._changing
                if changing is None:
                    self._opened += 1
                    if self._opened > 1:
                        return self
                    mine = self._changing = Ending()
                    break
            await changing.awaited()
        desk, disk = Desk("penstock-server"), Desk("penstock-checkpoint")
        try:
            await desk.call(self.optimizer.prepare, *set(self._weights.layout.kinds))
            if self.checkpoint is not None:
                self._store = Store(self.checkpoint, self._weights)
                await disk.call(self._store.open)
            if self.place == "shared":
                self._listener = Listener(self._weights, self._refusal)
            self._saved_at = time.monotonic()
            self._desk, self._disk = desk, disk
        except BaseException:
            self._opened = 0
            await uninterrupted(self._let_go(desk, disk))
            raise
        finally:
            self._changed(mine)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Apply what was pushed, save it, then close. Of several ``async with`` at once, the last one closes."""
        with self._lock:
            self._opened -= 1
            desk = self._desk
            if self._opened or desk is None:
                return
            self._desk = None
            mine = self._changing = Ending()
        try:
            await uninterrupted(self._let_go(desk, self._disk))
        finally:
            self._changed(mine)

    def _changed(self, mine: Ending) -> None:
        """The server is open, or closed: whoever waits for that looks again."""
        with self._lock:
            self._changing = None
        mine.over()

    async def _let_go(self, desk: Desk, disk: Desk) -> None:
        """Close what is open, each whatever became of the others."""
        listener, self._listener = self._listener, None
        store, self._store = self._store, None
        try:
            if listener is not None:
                await desk.call(listener.close)
        finally:
            await desk.close()
            try:
                if store is not None:
                    await disk.call(self._close_store, store)
            finally:
                await disk.close()

    def _close_store(self, store: Store) -> None:
        try:
            if 0 <= store.saved < self.version:
                store.save(self._weights.snapshot())
        finally:
            store.close()

    # -- pulling and pushing ----------------------------------------------------------------------------------------

    async def pull(self) -> tuple[Any, int]:
        """A copy of the parameters, in the form in which they were given, and their version.

        All of them are of that version. The copy is the caller's, to be kept or changed. Raises Closed outside of
        ``async with``. Cancelling leaves nothing behind.
        """
        vectors, version = await self._do(self._weights.copy)
        return self._weights.layout.tree(vectors), version

    async def push(self, gradients: Any, *, version: int) -> int:
        """Apply gradients that were computed from the parameters of ``version``; returns the version afterwards.

        It is applied at once, whatever ``fit`` and others do: no ticket bounds how stale it may be. ``gradients``: in
        the form, shapes and types of the parameters, of NumPy or crossing by DLPack; they are read only, and the
        caller's again on return.

        Raises GradientRejected, which names the parameter, for another form, shape or type, for NaN and infinity;
        PlanError for a version that isn't there yet, and under BSP, whose rounds only ``fit`` makes; Closed outside of
        ``async with``. Nothing is changed then. A checkpoint that can't be saved meanwhile is a warning. Cancelled, it
        is applied as a whole or not at all; until the server is closed, its arrays may still be read.
        """
        vectors, version = self._checked(gradients, version)
        found = await self._do(self._weights.push, vectors, version)
        if self._is_due():
            store = self._store
            assert store is not None
            try:
                snapshot = await self._do(self._weights.snapshot)
                await self._disk.call(store.save, snapshot)
            except (Closed, WriteFailed) as error:  # it was applied all the same; closing saves it, or raises
                _log.warning("the checkpoint couldn't be saved after a push, and will be tried again: %s", error)
        return found

    def pull_sync(self) -> tuple[Any, int]:
        """``pull`` for code that isn't async, from any thread."""
        self._open_desk()
        vectors, version = self._weights.copy()
        return self._weights.layout.tree(vectors), version

    def push_sync(self, gradients: Any, *, version: int) -> int:
        """``push`` for code that isn't async, from any thread. It is saved with the next checkpoint that ``push``,
        ``fit`` or closing makes."""
        vectors, version = self._checked(gradients, version)
        self._open_desk()
        return self._weights.push(vectors, version)

    def _checked(self, gradients: Any, version: Any) -> tuple[list[Array], int]:
        if self._refusal is not None:
            raise self._refusal
        return self._weights.layout.vectors(gradients), self._weights.checked_version(version)

    def _is_due(self) -> bool:
        """Whether what was pushed is to be saved now. Says so once."""
        store, kept = self._store, self.checkpoint
        if store is None or kept is None or self._fitting or store.saved < 0:
            return False
        enough = kept.updates is not None and self.version - store.saved >= kept.updates
        now = time.monotonic()
        if not enough and now - self._saved_at < kept.seconds:
            return False
        self._saved_at = now
        return True

    def _open_desk(self) -> Desk:
        if self._desk is None:
            raise Closed("the parameter server")
        return self._desk

    async def _do(self, work: Callable[..., T], *args: Any) -> T:
        desk = self._open_desk()
        if self._weights.layout.bytes <= AT_ONCE:
            return work(*args)
        return await desk.call(work, *args)

    # -- training ---------------------------------------------------------------------------------------------------

    async def fit(
        self,
        gradient: Callable[[Any, Any], Any],
        flow: Flow[Any],
        *,
        workers: int | None = None,
        epochs: int = 1,
        shuffle: int | None = None,
        collate: Callable[[Any], Any] | None = None,
        evaluate: Callable[[Any], Any] | None = None,
        stop: Callable[[list[Any]], Any] | None = None,
        fresh: bool = False,
        progress: bool | None = None,
        until: Until = None,
    ) -> TrainingReport:
        """Train on a flow of batches: each is learned from once, by whichever worker is free. Returns the report.

        ``gradient(params, batch)`` returns gradients in the form of ``params``, or ``(loss, gradients)``. A ``def`` or
        an ``async def``. It is called in ``workers`` threads or processes at once (by default as many as there are
        cores), with a copy of the parameters that is its own. Several steps at once are one gradient, too: with
        ``SGD(lr=1)``, return what the parameters were, minus what they have become.

        ``flow``: its outputs are the batches, for instance ``ps.Flow(samples).batch(64)``. ``epochs``: how often its
        source is read; batches end with the epoch where the flow keeps the order. ``shuffle``: a seed, by which each
        epoch has an order of its own; it needs a sequence. ``collate``: called with each batch in the worker, before
        ``gradient``.

        ``evaluate(params)`` is called after each epoch, with parameters as they were then, in a thread, and the
        training goes on; it returns a number or a dict of numbers. ``stop(scores)``, called with all of these so far,
        returns whether to stop; what was read by then is still learned from.

        With a checkpoint, run again after a crash it goes on where it was: each sample counts as often as it was
        applied, and was applied once an epoch. Under BSP or with one worker the parameters come out as they would have
        without the crash, bit for bit; under ASP and SSP the same samples are applied to other parameters. A second
        ``fit`` over another source keeps a progress of its own, under the flow's ``name``. ``fresh``: forget the
        checkpoint, all of it. ``progress``: show it; by default where a person looks on. ``until="drained"``: over a
        topic, end when nothing is left (``until=task``: once that is done); by default such a training goes on until it
        is cancelled.

        Raises what ``gradient`` raised, by default, with notes that name batch and stage (see ``on_error`` of
        ``Flow``); GradientRejected for gradients that don't fit; PlanError, ResumeMismatch before anything starts;
        Closed outside of ``async with``, which may be left while it runs: the server closes when it ends. Cancelling
        it ends the workers, waits for an evaluation that goes on, and saves what was applied.

        >>> import asyncio, numpy as np, penstock as ps
        >>> def gradient(w, batch):
        ...     x = np.array(batch, np.float32)
        ...     return float(((w - x) ** 2).mean()), 2 * (w - x).mean(axis=0, keepdims=True)
        >>> async def main():
        ...     async with ps.ParameterServer(np.zeros(1, np.float32), ps.SGD(lr=0.2)) as server:
        ...         report = await server.fit(gradient, ps.Flow([3.0] * 64).batch(4), workers=2, epochs=2)
        ...         print(report.samples, report.version, (await server.pull())[0].round(2))
        >>> asyncio.run(main())
        128 32 [3.]
        """
        given = Fit(
            gradient,
            flow,
            cores() if workers is None else workers,
            epochs,
            shuffle,
            collate,
            evaluate,
            stop,
            self.consistency.in_rounds,
        )
        check_fit(given)
        self._open_desk()
        if fresh and self.checkpoint is None:
            raise PlanError("fit(fresh=True) without checkpoint=: there is none to be forgotten", "Make a new server")
        with self._lock:
            if self._fitting:
                raise PlanError("fit() was called while another fit of this server runs", "Await that one first")
            self._fitting = True
        try:
            async with self:  # which stays open until then, whoever leaves it meanwhile
                return await self._fit(given, self._open_desk(), {"fresh": fresh, "progress": progress, "until": until})
        finally:
            self._fitting = False

    async def _fit(self, given: Fit, desk: Desk, options: dict[str, Any]) -> TrainingReport:
        weights = self._weights
        tickets = Tickets(self.consistency, given.workers)
        learner = Learner(
            weights,
            tickets,
            self._store,
            desk,
            self._disk,
            epochs=given.epochs,
            evaluate=given.evaluate,
            stop=given.stop,
        )
        shared = self._listener is not None
        read = weights if self._listener is None else Handle(self._listener.address, weights.layout)
        dropped, counts = weights.dropped, weights.staleness
        try:
            job = job_of(given, read, learner, tickets, shared=shared)
            with one_thread() if given.in_rounds and not shared else nullcontext():
                async with job.start(**options) as run:
                    began = weights.version
                    report = await run.finish()
            await learner.finish()
        finally:
            await learner.end()
        late = {stale: count - counts.get(stale, 0) for stale, count in weights.staleness.items()}
        return training_report(
            report,
            version=weights.version,
            updates=weights.version - began,
            dropped=weights.dropped - dropped,
            samples=learner.samples,
            loss=learner.loss,
            scores=tuple(learner.scores),
            stopped=learner.stopped,
            staleness={stale: count for stale, count in late.items() if count},
        )
