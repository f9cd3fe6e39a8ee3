"""Coverage costs more than the work itself where a test makes a hundred thousand steps through a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coverage import Coverage

__all__ = ["unmeasured"]


@contextmanager
def unmeasured() -> Iterator[None]:
    """What runs here isn't counted as covered; other tests of the same code are."""
    coverage = Coverage.current()
    if coverage is None:
        yield
        return
    coverage.stop()
    try:
        yield
    finally:
        coverage.start()
