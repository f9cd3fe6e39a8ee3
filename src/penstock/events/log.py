"""The event log: what it promises, whatever it is kept in, and how it is opened and closed.

The contract of a log:

1. ``publish`` returns when the event is as durable as ``capabilities.durability`` says. An exception means that it
   isn't known whether it was published: publish it again with the same ``id``, and it is there once.
2. Each group gets each event at least once, and acknowledges it. What isn't acknowledged is delivered again when its
   reader gives it back, when the reader's lease ends, or when its process does. Attempts are counted before the event
   is handed over.
3. Within a group, the events of a key are delivered in order and one after the other, across processes; an event that
   waits to be tried again, or for its time, holds back those of its key. Other keys go on.
4. Who has lost its lease can't acknowledge: the log refuses it.
5. Events are read again by position and by time, as long as they aren't trimmed. Times never fall.
6. An acknowledgement, what was published for it, and state that was kept by key count together, or not at all.
7. What is broken is never read as something else: a damaged event is an error.

A log belongs to no event loop: each request is answered on the loop that asked. Closing does what was asked before.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from penstock.errors import Closed, PlanError, Unsupported
from penstock.events.reading import TopicInfo, find_topic, open_topic, topics
from penstock.events.store import MEMORY, FileStore
from penstock.events.topic import Topic
from penstock.events.writer import Writer
from penstock.flow.blocking import Desk
from penstock.flow.commit import uninterrupted

__all__ = ["Capabilities", "EventLog"]

T = TypeVar("T")

_Durability = Literal["disk", "process"]
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a log can do.

    ``durability``: what a published event survives: "disk": a power cut; "process": the end of the process, but a power
    cut may take the last events; "none": nothing. ``processes``: several can use it at once. ``ordered_keys``: the
    order of a key holds across them. ``fencing``: a stale acknowledgement is refused. ``transactions``:
    acknowledgement, outputs and state count together. ``delays``: ``at=`` and ``retry(delay)``.
    """

    durability: Literal["disk", "process", "none"]
    processes: bool
    ordered_keys: bool = True
    fencing: bool = True
    transactions: bool = True
    delays: bool = True


class _Opened:
    """An open log: its store, the thread that writes, and the one that reads."""

    def __init__(self, path: str, durability: str) -> None:
        self.store = FileStore(path, durability)
        self.writer = Writer(self.store, f"the log {path}")
        self.desk = Desk(f"the log {path}")
        self.connection: Any = None

    def open(self) -> None:
        self.store.open()

    async def close(self) -> None:
        await self.writer.close()
        if self.connection is not None:
            connection, self.connection = self.connection, None
            await self.desk.call(connection.close)
        await self.desk.close()


class EventLog:
    """A durable log of events in one file, for any number of topics, groups and processes.

    ``address``: the path of the file, which is created if it isn't there, or ``":memory:"``. ``durability``: "disk"
    (default): what is published is on the disk; "process": it outlives the process, and a power cut may take the last
    moments. ``max_bytes``: of one event's payload (16 MiB).

    Used as ``async with EventLog(...) as log``, or opened and closed (``open``, ``close``, and their ``_sync`` twins);
    a job that reads or writes its topics opens it if nobody has. Beside the file stands a directory with what tells
    processes of each other; it must be on a local disk.

    Raises PlanError for an address it doesn't know, Unsupported for a durability that memory hasn't.

    >>> import asyncio, penstock as ps
    >>> async def main() -> list[str]:
    ...     async with ps.EventLog(":memory:") as log:
    ...         topic = log.topic("greetings")
    ...         await topic.publish("hello", key="c7")
    ...         return [event.value async for event in topic.read()]
    >>> asyncio.run(main())
    ['hello']
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        durability: _Durability | None = None,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        self.address = os.fspath(address)
        if not isinstance(self.address, str) or not self.address or "://" in self.address:
            raise PlanError(f"EventLog({address!r})", 'Give the path of a file, or ":memory:"')
        if durability not in (None, "disk", "process"):
            raise PlanError(f"durability={durability!r}", 'Give "disk" or "process"')
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise PlanError(f"max_bytes={max_bytes!r}", "Give a number of bytes")
        in_memory = self.address == MEMORY
        if in_memory and durability is not None:
            raise Unsupported(MEMORY, f"durability={durability!r}", "Give the path of a file")
        self.max_bytes = max_bytes
        self.capabilities = Capabilities("none" if in_memory else durability or "disk", processes=not in_memory)
        self._opened: _Opened | None = None
        self._users = 0
        self._turn = threading.Lock()
        self._numbers: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"EventLog({self.address!r})"

    @property
    def identity(self) -> str:
        """Names the log: its path."""
        return self.address if self.address == MEMORY else os.path.abspath(self.address)

    def is_same(self, other: EventLog) -> bool:
        """Whether both are the same log, so that they share transactions."""
        return self is other or (self.address != MEMORY and self.identity == other.identity)

    def __reduce__(self) -> Any:
        return _remade, (self.address, self.capabilities.durability, self.max_bytes)

    # -- opening and closing ----------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Open the log; a second time counts, and needs a second ``close``.

        Raises LogError for a file that is no log, is damaged, or was written by a newer penstock, and WriteFailed.
        Cancelling leaves it as it was.
        """
        try:
            await uninterrupted(asyncio.to_thread(self._open))
        except asyncio.CancelledError:  # it was opened all the same
            await self.close()
            raise
        return self

    def _open(self) -> None:
        with self._turn:
            if self._opened is None:
                opened = _Opened(self.address, self.capabilities.durability)
                opened.open()
                self._opened = opened
            self._users += 1

    async def close(self) -> None:
        """Do what was asked, and close the log if it was opened no more often. Safe to call once too often."""
        with self._turn:
            self._users = max(0, self._users - 1)
            if self._users:
                return
            opened, self._opened = self._opened, None
            self._numbers = {}
        if opened is not None:
            await uninterrupted(opened.close())

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def open_sync(self) -> Self:
        """``open`` for code that isn't async; it works while an event loop runs, too."""
        from penstock.flow.sync import run_blocking

        return run_blocking(self.open)

    def close_sync(self) -> None:
        """``close`` for code that isn't async."""
        from penstock.flow.sync import run_blocking

        run_blocking(self.close)

    @property
    def is_open(self) -> bool:
        """Whether it can be used now."""
        return self._opened is not None

    # -- what is in it ----------------------------------------------------------------------------------------------

    def topic(self, name: str, type: Any = None) -> Topic[Any]:
        """A topic of this log. ``type``: what its values are: by default anything that JSON can say; ``bytes``; or a
        Struct, dataclass or TypedDict, whose new fields with defaults read old events.

        Raises PlanError for a name or a type that can't be used. Creates nothing: the first event does.
        """
        return Topic(self, name, type)

    async def topics(self) -> list[TopicInfo]:
        """The topics as they stand, by name. Raises Closed, LogError."""
        return await self.look(topics)

    # -- for topics, subscriptions and flows ------------------------------------------------------------------------

    def _use(self) -> _Opened:
        if self._opened is None:
            raise Closed(f"the log {self.address} (open it with: async with log)")
        return self._opened

    @property
    def store(self) -> FileStore:
        """What an open log is kept in. Raises Closed."""
        return self._use().store

    async def ask(self, function: Callable[..., T], *arguments: Any, size: int = 0) -> T:
        """Call ``function(transaction, *arguments)`` in a transaction; its answer, once that is durable.

        Raises what it raises, WriteFailed, LogError, Closed. Cancelling drops the answer; it is done all the same.
        """
        answer: T = await self._use().writer.ask(function, *arguments, size=size)
        return answer

    @property
    def writer(self) -> Writer:
        """What is asked to write, in an open log. Raises Closed."""
        opened = self._opened
        return self._use().writer if opened is None else opened.writer

    def number_now(self, name: str) -> int | None:
        """The number of a topic, if it is known here already."""
        return self._numbers.get(name)

    async def look(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call ``function(connection, *arguments)`` to read, beside what is written."""
        opened = self._use()
        if self.address == MEMORY:
            return await self.ask(lambda transaction: function(transaction.connection, *arguments))

        def call() -> T:
            from penstock.events.schema import reported

            if opened.connection is None:
                opened.connection = opened.store.reader()
            with reported(opened.store.path, "read"):
                return function(opened.connection, *arguments)

        return await opened.desk.call(call)

    async def known(self, name: str) -> int | None:
        """The number of a topic, or None if nothing was ever published to it and nobody reads it."""
        number = self._numbers.get(name)
        if number is None:
            number = await self.look(find_topic, name)
        return number

    async def number(self, name: str) -> int:
        """The number of a topic, which is created if it isn't there."""
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = await self.ask(open_topic, name)
        return number


def _remade(address: str, durability: Any, max_bytes: int) -> EventLog:
    return EventLog(address, durability=None if durability == "none" else durability, max_bytes=max_bytes)
