"""Epochs: a source that is read several times over, each time in another order if that is wanted.

A position is (epoch, index): the partition names the epoch and the partition of the source (``"epoch 2"``, or ``"epoch
2: a.jsonl"``), the index counts within it; shuffled, it counts in the epoch's order, which its seed determines. So
progress says which samples were learned from in which epoch, and a run goes on in the middle of one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from penstock.errors import PlanError
from penstock.flow.contract import Source, is_subscribed
from penstock.flow.memory import SequenceSource
from penstock.flow.progress import Position, Positions, Progress

__all__ = ["Epochs", "check_epochs", "epoch_of"]

_BATCH = 256


def check_epochs(source: Any, epochs: Any, shuffle: Any) -> None:
    """Raise PlanError for a source that can't be read so often, or in another order."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise PlanError(f"fit(epochs={epochs!r})", "Give a whole number of at least 1")
    if shuffle is not None and (isinstance(shuffle, bool) or not isinstance(shuffle, int) or shuffle < 0):
        raise PlanError(f"fit(shuffle={shuffle!r})", "Give a seed, a whole number of 0 or more: it makes the order")
    if epochs > 1 and (is_subscribed(source) or not source.replayable):
        raise PlanError(
            f"fit(epochs={epochs}) over {source.identity}, which can be read once",
            "Give a list or a file, or leave epochs out",
        )
    if shuffle is not None and not isinstance(source, SequenceSource):
        raise PlanError(
            f"fit(shuffle={shuffle}) over {source.identity}, which has no order to choose from",
            "Give a sequence, for instance list(rows), or leave shuffle out",
        )


def epoch_of(partition: str) -> int:
    """The epoch, from 0, that a partition belongs to.

    >>> epoch_of("epoch 2: a.jsonl")
    1
    """
    return int(partition.partition(":")[0].removeprefix("epoch ")) - 1


class Epochs:
    """``source``, ``epochs`` times. ``seed``: shuffled, differently each time. ``ended``: whether to read no more."""

    replayable = True

    def __init__(self, source: Source[Any], epochs: int, seed: int | None, ended: Callable[[], bool]) -> None:
        self.source = source
        self.epochs = epochs
        self.seed = seed
        self._ended = ended

    @property
    def identity(self) -> str:
        return self.source.identity

    @property
    def total(self) -> int | None:
        total = self.source.total
        return None if total is None else total * self.epochs

    async def snapshot(self) -> Any:
        """That of the source, with how it is read."""
        return {"epochs": self.epochs, "shuffle": self.seed, "source": await self.source.snapshot()}

    async def changed(self, before: Any) -> str | None:
        """How the input differs: more epochs are no difference, and neither is a source that grew, unless shuffled."""
        if not isinstance(before, dict) or "epochs" not in before:
            return "it was read without epochs or shuffling before"
        if before["shuffle"] != self.seed:
            return f"it was shuffled by shuffle={before['shuffle']} before, and is by shuffle={self.seed} now"
        how = await self.source.changed(before["source"])
        if how is None and self.seed is not None and await self.source.snapshot() != before["source"]:
            return "it has grown, and a longer list is shuffled into another order"
        return how

    async def read(self, after: Progress) -> AsyncGenerator[Sequence[tuple[Position, Any]], None]:
        """Yield what isn't settled, epoch after epoch."""
        for epoch in range(self.epochs if not self._ended() else 0):
            name = f"epoch {epoch + 1}"
            batches = self._in_order(name, after) if self.seed is None else self._shuffled(name, epoch, after)
            async with aclosing(batches):
                async for batch in batches:
                    yield batch
                    if self._ended():
                        return

    async def _in_order(self, name: str, after: Progress) -> AsyncGenerator[Sequence[tuple[Position, Any]], None]:
        def inner(partition: str) -> str | None:
            if partition == name:
                return ""
            return partition.removeprefix(f"{name}: ") if partition.startswith(f"{name}: ") else None

        settled = {key: kept for one, kept in after.settled.partitions.items() if (key := inner(one)) is not None}
        snapshot = after.snapshot["source"] if after.snapshot is not None else None
        known = Progress(settled=Positions(settled), snapshot=snapshot)
        reading: Any = self.source.read(known)
        async with aclosing(reading):
            async for batch in reading:
                yield [((f"{name}: {one}" if one else name, index), item) for (one, index), item in batch]

    async def _shuffled(
        self, name: str, epoch: int, after: Progress
    ) -> AsyncGenerator[Sequence[tuple[Position, Any]], None]:
        assert isinstance(self.source, SequenceSource)
        items = self.source.items
        done = after.settled.of(name)
        order = np.random.default_rng([self.seed or 0, epoch]).permutation(len(items))
        for start in range(0, len(order), _BATCH):
            batch = [
                ((name, index), items[at])
                for index, at in enumerate(order[start : start + _BATCH].tolist(), start)
                if index not in done
            ]
            if batch:
                yield batch

    async def settle(self, positions: Positions) -> None:
        """A source that can be read again doesn't ask."""

    async def give_back(self, positions: Positions, delay: float = 0, reason: str | None = None) -> None:
        """It can be read again."""

    def joins(self, sink: Any) -> bool:
        return False
