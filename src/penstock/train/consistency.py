"""How far workers may be apart, and what becomes of a gradient from parameters that have changed since."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.errors import PlanError

__all__ = ["ASP"]


@dataclass(frozen=True)
class ASP:
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
        if not isinstance(self.scale, bool):
            raise PlanError(f"ASP(scale={self.scale!r})", "Give True to divide the rate by the staleness, or False")
        if self.drop is not None and (isinstance(self.drop, bool) or not isinstance(self.drop, int) or self.drop < 0):
            raise PlanError(f"ASP(drop={self.drop!r})", "Give the most updates that a gradient may be late, or None")

    def damping(self, staleness: int) -> float:
        """What the learning rate is multiplied with."""
        return 1 / staleness if self.scale and staleness > 1 else 1.0

    def drops(self, staleness: int) -> bool:
        """Whether a gradient that is so stale isn't applied."""
        return self.drop is not None and staleness > self.drop
