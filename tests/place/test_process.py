from __future__ import annotations

import asyncio
import enum
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import pytest
import uvloop

from penstock.errors import CannotSend, ExpansionTooLarge, StageTimeout, WorkerDied
from penstock.place.base import (
    DIED,
    DROPPED,
    FAILED,
    KEEP,
    OK,
    SPREAD,
    SPREAD_BOUND,
    STREAM,
    TIMED_OUT,
    Chain,
    Step,
    Task,
    outside,
    per_worker,
    worker_index,
)
from penstock.place.process import ProcessPool

pytestmark = pytest.mark.usefixtures("unmeasured")  # flows with processes measure what a worker runs


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module", autouse=True)
def uvloop_was_used() -> None:
    """It keeps a pipe for good from its first loop on."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread, descriptor or child, and nothing counted as outside."""
    gc.collect()
    before, threads = descriptors(), threading.enumerate()
    yield
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if thread not in threads] == []
    assert outside.count == 0
    assert descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


class Rig:
    """A pool and what it called back."""

    def __init__(self, *steps: Any, workers: int = 1, name: str = "stage") -> None:
        chain = Chain(name, tuple(step if isinstance(step, Step) else Step("step", step) for step in steps))
        self.finished: list[Task] = []
        self.parts: list[tuple[Task, list[Any]]] = []
        self.failures: list[BaseException] = []
        self.aborted = False
        self.changed = asyncio.Event()
        self.pool = ProcessPool(chain, workers, done=self.done, failed=self.failed, part=self.part)

    def done(self, tasks: list[Task]) -> None:
        assert not self.aborted
        assert self.pool.in_progress <= self.pool.workers
        self.finished += tasks
        self.changed.set()

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)
        self.changed.set()

    def part(self, task: Task, outputs: list[Any]) -> None:
        assert not self.aborted
        assert not any(task is other for other in self.finished)
        self.parts.append((task, outputs))
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def run(self, values: Sequence[Any]) -> list[Task]:
        tasks = [Task(value) for value in values]
        before = len(self.finished)
        self.pool.submit(tasks)
        await self.until(lambda: len(self.finished) >= before + len(tasks))
        return tasks

    async def __aenter__(self) -> Self:
        await self.pool.open()
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None:
            await self.pool.close()
        else:
            await self.pool.abort()
        self.aborted = True


def go(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


class Gate:
    """Something that functions in a worker wait for, and the test opens."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)

    def wait(self) -> None:
        with open(self.path) as pipe:
            pipe.read()

    async def open(self) -> None:
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        with open(self.path, "w"):
            pass


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def plus_one(x: int) -> int:
    return x + 1


def same(x: Any) -> Any:
    return x


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_every_task_comes_back_once_with_its_result(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        async with Rig(plus_one, workers=2) as rig:
            tasks = await rig.run(range(5000))
            assert [task.value for task in tasks] == list(range(1, 5001))
            assert {task.outcome for task in tasks} == {OK}
            assert len({id(task) for task in rig.finished}) == len(rig.finished) == 5000
            assert any(task.seconds is not None for task in tasks)
            assert 0 < rig.pool.room() <= 2 * 2 * 512

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(main(), 60))


def test_workers_are_other_processes_with_numbers() -> None:
    async def main() -> None:
        async with Rig(lambda _: (os.getpid(), os.getppid(), worker_index()), workers=2) as rig:
            seen: set[Any] = set()
            while len(seen) < 2:
                seen.update([task.value for task in await rig.run(range(50))])
            assert {pid for pid, _, _ in seen} == set(rig.pool.pids)
            assert {parent for _, parent, _ in seen} == {os.getpid()}
            assert {index for _, _, index in seen} == {0, 1}

    go(main)


def test_what_steps_do() -> None:
    async def main() -> None:
        steps = (
            Step("double", lambda x: 2 * x),
            Step("keep", lambda x: x != 4, verb=KEEP),
            Step("spread", lambda x: (x + i for i in range(3)), verb=SPREAD),
        )
        async with Rig(*steps) as rig:
            tasks = await rig.run([1, 2, 3])
            assert [task.outcome for task in tasks] == [OK, DROPPED, OK]
            assert [tasks[0].value, tasks[1].at, tasks[2].value] == [[2, 3, 4], 1, [6, 7, 8]]
            assert tasks[1].at == 1
            later = Task(10, at=2)
            rig.pool.submit([later])
            await rig.until(lambda: len(rig.finished) == 4)
            assert later.value == [10, 11, 12]

    go(main)


def test_a_spread_of_more_than_the_bound_fails_with_what_it_was_given() -> None:
    async def endless(x: int) -> AsyncIterator[int]:
        for index in itertools.count():
            yield index

    async def main() -> None:
        for many in (lambda x: itertools.count(), endless):
            async with Rig(Step("many", many, verb=SPREAD)) as rig:
                (task,) = await rig.run([7])
                assert (task.outcome, type(task.error), task.value) == (FAILED, ExpansionTooLarge, 7)
                assert task.error.bound == SPREAD_BOUND

    go(main)


def test_what_is_awaitable_is_awaited_on_one_loop() -> None:
    async def answer(x: int) -> tuple[int, int]:
        await asyncio.sleep(0)
        return x, id(asyncio.get_running_loop())

    async def letters(pair: tuple[int, int]) -> AsyncIterator[Any]:
        for letter in "ab":
            await asyncio.sleep(0)
            yield letter, pair, worker_index()

    async def main() -> None:
        async with Rig(lambda x: answer(x + 0), Step("letters", letters, verb=SPREAD)) as rig:
            first, second = await rig.run([1, 2])
            loop = first.value[0][1][1]
            assert first.value == [("a", (1, loop), 0), ("b", (1, loop), 0)]
            assert second.value[1] == ("b", (2, loop), 0)

    go(main)


def test_results_of_fast_items_dont_wait_for_a_slow_one(gate: Gate) -> None:
    def slow_at_the_end(x: int) -> int:
        if x == 49:
            gate.wait()
        return x

    async def main() -> None:
        async with Rig(slow_at_the_end) as rig:
            while rig.pool.room() < 100:  # until one chunk holds them all
                await rig.run([-1] * 500)
            del rig.finished[:]
            rig.pool.submit([Task(x) for x in range(50)])
            await rig.until(lambda: len(rig.finished) == 49)
            assert rig.pool.in_progress == 1
            await gate.open()
            await rig.until(lambda: len(rig.finished) == 50)

    go(main)


def test_nothing_is_sent_ahead_to_a_worker_with_slow_items(gate: Gate, tmp_path: Path) -> None:
    def busy(x: int) -> int:
        if x == 0:
            gate.wait()
        else:
            until = time.monotonic() + 0.02
            while time.monotonic() < until:
                pass
        return x

    async def main() -> None:
        async with Rig(busy, workers=2) as rig:
            await rig.run([1, 1])
            assert rig.pool.room() == 2
            tasks = [Task(x) for x in range(8)]
            rig.pool.submit(tasks)
            await rig.until(lambda: len(rig.finished) == 9)  # the other worker did all the rest
            assert rig.finished[-1] is not tasks[0]
            await gate.open()
            await rig.until(lambda: len(rig.finished) == 10)

    go(main)


# -- values -----------------------------------------------------------------------------------------------------------


def test_items_share_nothing_whatever_the_chunk() -> None:
    def grow(x: list[int]) -> list[int]:
        x.append(1)
        return x

    async def main() -> None:
        async with Rig(grow) as rig:
            shared: list[int] = []
            tasks = await rig.run([shared] * 2000)
            assert all(task.value == [1] for task in tasks)
            assert shared == []

    go(main)


def test_a_result_is_what_it_was_when_it_was_returned() -> None:
    class Reuser:
        def __init__(self) -> None:
            self.small: list[int] = [0]
            self.large = np.zeros(10_000)

        def __call__(self, x: int) -> Any:
            self.small[0] = x
            self.large[:] = x
            return self.small, self.large

    async def main() -> None:
        async with Rig(per_worker(Reuser)) as rig:
            for task, x in zip(await rig.run(range(300)), range(300), strict=True):
                small, large = task.value
                assert small == [x]
                assert (large == x).all()

    go(main)


@dataclass
class Point:
    x: int


class Row(msgspec.Struct, frozen=True):
    x: int
    point: Point | None = None


class Colour(enum.Enum):
    RED = 1


def test_classes_that_travel_by_value_keep_their_identity() -> None:
    def build(row: Row) -> Any:
        assert type(row) is Row
        assert isinstance(row.point, Point)
        return Row(row.x + 1, Point(row.point.x + 1)), Colour.RED, Point

    async def main() -> None:
        async with Rig(build, same) as rig:
            for task in await rig.run([Row(x, Point(x)) for x in range(100)]):
                row, colour, kind = task.value
                assert type(row) is Row
                assert type(row.point) is Point is kind
                assert colour is Colour.RED

    go(main)


def test_arrays_keep_their_contents_while_the_user_holds_them() -> None:
    held: list[Any] = []

    async def main() -> None:
        async with Rig(lambda x: np.full(10_000, x), workers=2) as rig:
            held.extend([task.value for task in await rig.run(range(1000))])
            assert all(array.flags.writeable for array in held)
            held[3][:] = -3
            for _ in range(3):
                await rig.run(range(300))
            del held[500:]
            for _ in range(3):
                await rig.run(range(300))

    go(main)
    held[3][:] += 6
    assert all((array == x).all() for x, array in enumerate(held))
    held.clear()


def test_arrays_travel_both_ways_and_a_worker_may_keep_them() -> None:
    class Keeper:
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def __call__(self, array: Any) -> Any:
            if len(self.kept) < 20:
                self.kept.append((int(array[0]), array))
            assert all((kept == x).all() for x, kept in self.kept)
            array += 1
            return array

    async def main() -> None:
        async with Rig(per_worker(Keeper)) as rig:
            given = [np.full(20_000, x) for x in range(0, 200, 2)]
            with pytest.raises(AssertionError):  # what it keeps is its own: adding to it shows
                await rig.run(given[:2])
                assert rig.finished[1].outcome == OK
            tasks = await rig.run([np.full(20_000, -1)])
            assert tasks[0].outcome == FAILED
            assert (given[5] == 10).all()

    go(main)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(1_000_000.0).reshape(1000, 1000)[:, ::2],
        np.asfortranarray(np.arange(40_000).reshape(200, 200)),
        np.frombuffer(bytes(range(256)) * 500, dtype=np.uint8),
        np.zeros(0),
        np.float64(2.5),
        b"x" * 3_000_000,
        bytearray(b"y" * 300_000),
        "z" * 100_000,
        {"text": "å" * 50_000, "array": np.arange(9000), "again": [np.arange(9000)] * 2},
        None,
        [],
    ],
    ids=["strided", "fortran", "readonly", "empty", "scalar", "bytes", "bytearray", "text", "nested", "None", "list"],
)
def test_values_come_back_equal(value: Any) -> None:
    async def main() -> None:
        async with Rig(same) as rig:
            for task in await rig.run([value] * 3):
                assert task.outcome == OK, task.error
                assert type(task.value) is type(value)
                np.testing.assert_equal(task.value, value)

    go(main)


# -- failures ---------------------------------------------------------------------------------------------------------


class Teapot(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"teapot with code {code}")
        self.code = code


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


def test_exceptions_come_back_as_themselves_with_their_traceback() -> None:
    def boil(x: int) -> int:
        if x == 1:
            raise Teapot(code=418)
        if x == 2:
            raise Unpicklable("lost")
        if x == 3:
            raise asyncio.CancelledError
        return x

    async def main() -> None:
        async with Rig(boil) as rig:
            fine, teapot, lost, cancelled = await rig.run(range(4))
            assert fine.outcome == OK
            assert [task.outcome for task in (teapot, lost, cancelled)] == [FAILED] * 3
            assert [task.value for task in (teapot, lost, cancelled)] == [1, 2, 3]
            assert type(teapot.error) is Teapot
            assert teapot.error.code == 418
            assert str(teapot.error) == "teapot with code 418"
            assert "in boil" in teapot.error.__notes__[0]
            assert "raise Teapot(code=418)" in teapot.error.__notes__[0]
            assert "worker.py" not in teapot.error.__notes__[0]
            assert isinstance(lost.error, RuntimeError)
            assert type(lost.error).__name__ == "Unpicklable"
            assert str(lost.error) == "lost"
            assert type(cancelled.error) is asyncio.CancelledError

    go(main)


def test_a_failed_task_stands_before_the_step_that_failed() -> None:
    def third(x: Any) -> Any:
        if x == [6]:
            raise ValueError("six")
        if callable(x):
            raise KeyError("function")
        return x

    def second(x: int) -> Any:
        return threading.Lock().acquire if x == 4 else [x]

    async def main() -> None:
        async with Rig(lambda x: 2 * x, second, third) as rig:
            _, two, three = await rig.run([1, 2, 3])
            assert (three.outcome, three.at, three.value) == (FAILED, 2, [6])
            assert type(three.error) is ValueError
            assert (two.outcome, two.at, two.value) == (FAILED, 0, 2)  # what the step was given can't travel
            assert type(two.error) is KeyError
            rig.pool.submit([three])
            await rig.until(lambda: len(rig.finished) == 4)
            assert (three.outcome, three.at, three.value) == (FAILED, 2, [6])

    go(main)


class Treacherous:
    """Pickles well, and can't be unpickled where ``where`` says."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __reduce__(self) -> Any:
        return _rebuild, (self.bad,)


def _rebuild(bad: int) -> Treacherous:
    if os.getpid() == bad:
        raise ValueError("bad pickle")
    return Treacherous(bad)


def test_what_cant_travel_fails_alone() -> None:
    def odd(x: Any) -> Any:
        if x == "lock":
            return {"inside": threading.Lock()}
        if x == "there":
            return Treacherous(os.getppid())
        return x

    async def main() -> None:
        async with Rig(odd) as rig:
            values = [1, threading.Lock(), "lock", "there", Treacherous(rig.pool.pids[0]), 2]
            one, lock, inside, there, here, two = await rig.run(values)
            assert (one.value, two.value) == (1, 2)
            for task in (lock, inside, there, here):
                assert task.outcome == FAILED
                assert type(task.error) is CannotSend
                assert task.error.stage == "step"
            assert lock.error.type_name == "lock"
            assert inside.error.type_name == "dict"
            assert "pickle '_thread.lock' object" in str(inside.error)
            assert "bad pickle" in str(there.error)
            assert "bad pickle" in str(here.error)

    go(main)


def test_a_class_lost_in_an_unreadable_value_is_sent_again() -> None:
    class Local:
        def __init__(self, x: Any) -> None:
            self.x = x

    def unwrap(local: Any) -> Any:
        return local.x

    async def main() -> None:
        async with Rig(unwrap) as rig:
            bad = (Treacherous(rig.pool.pids[0]), Local)
            tasks = await rig.run([bad, *map(Local, range(20))])
            assert type(tasks[0].error) is CannotSend
            for task in tasks[1:]:
                if task.outcome != OK:
                    raise task.error
            assert [task.value for task in tasks[1:]] == list(range(20))

    go(main)


def test_a_chain_that_cant_travel_is_refused() -> None:
    lock = threading.Lock()

    async def main() -> None:
        with pytest.raises(CannotSend, match=r"stage 'locked': a function can't be sent .*lock"):
            async with Rig(same, Step("locked", lambda x: lock)):
                raise AssertionError

    go(main)


# -- objects per worker -----------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, path: str, fault: str = "") -> None:
        self.path = path
        self.fault = fault
        if fault == "constructor":
            raise Teapot(code=1)
        if fault == "exit":
            os._exit(7)
        if fault == "kill" or (fault == "kill once" and not os.path.exists(path)):
            with open(path, "a") as file:
                file.write("killed\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, x: int) -> int:
        return x

    def close(self) -> None:
        if self.fault == "close":
            raise Teapot(code=2)
        with open(self.path, "a") as file:
            file.write(f"{worker_index()}\n")


def test_objects_are_built_once_and_closed(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(per_worker(Recorder, str(tmp_path / "closed")), workers=2) as rig:
            await rig.run(range(100))

    go(main)
    assert sorted((tmp_path / "closed").read_text().split()) == ["0", "1"]


def test_what_a_constructor_raises_comes_out_of_open() -> None:
    async def main() -> None:
        with pytest.raises(Teapot) as caught:
            async with Rig(per_worker(Recorder, "", "constructor"), workers=2):
                raise AssertionError
        assert caught.value.code == 1
        assert "In worker process" in caught.value.__notes__[0]
        with pytest.raises(WorkerDied, match="exited with code 7"):
            async with Rig(per_worker(Recorder, "", "exit")):
                raise AssertionError
        with pytest.raises(TypeError, match="isn't callable"):
            async with Rig(per_worker(dict)):
                raise AssertionError

    go(main)


def test_who_has_been_idle_for_longest_comes_first() -> None:
    async def main() -> None:
        async with Rig(lambda _: worker_index(), workers=2) as rig:
            assert [(await rig.run([x]))[0].value for x in range(6)] == [0, 1, 0, 1, 0, 1]

    go(main)


def test_a_worker_that_is_killed_while_it_starts_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.place.process._KILLS", 4)

    async def main() -> None:
        async with Rig(per_worker(Recorder, str(tmp_path / "once"), "kill once"), workers=2) as rig:
            assert [task.value for task in await rig.run([1, 2])] == [1, 2]
        with pytest.raises(WorkerDied, match="killed by signal 9"):
            async with Rig(per_worker(Recorder, str(tmp_path / "ever"), "kill")):
                raise AssertionError

    go(main)
    assert len((tmp_path / "ever").read_text().split()) == 4


def test_what_close_raises_comes_out_of_close() -> None:
    async def main() -> None:
        with pytest.raises(Teapot, match="code 2"):
            async with Rig(per_worker(Recorder, "", "close")) as rig:
                await rig.run([1])

    go(main)


# -- deaths and timeouts ----------------------------------------------------------------------------------------------


def deadly(x: int) -> Any:
    if x == -9:
        os.kill(os.getpid(), signal.SIGKILL)
    if x == -1:
        os._exit(3)
    if x == -2:
        sys.exit(4)
    if x == -3:
        os.abort()
    return x


def test_only_the_item_it_died_of_is_charged() -> None:
    async def main() -> None:
        async with Rig(deadly) as rig:
            await rig.run([0] * 3000)
            tasks = await rig.run([*range(40), -9, *range(40), -1, -2, *range(40)])
            codes = {-9: -9, -1: 3, -2: 4}
            for task in tasks:
                if task.value < 0:
                    assert (task.outcome, task.error) == (DIED, codes[task.value])
                else:
                    assert task.outcome == OK
            assert rig.failures == []

    go(main)


def test_law_accounting_under_random_deaths() -> None:
    rng = random.Random(5)

    async def main() -> None:
        async with Rig(deadly, workers=2) as rig:
            values = [rng.choice([-1, -9]) if rng.random() < 0.008 else x for x in range(1000)]
            tasks = await rig.run(values)
            assert len(rig.finished) == len({id(task) for task in rig.finished}) == 1000
            assert [task.outcome for task in tasks] == [DIED if value < 0 else OK for value in values]
            assert rig.pool.in_progress == 0

    go(main)


def test_a_worker_killed_while_idle_is_replaced_under_its_number() -> None:
    async def main() -> None:
        async with Rig(lambda _: (os.getpid(), worker_index())) as rig:
            (before,) = await rig.run([0])
            os.kill(before.value[0], signal.SIGKILL)
            while True:
                (after,) = await rig.run([0])
                if after.outcome == OK and after.value[0] != before.value[0]:
                    break
            assert after.value[1] == 0

    go(main)


class DiesWhenReplaced:
    def __init__(self, marker: str) -> None:
        if os.path.exists(marker):
            os._exit(9)
        with open(marker, "w"):
            pass

    def __call__(self, x: int) -> None:
        os._exit(1)


def test_workers_that_die_without_a_result_fail_the_pool(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(per_worker(DiesWhenReplaced, str(tmp_path / "marker"))) as rig:
            (task,) = await rig.run([1])
            assert (task.outcome, task.error) == (DIED, 1)
            await rig.until(lambda: rig.failures)
            (failure,) = rig.failures
            assert isinstance(failure, WorkerDied)
            assert failure.exit_code == 9

    go(main)


class FailsWhenReplaced:
    def __init__(self, marker: str) -> None:
        if os.path.exists(marker):
            raise Teapot(code=3)
        with open(marker, "w"):
            pass

    def __call__(self, x: int) -> None:
        os._exit(1)


def test_a_worker_that_cant_be_built_again_fails_the_pool(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(per_worker(FailsWhenReplaced, str(tmp_path / "marker"))) as rig:
            await rig.run([1])
            await rig.until(lambda: rig.failures)
            assert type(rig.failures[0]) is Teapot

    go(main)


def test_a_death_is_seen_when_a_grandchild_keeps_the_socket(tmp_path: Path) -> None:
    def leave_a_child(path: str) -> None:
        child = os.fork()
        if not child:
            signal.pause()
        with open(path, "w") as file:
            file.write(str(child))
        os._exit(5)

    async def main() -> None:
        async with Rig(leave_a_child) as rig:
            (task,) = await rig.run([str(tmp_path / "pid")])
            assert (task.outcome, task.error) == (DIED, 5)

    try:
        go(main)
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_timeout_costs_only_the_item_that_is_over_time(gate: Gate) -> None:
    def stuck_at_seven(x: int) -> int:
        if x == 7:
            gate.wait()
        return x

    async def main() -> None:
        async with Rig(same, Step("stuck", stuck_at_seven, timeout=0.2)) as rig:
            tasks = await rig.run(range(30))
            for task in tasks:
                if task.value == 7:
                    assert task.outcome == TIMED_OUT
                    assert isinstance(task.error, StageTimeout)
                    assert (task.error.stage, task.error.seconds) == ("stuck", 0.2)
                else:
                    assert task.outcome == OK
            assert [task.value for task in tasks] == list(range(30))

    go(main)


# -- streams ----------------------------------------------------------------------------------------------------------


def count_to(n: int) -> Iterator[int]:
    yield from range(n)


async def count_later(n: int) -> AsyncIterator[int]:
    for x in range(n):
        yield x


@pytest.mark.parametrize("count", [count_to, count_later])
def test_a_stream_hands_over_parts_as_they_are_granted(count: Any) -> None:
    async def main() -> None:
        async with Rig(plus_one, Step("count", count, verb=STREAM)) as rig:
            task = Task(9_999)
            rig.pool.submit([task])
            await rig.until(lambda: len(rig.parts) == 2)
            assert outside.count == 0  # a worker that waits for its parts to be wanted isn't at work
            assert rig.pool.in_progress == 1
            granted = 0
            while not rig.finished:
                assert len(rig.parts) <= granted + 2
                if len(rig.parts) == granted + 2:
                    rig.pool.grant(task)
                    granted += 1
                rig.changed.clear()
                await rig.changed.wait()
            rig.pool.grant(task)  # late: of no use to anybody
            assert (task.outcome, task.value) == (OK, None)
            assert [x for _, outputs in rig.parts for x in outputs] == list(range(10_000))
            assert all(owner is task for owner, _ in rig.parts)
            await rig.run([0, 3])
            assert [x for _, outputs in rig.parts for x in outputs][10_000:] == [0, *range(4)]

    go(main)


def test_outputs_of_a_slow_stream_dont_lie(gate: Gate) -> None:
    def slow(n: int) -> Iterator[int]:
        yield 1
        gate.wait()
        yield 2

    async def main() -> None:
        async with Rig(Step("slow", slow, verb=STREAM)) as rig:
            rig.pool.submit([Task(0)])
            await rig.until(lambda: rig.parts)
            assert rig.parts[0][1] == [1]
            await gate.open()
            await rig.until(lambda: rig.finished)
            assert rig.parts[1][1] == [2]

    go(main)


def test_a_stream_that_fails_dies_or_gives_what_cant_travel() -> None:
    def odd(n: int) -> Iterator[Any]:
        yield from range(n)
        if n == 1:
            raise Teapot(code=n)
        if n == 2:
            yield threading.Lock()
        if n == 3:
            os._exit(3)
        if n == 4:
            yield Treacherous(os.getppid())
            yield from iter(int, 1)

    async def main() -> None:
        async with Rig(Step("odd", odd, verb=STREAM)) as rig:
            tasks = await rig.run([0, 1, 2, 3, 4, 0])
            assert [task.outcome for task in tasks] == [OK, FAILED, FAILED, DIED, FAILED, OK]
            assert type(tasks[1].error) is Teapot
            assert tasks[2].error.type_name == "lock"
            assert tasks[3].error == 3
            assert type(tasks[4].error) is CannotSend

    go(main)


# -- the worker's surroundings ----------------------------------------------------------------------------------------


def test_a_worker_has_the_path_directory_and_environment_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "COLOUR"]

    def look(_: int) -> Any:
        return sys.path, os.getcwd(), [os.environ.get(name) for name in names]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "77")
    monkeypatch.setenv("COLOUR", "red")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.syspath_prepend("/somewhere")

    async def main() -> None:
        async with Rig(look, workers=2) as rig:
            (task,) = await rig.run([0])
            path, directory, (omp, mkl, python_path, colour) = task.value
            assert path == sys.path
            assert directory == os.getcwd()
            assert omp == str(max(1, len(os.sched_getaffinity(0)) // 2))
            assert (mkl, colour, python_path) == ("77", "red", "/nowhere")

    go(main)


def test_a_worker_leaves_signals_to_its_parent() -> None:
    def interrupt(x: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return x

    async def main() -> None:
        async with Rig(interrupt) as rig:
            (task,) = await rig.run([5])
            assert (task.outcome, task.value) == (OK, 5)

    go(main)


# -- the end ----------------------------------------------------------------------------------------------------------


def test_abort_kills_what_runs_and_calls_nothing_back(gate: Gate) -> None:
    async def main() -> None:
        rig = Rig(lambda _: gate.wait(), workers=2)
        await rig.pool.open()
        rig.pool.submit([Task(x) for x in range(10)])
        assert rig.pool.in_progress == 2
        pids = rig.pool.pids
        await rig.pool.abort()
        rig.aborted = True
        assert outside.count == 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        await rig.pool.abort()
        assert rig.finished == []

    go(main)


def test_a_pool_that_never_opened_ends_too() -> None:
    async def main() -> None:
        await Rig(same).pool.abort()
        await Rig(same).pool.close()

    go(main)


class Waits:
    def __init__(self, gate: Gate, where: str) -> None:
        self.gate = gate
        self.where = where
        if where == "open":
            gate.wait()

    def __call__(self, x: int) -> int:
        return x

    def close(self) -> None:
        self.gate.wait()


@pytest.mark.parametrize("where", ["open", "close"])
def test_law_cancellation_of_open_and_close_leaves_nothing(gate: Gate, where: str) -> None:
    async def main() -> None:
        rig = Rig(per_worker(Waits, gate, where), workers=2)
        if where == "close":
            await rig.pool.open()
        ending = asyncio.ensure_future(rig.pool.open() if where == "open" else rig.pool.close())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ending, 0.3)
        assert rig.pool.pids == []
        assert outside.count == 0

    go(main)


def test_many_pools_leave_nothing() -> None:
    threads = threading.active_count()

    async def main() -> None:
        before = 0
        for turn in range(4):
            async with Rig(plus_one) as rig:
                await rig.run([np.zeros(10_000)] * 3)
            rig.finished.clear()
            if turn == 0:
                before = descriptors()
            assert descriptors() == before
            assert threading.active_count() == threads

    go(main)


def test_arrays_outlive_the_pool_they_came_through() -> None:
    held: list[Any] = []

    async def main() -> None:
        async with Rig(lambda x: np.full(50_000, x)) as rig:
            held.extend([task.value for task in await rig.run(range(20))][::3])
            rig.finished.clear()

    go(main)
    gc.collect()
    assert [(array == 3 * x).all() for x, array in enumerate(held)] == [True] * 7
    del held[1::2]
    assert [(array == 6 * x).all() for x, array in enumerate(held)] == [True] * 4
    held.clear()
