"""What a training run came to: the report of its flow, with the loss, the staleness and the scores."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from penstock.flow.report import Report
from penstock.flow.text import number, percent, rate

__all__ = ["TrainingReport", "training_report"]


@dataclass(frozen=True, slots=True)
class TrainingReport(Report):
    """The report of ``fit``: that of its flow, whose items are samples, and what became of the parameters.

    ``version``: how many updates they have had in all. ``updates``: how many in this run, and ``dropped`` how many
    gradients were too stale to be applied. ``samples``: those that were learned from in this run. ``loss``: the mean of
    the last 100 gradients' losses; None if none had one. ``scores``: what ``evaluate`` returned, epoch by epoch,
    earlier runs included (not over a topic, which has no end); ``stopped``: whether ``stop`` has ended the training.
    ``staleness``: how many gradients of this run were how many updates late when they were applied.
    """

    version: int = 0
    updates: int = 0
    dropped: int = 0
    samples: int = 0
    loss: float | None = None
    scores: tuple[Any, ...] = ()
    stopped: bool = False
    staleness: dict[int, int] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float:
        """Samples learned from a second; 0 where no time has passed."""
        return self.samples / self.elapsed if self.elapsed > 0 else 0.0

    def __str__(self) -> str:
        first, _, rest = Report.__str__(self).partition("\n")
        return "\n".join([first, *(f"  {line}" for line in _lines(self)), rest])


def training_report(report: Report, **learned: Any) -> TrainingReport:
    """The report of a training run."""
    return TrainingReport(**{each.name: getattr(report, each.name) for each in fields(Report)}, **learned)


def _lines(report: TrainingReport) -> list[str]:
    speed = rate(report.samples_per_second).replace("items", "samples")
    told = [f"{number(report.updates)} updates, to version {number(report.version)}, {speed}"]
    if report.loss is not None:
        told[0] += f", loss {report.loss:.4g}"
    if report.scores:
        shown = ", ".join(f"{score:.4g}" if isinstance(score, float) else str(score) for score in report.scores[-5:])
        told.append(f"scores: {'… ' if len(report.scores) > 5 else ''}{shown}{' (stopped)' if report.stopped else ''}")
    if report.staleness:
        total = sum(report.staleness.values())
        late = sorted(report.staleness.items(), key=lambda one: -one[1])[:6]
        shown = ", ".join(f"{stale}: {percent(count / total)}" for stale, count in sorted(late))
        told.append(
            f"staleness in updates: {shown}" + (f"; dropped {number(report.dropped)}" if report.dropped else "")
        )
    return told
