"""Which fetches are tried again: those that say of themselves that it may help and does no harm."""

from __future__ import annotations

from typing import Any

from penstock.errors import FetchError
from penstock.flow.retry import Retry, as_retry

__all__ = ["FetchRetry", "as_fetch_retry", "worth_it"]

_RETRIES = 4


class FetchRetry(Retry):
    """A Retry for fetches: by default it repeats what says of itself that it may be repeated."""

    __slots__ = ()

    def repeats(self, error: BaseException, attempts: int) -> bool:
        """Whether to try again. An error that every other item would meet too is raised: that stops the run."""
        if isinstance(error, FetchError) and error.stops_run:
            raise error
        return Retry.repeats(self, error, attempts)


def worth_it(error: BaseException) -> bool:
    """Whether an attempt that failed so is worth another one, and does no harm."""
    return isinstance(error, FetchError) and error.retryable


def as_fetch_retry(value: Any) -> FetchRetry:
    """The FetchRetry that ``retry=value`` means. Raises PlanError."""
    given = as_retry(_RETRIES if value is None else value)
    assert given is not None
    on = worth_it if given.on is Exception else given.on
    return FetchRetry(given.attempts, given.backoff, given.jitter, on)
