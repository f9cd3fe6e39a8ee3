"""How far workers may be apart, and what becomes of a gradient from parameters that have changed since.

``fit`` leases each batch with a *ticket*, a number in the order in which batches start. A consistency is one rule over
tickets, ``may_start``: whether the next one may start, given those that have started and aren't applied yet. No worker
holds a clock and none waits: a batch that may not start yet isn't given to anybody.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from penstock.errors import PlanError

__all__ = ["ASP", "BSP", "SSP", "Consistency"]


class Consistency(ABC):
    """What the parameter server asks of ``ASP``, ``SSP`` and ``BSP``."""

    in_rounds = False
    """Whether gradients are applied together, as many as there are workers, and in the order of their tickets."""

    @abstractmethod
    def may_start(self, ticket: int, oldest: int, applied: int, workers: int) -> bool:
        """Whether this ticket may start, while ``oldest`` is the first that isn't applied (itself, if there is no
        other) and ``applied`` is how many are."""

    def damping(self, staleness: int) -> float:
        """What the learning rate is multiplied with for a gradient that is so many updates late."""
        return 1.0

    def drops(self, staleness: int) -> bool:
        """Whether a gradient that is so many updates late isn't applied."""
        return False


class _Tolerant(Consistency):
    """What ASP and SSP share: gradients are applied as they come, late or not."""

    scale: bool
    drop: int | None

    def damping(self, staleness: int) -> float:
        """What the learning rate is multiplied with for a gradient that is so many updates late."""
        return 1 / staleness if self.scale and staleness > 1 else 1.0

    def drops(self, staleness: int) -> bool:
        """Whether a gradient that is so many updates late isn't applied."""
        return self.drop is not None and staleness > self.drop

    def _check(self) -> None:
        name = type(self).__name__
        if not isinstance(self.scale, bool):
            raise PlanError(f"{name}(scale={self.scale!r})", "Give True to divide the rate by the staleness, or False")
        if self.drop is not None and not _is_count(self.drop, 0):
            raise PlanError(f"{name}(drop={self.drop!r})", "Give the most updates that a gradient may be late, or None")


@dataclass(frozen=True)
class ASP(_Tolerant):
    """Asynchronous parallel: nobody waits for anybody, and every gradient is applied to the parameters as they are.

    A gradient is τ updates stale if τ others were applied since its parameters were pulled. ``scale``: divide the
    learning rate by τ (for τ of 2 and more), which keeps training stable where many workers make gradients stale, and
    slows it where they wouldn't have done harm (Zhang et al. 2016, "Staleness-aware async-SGD"). ``drop``: gradients
    staler than this aren't applied at all, and the server counts them. Raises PlanError for values out of range.

    >>> ASP(scale=True).damping(4), ASP().damping(4), ASP(drop=8).drops(9)
    (0.25, 1.0, True)
    """

    scale: bool = False
    drop: int | None = None

    def __post_init__(self) -> None:
        self._check()

    def may_start(self, ticket: int, oldest: int, applied: int, workers: int) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class SSP(_Tolerant):
    """Stale synchronous parallel: nobody gets further ahead than ``s`` rounds of all workers (Ho et al. 2013).

    A batch starts only while its ticket is at most ``s`` times the number of workers after the oldest one that isn't
    applied. Tickets are given out when batches start, so a worker that is slow for long simply takes fewer of them, and
    holds the others up by one batch at the most. ``scale`` and ``drop``: see ``ASP``. Raises PlanError for values out
    of range.

    >>> SSP(3).may_start(ticket=10, oldest=4, applied=9, workers=2)
    True
    >>> SSP(3).may_start(ticket=11, oldest=4, applied=10, workers=2)
    False
    """

    s: int
    scale: bool = False
    drop: int | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.s, 1):
            raise PlanError(
                f"SSP(s={self.s!r})",
                "Give how many rounds of all workers the fastest may be ahead, 1 or more; ps.BSP() waits for all",
            )
        self._check()

    def may_start(self, ticket: int, oldest: int, applied: int, workers: int) -> bool:
        """Whether it is near enough to the oldest."""
        return ticket - oldest <= self.s * workers


@dataclass(frozen=True)
class BSP(Consistency):
    """Bulk synchronous parallel: rounds of one batch for each worker, whose gradients are averaged into one update.

    All gradients of a round are computed from the same parameters and added up in the order of the batches, so that
    training gives the same bits whichever worker is faster, wherever they run, and if it is killed and run again. With
    W workers it is training with batches W times as large: W belongs to what is reproduced. A last round that is
    short is averaged over what it has. Everybody waits for the slowest of each round.

    >>> BSP().may_start(ticket=3, oldest=2, applied=0, workers=4), BSP().may_start(4, 2, 0, 4)
    (True, False)
    """

    in_rounds = True

    def may_start(self, ticket: int, oldest: int, applied: int, workers: int) -> bool:
        """Whether it belongs to the round that is being computed."""
        return ticket < (applied // workers + 1) * workers


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
