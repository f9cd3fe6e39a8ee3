"""The start of a flow: reads the source into the first channel, as fast as there is room.

It draws no further ahead than what is consumed in a few milliseconds, or than the workers need to be busy: the items on
their way, wherever they are, are bounded by one ``Demand``. When they reach the bound, it waits until a quarter of them
has left, so that what follows one another quickly crosses in chunks.

One coroutine, cancelled to stop it. What it has read and not put isn't issued: a later run reads it again. A source
that has to block does so in a thread of its own. Under ``id=`` every batch is first held against the ids that the sink
has settled; where none are kept, an item still needs one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from penstock.errors import IdError, PenstockError, ResumeMismatch
from penstock.flow.channel import Channel
from penstock.flow.codec import id_key, row_digest
from penstock.flow.contract import Source, Unreadable
from penstock.flow.demand import Demand
from penstock.flow.failing import DEAD_LETTER, KEEP_IT, RAISE, Policy
from penstock.flow.ledger import DEAD, SKIPPED
from penstock.flow.memory import position_of
from penstock.flow.progress import Known, Position, Progress
from penstock.flow.segment import Host, appetite_of
from penstock.place.base import Task

__all__ = ["Reader"]

_SLACK = 32
_MOST_AHEAD = 65_536


class Reader:
    """Reads ``source`` after ``progress`` into ``channel``; ``id`` is the flow's.

    ``digests``: a row must be recognized by more than its id, since a later run may expand it again.
    """

    def __init__(
        self,
        host: Host,
        source: Source[Any],
        progress: Progress,
        channel: Channel,
        policy: Policy,
        id: str | Callable[[Any], Any] | None,
        output: str,
        *,
        digests: bool,
    ) -> None:
        self.host = host
        self.ledger = host.ledger
        self.source = source
        self.progress = progress
        self.channel = channel
        self.policy = policy
        redoes = progress.ids is None and host.ledger.holds  # a sink that keeps ids knows its letters by number
        self.id = None if redoes else id
        self.output = output
        self.digests = digests
        self._appetite = appetite_of(host.segments)
        self._demand = Demand(host.clock, _SLACK, _MOST_AHEAD)
        self._left = 0
        self._last: Position | None = None
        self._room: asyncio.Future[None] | None = None
        channel.on_room = self._wake

    def _may_issue(self) -> int:
        """How many items the channel and the demand have room for now."""
        left = self.ledger.left
        self._demand.least = self._appetite() + _SLACK
        most = self._demand.note(left - self._left)
        self._left = left
        return min(self.channel.room, most - self.ledger.ahead)

    def _wake(self) -> None:
        room, size = self._room, self._demand.size
        if room is None or room.done() or self.channel.room <= 0 or self.ledger.ahead > size - size // 4:
            return
        room.set_result(None)

    async def run(self) -> None:
        """Read to the end and close the channel. Cancelling closes the source and leaves the channel open."""
        ledger = self.ledger
        ledger.known.update(
            {
                position: (children, self.progress.fates.get(position, 0))
                for position, children in self.progress.children.items()
            }
        )
        batches = self.source.read(self.progress)
        try:
            async for batch in batches:
                if self.id is None:
                    tasks = [Task(value, position) for position, value in batch]
                elif self.progress.ids is None:
                    tasks = [Task(self._with_id(value), position) for position, value in batch]
                else:
                    tasks = await self._by_id(batch)
                await self._put(tasks)
                self._last = batch[-1][0] if batch else self._last
        except Exception as error:
            if not isinstance(error, PenstockError):
                where = "before its first item" if self._last is None else f"after {position_of(self._last)}"
                error.add_note(f"in the source {self.source.identity}, {where}")
            raise
        finally:
            closer = getattr(batches, "aclose", None)
            if closer is not None:
                await closer()
        self.channel.close()

    async def _put(self, tasks: list[Task]) -> None:
        """Put them into the channel as it has room. What is put isn't held here: a task takes its results along."""
        while tasks:
            most = self._may_issue()
            if most > 0:
                self._put_some(tasks, most)
                continue
            self._room = self.host.loop.create_future()
            self.ledger.on_left = self._wake
            try:
                await self._room
            finally:
                self._room = self.ledger.on_left = None

    def _put_some(self, tasks: list[Task], most: int) -> None:
        part = tasks[:most]
        del tasks[: len(part)]
        self.policy.meter.taken += len(part)
        self.policy.meter.emitted += len(part)
        self.ledger.issue(part)
        if Unreadable in {type(task.value) for task in part}:
            part = self._readable(part)
        else:
            self.policy.tried += len(part)
        self.channel.put(part)

    def _readable(self, tasks: list[Task]) -> list[Task]:
        """Apply ``on_error`` to what can't be decoded, or has no id of its own."""
        readable = []
        for task in tasks:
            bad = task.value
            self.policy.tried += 1
            if type(bad) is not Unreadable:
                readable.append(task)
                continue
            if task.origin in self.ledger.items:
                self.ledger.items[task.origin] = bad.raw
            verdict = self.policy.give_up(bad.raw, task.origin, bad.error, 1)
            if verdict.kind == RAISE:
                self.host.fail(verdict.error)
                break
            if verdict.kind == KEEP_IT:
                task.value = verdict.failed
                readable.append(task)
            else:
                self.ledger.settle(task.origin, DEAD if verdict.kind == DEAD_LETTER else SKIPPED, verdict.failed)
        return readable

    def _with_id(self, value: Any) -> Any:
        """The item, if it has an id."""
        if type(value) is not Unreadable:
            try:
                id_key(value, self.id or "id")
            except IdError as error:
                return Unreadable(value, error)
        return value

    async def _by_id(self, batch: Sequence[tuple[Position, Any]]) -> list[Task]:
        """The items of a batch whose ids aren't settled. An item without an id is known by its digest."""
        keys: list[str] = []
        missing: dict[int, Exception] = {}
        for number, (_, value) in enumerate(batch):
            if type(value) is Unreadable:
                keys.append(f"unreadable:{row_digest(value.raw).hex()}")
                continue
            try:
                keys.append(id_key(value, self.id or "id"))
            except IdError as error:
                missing[number] = error
                keys.append(f"missing:{row_digest(value).hex()}")
        assert self.progress.ids is not None
        answers = await self.progress.ids.look_up(keys)
        tasks = []
        for number, ((position, value), known) in enumerate(zip(batch, answers, strict=True)):
            if known.done:
                continue
            item = value
            if type(value) is not Unreadable:
                if number in missing:
                    item = Unreadable(value, missing[number])
                elif known.repeated:
                    item = Unreadable(value, IdError(f"the id {keys[number].partition(':')[2]} came before"))
            self._remember(position, value, known)
            tasks.append(Task(item, position))
        return tasks

    def _remember(self, position: Position, value: Any, known: Known) -> None:
        ledger = self.ledger
        ledger.keys[position] = known.key
        if not self.digests and known.children is None:
            return
        digest = row_digest(value.raw if type(value) is Unreadable else value)
        if known.children is not None:
            if known.digest is not None and known.digest != digest:
                raise ResumeMismatch(
                    self.output,
                    f"the row with the id {known.key.partition(':')[2]} changed while its expansion was unfinished",
                )
            ledger.known[position] = (known.children, known.fate)
        ledger.digests[position] = digest
