"""A topic as the sink of a flow: each output is an event, and the job's progress is in the same database.

Where the source is a group of the same log (``JoinedSink``), a commit publishes the outputs, acknowledges what they
came of and keeps the dead letters, in one transaction; outputs of what is no longer the reading's own are dropped in
it. Otherwise (``TopicSink``) the job has a journal, in tables of its own, and is alone with it; a job that redoes the
dead letters of another one into this topic uses the other's, and removes them there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from penstock.errors import OutputInUse, OutputRejected, PlanError
from penstock.events.groups import acknowledge, bury, is_held, release
from penstock.events.reading import open_topic
from penstock.events.states import keep_states, load_states
from penstock.events.transaction import Appended, Transaction
from penstock.flow.contract import Delta, JobId, Origin
from penstock.flow.database import Tables
from penstock.flow.journal import Journal, letters_identity
from penstock.flow.letters import PREFIX, tables_prefix
from penstock.flow.progress import Known, Positions, Progress

if TYPE_CHECKING:
    from penstock.events.source import GroupReading
    from penstock.events.topic import Topic

__all__ = ["JoinedSink", "TopicSink"]

T = TypeVar("T")


class TopicSink:
    """Publishes each output. ``key``: a function of an output that gives its event's key."""

    exactly_once = True
    keeps_dead = True
    pace = 0.0

    def __init__(self, topic: Topic[Any], key: Callable[[Any], str | None] | None = None) -> None:
        self.topic = topic
        self.key = key
        self._waiting: list[tuple[Origin, list[Appended]]] = []
        self._journal: Journal | None = None
        self._prefix = ""
        self._lock = -1
        self._opened = False

    @property
    def identity(self) -> str:
        return f"log:{self.topic.log.identity}#{self.topic.name}"

    async def open(self, job: JobId) -> Progress:
        """Take the job for this process alone. Raises OutputInUse, ResumeMismatch, LogError; PlanError for ``fresh`` in
        a job that redoes this topic's own dead letters."""
        log = self.topic.log
        if self._opened:
            raise OutputInUse(self.identity)
        await log.open()
        self._opened = True
        self._waiting = []
        try:
            self._take(await log.ask(self._prefix_of, job))
            return await log.ask(self._load, job)
        except BaseException:
            await self.close()
            raise

    def _prefix_of(self, transaction: Transaction, job: JobId) -> str:
        """What the names of the tables begin with that the job's journal is in."""
        here = letters_identity(self.topic.log.store.path, "")
        if job.source.startswith(here):  # these are dead letters: of a job into this topic?
            prefix = tables_prefix(job.source.removeprefix(here))
            connection = transaction.connection
            if Tables(prefix).exist(connection) and self._journal_on(connection, prefix).state == self._state:
                return prefix
        return tables_prefix(hashlib.blake2b(job.name.encode(), digest_size=6).hexdigest())

    @property
    def _state(self) -> dict[str, Any]:
        """What a journal says of the output."""
        return {"topic": self.topic.name}

    def _take(self, prefix: str) -> None:
        store = self.topic.log.store
        if prefix in store.jobs:
            raise OutputInUse(self.identity)
        store.jobs.add(prefix)
        self._prefix = prefix
        directory = store.directory
        if directory is not None:
            self._lock = os.open(f"{directory}/{self._prefix}.job", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputInUse(self.identity) from None

    def _load(self, transaction: Transaction, job: JobId) -> Progress:
        connection = transaction.connection
        redoes = job.source == self._letters(self._prefix)
        if job.fresh and redoes:
            raise PlanError(
                f"fresh=True would discard the progress of {self.identity} with the dead letters that are to be redone",
                "Run it without fresh=True: what is redone is added to the topic",
            )
        if job.fresh:
            Tables(self._prefix).drop(connection)
        self._journal = self._journal_on(connection, self._prefix)
        progress = self._journal.load(job)
        self._journal.begin()
        if job.by_id and not redoes:
            progress.ids = self
        progress.states = self
        return progress

    def _letters(self, prefix: str) -> str:
        table = prefix.removeprefix(PREFIX).removesuffix("_")
        return letters_identity(self.topic.log.store.path, table)

    def _journal_on(self, connection: Any, prefix: str) -> Journal:
        path = self.topic.log.store.path
        return Journal(path, output=self.identity, letters=self._letters(prefix), prefix=prefix, lent=connection)

    async def look_up(self, keys: list[str]) -> list[Known]:
        """What earlier runs committed of the items with these keys."""
        return await self.topic.log.ask(self._look_up, keys)

    def _look_up(self, transaction: Transaction, keys: list[str]) -> list[Known]:
        assert self._journal is not None
        self._journal.connection = transaction.connection
        return self._journal.look_up(keys)

    async def load_states(self, stage: str, keys: list[str]) -> dict[str, bytes]:
        """The states of these keys that earlier commits left, of a ``map_state``."""
        return await self.topic.log.ask(self._load_states, stage, keys)

    def _load_states(self, transaction: Transaction, stage: str, keys: list[str]) -> dict[str, bytes]:
        assert self._journal is not None
        self._journal.connection = transaction.connection
        return self._journal.load_states(stage, keys)

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        """Take these outputs; they count at the next commit. Raises OutputRejected."""
        packed: list[tuple[Origin, list[Appended]]] = []
        rejected: list[tuple[int, Exception]] = []
        for index, (origin, values) in enumerate(outputs):
            try:
                packed.append((origin, [self._packed(value) for value in values]))
            except Exception as error:  # the user's function of a key may raise anything
                rejected.append((index, error))
        if rejected:
            raise OutputRejected(rejected)
        self._waiting += packed

    def _packed(self, value: Any) -> Appended:
        return self.topic.codec.pack(value, None if self.key is None else self.key(value))

    def taken(self) -> list[tuple[Origin, list[Appended]]]:
        """What was written since the last commit."""
        waiting, self._waiting = self._waiting, []
        return waiting

    async def commit(self, delta: Delta) -> Positions:
        """Publish what was written and record progress: all or none."""
        waiting = self.taken()
        size = sum(len(event.body) for _, events in waiting for event in events)
        await self.topic.log.ask(self._commit, waiting, delta, size=size)
        return Positions()

    def _commit(self, transaction: Transaction, waiting: list[tuple[Origin, list[Appended]]], delta: Delta) -> None:
        _publish(transaction, self.topic.name, waiting)
        assert self._journal is not None
        self._journal.connection = transaction.connection
        self._journal.transaction(delta, self._state)  # always: what it says of earlier ones may have been undone

    async def close(self) -> None:
        """Release the job. Safe to call twice."""
        journal, self._journal = self._journal, None
        log = self.topic.log
        try:
            if journal is not None and log.is_open:
                await log.ask(_closed, journal)
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1
            if self._opened:
                self._opened = False
                if log.is_open:
                    log.store.jobs.discard(self._prefix)
                    await log.close()


def _closed(transaction: Transaction, journal: Journal) -> None:
    journal.connection = transaction.connection
    journal.close(clean=True)


def _publish(transaction: Transaction, topic: str, waiting: Sequence[tuple[Origin, list[Appended]]]) -> None:
    events = [event for _, some in waiting for event in some]
    if events:
        transaction.append(open_topic(transaction, topic), events)


class JoinedSink:
    """The sink of a job whose source is a group of the same log."""

    exactly_once = True
    keeps_dead = True
    pace = 0.0

    def __init__(self, sink: TopicSink, reading: GroupReading) -> None:
        self._sink = TopicSink(sink.topic, sink.key)  # of this run alone
        self._reading = reading
        self._opened = False

    @property
    def identity(self) -> str:
        return self._sink.identity

    async def open(self, job: JobId) -> Progress:
        """Nothing to undo: what doesn't count isn't there."""
        await self._sink.topic.log.open()
        self._opened = True
        self._sink.taken()  # by a run that failed
        return Progress(states=self)

    async def load_states(self, stage: str, keys: list[str]) -> dict[str, bytes]:
        """The states of these keys that earlier commits left in the group, of a ``map_state``."""
        return await self._sink.topic.log.look(load_states, self._reading.reader.name[0], stage, keys)

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        """Take these outputs; they count at the next commit. Raises OutputRejected."""
        await self._sink.write(outputs)

    async def commit(self, delta: Delta) -> Positions:
        """Publish, acknowledge and bury, in one transaction. Returns what was no longer this reading's own."""
        waiting = self._sink.taken()
        size = sum(len(event.body) for _, events in waiting for event in events)
        fenced: Positions = await self._sink.topic.log.ask(self._commit, waiting, delta, size=size)
        self._reading.forget(delta.settled)
        return fenced

    def _commit(
        self, transaction: Transaction, waiting: Sequence[tuple[Origin, list[Appended]]], delta: Delta
    ) -> Positions:
        group, topic = self._reading.reader.name[:2]
        fenced, dead = Positions(), Positions()
        for failed, (owner, letter) in zip(delta.dead, self._reading.letters(delta.dead), strict=True):
            refused = bury(transaction, group, topic, owner, [letter])
            (fenced if refused else dead).add(failed.position)
        self._part(transaction, waiting)
        for partition, owner, ranges in self._reading.by_owner(delta.settled):
            for seq in acknowledge(transaction, group, topic, owner, ranges):
                if (partition, seq) not in dead:
                    fenced.add((partition, seq))
        held = self._reading.held(transaction)
        keep_states(
            transaction,
            group,
            [(stage, key, value) for (stage, partition, key), value in delta.states.items() if partition in held],
        )
        kept = [one for one in waiting if not any(position in fenced for position in one[0])]
        _publish(transaction, self._sink.topic.name, kept)
        return fenced

    def _part(self, transaction: Transaction, waiting: Sequence[tuple[Origin, list[Appended]]]) -> None:
        """Give back what came into one output with an event that is no longer the reading's own: the output is dropped,
        and each is delivered again."""
        group, topic = self._reading.reader.name[:2]
        for origin, _ in waiting:
            if len(origin) > 1:
                owned = [(seq, self._reading.owner_of(partition)) for partition, seq in origin]
                mine = [one for one in owned if is_held(transaction, group, *one)]
                if len(mine) < len(owned):
                    for seq, owner in mine:
                        release(transaction, group, topic, owner, [(seq, 0.0, True)])

    async def close(self) -> None:
        """Safe to call twice."""
        if self._opened:
            self._opened = False
            await self._sink.topic.log.close()
