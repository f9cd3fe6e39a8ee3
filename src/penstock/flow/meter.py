"""How a run's time goes: counters that its hot path bumps, read when somebody asks for a report.

All of this stands in the path of about a microsecond an item, so nothing here is done per item:

- Attributes are plain numbers and are bumped by the run itself, on its event loop, without locks.
- A segment is told of items once a chunk: ``segment.first.taken += len(tasks)`` when a pool is fed,
  ``segment.passed(n)`` when n of them went through, ``segment.stopped(entry, at)`` for each of the few that
  did not. The counters of the stages between follow from that.
- Service times are sampled by the places; ``segment.add_samples(entry, seconds)`` is called for those tasks alone.
- ``segment.set_state(state, now)`` is called when a segment's state changes, with a time the run has anyway.

What a segment is doing has one of six states, by the first that holds:

1. HELD: a worker is free, and there are items that a limit doesn't let start yet.
2. BUSY: every one of its workers has an item, or it has items and is free to hand them out.
3. BLOCKED_HEAD: a worker is free, and the window of an ordered segment is full behind an item that isn't done.
4. BLOCKED_OUTPUT: a worker is free, and what comes after the segment takes nothing more.
5. OVER: a worker is free, and no item will come any more.
6. WAITING_INPUT: a worker is free, and there is no item for it.

*Busy* is not read off the state, for a stage with one of 32 coroutines at work is 3 % busy. It is the sampled mean
of the service time × calls / (elapsed × ceiling). The rest of the capacity is idle, and the states say why. A ceiling
that is searched for changes while the run goes: the capacity is then what the ceilings came to over the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log
from typing import NamedTuple

__all__ = [
    "BLOCKED_HEAD",
    "BLOCKED_OUTPUT",
    "BUSY",
    "HELD",
    "OVER",
    "WAITING_INPUT",
    "Histogram",
    "SegmentMeter",
    "Shares",
    "StageMeter",
]

WAITING_INPUT, BUSY, BLOCKED_OUTPUT, BLOCKED_HEAD, HELD, OVER = range(6)

_SHORTEST = 1e-6
_LONGEST = 1e5
_WIDTH = log(1.05)
_BUCKETS_A_NAT = 1 / _WIDTH


class Histogram:
    """Durations in buckets of 5 % relative width from 1 µs to 10⁵ s: at most 520 numbers, however many are added.

    >>> times = Histogram()
    >>> for milliseconds in range(1, 101):
    ...     times.add(milliseconds / 1000)
    >>> round(times.quantile(0.5), 2), round(times.quantile(1.0), 2)
    (0.05, 0.1)
    """

    __slots__ = ("_buckets", "count", "longest", "shortest")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.shortest = inf
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration. What lies outside the range goes to the bucket at its end."""
        if seconds > self.longest:
            self.longest = seconds
        if seconds < self.shortest:
            self.shortest = seconds
        bounded = min(max(seconds, _SHORTEST), _LONGEST)
        bucket = int(log(bounded / _SHORTEST) * _BUCKETS_A_NAT)
        buckets = self._buckets
        buckets[bucket] = buckets.get(bucket, 0) + 1
        self.count += 1

    def quantile(self, q: float) -> float:
        """The duration, in seconds, that a share ``q`` (0 … 1) of those added don't exceed; 0 if there are none.

        Right to 2.5 %; never below the shortest or above the longest that was added.
        """
        if not self.count:
            return 0.0
        wanted = q * self.count
        seen = 0
        bucket = 0
        for bucket in sorted(self._buckets):  # the last one stands where rounding runs past the end
            seen += self._buckets[bucket]
            if seen >= wanted:
                break
        middle = _SHORTEST * exp((bucket + 0.5) * _WIDTH)
        return min(max(middle, self.shortest), self.longest)


class StageMeter:
    """The counters of one stage; ``place`` and ``ceiling`` are what the plan says of it.

    ``taken`` and ``emitted`` count its items in and out, ``failed`` those given up for good, ``retried`` repeated
    attempts, ``throttled`` those that were refused as too many and cost no attempt, ``in_progress`` the items in its
    workers' hands (of fused stages: kept at the first, or set there from the pool before a report). ``calls`` is
    bumped where a call takes other than one item (a batch): service times are times of calls.
    """

    __slots__ = (
        "calls",
        "ceiling",
        "emitted",
        "failed",
        "in_progress",
        "name",
        "place",
        "retried",
        "sampled",
        "service",
        "service_total",
        "taken",
        "throttled",
    )

    def __init__(self, name: str, place: str, ceiling: int) -> None:
        self.name = name
        self.place = place
        self.ceiling = ceiling
        self.taken = 0
        self.emitted = 0
        self.failed = 0
        self.retried = 0
        self.throttled = 0
        self.in_progress = 0
        self.calls = 0
        self.service = Histogram()
        self.service_total = 0.0
        self.sampled = 0

    def add_sample(self, seconds: float) -> None:
        """One call took this long."""
        self.service.add(seconds)
        self.service_total += seconds
        self.sampled += 1

    def worked(self) -> float:
        """Seconds of service so far, all workers together, reckoned from the samples."""
        if not self.sampled:
            return 0.0
        calls = self.calls or self.taken + self.retried + self.throttled - self.in_progress
        return self.service_total / self.sampled * max(calls, self.sampled)


class Shares(NamedTuple):
    """Where a segment's capacity went, as shares of elapsed time × ceiling; what is missing to 1 is overhead."""

    busy: float
    waiting: float
    blocked: float
    head: float
    held: float = 0.0


class SegmentMeter:
    """The stages of one segment, which share ``ceiling`` workers, and what the segment spends its time on.

    ``started`` is the time of its start by the run's clock; every ``now`` is by the same clock. ``searched``: the
    ceiling is found out while the run goes. ``learns``: so is the rate. ``works``: False for one without workers,
    which spends no time.
    """

    __slots__ = (
        "_capacity",
        "_changed",
        "_since",
        "_spent",
        "ceiling",
        "first",
        "last",
        "learns",
        "searched",
        "stages",
        "started",
        "state",
        "works",
    )

    def __init__(self, stages: Sequence[StageMeter], ceiling: int, started: float, *, works: bool = True) -> None:
        self.stages = list(stages)
        self.first = self.stages[0]
        self.last = self.stages[-1]
        self.ceiling = ceiling
        self.started = started
        self.searched = False
        self.learns = False
        self.works = works
        self.state = WAITING_INPUT
        self._since = self._changed = started
        self._capacity = 0.0
        self._spent = [0.0] * 6

    def start(self, now: float) -> None:
        """The workers are there: what was before isn't theirs to account for."""
        self.started = self._since = self._changed = now

    def set_state(self, state: int, now: float) -> None:
        """The segment is in this state from now on. Costs a comparison if it was already."""
        if state != self.state:
            self._spent[self.state] += now - self._since
            self._since = now
            self.state = state

    def set_ceiling(self, ceiling: int, now: float) -> None:
        """So many workers may have an item from now on."""
        if ceiling != self.ceiling:
            self._capacity = self.capacity(now)
            self._changed = now
            self.ceiling = ceiling
            for stage in self.stages:
                stage.ceiling = ceiling

    def capacity(self, now: float) -> float:
        """Seconds of work that the workers had to give, until now."""
        return self._capacity + (now - self._changed) * self.ceiling

    def passed(self, items: int, entry: int = 0, outputs: int | None = None) -> None:
        """So many items went from stage ``entry`` (by number) through the last; ``outputs``: if it emitted more."""
        stages = self.stages
        if len(stages) == 1:
            stages[0].emitted += items if outputs is None else outputs
            return
        for at in range(entry, len(stages) - 1):
            stages[at].emitted += items
            stages[at + 1].taken += items
        self.last.emitted += items if outputs is None else outputs

    def stopped(self, entry: int, at: int) -> None:
        """One item went from stage ``entry`` into stage ``at`` and not through it: dropped, failed or to be retried.

        The caller bumps ``failed`` or ``retried`` of the stage ``at`` where that is so. A retry enters again at
        ``at``, where it isn't counted as taken a second time.
        """
        stages = self.stages
        for number in range(entry, at):
            stages[number].emitted += 1
            stages[number + 1].taken += 1

    def add_samples(self, entry: int, seconds: Sequence[float]) -> None:
        """The service times of one task, of each stage that it ran from ``entry`` on."""
        for stage, one in zip(self.stages[entry:], seconds, strict=False):
            stage.add_sample(one)

    def busy(self, stage: StageMeter, now: float) -> float:
        """The share of the segment's capacity that one of its stages used."""
        capacity = self.capacity(now)
        if not stage.sampled:
            return min(1.0, stage.in_progress / self.ceiling)
        return min(1.0, stage.worked() / capacity) if capacity > 0 else 0.0

    def shares(self, now: float) -> Shares:
        """Where the capacity went, until now."""
        elapsed = now - self.started
        if elapsed <= 0 or not self.works:
            return Shares(0.0, 0.0, 0.0, 0.0)
        busy = min(1.0, sum(self.busy(stage, now) for stage in self.stages))
        spent = list(self._spent)
        spent[self.state] += now - self._since
        idle = 1.0 - busy
        known = (elapsed - spent[BUSY]) / elapsed
        scale = idle / known if known > idle else 1.0  # while one worker waits, others of the segment may be at work
        states = (WAITING_INPUT, BLOCKED_OUTPUT, BLOCKED_HEAD, HELD)
        return Shares(busy, *(scale * spent[state] / elapsed for state in states))
