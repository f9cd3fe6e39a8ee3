"""Tickets: the numbers under which batches are leased, and when the next one may start.

*States of a ticket.* It is *out* from when its batch starts until its gradient is applied; then it is gone. If the
batch fails for good or is taken back, the ticket is *void*: nobody waits for it. A worker that dies changes nothing:
its batch starts again, elsewhere, under the same ticket.

At most as many tickets are out as there are workers, whatever the consistency: a worker's next batch starts when its
last gradient has been applied, so it is computed from parameters that hold it, and no more gradients than workers lie
about. In rounds, a void ticket's number is given to the next batch, or its round would never be full.

All of it is synchronous and belongs to one event loop. ``changed`` is called when tickets were applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from penstock.train.consistency import Consistency

__all__ = ["Tickets"]


class Tickets:
    """The tickets of one training run.

    >>> from penstock.train.consistency import SSP
    >>> tickets = Tickets(SSP(1), workers=2)
    >>> tickets.start(), tickets.start(), tickets.may_start()
    (0, 1, False)
    >>> tickets.applied([1])
    >>> tickets.start()
    2
    """

    def __init__(self, consistency: Consistency, workers: int) -> None:
        self.consistency = consistency
        self.workers = workers
        self.changed: Callable[[], None] = lambda: None
        self._next = 0
        self._applied = 0
        self._out: dict[int, None] = {}  # in the order of their numbers, but for those that were void
        self._void: list[int] = []

    @property
    def out(self) -> tuple[int, ...]:
        """Those whose batches have started and whose gradients aren't applied."""
        return tuple(self._out)

    def may_start(self) -> bool:
        """Whether a batch may start now."""
        if len(self._out) >= self.workers:
            return False
        ticket = self._void[0] if self._void else self._next
        oldest = min(self._out, default=ticket)
        return self.consistency.may_start(ticket, min(oldest, ticket), self._applied, self.workers)

    def start(self) -> int:
        """The ticket of a batch that starts; ask ``may_start`` first."""
        if self._void:
            ticket = heappop(self._void)
        else:
            ticket = self._next
            self._next += 1
        self._out[ticket] = None
        return ticket

    def void(self, ticket: int) -> None:
        """Nothing will be applied under this ticket."""
        del self._out[ticket]
        if self.consistency.in_rounds:
            heappush(self._void, ticket)

    def applied(self, tickets: Iterable[int]) -> None:
        """The gradients of these are in the parameters."""
        for ticket in tickets:
            del self._out[ticket]
            self._applied += 1
        self.changed()
