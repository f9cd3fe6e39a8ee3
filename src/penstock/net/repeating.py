"""Which fetches are tried again: those that say of themselves that it may help and does no harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from penstock.errors import FetchError
from penstock.flow.retry import Retry, as_retry

__all__ = ["as_fetch_retry", "worth_it"]

_RETRIES = 4


def worth_it(error: BaseException) -> bool:
    """Whether an attempt that failed so is worth another one, and does no harm."""
    return isinstance(error, FetchError) and error.retryable


def as_fetch_retry(value: Any) -> Retry:
    """The Retry that ``retry=value`` means, ``on`` what is ``worth_it`` unless it says else. Raises PlanError."""
    given = as_retry(_RETRIES if value is None else value)
    assert given is not None
    return replace(given, on=worth_it) if given.on is Exception else given
