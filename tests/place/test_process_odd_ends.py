"""Workers that end where nobody expects it: what they had is charged to whom it belongs, and nothing waits for them."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import pytest

import penstock as ps
from penstock.errors import WorkerDied

pytestmark = pytest.mark.usefixtures("unmeasured")  # flows with processes measure what a worker runs

HERE = os.getpid()


class Trap:
    """Ends any process but this one where it is read."""

    def __init__(self, number: int, pid: int, deadly: bool) -> None:
        self.number, self.pid, self.deadly = number, pid, deadly

    def __reduce__(self) -> Any:
        return spring, (self.number, self.pid, self.deadly)


def spring(number: int, pid: int, deadly: bool) -> Trap:
    if deadly and os.getpid() != pid:
        os._exit(7)
    return Trap(number, pid, deadly)


def number_of(trap: Trap) -> int:
    return trap.number


def test_an_item_that_ends_the_worker_that_reads_it_is_charged_itself() -> None:
    traps = [Trap(n, HERE, n == 5) for n in range(40)]
    found: list[Any] = ps.Flow(traps).map(number_of, place="process", workers=1, on_error="keep").collect_sync()
    assert [one for one in found if isinstance(one, int)] == [n for n in range(40) if n != 5]
    assert found[5].item.number == 5
    assert "exited with code 7" in found[5].error


def leave_a_thread(n: int) -> int:
    if n == 3:
        threading.Thread(target=time.sleep, args=(1e6,)).start()
        sys.exit(4)
    return n


def test_threads_of_the_user_s_dont_keep_a_worker_that_exits() -> None:
    flow = ps.Flow(range(8)).map(leave_a_thread, place="process", workers=1, on_error="keep")
    found: list[Any] = flow.collect_sync()
    assert [one for one in found if isinstance(one, int)] == [0, 1, 2, 4, 5, 6, 7]
    assert "exited with code 4" in found[3].error


class Ends:
    def __call__(self, n: int) -> int:
        return n

    def close(self) -> None:
        os._exit(3)


def test_a_worker_that_ends_in_close_is_told() -> None:
    with pytest.raises(WorkerDied, match="exited with code 3 while it worked on the closing of its objects"):
        ps.Flow(range(8)).map(ps.per_worker(Ends), place="process", workers=2).collect_sync()
