"""The dead letters of an output as a source, to be fixed and redone."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

from penstock.files.source import BATCH, Batch, aside
from penstock.flow.blocking import feed
from penstock.flow.contract import Failed
from penstock.flow.journal import LETTERS
from penstock.flow.letters import JournalReader
from penstock.flow.progress import Position, Positions, Progress

__all__ = ["DeadSource"]


class DeadSource:
    """The letters in an output's journal that were there when reading began, each as a ``Failed``.

    A letter stands at ("dead", its number). Written back to the same output, what is redone is added there and its
    letter removed in one transaction; one that dies again keeps its number and adds up its attempts.
    """

    replayable = True

    def __init__(self, output: str | os.PathLike[str], table: str | None = None) -> None:
        self.output = os.fspath(output)
        reader = JournalReader(self.output, table)
        reader.close()
        self._table = reader.table
        self._identity = reader.identity

    def __repr__(self) -> str:
        return f"read.dead({self.output!r})"

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def total(self) -> int | None:
        return None

    async def snapshot(self) -> Any:
        """Which journal it is: another one may give its letters the same numbers."""
        return {"journal": await aside(self._journal_id)}

    async def changed(self, before: Any) -> str | None:
        """Whether the journal was replaced by another one since."""
        if before["journal"] != await aside(self._journal_id):
            return f"the journal of {self.output} was started afresh, and its dead letters are others"
        return None

    async def read(self, after: Progress) -> AsyncIterator[Sequence[tuple[Position, Failed]]]:
        """Yield the letters that aren't settled. Closing or cancelling ends the thread before its next batch."""
        batches: AsyncGenerator[Sequence[tuple[Position, Failed]], None] = feed(
            lambda: self._batches(after.settled), f"penstock-{self.identity}"
        )
        try:
            async for batch in batches:
                yield batch
        finally:
            await batches.aclose()

    async def settle(self, positions: Positions) -> None:
        """A sink that shares the journal has removed them; another one remembers them itself."""

    async def give_back(self, positions: Positions, delay: float = 0, reason: str | None = None) -> None:
        """They are still there."""

    def joins(self, sink: Any) -> bool:
        """Whether the sink writes the output that these letters belong to."""
        return getattr(sink, "letters", None) == self.identity

    def _journal_id(self) -> str:
        reader = JournalReader(self.output, self._table)
        reader.close()
        return reader.id

    def _batches(self, settled: Positions) -> Iterator[Batch]:
        reader = JournalReader(self.output, self._table)
        try:
            done = settled.of(LETTERS)
            after, last = 0, reader.last_letter()
            while letters := reader.letters(after, last, BATCH):
                after = letters[-1][0]
                batch: Batch = [((LETTERS, number), failed) for number, failed in letters if number not in done]
                if batch:
                    yield batch
        finally:
            reader.close()
