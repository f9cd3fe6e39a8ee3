"""Coverage costs more than the work itself where a test makes a hundred thousand steps through a few lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["unmeasured"]


@contextmanager
def unmeasured() -> Iterator[None]:
    """What runs here isn't counted as covered; other tests of the same code are."""
    module = sys.modules.get("coverage")
    coverage = module.Coverage.current() if module is not None else None
    if coverage is None:
        yield
        return
    coverage.stop()
    try:
        yield
    finally:
        coverage.start()
