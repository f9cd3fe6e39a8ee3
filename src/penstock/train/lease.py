"""Leases: a pool around the workers' pool, which gives each batch its ticket and starts it when that may be.

*States of a task.* It *waits* in the order in which it came, without a worker and without a ticket; it *runs* in the
inner pool, under a ticket; it is *back*. A task whose worker died goes in again at once, under the same ticket: so it
is given to the next free worker before any other. One that kills so many workers that it must be its own fault, fails
as any other does, and its ticket is void. What succeeded keeps its ticket until the gradient is applied, which the
sink tells the tickets.

Everything is synchronous and on the run's loop. ``halt`` forgets what waits; ``abort`` and ``close`` are the inner
pool's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from penstock.place.base import DIED, OK, PENDING, Chain, Outer, Pool, Task
from penstock.train.tickets import Tickets

__all__ = ["Lease"]

_DEATHS = 5
"""Workers that may die over one batch."""


class Lease(Outer):
    """``inner`` makes the pool that does the work."""

    def __init__(
        self,
        chain: Chain,
        workers: int,
        *,
        tickets: Tickets,
        inner: type[Pool],
        done: Callable[[list[Task]], None],
        failed: Callable[[BaseException], None],
        part: Callable[[Task, list[Any]], None] | None = None,
    ) -> None:
        super().__init__(chain, workers, done=done, failed=failed, part=part)
        self._inner = inner(chain, workers, done=self._finished, failed=failed, part=part)
        self._tickets = tickets
        self._waiting: deque[Task] = deque()
        self._leases: dict[int, tuple[int, int]] = {}  # of each running task: its ticket, and how often it was started
        self._halted = False
        tickets.changed = self._start

    @property
    def backlog(self) -> int:
        return self._inner.backlog

    def room(self) -> int:
        return max(0, 2 * self.workers - len(self._waiting) - len(self._leases))

    def submit(self, tasks: Sequence[Task]) -> None:
        self._waiting.extend(tasks)
        self._start()

    def _start(self) -> None:
        starting = []
        while self._waiting and not self._halted and self._tickets.may_start():
            task = self._waiting.popleft()
            self._leases[id(task)] = self._tickets.start(), 1
            starting.append(task)
        if starting:
            self._inner.submit(starting)

    def _finished(self, tasks: list[Task]) -> None:
        back, again = [], []
        for task in tasks:
            ticket, starts = self._leases.pop(id(task))
            if task.outcome == DIED and starts <= _DEATHS and not self._halted:
                self._leases[id(task)] = ticket, starts + 1
                task.outcome, task.error, task.seconds = PENDING, None, None
                again.append(task)
                continue
            if task.outcome == OK:
                task.value.ticket = ticket
            else:
                self._tickets.void(ticket)
            back.append(task)
        if again:
            self._inner.submit(again)
        if back:
            self.done(back)
        self._start()

    def halt(self) -> None:
        self._halted = True
        self._waiting.clear()
        self._inner.halt()
