"""From description to plan: the segments that will run, and every check that can be made before running.

Adjacent stages with one placement that don't name their own ceiling are fused into one segment: the same worker takes
an item through all of them. A segment ends where something changes: the place, the ceiling, the order, a key, or
the number of items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from penstock.errors import PlanError
from penstock.flow.contract import JobId, Sink, Source, Until, is_subscribed
from penstock.flow.stage import (
    Batch,
    Filter,
    FlatMap,
    MapBatches,
    MapState,
    Stage,
    Take,
    Unbatch,
    Work,
    code_digest,
    describe,
    pacing,
)
from penstock.place.base import KEEP, MAP, SPREAD, STREAM, Chain, Step

if TYPE_CHECKING:
    from penstock.flow.flow import Flow
    from penstock.flow.job import Job

__all__ = ["Plan", "Segment", "make_plan", "plan_call", "stage_takes"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Stages that one pool of workers (or none, for ``batch``, ``unbatch`` and ``take``) runs together.

    ``numbers``: the stages' numbers in the flow, ``names``: their names, unique within it.
    """

    stages: tuple[Stage, ...]
    numbers: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def works(self) -> tuple[Work, ...]:
        return tuple(stage for stage in self.stages if isinstance(stage, Work))

    @property
    def place(self) -> str:
        return self.works[0].options.place if self.works else "loop"

    @property
    def ordered(self) -> bool:
        return all(work.options.ordered and work.options.key is None for work in self.works)

    @property
    def ceiling(self) -> int:
        """Items (or batches) in progress at once."""
        if not self.works:
            return 1
        stage = self.stages[0]
        if isinstance(stage, FlatMap) and not stage.whole and self.ordered:
            return 1  # a second expansion could hold the worker that the first needs to be tried again
        return self.works[0].options.ceiling

    def chain(self) -> Chain:
        """What a pool runs for each item."""
        steps = tuple(
            Step(name, work.function, _verb(work), work.options.timeout)
            for name, work in zip(self.names, self.works, strict=True)
        )
        return Chain("+".join(self.names), steps, attempts=2 if isinstance(self.stages[0], MapBatches) else 1)


def _verb(work: Work) -> int:
    if isinstance(work, Filter):
        return KEEP
    if isinstance(work, FlatMap):
        return SPREAD if work.whole else STREAM
    return MAP


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run: everything a run needs to know, and nothing that changes while it runs."""

    name: str
    source: Source[Any] | None
    id: Any
    segments: tuple[Segment, ...]
    sink: Sink[Any] | None
    sink_on_error: str
    read_on_error: str
    read_max_failures: float | None
    exactly_once: bool
    guarantee: str
    fingerprint: str

    @property
    def keeps_items(self) -> bool:
        """Whether the source's item must be kept until it is settled, for the dead letters."""
        return self.read_on_error == "dead_letter" or "dead_letter" in (
            self.sink_on_error,
            *(_on_error(stage) for segment in self.segments for stage in segment.stages),
        )

    @property
    def streams(self) -> bool:
        """Whether a stage's outputs are committed one by one, so that an unfinished item must be known again."""
        return any(isinstance(one, FlatMap) and not one.whole for segment in self.segments for one in segment.works)

    @property
    def in_turn(self) -> bool:
        """Whether a stage keeps the order of each key among the outputs of whole expansions."""
        stages = [stage for segment in self.segments for stage in segment.stages]
        expanded = False
        for stage in stages:
            if expanded and isinstance(stage, Work) and stage.options.key is not None:
                return True
            expanded = expanded or isinstance(stage, Unbatch) or (isinstance(stage, FlatMap) and stage.whole)
        return False

    @property
    def commits(self) -> bool:
        """Whether the sink keeps progress, so that outputs of an item are held to be committed together."""
        return self.sink is not None and self.sink.exactly_once

    def begin(self, until: Until) -> tuple[Source[Any] | None, Sink[Any] | None, Any]:
        """The source and the sink as one run uses them, and its ``Reading`` if the source is a subscription."""
        if not is_subscribed(self.source):
            return self.source, self.sink, None
        subscribed: Any = self.source
        reading, sink = subscribed.begin(self.sink, until=until)
        return reading, sink, reading

    def job(self, *, fresh: bool) -> JobId:
        """Which job opens the sink."""
        assert self.source is not None
        return JobId(
            self.name,
            self.source.identity,
            fresh=fresh,
            by_id=self.id is not None and self.commits,
            replayable=self.source.replayable,
            settles=is_subscribed(self.source),
        )

    def explain(self) -> str:
        """The plan in words: a line for each segment, and the guarantee with its reason."""
        names = [name for segment in self.segments for name in segment.names]
        ends = [self.source.identity if self.source else "unbound", *names]
        if self.sink is not None:
            ends.append(self.sink.identity)
        lines = [" -> ".join(ends)]
        for number, segment in enumerate(self.segments, 1):
            lines.append(f"  segment {number}: {_placement(segment)}")
            lines.extend(f"    {describe(stage)}" for stage in segment.stages)
        lines.append(f"guarantee: {self.guarantee}")
        return "\n".join(lines)


def _on_error(stage: Stage) -> str:
    """What the stage itself does with what it gives up."""
    if isinstance(stage, MapState):
        return stage.on_error
    return stage.options.on_error if isinstance(stage, Work) else "raise"


def _placement(segment: Segment) -> str:
    if not segment.works:
        return "between workers"
    count, place = segment.ceiling, segment.place
    options = segment.works[0].options
    most = "up to " if options.auto else ""
    what = {
        "loop": f"on the event loop, {most}{count} at once",
        "thread": f"in threads, {most}{count} worker{'s' * (count != 1)}",
        "process": f"in processes, {most}{count} worker{'s' * (count != 1)}",
    }[place]
    order = "ordered" if segment.ordered else "unordered"
    if options.key is not None:
        order = "in order within a key"
    return ", ".join(filter(None, (what, order, pacing(options))))


def make_plan(flow: Flow[Any], job: Job | None) -> Plan:
    """Check a flow (of a job, or by itself) and make its plan. Raises PlanError; starts and writes nothing."""
    if flow.source is None:
        raise PlanError(
            "this flow is unbound: it has no source",
            "Bind it with flow.over(source), or serve live requests with flow.open()",
        )
    sink = job.sink if job is not None else None
    segments = _segments(flow.stages)
    _check_expansions(flow.stages)
    _check_states(flow, sink)
    read_on_error = flow.defaults.get("on_error", "raise")
    sink_on_error = job.on_error if job is not None else "raise"
    _check_apart(flow.source, sink)
    exactly_once, guarantee = _guarantee(flow, sink)
    _check_dead_letters(flow, sink, read_on_error, sink_on_error)
    source_name = flow.name or flow.source.identity
    name = (job.name if job is not None else None) or (
        source_name if sink is None else f"{source_name} -> {sink.identity}"
    )
    return Plan(
        name=name,
        source=flow.source,
        id=flow.id,
        segments=segments,
        sink=sink,
        sink_on_error=sink_on_error,
        read_on_error=read_on_error,
        read_max_failures=flow.defaults.get("max_failures"),
        exactly_once=exactly_once,
        guarantee=guarantee,
        fingerprint=_fingerprint(flow.stages),
    )


def plan_call(flow: Flow[Any]) -> Plan:
    """The plan of an unbound flow behind live requests: one to one, and unordered inside. Raises PlanError."""
    if flow.source is not None:
        raise PlanError("open() needs a flow without a source", "Start it with Flow(), without a source")
    if not flow.stages:
        raise PlanError("open() was called on a flow without stages", "Add a stage, for instance .map(function)")
    stages: list[Stage] = []
    for stage in flow.stages:
        if isinstance(stage, MapState):
            raise PlanError(
                f"open(): {describe(stage)} keeps a state, which would be lost with the service",
                "Publish to a topic, and use map_state in a flow over it",
            )
        if not isinstance(stage, Work) or isinstance(stage, (Filter, FlatMap)):
            raise PlanError(
                f"open(): {describe(stage)} isn't one to one, and each call needs one answer",
                "Use map and map_batches only, and answer None where there is nothing to say",
            )
        if stage.options.on_error in ("skip", "dead_letter"):
            raise PlanError(
                f"open(): stage {stage.name!r} has on_error={stage.options.on_error!r}, and each call needs an answer",
                'Use "raise" (the caller gets the error) or "keep" (the caller gets a Failed)',
            )
        stages.append(stage.unordered())
    return Plan(
        name=flow.name or "calls",
        source=None,
        id=None,
        segments=_segments(tuple(stages)),
        sink=None,
        sink_on_error="raise",
        read_on_error="raise",
        read_max_failures=None,
        exactly_once=False,
        guarantee="each call gets its own answer or its own error",
        fingerprint=_fingerprint(flow.stages),
    )


def _segments(stages: Sequence[Stage]) -> tuple[Segment, ...]:
    names = _unique([stage.name for stage in stages])
    segments: list[Segment] = []
    for number, (stage, name) in enumerate(zip(stages, names, strict=True)):
        last = segments[-1] if segments else None
        if last is not None and _fuses(last, stage):
            segments[-1] = replace(
                last,
                stages=(*last.stages, stage),
                numbers=(*last.numbers, number),
                names=(*last.names, name),
            )
        else:
            segments.append(Segment((stage,), (number,), (name,)))
    return tuple(segments)


def _fuses(segment: Segment, stage: Stage) -> bool:
    before = segment.stages[-1]
    for one in (before, stage):
        if not isinstance(one, Work) or isinstance(one, MapBatches):
            return False
        if one.options.named or one.options.gated or one.options.key is not None:
            return False
        if isinstance(one, FlatMap) and (one is before or not one.whole):
            return False
    assert isinstance(before, Work)
    assert isinstance(stage, Work)
    mine, its = before.options, stage.options
    return mine.place == its.place and mine.ceiling == its.ceiling and mine.ordered == its.ordered


def _unique(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _check_expansions(stages: Sequence[Stage]) -> None:
    """What can't be accounted for: batches across whole expansions, and expansions one by one of many items."""
    batched: str | None = None
    whole: str | None = None
    streams: str | None = None
    for stage in stages:
        if isinstance(stage, Batch) and whole is not None:
            raise PlanError(
                f"batch({stage.size}) comes after {whole}, whose outputs are committed together: batches across its "
                "items would chain them for ever",
                "Use map_batches, which leaves items single, or flat_map(..., whole=False)",
            )
        if isinstance(stage, Batch):
            batched = f"batch({stage.size})"
        if isinstance(stage, FlatMap) and not stage.whole:
            if batched is not None:
                raise PlanError(
                    f"flat_map({stage.name}, whole=False) comes after {batched}, and a later run may make other lists",
                    "Leave out whole=False, or expand the items before they are batched",
                )
            if whole is not None or streams is not None:
                raise PlanError(
                    f"flat_map({stage.name}, whole=False) comes after {whole or streams}",
                    "Only the first expansion of a flow can commit its outputs one by one",
                )
            streams = f"flat_map({stage.name}, whole=False)"
        elif isinstance(stage, FlatMap):
            whole = f"flat_map({stage.name})"
        elif isinstance(stage, Unbatch):
            whole = "unbatch()"


def _check_states(flow: Flow[Any], sink: Sink[Any] | None) -> None:
    """What would make a state count apart from its item, or let two processes change one state."""
    expanded = stated = loose = None
    for stage in flow.stages:
        if isinstance(stage, MapState):
            if expanded is not None:
                raise PlanError(
                    f"map_state({stage.name}) comes after {expanded}, whose outputs count together or not at all",
                    "Put it before, or use flat_map(..., whole=False)",
                )
            stated = f"map_state({stage.name})"
            subscribed: Any = flow.source
            if stage.key is not None and is_subscribed(subscribed) and not subscribed.is_alone(sink):
                raise PlanError(
                    f"{stated} has a key= of its own, and others may read the group",
                    "Leave key= out to use the events' keys, or give flow(..., exclusive=True)",
                )
        elif isinstance(stage, Take) and loose is not None:
            raise PlanError(
                f"take({stage.count}) comes after {stated} and {loose}, whose outputs come in another order: "
                "it could let an item pass and cut off one of the same key that has to settle before",
                "Put take before that stage, or leave out its ordered=False or key=",
            )
        elif isinstance(stage, Batch) and stated is not None:
            raise PlanError(
                f"batch({stage.size}) comes after {stated}: items of a key would wait for each other in two batches",
                "Use map_batches, which leaves items single, or put batch before",
            )
        elif isinstance(stage, Work) and stated and (not stage.options.ordered or stage.options.key is not None):
            loose = f"{stage.verb}({stage.name})"
        if isinstance(stage, (Unbatch, Batch)) or (isinstance(stage, FlatMap) and stage.whole):
            expanded = f"{stage.verb}()" if not isinstance(stage, FlatMap) else f"flat_map({stage.name})"


def _check_apart(source: Any, sink: Any) -> None:
    """A job that wrote what it reads would read itself, and begun afresh, it would first delete its input."""
    path, reads = getattr(sink, "path", None), getattr(source, "reads", None)
    if path is not None and reads is not None and reads(path):
        raise PlanError(
            f"{path} is read by this job, and it is its output, too", "Write to another file, or name the input closer"
        )


def _check_dead_letters(flow: Flow[Any], sink: Sink[Any] | None, read_on_error: str, sink_on_error: str) -> None:
    asked = [stage.name for stage in flow.stages if _on_error(stage) == "dead_letter"]
    if read_on_error == "dead_letter":
        asked.append("read")
    if sink_on_error == "dead_letter":
        asked.append("to")
    if asked and (sink is None or not (sink.keeps_dead or is_subscribed(flow.source))):
        where = "the caller" if sink is None else sink.identity
        raise PlanError(
            f'stage {asked[0]!r} has on_error="dead_letter", and {where} keeps no dead letters',
            'Write to a file (.to("out.jsonl")), or use on_error="keep" or "skip"',
        )


def _guarantee(flow: Flow[Any], sink: Sink[Any] | None) -> tuple[bool, str]:
    assert flow.source is not None
    no_ids = "; no ids are kept, so a repeated one isn't noticed" if flow.id is not None else ""
    if is_subscribed(flow.source):
        if sink is None:
            raise PlanError(
                f"a flow over {flow.source.identity} needs an output: what is acknowledged must be done with",
                "Add .to(...), or read it with topic.subscribe(group)",
            )
        subscribed: Any = flow.source
        one_by_one = any(isinstance(stage, FlatMap) and not stage.whole for stage in flow.stages)
        found: tuple[bool, str] = subscribed.guarantee(sink, one_by_one=one_by_one)
        return found
    if sink is None:
        return False, f"outputs are handed to the caller as they come; nothing is kept for another run{no_ids}"
    if not sink.exactly_once:
        why = getattr(sink, "weakness", "a function can't commit progress together with its effect")
        return False, f"at least once: {why}{no_ids}"
    if flow.id is not None:
        return True, (
            f"exactly once: {sink.identity} commits the ids together with the data; after a crash, what was in flight "
            "and the last moments of work are done again"
        )
    if not flow.source.replayable:
        return False, (
            f"at least once: {flow.source.identity} can't be read again from where it was; "
            "give a list, a file, or id= to be able to resume"
        )
    pace = sink.pace or 0.03
    return True, (
        f"exactly once: {sink.identity} commits the source's progress together with the data; after a crash, "
        f"what was in flight and about {pace:g} s of work is done again"
    )


def _fingerprint(stages: Sequence[Stage]) -> str:
    state = hashlib.blake2b(digest_size=12)
    for stage in stages:
        state.update(f"{describe(stage)}\n{code_digest(stage)}\n".encode())
    return state.hexdigest()


def stage_takes(plan: Plan) -> dict[int, int]:
    """The ``take`` stages of a plan: number to count."""
    return {
        number: stage.count
        for segment in plan.segments
        for number, stage in zip(segment.numbers, segment.stages, strict=True)
        if isinstance(stage, Take)
    }
