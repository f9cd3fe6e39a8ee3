"""fit: a training run is a flow whose last stage computes gradients and whose sink applies them.

``check_fit`` refuses what can't be run, and ``job_of`` makes the job; nothing runs here. The stages of the user's flow
come first, then the gradient, leased by tickets (``train/lease.py``), then, in rounds, a ``batch`` of as many as there
are workers, then the sink (``train/learner.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from penstock.errors import PlanError
from penstock.flow.contract import is_subscribed
from penstock.flow.flow import Flow, changed
from penstock.flow.job import Job
from penstock.flow.stage import (
    Batch,
    FlatMap,
    MapBatches,
    Stage,
    Take,
    Unbatch,
    Work,
    describe,
    function_name,
    positive,
)
from penstock.place.base import PerWorker, is_async
from penstock.train.epochs import Epochs, check_epochs, epoch_of
from penstock.train.learner import Learner
from penstock.train.lease import Lease
from penstock.train.tickets import Tickets
from penstock.train.worker import AsyncStep, Readable, Step

__all__ = ["Fit", "check_fit", "job_of"]


@dataclass(frozen=True, slots=True)
class Fit:
    """What ``fit`` was given, checked."""

    gradient: Callable[[Any, Any], Any]
    flow: Flow[Any]
    workers: int
    epochs: int
    shuffle: int | None
    collate: Callable[[Any], Any] | None
    evaluate: Callable[[Any], Any] | None
    stop: Callable[[list[Any]], Any] | None
    in_rounds: bool

    @property
    def repeats(self) -> bool:
        """Whether the source is read as epochs: wherever it can be, so that another run may ask for more of them."""
        source: Any = self.flow.source
        return not is_subscribed(source) and source.replayable and self.flow.id is None


def check_fit(given: Fit) -> None:
    """Raise PlanError for what can't be run."""
    gradient, flow = given.gradient, given.flow
    for name, function in (
        ("gradient", gradient),
        ("collate", given.collate),
        ("evaluate", given.evaluate),
        ("stop", given.stop),
    ):
        if (function is not None or name == "gradient") and not callable(function):
            raise PlanError(f"fit({name}={function!r:.60}), which isn't callable", f"Give a function for {name}")
    if isinstance(gradient, PerWorker):
        raise PlanError("fit() was given per_worker(…)", "Give a function of parameters and a batch")
    if not isinstance(flow, Flow):
        raise PlanError(
            f"fit() was given a {type(flow).__name__} to learn from",
            "Give a flow of batches, for instance ps.Flow(samples).batch(64)",
        )
    if flow.source is None:
        raise PlanError("fit() was given a flow without a source", "Give it one: flow.over(samples)")
    positive(given.workers, "fit(): workers")
    check_epochs(flow.source, given.epochs, given.shuffle)
    if flow.id is not None and (given.epochs > 1 or given.shuffle is not None):
        raise PlanError(
            "fit(epochs=…, shuffle=…) over a flow with id=: progress by ids knows each item once",
            "Leave id= out: positions say which items were learned from in which epoch",
        )
    if given.stop is not None and given.evaluate is None:
        raise PlanError("fit(stop=…) without evaluate: there are no scores to judge", "Give evaluate=, too")
    if given.epochs > 1 and any(isinstance(stage, Take) for stage in flow.stages):
        raise PlanError(
            f"fit(epochs={given.epochs}) over a flow with take(…), which counts over all epochs together",
            "Cut the samples themselves, for instance ps.Flow(samples[:1000])",
        )
    for stage in flow.stages:
        if isinstance(stage, Unbatch) or (isinstance(stage, FlatMap) and stage.whole):
            raise PlanError(
                f"fit() over a flow with {describe(stage)}, whose outputs count together or not at all",
                "Use flat_map(…, whole=False): each batch counts when its gradient is applied",
            )
        if given.in_rounds:
            _check_in_rounds(stage)


def _check_in_rounds(stage: Any) -> None:
    """BSP gives the same bits each time, so nothing before it may depend on time."""
    problem = None
    if isinstance(stage, Work) and (not stage.options.ordered or stage.options.key is not None):
        problem = "isn't ordered", "Leave out ordered=False and key="
    elif isinstance(stage, (Batch, MapBatches)) and stage.max_wait is not None:
        problem = "makes batches of what is there when max_wait is over", "Leave out max_wait"
    if problem is not None:
        raise PlanError(f"BSP: the stage {describe(stage)} {problem[0]}", f"{problem[1]}, or use ps.SSP(1) or ps.ASP()")


def job_of(given: Fit, weights: Readable, learner: Learner, tickets: Tickets, *, shared: bool) -> Job:
    """The flow that trains, into its sink. ``shared``: gradients are computed in processes."""
    flow = given.flow
    source: Any = flow.source
    if given.repeats:
        epochs = Epochs(source, given.epochs, given.shuffle, lambda: learner.stopped)
        flow = changed(flow, source=epochs, stages=_epoch_by_epoch(flow))
    kind = AsyncStep if is_async(given.gradient) else Step
    in_rounds = given.in_rounds
    step = kind(weights, given.gradient, given.collate, keeps=not shared, alone=shared and in_rounds)
    ceiling = "concurrency" if kind is AsyncStep and not shared else "workers"
    options: dict[str, Any] = {
        "name": function_name(given.gradient),
        "place": "process" if shared else "loop" if kind is AsyncStep else "thread",
        "ordered": in_rounds,
        ceiling: given.workers,
        "gate": partial(Lease, tickets=tickets),
    }
    if in_rounds:
        options["retry"] = None  # an attempt later would be one from other parameters
    if flow.defaults.get("on_error") == "keep":
        options["on_error"] = "raise"  # a Failed is no gradient
    trained: Flow[Any] = flow.map(step, **options)
    if in_rounds:
        trained = trained.batch(given.workers)
    return trained.to(learner, name=flow.name or source.identity)


def _epoch_by_epoch(flow: Flow[Any]) -> tuple[Stage, ...]:
    """The flow's stages, with batches that end with the epoch, as far as epochs come one after the other."""
    stages: list[Stage] = []
    ordered = True
    for stage in flow.stages:
        if isinstance(stage, Work):
            ordered = ordered and stage.options.ordered and stage.options.key is None
        stages.append(replace(stage, apart=epoch_of) if isinstance(stage, Batch) and ordered else stage)
    return tuple(stages)
