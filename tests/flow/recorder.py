"""A sink in memory that keeps every promise of the contract, and checks that the run keeps its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from msgspec.structs import astuple

from penstock.errors import OutputRejected
from penstock.flow.contract import Delta, Failed, JobId, Origin
from penstock.flow.progress import Intervals, Position, Positions, Progress


class Recorder:
    """Commits all or nothing into lists; what was written and not committed is gone when the next run opens it.

    ``refuse``: whether an output can't be taken. ``before_commit``: called with what is written and the delta.
    """

    exactly_once = True
    keeps_dead = True
    identity = "memory:recorder"

    def __init__(
        self,
        *,
        pace: float = 0.0,
        refuse: Callable[[Any], bool] = lambda value: False,
        before_commit: Callable[[Recorder, Delta], None] = lambda recorder, delta: None,
    ) -> None:
        self.pace = pace
        self.refuse = refuse
        self.before_commit = before_commit
        self.outputs: list[Any] = []
        self.origins: list[Origin] = []
        self.letters: dict[Position, Failed] = {}
        self.progress = Progress()
        self.commits = 0
        self.written: list[tuple[Origin, Any]] = []
        self.is_open = False
        self.busy = False

    async def open(self, job: JobId) -> Progress:
        assert not self.is_open
        self.is_open = True
        self.written = []
        return deepcopy(self.progress)

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        assert self.is_open
        assert not self.busy, "write during a write or a commit"
        rejected: list[tuple[int, Exception]] = [
            (index, ValueError(f"refused {values!r}"))
            for index, (_, values) in enumerate(outputs)
            if any(self.refuse(value) for value in values)
        ]
        if rejected:
            raise OutputRejected(rejected)
        self.written += [(origin, value) for origin, values in outputs for value in values]

    async def commit(self, delta: Delta) -> Positions:
        assert self.is_open
        assert not self.busy, "commit during a write or a commit"
        self.before_commit(self, delta)
        self.origins += [origin for origin, _ in self.written]
        self.outputs += [value for _, value in self.written]
        self.written = []
        self.commits += 1
        progress = self.progress
        for partition, intervals in delta.settled.partitions.items():
            for start, stop in intervals:
                for index in range(start, stop):
                    assert progress.settled.add((partition, index)), f"{partition, index} settled twice"
                    progress.children.pop((partition, index), None)
                    progress.fates.pop((partition, index), None)
        for position, children in delta.children.items():
            assert position not in progress.settled
            progress.children.setdefault(position, Intervals()).update(children)
        progress.fates.update(delta.fates)
        for number, count in delta.taken.items():
            progress.taken[number] = progress.taken.get(number, 0) + count
        for name, count in delta.counts.items():
            progress.counts[name] = progress.counts.get(name, 0) + count
        for failed in delta.dead:
            assert failed.position not in self.letters
            self.letters[failed.position] = Failed(*astuple(failed)[:6])  # as a journal keeps it: without a traceback
        if delta.snapshot is not None:
            progress.snapshot = delta.snapshot
        progress.plan = delta.plan or progress.plan
        progress.finished = delta.finished
        return Positions()

    async def close(self) -> None:
        self.is_open = False
        self.written = []
