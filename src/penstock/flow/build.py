"""From plan to machinery: the channels, segments and pools of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from penstock.flow.batching import BatchRunner, BatchSegment
from penstock.flow.chain import ChainSegment
from penstock.flow.channel import Channel
from penstock.flow.failing import Policy, Tries
from penstock.flow.meter import SegmentMeter, StageMeter
from penstock.flow.plan import Plan, Segment, stage_takes
from penstock.flow.progress import Progress
from penstock.flow.report import ErrorLog
from penstock.flow.segment import Host, Runner
from penstock.flow.shaping import TakeRunner, UnbatchRunner
from penstock.flow.stage import Batch, MapBatches, MapState, Take, Work
from penstock.flow.state import StateRunner
from penstock.place.base import SPREAD, STREAM, Pool
from penstock.place.loop import LoopPool

__all__ = ["Built", "build_segments"]

_LEAST_CAPACITY = 64


@dataclass(slots=True)
class Built:
    """What stands between source and sink. ``pump_gate`` wakes the expansion that pauses while much is held."""

    inlet: Channel
    segments: list[Runner] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    meters: list[SegmentMeter] = field(default_factory=list)
    pump_gate: Callable[[], None] = lambda: None


def build_segments(
    host: Host, plan: Plan, outlet: Channel, errors: ErrorLog, progress: Progress, reading: Any, *, inline: bool
) -> Built:
    """Make the segments of ``plan``, the last of which puts into ``outlet``.

    ``progress``: what earlier runs did. ``reading``: of a subscription, or None. ``inline``: no threads or processes.
    """
    if not plan.segments:
        return Built(outlet)
    channels = [Channel(_capacity(segment), host.clock if _timed(segment) else None) for segment in plan.segments]
    built = Built(channels[0])
    left = progress.left(stage_takes(plan))
    kept = {"states": progress.states, "key_of": None if reading is None else reading.key_of}
    for segment, source, sink in zip(plan.segments, channels, [*channels[1:], outlet], strict=True):
        meters = [
            StageMeter(name, segment.place if isinstance(stage, Work) else "loop", segment.ceiling)
            for name, stage in zip(segment.names, segment.stages, strict=True)
        ]
        works = bool(segment.works) or isinstance(segment.stages[0], MapState)
        meter = SegmentMeter(meters, segment.ceiling, host.clock(), works=works)
        built.meters.append(meter)
        built.segments.append(_make(host, plan, segment, source, sink, meter, errors, left, kept, built, inline))
    return built


def _make(
    host: Host,
    plan: Plan,
    segment: Segment,
    source: Channel,
    sink: Channel,
    meter: SegmentMeter,
    errors: ErrorLog,
    left: Mapping[int, int],
    kept: dict[str, Any],
    built: Built,
    inline: bool,
) -> Runner:
    stage = segment.stages[0]
    ends: tuple[Any, ...] = (host, segment.names, source, sink, meter)
    if isinstance(stage, Batch):
        return BatchRunner(*ends, size=stage.size, max_wait=stage.max_wait, apart=stage.apart)
    if isinstance(stage, Take):
        return TakeRunner(*ends, number=segment.numbers[0], left=left.get(segment.numbers[0], stage.count))
    if isinstance(stage, MapState):
        policy = Policy(segment.names[0], meter.first, errors, on_error=stage.on_error)
        return StateRunner(*ends, stage=stage, policy=policy, **kept)
    if not isinstance(stage, Work):
        return UnbatchRunner(*ends, policy=Policy(segment.names[0], meter.first, errors, on_error=plan.read_on_error))
    tries: Tries = {}
    policies = [
        Policy(
            name,
            stage_meter,
            errors,
            retry=work.options.retry,
            timeout=work.options.timeout,
            on_error=work.options.on_error,
            max_failures=work.options.max_failures,
            tries=tries,
        )
        for name, work, stage_meter in zip(segment.names, segment.works, meter.stages, strict=True)
    ]
    chain = segment.chain()
    shared: dict[str, Any] = {"ordered": segment.ordered, "ceiling": segment.ceiling}
    runner: BatchSegment | ChainSegment
    if isinstance(stage, MapBatches):
        runner = BatchSegment(*ends, policies, tries, batch_size=stage.batch_size, max_wait=stage.max_wait, **shared)
    else:
        verb = chain.steps[-1].verb
        first_whole = verb == SPREAD and not any(
            isinstance(before, ChainSegment) and before.expands for before in built.segments
        )
        runner = ChainSegment(
            *ends,
            policies,
            tries,
            key=stage.options.key,
            verb=verb,
            streams=verb == STREAM,
            gate=first_whole,
            **shared,
        )
        if first_whole:
            built.pump_gate = runner.pump
    pool = _pool_class(segment.place, inline)
    options = stage.options
    if options.gate is not None:
        runner.connect(partial(options.gate, inner=pool), chain)
        runner.gated = True
    elif options.gated:
        from penstock.flow.gate import Gate

        gate = partial(
            Gate,
            inner=pool,
            limit=options.limit,
            auto=options.auto,
            site=options.site,
            meter=meter,
            behind=runner.behind,
        )
        runner.connect(gate, chain)
        runner.gated = True
    else:
        runner.connect(pool, chain)
    built.pools.append(runner.pool)
    return runner


def _pool_class(place: str, inline: bool) -> type[Pool]:
    """The pool of a place; threads and processes are imported when they are used."""
    if place == "loop":
        return LoopPool
    if inline:
        from penstock.place.inline import InlinePool

        return InlinePool
    if place == "thread":
        from penstock.place.thread import ThreadPool

        return ThreadPool
    from penstock.place.process import ProcessPool

    return ProcessPool


def _capacity(segment: Segment) -> int:
    """How many tasks may wait before a segment."""
    stage = segment.stages[0]
    size = stage.size if isinstance(stage, Batch) else stage.batch_size if isinstance(stage, MapBatches) else 1
    return max(_LEAST_CAPACITY, 2 * segment.ceiling, 2 * size)


def _timed(segment: Segment) -> bool:
    """Whether the segment asks its channel since when the oldest item waits."""
    stage = segment.stages[0]
    return isinstance(stage, (Batch, MapBatches)) and stage.max_wait is not None
