"""How many items may be ahead of whoever takes them: as many as were taken in the last few milliseconds.

A bound in items alone is wrong for everybody. A thousand of a microsecond each are needed to keep the places busy; a
thousand images ahead of a consumer who takes one in ten milliseconds fill the memory. So a bound starts small and
doubles whenever all that it allows was taken within HORIZON; where less than half of it was, it is halved. What is
ahead is then what HORIZON of the consumer's work holds, or the least that keeps the workers busy.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["HORIZON", "Demand"]

HORIZON = 0.02
"""Seconds of the consumer's work that may be ahead."""


class Demand:
    """A bound that follows demand: ``size`` items, from ``least`` up to ``most``. Time is that of ``clock``."""

    __slots__ = ("_clock", "_most", "_since", "_taken", "least", "size")

    def __init__(self, clock: Callable[[], float], least: int, most: int) -> None:
        self._clock = clock
        self._most = most
        self._taken = 0
        self._since = clock()
        self.least = least
        self.size = least

    def note(self, taken: int) -> int:
        """So many more were taken; returns the bound that holds from now on."""
        self._taken += taken
        self.size = max(self.size, self.least)  # which may have risen
        now = self._clock()
        elapsed = now - self._since
        if elapsed < HORIZON:
            if self._taken < self.size:
                return self.size
            self.size = min(2 * self.size, self._most)
        elif self._taken * HORIZON < self.size * elapsed / 2:
            self.size //= 2
        self._taken = 0
        self._since = now
        self.size = max(self.size, self.least)
        return self.size
