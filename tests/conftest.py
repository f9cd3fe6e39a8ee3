"""For all tests: Hypothesis without deadlines of wall-clock time, the same examples in every run; signals as usual."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "usual", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("searching", settings.get_profile("usual"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell leaves it for what it starts in the background: children would inherit that, and never hear Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _nothing_is_left_outside() -> Iterator[None]:
    """What is counted as at work outside the loop is counted out again: a leak would hang the virtual clock."""
    from penstock.place.base import outside

    before = outside.count
    yield
    assert outside.count == before


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this test starts is killed before it could say which lines it ran; measuring would only make it slow."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
