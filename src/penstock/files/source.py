"""What all sources over files share, and the one that yields the files themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from penstock.files.paths import FileSet, partition_of
from penstock.flow.blocking import Desk, feed
from penstock.flow.progress import Intervals, Position, Positions, Progress

__all__ = ["BATCH", "BATCH_BYTES", "Batch", "FileSource", "PathSource", "Unsettled", "aside"]

Batch = list[tuple[Position, Any]]

BATCH = 256
"""The most items of a batch."""

BATCH_BYTES = 1 << 20
"""About the most bytes of a batch, where an item's size is known."""


class FileSource(ABC):
    """A Source over the files of a pattern, read one after the other in a thread of its own.

    An item stands at (path as given, number of the record in the file, from 0), also in errors; see ``partition_of``.
    """

    replayable = True

    def __init__(self, files: FileSet) -> None:
        self.files = files

    def __repr__(self) -> str:
        return f"read.{self.identity}"

    @property
    def identity(self) -> str:
        return self.files.identity

    @property
    def total(self) -> int | None:
        """Not known: counting lines would be reading twice."""
        return None

    def reads(self, path: str) -> bool:
        """Whether a file, or one in a directory of that path, is among those that are read."""
        return self.files.hold(path)

    async def snapshot(self) -> Any:
        """Size, time and digest of each file. Cancelling leaves the reading of a file to finish in the background."""
        return await aside(self.files.snapshot)

    async def changed(self, before: Any) -> str | None:
        """Which file differs, and how, beyond what was appended; None if none does. Cancelling as for snapshot."""
        how: str | None = await aside(self.files.changed, before)
        return how

    async def read(self, after: Progress) -> AsyncIterator[Sequence[tuple[Position, Any]]]:
        """Yield what isn't settled, in batches. Closing or cancelling ends the thread before its next batch.

        Of what has come since the snapshot nothing is read: a line that was half written then would count as read.
        """
        batches: AsyncGenerator[Sequence[tuple[Position, Any]], None] = feed(
            lambda: self._batches(after), f"penstock-{self.identity}"
        )
        try:
            async for batch in batches:
                yield batch
        finally:
            await batches.aclose()

    def _batches(self, after: Progress) -> Iterator[Batch]:
        """The items that aren't settled, in the reading thread."""
        for path, limit in self.files.paths_of(after.snapshot):
            partition = partition_of(path)
            yield from self._of_file(path, limit, Unsettled(after.settled.of(partition)))

    @abstractmethod
    def _of_file(self, path: str, limit: int | None, unsettled: Unsettled) -> Iterator[Batch]:
        """The items in the first ``limit`` bytes of a file that aren't settled, at (``partition_of(path)``, number)."""

    # A file doesn't ask what became of its lines.

    async def settle(self, positions: Positions) -> None:
        return

    async def give_back(self, positions: Positions, delay: float = 0, reason: str | None = None) -> None:
        return

    def joins(self, sink: Any) -> bool:
        return False


class PathSource(FileSource):
    """The matching files themselves, as paths; nothing of them is read."""

    def _batches(self, after: Progress) -> Iterator[Batch]:
        """Many files in a batch: each is but one item."""
        files = super()._batches(after)
        while batch := [item for one in islice(files, BATCH) for item in one]:
            yield batch

    def _of_file(self, path: str, limit: int | None, unsettled: Unsettled) -> Iterator[Batch]:
        if unsettled.wanted(0, 1):
            yield [((partition_of(path), 0), Path(path))]


class Unsettled:
    """Says of the records of one file, in their order, which are to be read. Asked for ranges that never go back."""

    def __init__(self, settled: Intervals) -> None:
        self._intervals = iter(list(settled))
        self._next: tuple[int, int] | None = next(self._intervals, None)

    def _after(self, start: int) -> tuple[int, int] | None:
        """The first settled interval that ends after ``start``."""
        while self._next is not None and self._next[1] <= start:
            self._next = next(self._intervals, None)
        return self._next

    def passes_over(self, start: int, stop: int) -> bool:
        """Whether all of [start, stop) is settled."""
        settled = self._after(start)
        return start >= stop or (settled is not None and settled[0] <= start and stop <= settled[1])

    def wanted(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of [start, stop) that aren't settled."""
        parts = []
        while start < stop:
            settled = self._after(start)
            if settled is None or settled[0] >= stop:
                parts.append((start, stop))
                break
            if start < settled[0]:
                parts.append((start, settled[0]))
            start = settled[1]
        return parts


async def aside(function: Any, *args: Any) -> Any:
    """Call what blocks on files in a thread that ends with it."""
    desk = Desk("penstock-files")
    try:
        return await desk.call(function, *args)
    finally:
        await desk.close()
