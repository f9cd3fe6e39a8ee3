"""What a run did and what held it up: the report, and how it is made of the meters.

``build`` is a pure function of counters; a live report and the last one are made the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.flow.bottleneck import Bottleneck, find
from penstock.flow.meter import BLOCKED_HEAD, BLOCKED_OUTPUT, BUSY, HELD, OVER, WAITING_INPUT, SegmentMeter
from penstock.flow.progress import Position
from penstock.flow.text import WIDTH, compact, duration, number, percent, rate, table, wrapped

__all__ = ["ErrorGroup", "ErrorLog", "Report", "StageReport", "build"]

_MOST_KINDS = 50
_LONGEST_EXAMPLE = 200
_WORTH_A_COLUMN = 0.005
_OTHERS = "other errors"
_STATES = {
    WAITING_INPUT: "waiting for input",
    OVER: "done with its input",
    BUSY: "busy",
    BLOCKED_OUTPUT: "blocked on output",
    BLOCKED_HEAD: "blocked by the order",
    HELD: "held by the limit",
}


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage: what went in and out, and where its capacity went.

    ``taken`` and ``emitted`` count its items. ``busy``, ``waiting`` (for input), ``blocked`` (on output), ``head``
    (behind the slowest item of an ordered window) and ``held`` (back by a limit) are shares of elapsed time ×
    ``ceiling``; of fused stages, which share workers, all but ``busy`` are the same. ``p50`` and ``p99``: seconds of
    service a call, 0 where none was timed. ``throttled``: attempts refused as too many. ``state``: what it does now.
    Stages of one ``segment`` are fused.
    """

    name: str
    place: str
    ceiling: int
    taken: int
    emitted: int
    busy: float
    waiting: float
    blocked: float
    p50: float
    p99: float
    failed: int = 0
    retried: int = 0
    head: float = 0.0
    in_progress: int = 0
    state: str = ""
    segment: int = 0
    held: float = 0.0
    throttled: int = 0


@dataclass(frozen=True, slots=True)
class ErrorGroup:
    """Errors of one ``kind`` (an exception's class name) at one stage, with the first as an example."""

    stage: str
    kind: str
    count: int
    example: str
    position: Position | None = None


class ErrorLog:
    """Counts errors by stage and kind and keeps one example of each; beyond 50 kinds, the rest counts as one.

    >>> log = ErrorLog()
    >>> for line in (3, 8):
    ...     log.add("parse", "ValueError", f"bad date in line {line}", ("a.jsonl", line))
    >>> log.groups()
    (ErrorGroup(stage='parse', kind='ValueError', count=2, example='bad date in line 3', position=('a.jsonl', 3)),)
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], tuple[int, str, Position | None]] = {}

    def add(self, stage: str, kind: str, message: str, position: Position | None = None) -> None:
        """Count one error."""
        key = (stage, kind)
        known = self._kinds.get(key)
        if known is None and len(self._kinds) >= _MOST_KINDS - 1:
            key = ("", _OTHERS)
            known = self._kinds.get(key)
        if known is not None:
            self._kinds[key] = (known[0] + 1, known[1], known[2])
            return
        example = " ".join(message.split())
        if len(example) > _LONGEST_EXAMPLE:
            example = example[: _LONGEST_EXAMPLE - 1] + "…"
        self._kinds[key] = (1, example, position)

    def groups(self) -> tuple[ErrorGroup, ...]:
        """The kinds, most frequent first."""
        found = [
            ErrorGroup(stage, kind, count, example, position)
            for (stage, kind), (count, example, position) in self._kinds.items()
        ]
        return tuple(sorted(found, key=lambda group: -group.count))


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did: counts in source items, times, stages, errors, and the stage to fix.

    At every moment ``issued = delivered + filtered + skipped + dead + released + in_flight``, and at the end
    ``in_flight`` is 0. ``retried`` counts repeated attempts, ``elapsed`` seconds. ``earlier`` holds the counts of
    earlier runs of a resumed job, which the others don't include. ``guarantee`` says whether an output can be
    doubled by a crash, ``notes`` what else should be known. Printing it gives a table.

    >>> import penstock as ps
    >>> report = ps.Flow(range(10)).filter(lambda x: x % 2).to(lambda x: None).run_sync()
    >>> report.issued, report.delivered, report.filtered
    (10, 5, 5)
    """

    name: str
    issued: int
    delivered: int
    filtered: int
    skipped: int
    dead: int
    released: int
    in_flight: int
    retried: int
    elapsed: float
    bottleneck: Bottleneck
    stages: tuple[StageReport, ...] = ()
    errors: tuple[ErrorGroup, ...] = ()
    guarantee: str = ""
    earlier: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def settled(self) -> int:
        """Items done with: delivered, filtered, skipped or dead."""
        return self.delivered + self.filtered + self.skipped + self.dead

    @property
    def rate(self) -> float:
        """Items settled a second; 0 where no time has passed."""
        return self.settled / self.elapsed if self.elapsed > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold; ``from_dict`` reads it back."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Report:
        """The report that ``to_dict`` gave. Raises msgspec.ValidationError if it is none."""
        return msgspec.convert(plain, cls)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def build(
    *,
    name: str,
    counts: Mapping[str, int],
    elapsed: float,
    segments: Sequence[SegmentMeter],
    errors: ErrorLog,
    now: float,
    guarantee: str = "",
    earlier: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    source: str = "the source",
    sink: str | None = None,
    cores: int = 1,
    loop_busy: float = 0.0,
) -> Report:
    """The report of a run, from its counters at the time ``now`` of its clock.

    ``counts``: issued, delivered, filtered, skipped, dead, released, in_flight, retried; a missing one is 0.
    ``source`` and ``sink`` name them in the sentence on the bottleneck (``sink`` None: somebody iterates).
    ``cores``: how many this process may use. ``loop_busy``: CPU time of the event loop's thread / elapsed.
    """
    stages = tuple(row for at, segment in enumerate(segments) for row in _rows(at, segment, now))
    settled = sum(counts.get(key, 0) for key in ("delivered", "filtered", "skipped", "dead"))
    bottleneck = find(
        [(segment, segment.shares(now)) for segment in segments],
        now=now,
        settled=settled,
        elapsed=elapsed,
        source=source,
        sink=sink,
        cores=cores,
        loop_busy=loop_busy,
    )
    return Report(
        name=name,
        issued=counts.get("issued", 0),
        delivered=counts.get("delivered", 0),
        filtered=counts.get("filtered", 0),
        skipped=counts.get("skipped", 0),
        dead=counts.get("dead", 0),
        released=counts.get("released", 0),
        in_flight=counts.get("in_flight", 0),
        retried=counts.get("retried", 0),
        elapsed=elapsed,
        bottleneck=bottleneck,
        stages=stages,
        errors=errors.groups(),
        guarantee=guarantee,
        earlier=dict(earlier or {}),
        notes=tuple(notes),
    )


def _rows(at: int, segment: SegmentMeter, now: float) -> list[StageReport]:
    shares = segment.shares(now)
    return [
        StageReport(
            name=stage.name,
            place=stage.place,
            ceiling=stage.ceiling,
            taken=stage.taken,
            emitted=stage.emitted,
            busy=segment.busy(stage, now),
            waiting=shares.waiting,
            blocked=shares.blocked,
            p50=stage.service.quantile(0.5),
            p99=stage.service.quantile(0.99),
            failed=stage.failed,
            retried=stage.retried,
            head=shares.head,
            in_progress=stage.in_progress,
            state=_STATES[segment.state],
            segment=at,
            held=shares.held,
            throttled=stage.throttled,
        )
        for stage in segment.stages
    ]


def _lines(report: Report) -> list[str]:
    lines = [
        f"{report.name}: {number(report.issued)} items issued in {duration(report.elapsed)}, {rate(report.rate)}",
        "  " + _counts(report),
    ]
    if any(report.earlier.values()):
        done = ", ".join(f"{key} {number(count)}" for key, count in report.earlier.items() if count)
        lines.append(f"  earlier runs: {done}")
    if report.guarantee:
        lines += wrapped(report.guarantee, "  ", "  ")
    if report.stages:
        lines += ["", *_stage_table(report.stages)]
    if report.errors:
        lines += ["", "errors"]
        lines += [line for group in report.errors for line in _error(group)]
    if report.issued or not report.notes:  # where there was nothing to do, nothing limits
        lines += ["", *wrapped(str(report.bottleneck))]
    lines += [line for note in report.notes for line in wrapped(f"note: {note}", "", "  ")]
    return lines


def _counts(report: Report) -> str:
    parts = [f"delivered {number(report.delivered)}"]
    rest = ("filtered", "skipped", "dead", "released", "in_flight", "retried")
    parts += [f"{key.replace('_', ' ')} {number(getattr(report, key))}" for key in rest if getattr(report, key)]
    return ", ".join(parts)


def _stage_table(stages: Sequence[StageReport]) -> list[str]:
    ordered = any(stage.head >= _WORTH_A_COLUMN for stage in stages)
    held = any(stage.held >= _WORTH_A_COLUMN for stage in stages)
    heads = ["stage", "place", "in", "out", "busy", "waiting", "blocked"]
    heads += [*["order"] * ordered, *["limit"] * held, "p50", "p99"]
    rows = []
    for stage in stages:
        place = stage.place if stage.place == "sink" else f"{stage.place} × {stage.ceiling}"
        row = [stage.name, place, compact(stage.taken), compact(stage.emitted)]
        row += [percent(stage.busy), percent(stage.waiting), percent(stage.blocked)]
        row += [percent(stage.head)] * ordered
        row += [percent(stage.held)] * held
        row += [duration(stage.p50) if stage.p50 else "-", duration(stage.p99) if stage.p99 else "-"]
        rows.append(row)
    troubled = [stage for stage in stages if stage.failed or stage.retried or stage.throttled]
    return table(heads, rows) + [line for stage in troubled for line in _trouble(stage)]


def _trouble(stage: StageReport) -> list[str]:
    counts = {"failed": stage.failed, "retried": stage.retried, "throttled": stage.throttled}
    parts = [f"{number(count)} {what}" for what, count in counts.items() if count]
    return wrapped(f"{stage.name}: {', '.join(parts)}", "  ", "  ")


def _error(group: ErrorGroup) -> list[str]:
    head = f"  {number(group.count)} × {group.kind}" + (f" in {group.stage}" if group.stage else "")
    example = group.example or "no message"
    if group.position is not None:
        partition, index = group.position
        example += f" ({partition}, item {index})" if partition else f" (item {index})"
    if group.count > 1:
        example = f"the first: {example}"
    if len(head) + 2 + len(example) <= WIDTH:
        return [f"{head}: {example}"]
    return [f"{head}:", *wrapped(example, "    ", "    ")]
