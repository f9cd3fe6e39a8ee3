"""A place in a group, as subscriptions and flows have one: it joins, claims, and says what became of deliveries."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from penstock.errors import PlanError
from penstock.events.clock import boot_time, loop_calendar, loop_time
from penstock.events.groups import (
    Claimed,
    Letter,
    Ranges,
    acknowledge,
    acknowledge_each,
    bury,
    claim,
    extend,
    join,
    leave,
    release,
)
from penstock.events.reading import open_group
from penstock.flow.commit import uninterrupted

if TYPE_CHECKING:
    from penstock.events.topic import Topic

__all__ = ["Reader"]


class Reader:
    """A place in a group: joins it, claims, and says what became of deliveries. ``join`` comes first."""

    def __init__(
        self,
        topic: Topic[Any],
        group: str,
        *,
        lease: float,
        max_attempts: int,
        start: int | str,
        alone: bool = False,
        what: str = "a subscription",
    ) -> None:
        if not isinstance(group, str) or not group or not group.isprintable():
            raise PlanError(f"group={group!r}", "Give a name of printable characters")
        if isinstance(lease, bool) or not isinstance(lease, (int, float)) or not 0.1 <= lease <= 86_400:
            raise PlanError(f"lease={lease!r}", "Give seconds, from 0.1 to 86,400")
        if not isinstance(max_attempts, int) or max_attempts < 1:
            raise PlanError(f"max_attempts={max_attempts!r}", "Give a number from 1")
        if not (start in ("earliest", "latest") or (isinstance(start, int) and start >= 0)):
            raise PlanError(f"start={start!r}", 'Give "earliest", "latest" or a position')
        self.topic = topic
        self.group = group
        self.lease = float(lease)
        self.max_attempts = max_attempts
        self.start = start
        self.alone = alone
        self.what = what
        self.owner = 0
        self.number = 0
        self.name = (0, 0, group)

    async def join(self) -> None:
        """Become an owner of the group. Raises GroupInUse, Closed, LogError. Cancelled, ``leave`` undoes it."""
        await uninterrupted(self._join())

    async def _join(self) -> None:
        log = self.topic.log
        self.number = await log.number(self.topic.name)
        group = await log.ask(open_group, self.number, self.group, self.start)
        self.name = (group, self.number, self.group)
        store = log.store
        store.drop(self.owner)
        self.owner = await log.ask(
            join, self.name, store.session, self.lease, self.max_attempts, self.alone, self.what, store.is_alive
        )
        store.keep(self.owner, self.lease)

    async def claim(self, most: int) -> Claimed:
        """Up to so many deliveries. Raises LeaseLost."""
        log = self.topic.log
        loop = asyncio.get_running_loop()
        now, today = loop_time(loop), loop_calendar(loop)
        return await log.ask(claim, self.name, self.owner, most, now, today, log.store.is_alive)

    def pause(self, claimed: Claimed) -> float | None:
        """Seconds until there may be more to claim than was, if nothing is published meanwhile; None: never."""
        times = [] if claimed.due is None else [claimed.due - loop_time(asyncio.get_running_loop())]
        if claimed.lease_end is not None:
            times.append(claimed.lease_end - boot_time())
        return max(0.0, min(times)) + 0.001 if times else None

    async def acknowledge(self, owner: int, ranges: Ranges) -> list[int]:
        """These are done with; returns those that weren't this owner's."""
        return await self.topic.log.ask(acknowledge, self.name[0], self.number, owner, ranges)

    async def acknowledge_one(self, owner: int, seq: int) -> bool:
        """This one is done with; whether it wasn't this owner's. Cancelling waits for that."""
        writer = self.topic.log.writer
        place = self.name[0], self.number, owner
        return await writer.finished(writer.ask_alike(acknowledge_each, *place, item=seq))

    async def release(self, owner: int, given: list[tuple[int, float, bool]]) -> list[int]:
        """Give back (number, due, unused)."""
        return await self.topic.log.ask(release, self.name[0], self.number, owner, given)

    async def bury(self, owner: int, given: list[Letter]) -> list[int]:
        """These are given up for good."""
        return await self.topic.log.ask(bury, self.name[0], self.number, owner, given)

    async def extend(self, owner: int, seconds: float) -> bool:
        """Keep the lease for so long at least, whatever happens; False if it is lost."""
        return await self.topic.log.ask(extend, owner, seconds)

    async def leave(self) -> None:
        """Give back what is left and stop being an owner. Safe if the log was closed meanwhile, or it never joined."""
        log = self.topic.log
        if self.owner and log.is_open:
            log.store.drop(self.owner)
            await log.ask(leave, self.name[0], self.number, self.owner)
        self.owner = 0
