"""Each test of the contract runs on every kind of log."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock as ps


@pytest.fixture(params=["memory", "file"])
def make_log(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., ps.EventLog]:
    """Makes logs of one kind; in a file it is the same one each time."""

    def make(**options: Any) -> ps.EventLog:
        return ps.EventLog(":memory:" if request.param == "memory" else tmp_path / "events.db", **options)

    return make


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    threads = threading.enumerate()
    yield
    gc.collect()
    left = [thread for thread in threading.enumerate() if thread not in threads]
    left = [thread for thread in left if thread.name != "penstock-loop" and not thread.name.startswith("uvloop_")]
    for thread in left:
        thread.join(5)  # it may be on its last line
    assert [thread.name for thread in left if thread.is_alive()] == []
