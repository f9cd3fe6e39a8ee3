"""A topic: events are published to it, read again by position and time, and delivered to groups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Unpack

from penstock.errors import DecodeError, LogError, PlanError
from penstock.events.clock import calendar, loop_calendar
from penstock.events.event import Codec, DeadLetter, Event, moment
from penstock.events.reading import (
    GroupInfo,
    Stored,
    forget_group,
    groups_of,
    letters,
    requeue,
    seek,
    stored,
    trim,
)
from penstock.events.schema import SPAN
from penstock.events.sink import TopicSink
from penstock.events.source import GroupSource
from penstock.events.subscription import Subscription
from penstock.flow.flow import Flow
from penstock.flow.retry import Retry
from penstock.flow.stage import Defaults

if TYPE_CHECKING:
    from penstock.events.log import EventLog

__all__ = ["Topic"]

T = TypeVar("T")

_PAGE = 512


class Topic(Generic[T]):
    """A topic of a log, made by ``EventLog.topic``. Its first event creates it.

    >>> import asyncio, penstock as ps
    >>> async def main() -> list[int]:
    ...     async with ps.EventLog(":memory:") as log:
    ...         numbers = log.topic("numbers", type=int)
    ...         await numbers.publish_many([1, 2, 3])
    ...         return [event.value async for event in numbers.read(start=1)]
    >>> asyncio.run(main())
    [2, 3]
    """

    def __init__(self, log: EventLog, name: str, type: Any = None) -> None:
        if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 200:
            raise PlanError(f"topic({name!r})", "Give a name of 1 to 200 printable characters")
        self.log = log
        self.name = name
        self.codec = Codec(name, type, log.max_bytes)

    def __repr__(self) -> str:
        return f"Topic({self.log.address!r}, {self.name!r})"

    # -- publishing -------------------------------------------------------------------------------------------------

    async def publish(
        self,
        value: T,
        *,
        key: str | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        at: datetime | None = None,
    ) -> int:
        """Append an event; its position in the topic, once it is durable.

        ``key``: events of one key are delivered in order. ``id``: an event whose id is in the topic (until that is
        trimmed) isn't published again, and the position is that of the first. ``headers``: text by text, beside the
        value. ``at``: not to be delivered before then; under ``penstock.testing.run_virtual`` as long after now, by the
        virtual clock, as it lies ahead by the calendar.

        Raises CannotEncode, PayloadTooLarge and PlanError before anything is published; Closed; WriteFailed for a full
        or broken disk. After WriteFailed or a cancellation it isn't known whether it was published: do it again with
        the same ``id``.
        """
        event = self.codec.pack(value, key, id, headers, at)
        if event.due is not None:
            event = event._replace(due=event.due - calendar() + loop_calendar(asyncio.get_running_loop()))
        number = self.log.number_now(self.name)
        if number is None:
            number = await self.log.number(self.name)
        return await self.log.writer.publish(number, event)

    async def publish_many(
        self,
        values: Iterable[T],
        *,
        key: Callable[[T], str | None] | None = None,
        id: Callable[[T], str | None] | None = None,
    ) -> list[int]:
        """Append many events, all or none of them; their positions. ``key``, ``id``: functions of a value.

        Raises what ``publish`` raises; a value that can't be published leaves all unpublished.
        """
        events = [self.codec.pack(value, key and key(value), id and id(value)) for value in values]
        number = await self.log.number(self.name)
        return await self.log.writer.publish_many(number, events) if events else []

    def publish_sync(
        self,
        value: T,
        *,
        key: str | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        at: datetime | None = None,
    ) -> int:
        """``publish`` for code that isn't async; it works while an event loop runs, too."""
        from penstock.flow.sync import run_blocking

        return run_blocking(lambda: self.publish(value, key=key, id=id, headers=headers, at=at))

    # -- reading again ----------------------------------------------------------------------------------------------

    async def read(
        self, start: int | datetime | None = None, stop: int | datetime | None = None, *, follow: bool = False
    ) -> AsyncGenerator[Event[T], None]:
        """The events from ``start`` (a position or a time; default: the first) up to but not including ``stop``.

        ``follow``: wait for more at the end. No group is involved, and nothing is acknowledged. Reading takes short
        looks at the log, so it never holds back what is written. Raises DecodeError for an event that isn't of the
        topic's type, LogError for one that was damaged, Closed. Cancelling leaves nothing.
        """
        number = await self.log.number(self.name) if follow else await self.log.known(self.name)
        if number is None:
            return
        at = await self._position(number, start)
        end = None if stop is None else await self._position(number, stop)
        while end is None or at < end:
            seen = self.log.store.look(number)
            page = await self.log.look(stored, number, at, _PAGE)
            for one in page:
                if end is not None and one.seq >= end:
                    return
                yield self.event(one)
                at = one.seq + 1
            if not page:
                if not follow:
                    return
                await self.log.store.changed(number, seen, None)

    async def _position(self, number: int, wanted: int | datetime | None) -> int:
        if wanted is None:
            return 0
        if isinstance(wanted, datetime):
            return await self.log.look(seek, number, int(wanted.timestamp() * 1e6))
        if not isinstance(wanted, int) or not 0 <= wanted < SPAN:
            raise PlanError(f"topic {self.name!r}: a position of {wanted!r}", "Give a number from 0, or a datetime")
        return wanted

    def event(self, one: Stored) -> Event[T]:
        """A stored event with its value. Raises DecodeError, LogError."""
        value = self.codec.unpack(one.body, one.seq, self.log.address)
        headers = self.codec.headers(one.headers)
        return Event(value, one.seq, moment(one.time), one.key, one.id, headers)

    # -- groups -----------------------------------------------------------------------------------------------------

    def subscribe(
        self,
        group: str,
        *,
        lease: float = 30.0,
        max_attempts: int = 5,
        backoff: float = 1.0,
        in_flight: int = 100,
        start: int | Literal["earliest", "latest"] = "earliest",
        until: Literal["drained"] | None = None,
    ) -> Subscription[T]:
        """Deliveries to a group, for a loop written by hand: ``async with topic.subscribe("g") as deliveries``.

        ``lease``: seconds after which what a reader holds is given to others, if the reader stands still; it is renewed
        by itself for as long as the process works, however long a handler takes. ``max_attempts``: deliveries of an
        event, after which it goes to the dead letters; ``backoff``: seconds before the second, doubled for each further
        one up to a minute. ``in_flight``: deliveries handed over and not yet settled. ``start``: where a new group
        begins. ``until="drained"``: end when nothing is left to be delivered.

        Raises PlanError for parameters out of range; on entering GroupInUse, Closed, LogError.
        """
        return Subscription(
            self,
            group,
            lease=lease,
            max_attempts=max_attempts,
            backoff=backoff,
            in_flight=in_flight,
            start=start,
            until=until,
        )

    def flow(
        self,
        group: str,
        *,
        lease: float = 30.0,
        max_attempts: int = 5,
        start: int | Literal["earliest", "latest"] = "earliest",
        exclusive: bool | None = None,
        name: str | None = None,
        id: str | Callable[[T], Any] | None = None,
        **defaults: Unpack[Defaults],
    ) -> Flow[T]:
        """The events of a group as a flow, for jobs: ``topic.flow("g").map(f).to(log.topic("out"))``.

        Outputs in a topic of the same log count together with the acknowledgement: exactly once, for several
        processes in the group too. Into a file it is exactly once for a job that reads the group alone: ``exclusive``,
        the default there (False: at least once). Into a function it is at least once. The job runs until it is stopped;
        ``run(until="drained")`` ends when nothing is left.

        An event whose stage fails is tried again, ``max_attempts`` times in all with a backoff from 0.1 s up, and goes
        to the dead letters then, at once for a ``TypeError`` and its like, and where a ``map_state`` fails, which is
        never tried again; ``retry=`` and ``on_error=`` (here or at a stage) change that. ``lease``, ``start``: see
        ``subscribe``; ``name``, ``id`` and the defaults: see ``Flow``.

        Raises PlanError for parameters out of range; the job raises GroupInUse.
        """
        source: Any = GroupSource(self, group, lease=lease, max_attempts=max_attempts, start=start, exclusive=exclusive)
        given: dict[str, Any] = {
            "on_error": "dead_letter",
            "retry": Retry(attempts=max_attempts - 1, backoff=0.1, jitter=False),
        }
        given.update(defaults)
        return Flow(source, name=name, id=id, **given)

    def as_sink(self, key: Callable[[Any], str | None] | None = None) -> TopicSink:
        """This topic as an output, with a ``key`` for each: ``.to(topic.as_sink(key=...))``; ``.to(topic)`` has
        none."""
        return TopicSink(self, key)

    async def groups(self) -> list[GroupInfo]:
        """The groups of this topic as they stand, by name. Raises Closed, LogError."""
        number = await self.log.known(self.name)
        return [] if number is None else await self.log.look(groups_of, number)

    async def remove_group(self, group: str) -> bool:
        """Forget a group that isn't used any more, with its dead letters and states; whether there was one.

        Until then it holds back ``trim``. Readers that it still has find their leases lost.
        """
        number = await self.log.known(self.name)
        return number is not None and await self.log.ask(forget_group, number, group)

    async def trim(
        self,
        *,
        before: int | datetime | None = None,
        keep: int | None = None,
        max_bytes: int | None = None,
        force: bool = False,
    ) -> int:
        """Remove the oldest events and give their space back; how many. Each limit given counts.

        ``before``: a position or a time; ``keep``: this many events stay; ``max_bytes``: this much payload stays. What
        a group still needs, a dead letter included, is never removed, unless ``force``. Raises PlanError.
        """
        for what, value in (("keep", keep), ("max_bytes", max_bytes)):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise PlanError(f"trim({what}={value!r})", "Give a whole number from 0")
        number = await self.log.known(self.name)
        if number is None:
            return 0
        position = None if before is None else await self._position(number, before)
        return await self.log.ask(trim, number, position, keep, max_bytes, force)

    async def dead(self, group: str | None = None) -> AsyncGenerator[DeadLetter[T], None]:
        """The dead letters of this topic, or of one group, in the order they died.

        An event that can't be decoded has its bytes as value, one that was damaged None. Raises Closed, LogError.
        """
        number = await self.log.known(self.name)
        if number is None:
            return
        after = 0
        while page := await self.log.look(letters, number, group, after, _PAGE):
            for letter, name, attempts, stage, reason, error, time, one in page:
                event: Event[Any]
                try:
                    event = self.event(one)
                except (DecodeError, LogError):
                    event = Event(one.body, one.seq, moment(one.time), one.key, one.id, self.codec.headers(one.headers))
                yield DeadLetter(name, event, attempts, stage, reason, error, moment(time))
                after = letter

    async def requeue(self, group: str | None = None, positions: Iterable[int] | None = None) -> int:
        """Deliver dead letters again, with their attempts counted anew; how many.

        ``group``: only its; ``positions``: only those. Their place in the order of their keys is lost.
        """
        chosen = None if positions is None else list(positions)
        number = await self.log.known(self.name)
        return 0 if number is None else await self.log.ask(requeue, number, group, chosen)
