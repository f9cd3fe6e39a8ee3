"""When a failed attempt is tried again, and after how long."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from penstock.errors import (
    AbandonedThreads,
    BatchMismatch,
    CannotEncode,
    CannotSend,
    DecodeError,
    ExpansionTooLarge,
    PlanError,
    StrayException,
    Throttled,
)

__all__ = ["NEVER_RETRIED", "Retry", "as_retry"]

NEVER_RETRIED: tuple[type[BaseException], ...] = (
    TypeError,
    AttributeError,
    NameError,
    ImportError,
    SyntaxError,
    NotImplementedError,
    AssertionError,
    MemoryError,
    RecursionError,
    PlanError,
    DecodeError,
    CannotSend,
    CannotEncode,
    BatchMismatch,
    ExpansionTooLarge,
    AbandonedThreads,
    Throttled,
)
"""Errors of the program and not of the moment: another attempt would fail the same way."""

_LONGEST = 60.0


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and when a failed item is tried again; ``retry=8`` means ``Retry(attempts=8)``.

    ``attempts``: attempts after the first one, so a function is called at most ``attempts + 1`` times.
    ``backoff``: seconds before the second attempt, doubled for each further one up to a minute. ``jitter``:
    wait a random part of that (full jitter), so that items that failed together don't come back together.
    ``on``: what is worth another attempt: an exception type, a tuple of them, or a function of the exception.
    A ``TypeError`` and its like are never repeated, whatever ``on`` says: another attempt would fail the same way.

    A waiting item holds no worker. Raises PlanError for values out of range.

    >>> import penstock as ps
    >>> ps.Retry(attempts=3, backoff=0.1, jitter=False).delay(3)
    0.4
    """

    attempts: int = 3
    backoff: float = 0.5
    jitter: bool = True
    on: type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool] = Exception

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 0:
            raise PlanError(f"Retry(attempts={self.attempts!r})", "Give a whole number of further attempts, 0 or more")
        if isinstance(self.backoff, bool) or not isinstance(self.backoff, (int, float)) or not 0 <= self.backoff < inf:
            raise PlanError(f"Retry(backoff={self.backoff!r})", "Give seconds, 0 or more")
        if not isinstance(self.jitter, bool):
            raise PlanError(f"Retry(jitter={self.jitter!r})", "Give True for a random part of the wait, or False")
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds) and (
            isinstance(self.on, (type, tuple)) or not callable(self.on)
        ):
            raise PlanError(f"Retry(on={self.on!r})", "Give exception types, or a function of the exception")

    def repeats(self, error: BaseException, attempts: int) -> bool:
        """Whether an item that has been tried ``attempts`` times and got ``error`` is to be tried again."""
        if attempts > self.attempts or not isinstance(error, Exception) or isinstance(error, NEVER_RETRIED):
            return False
        if isinstance(error, StrayException) and error.__cause__ is not None:
            error = error.__cause__
        if isinstance(self.on, (type, tuple)):
            return isinstance(error, self.on)
        return bool(self.on(error))

    def delay(self, attempts: int) -> float:
        """Seconds to wait after attempt number ``attempts``."""
        longest = min(self.backoff * 2.0 ** min(attempts - 1, 30), _LONGEST)
        return longest * random.random() if self.jitter else longest


def as_retry(value: Any) -> Retry | None:
    """The Retry that ``retry=value`` means."""
    if value is None or isinstance(value, Retry):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"retry={value!r}", "Give a number of further attempts or a Retry(...)")
    return Retry(attempts=value)
