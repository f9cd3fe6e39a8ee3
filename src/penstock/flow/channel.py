"""What connects two segments: a bounded queue of tasks on one loop, whose end is a state and not an item.

One side puts, the other takes, both synchronously; nobody awaits inside a channel. ``on_items`` is called when
something was put or the channel closed, ``on_room`` when something was taken. The bound is what the putting side
respects by asking ``room`` first: a single put is never refused, so an expansion stays whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from penstock.place.base import Task

__all__ = ["Channel"]


def _nobody() -> None:
    """Called until the other side is connected."""


class Channel:
    """Tasks on their way from one segment to the next, at most about ``capacity`` of them.

    With ``clock``, it remembers when each put came, so that ``oldest`` can say since when the first task waits.
    """

    __slots__ = ("_clock", "_stamps", "capacity", "closed", "items", "on_items", "on_room")

    def __init__(self, capacity: int, clock: Callable[[], float] | None = None) -> None:
        self.capacity = capacity
        self.items: deque[Task] = deque()
        self.closed = False
        self.on_items: Callable[[], None] = _nobody
        self.on_room: Callable[[], None] = _nobody
        self._clock = clock
        self._stamps: deque[list[float]] = deque()  # [how many of this put are left, when it came]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def room(self) -> int:
        return self.capacity - len(self.items)

    @property
    def ended(self) -> bool:
        """Closed, and everything in it was taken."""
        return self.closed and not self.items

    @property
    def oldest(self) -> float:
        """When the task that would be taken next was put, by the channel's clock."""
        return self._stamps[0][1]

    def put(self, tasks: Sequence[Task]) -> None:
        """Add these at the end."""
        if not tasks:
            return
        self.items.extend(tasks)
        if self._clock is not None:
            self._stamps.append([len(tasks), self._clock()])
        self.on_items()

    def take(self, most: int) -> list[Task]:
        """Remove and return up to ``most`` tasks from the front."""
        items = self.items
        if most >= len(items):
            taken = list(items)
            items.clear()
            self._stamps.clear()
        else:
            popleft = items.popleft
            taken = [popleft() for _ in range(most)]
            left = most
            while self._stamps and left > 0:
                stamp = self._stamps[0]
                used = min(left, stamp[0])
                stamp[0] -= used
                left -= int(used)
                if not stamp[0]:
                    self._stamps.popleft()
        if taken:
            self.on_room()
        return taken

    def withdraw(self, task: Task) -> bool:
        """Remove a task that nobody wants any more; False if it isn't here."""
        try:
            at = self.items.index(task)
        except ValueError:
            return False
        del self.items[at]
        for stamp in self._stamps:
            if at < stamp[0]:
                stamp[0] -= 1
                if not stamp[0]:
                    self._stamps.remove(stamp)
                break
            at -= int(stamp[0])
        self.on_room()
        return True

    def close(self) -> None:
        """Say that nothing more will come. What is inside can still be taken."""
        if not self.closed:
            self.closed = True
            self.on_items()
