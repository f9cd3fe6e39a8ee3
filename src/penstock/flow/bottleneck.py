"""Which part of a run holds it up, and what mending it would give.

The evidence is where capacity went. A stage is the bottleneck when it is busy: then what comes before it is blocked
on output, and what comes after waits for input. If no stage is busy, the idle ones say why: the first waits for the
source, the last is blocked by the sink, an ordered one stands behind its slowest item, one with a limit isn't
allowed to go faster. Whichever share is greatest
holds the run up; if all are small, it is the runtime's own work, on the event loop, that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.flow.meter import SegmentMeter, Shares, StageMeter
from penstock.flow.text import duration, percent, rate

__all__ = ["Bottleneck", "find"]

_CLEAR = 0.3
"""Below this share nothing but the runtime's own work holds the run up."""

_SATURATED = 0.85
"""An event loop whose thread computes for this share of the time has none to spare for more items."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What holds a run up: ``reason`` is one of ``busy source sink order limit loop none``.

    ``stage`` names the stage to fix (None where it is no stage), ``share`` the share of its capacity that says so,
    ``gain`` what one more worker would give, as a share of the rate (0.25: a quarter more items a second; 0 where a
    worker gives nothing). ``sentence`` says it all; printing gives that.
    """

    reason: str
    sentence: str
    stage: str | None = None
    share: float = 0.0
    gain: float = 0.0

    def __str__(self) -> str:
        return self.sentence


def find(
    segments: Sequence[tuple[SegmentMeter, Shares]],
    *,
    now: float,
    settled: int,
    elapsed: float,
    source: str,
    sink: str | None,
    cores: int,
    loop_busy: float,
) -> Bottleneck:
    """The bottleneck, from each segment's shares in the order of the flow; the sink's has the place ``"sink"``."""
    if not settled or elapsed <= 0:
        return Bottleneck("none", "No item is done yet: nothing can be said about the bottleneck.")
    writing = max((shares.busy for segment, shares in segments if segment.first.place == "sink"), default=0.0)
    segments = [pair for pair in segments if pair[0].first.place != "sink" and pair[0].works]
    if not segments:
        return Bottleneck("none", "The flow has no stage: reading and writing take all its time.")
    busiest, most = max(segments, key=lambda pair: pair[1].busy)
    headed, behind = max(segments, key=lambda pair: pair[1].head)
    limited, held = max(segments, key=lambda pair: pair[1].held)
    first, last = segments[0], segments[-1]
    evidence = {
        "busy": most.busy,
        "sink": max(last[1].blocked, writing),
        "source": first[1].waiting,
        "order": behind.head,
        "limit": held.held,
    }
    reason = max(evidence, key=evidence.__getitem__)  # of equals the first: a busy stage before an idle one
    share = evidence[reason]
    if loop_busy >= _SATURATED:  # whatever else seems slow waits for the loop to come round
        return _loop(loop_busy, [segment for segment, _ in segments], settled, elapsed)
    if share < _CLEAR:
        return Bottleneck(
            "none",
            f"No stage is the bottleneck: the busiest, {_busiest(busiest, now).name!r}, uses "
            f"{percent(most.busy)} of its workers' time.",
            share=share,
        )
    if reason == "busy":
        others = [shares.busy for segment, shares in segments if segment is not busiest]
        return _busy(busiest, most.busy, max([*others, writing]), settled / elapsed, now, cores)
    if reason == "source":
        return Bottleneck(
            "source",
            f"The source limits: {first[0].first.name!r} waits {percent(share)} of the time for {source}. "
            "More workers would give nothing.",
            share=share,
        )
    if reason == "sink":
        if writing > last[1].blocked:
            said = f"writing to {sink or 'it'} takes {percent(share)} of the time"
        else:
            who = f"writing to {sink}" if sink else "the code that takes the results"
            said = f"{last[0].last.name!r} waits {percent(share)} of the time for {who}"
        return Bottleneck("sink", f"The output limits: {said}. More workers would give nothing.", share=share)
    if reason == "limit":
        name = limited.first.name
        remedy = (
            "The rate was learned from the server: if you know the quota, give it, as Limit(per_second=...)."
            if limited.learns
            else "A higher quota would."
        )
        return Bottleneck(
            "limit",
            f"The limit holds: {name!r} waits {percent(share)} of the time for what it is allowed. More workers would "
            f"give nothing. {remedy}",
            stage=name,
            share=share,
        )
    name = _busiest(headed, now).name
    again = sum(stage.retried for stage in headed.stages)
    waits = f", which may wait to be tried again ({again:,} were)" if again else ""
    even = "fewer attempts (retry=)" if again else "items of more even size"
    return Bottleneck(
        "order",
        f"Order limits: the workers of {name!r} stand idle {percent(share)} of the time behind the slowest item "
        f"of the window{waits}. ordered=False, or {even}, would use them.",
        stage=name,
        share=share,
    )


def _busiest(segment: SegmentMeter, now: float) -> StageMeter:
    return max(segment.stages, key=lambda stage: segment.busy(stage, now))


def _busy(segment: SegmentMeter, busy: float, next_busy: float, pace: float, now: float, cores: int) -> Bottleneck:
    """One more worker raises the rate by 1 / ceiling, until the next busiest part has all it can do."""
    stage = _busiest(segment, now)
    if segment.searched:
        return Bottleneck(
            "busy",
            f"The stage to fix is {stage.name!r}: {segment.ceiling} calls at once, the number that was found best, are "
            f"{percent(busy)} busy at {duration(stage.service_total / max(1, stage.sampled))} a call. "
            "What it calls would have to answer sooner, or more at once.",
            stage=stage.name,
            share=busy,
        )
    gain = 1 / segment.ceiling
    bound_by_next = next_busy > 0 and busy / next_busy - 1 < gain
    if bound_by_next:
        gain = max(0.0, busy / next_busy - 1)
    sentence = f"The stage to fix is {stage.name!r}: its {_workers(segment)} {percent(busy)} busy"
    if stage.service.count:
        sentence += f" at {duration(stage.service_total / stage.sampled)} a call"
    more = "One more slot" if stage.place == "loop" else "One more worker"
    if gain < 0.005:
        sentence += f". {more} would give nothing: what is next busiest is as busy."
    else:
        limit = ", all that the next busiest can take" if bound_by_next else ""
        sentence += f". {more} would give up to {percent(gain)} more ({rate(pace * (1 + gain))}){limit}"
        taken = stage.place != "loop" and segment.ceiling >= cores
        sentence += f", if it waits rather than computes: there are {cores} cores." if taken else "."
    return Bottleneck("busy", sentence, stage=stage.name, share=busy, gain=gain)


def _workers(segment: SegmentMeter) -> str:
    count = segment.ceiling
    if segment.first.place == "loop":
        return f"{count} slots are" if count > 1 else "one slot is"
    kind = {"thread": ("thread is", "threads are"), "process": ("process is", "processes are")}
    one, many = kind.get(segment.first.place, ("worker is", "workers are"))
    return f"{count} {many}" if count > 1 else f"one {one}"


def _loop(loop_busy: float, segments: Sequence[SegmentMeter], settled: int, elapsed: float) -> Bottleneck:
    """A coroutine that takes about as long as the loop computes an item is what computes."""
    stages = [stage for segment in segments if segment.first.place == "loop" for stage in segment.stages]
    heaviest = max(stages, key=StageMeter.worked, default=None)
    cost = duration(elapsed / settled)
    sentence = f"The event loop limits: it computes {percent(loop_busy)} of the time, {cost} an item. "
    computed = loop_busy * elapsed
    if heaviest is not None and 0.5 * computed < heaviest.worked() < 2 * computed:
        sentence += f"What {heaviest.name!r} computes belongs in a plain function, in threads or processes."
        return Bottleneck("loop", sentence, stage=heaviest.name, share=loop_busy)
    sentence += "More workers would give nothing; more work an item, or map_batches, would."
    return Bottleneck("loop", sentence, share=loop_busy)
