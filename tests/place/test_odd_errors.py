"""What users' functions and objects may do that nobody expects: it costs their item, hangs nothing, loses no other."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import penstock as ps
from penstock.place.base import SPREAD, STREAM, Chain, Pool, Step, Task, per_worker
from penstock.place.loop import LoopPool
from penstock.place.process import ProcessPool
from penstock.place.thread import ThreadPool

pytestmark = pytest.mark.usefixtures("unmeasured")  # flows with processes measure what a worker runs

DEADLINE = 60
POOLS = [LoopPool, ThreadPool, ProcessPool]
every_pool = pytest.mark.parametrize("kind", POOLS, ids=lambda kind: kind.__name__)
every_place = pytest.mark.parametrize("place", ["loop", "thread", "process"])


def pool_of(kind: type[Pool], *steps: Step, failures: list[BaseException] | None = None) -> tuple[Pool, list[Task]]:
    done: list[Task] = []
    failed = [] if failures is None else failures
    pool = kind(Chain("stage", steps), 1, done=done.extend, failed=failed.append, part=lambda task, outputs: None)
    return pool, done


async def until(ready: Callable[[], object]) -> None:
    while not ready():  # noqa: ASYNC110  # pools call back
        await asyncio.sleep(0.005)


def go(main: Any) -> Any:
    return asyncio.run(asyncio.wait_for(main, DEADLINE))


# -- errors ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen(Exception):
    """It takes no notes."""

    code: int


class Touchy(Exception):
    @property
    def status(self) -> int:
        raise RuntimeError("not here")


class Large(Exception):
    def __init__(self, x: int) -> None:
        super().__init__(x)
        self.digits = 10**5000


class Broken(OSError):
    """With an ``__init__`` of its own, as SDKs have it."""

    def __init__(self, response: int) -> None:
        super().__init__(5, "it broke", "a file")
        self.response = response


async def fail_async(kind: type[BaseException]) -> Any:
    raise kind(7)  # type: ignore[call-arg]  # all of these take one


def fail(kind: type[BaseException]) -> Any:
    raise kind(7)  # type: ignore[call-arg]  # all of these take one


@every_place
@pytest.mark.parametrize("kind", [Frozen, Touchy, Large, Broken])
def test_whatever_is_raised_comes_back_as_itself(place: Any, kind: Any) -> None:
    function = fail_async if place == "loop" else fail
    with pytest.raises(kind) as raised:
        ps.Flow([kind]).map(function, place=place).collect_sync()
    if kind is Broken:
        assert (raised.value.errno, raised.value.filename, raised.value.response) == (5, "a file", 7)
    kept: list[Any] = ps.Flow([kind] * 3).map(function, place=place, on_error="keep").collect_sync()
    assert [failed.reason for failed in kept] == [kind.__name__] * 3


def test_an_error_of_a_class_of_oserror_is_tried_again_as_one() -> None:
    retry = ps.Retry(2, backoff=0, on=OSError)
    (failed,) = ps.Flow([Broken]).map(fail, place="process", retry=retry, on_error="keep").collect_sync()
    assert failed.attempts == 3


def make_lock(x: int) -> Any:
    return threading.Lock()


def refuse(lock: Any) -> Any:
    raise ValueError("no")


def keep_none(lock: Any) -> bool:
    return False


def test_a_failure_is_its_stage_s_also_where_what_it_was_given_can_t_travel() -> None:
    flow = ps.Flow([1, 2]).map(make_lock, place="process").map(refuse, place="process", on_error="keep")
    assert [(failed.stage, failed.item) for failed in flow.collect_sync()] == [("refuse", 1), ("refuse", 2)]
    report = ps.Flow([1, 2]).map(make_lock, place="process").filter(keep_none, place="process").to(print).run_sync()
    assert (report.filtered, report.delivered) == (2, 0)


class Unreadable:
    """Can't be read in the process that started the worker."""

    def __reduce__(self) -> Any:
        return check, (os.getppid(),)


def check(pid: int) -> Unreadable:
    if os.getpid() == pid:
        raise ValueError("unreadable here")
    return Unreadable()


def outputs_of(n: int) -> Iterator[Any]:
    yield n
    if n % 10 == 5:
        yield Unreadable()
    yield -n


def test_an_output_that_cant_be_read_is_its_item_s_failure_each_time() -> None:
    for _ in range(3):
        found: list[Any] = []
        report = (
            ps.Flow(range(1, 30))
            .flat_map(outputs_of, place="process", whole=False, on_error="skip")
            .to(found.append)
            .run_sync()
        )
        good = [n for n in range(1, 30) if n % 10 != 5]
        assert {n for n in found if isinstance(n, int) and abs(n) % 10 != 5} == {*good, *(-n for n in good)}
        assert report.filtered == 0
        assert report.skipped + report.delivered == 29


# -- processes of the user's -------------------------------------------------------------------------------------------


def terminate_a_program(x: int) -> int:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    assert child.stdout is not None
    child.stdout.read(1)  # it is there
    child.terminate()
    child.stdout.close()
    return child.wait(DEADLINE)


def announce(there: Any) -> None:
    there.set()
    time.sleep(600)


def terminate_a_fork(x: int) -> int | None:
    context = multiprocessing.get_context("fork")
    there = context.Event()
    child = context.Process(target=announce, args=(there,))
    child.start()
    there.wait()
    child.terminate()
    child.join(DEADLINE)
    return child.exitcode


@pytest.mark.parametrize("function", [terminate_a_program, terminate_a_fork])
def test_processes_that_a_worker_starts_can_be_ended(function: Any) -> None:
    assert ps.Flow([1]).map(function, place="process", workers=1).collect_sync() == [-15]


def arguments_of(x: int) -> list[str]:
    return sys.argv


def test_a_worker_has_the_arguments_of_its_parent() -> None:
    assert ps.Flow([1]).map(arguments_of, place="process", workers=1).collect_sync() == [sys.argv]


# -- objects -----------------------------------------------------------------------------------------------------------


class Noting:
    """Writes down that it was closed."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __call__(self, x: int) -> int:
        return x

    async def close(self) -> None:
        await asyncio.sleep(0)
        with self.path.open("a") as file:
            file.write(f"{self.name} ")


class Leaving(Noting):
    def __init__(self, path: Path, how: type[BaseException]) -> None:
        super().__init__(path, "leaving")
        self.how = how

    def close(self) -> Any:
        raise self.how


class Unbuilt:
    def __init__(self) -> None:
        raise ValueError("the real reason")

    def __call__(self, x: int) -> int:
        return x


@every_pool
@pytest.mark.parametrize("how", [ValueError, SystemExit, asyncio.CancelledError, KeyboardInterrupt])
def test_each_object_is_closed_whatever_another_raises(kind: Any, how: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def main() -> BaseException | None:
        objects = [per_worker(Noting, log, "first"), per_worker(Leaving, log, how), per_worker(Noting, log, "last")]
        pool, _ = pool_of(kind, *(Step(f"step {n}", made) for n, made in enumerate(objects)))
        await pool.open()
        try:
            await pool.close()
        except BaseException as error:
            return error
        return None

    error = go(main())
    assert isinstance(error, how)
    assert "in close() of an object" in error.__notes__[0]
    assert log.read_text() == "last first "


@every_pool
@pytest.mark.parametrize("other", [Noting, Leaving])
def test_what_a_constructor_raised_isn_t_hidden_by_what_was_built_before(kind: Any, other: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def main() -> None:
        argument = "first" if other is Noting else RuntimeError
        pool, _ = pool_of(kind, Step("one", per_worker(other, log, argument)), Step("two", per_worker(Unbuilt)))
        with pytest.raises(ValueError, match="the real reason"):
            await pool.open()

    go(main())
    assert other is Leaving or log.read_text() == "first "


def test_a_cancelled_close_calls_the_other_closers(tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Slow(Noting):
        async def close(self) -> None:
            await asyncio.sleep(600)

    async def main() -> None:
        pool, _ = pool_of(LoopPool, Step("one", per_worker(Noting, log, "one")), Step("two", per_worker(Slow, log, "")))
        await pool.open()
        closing = asyncio.create_task(pool.close())
        for _ in range(5):
            await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    go(main())
    assert log.read_text() == "one "


# -- generators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "verb"),
    [(LoopPool, SPREAD), (ThreadPool, SPREAD), (ProcessPool, SPREAD), (LoopPool, STREAM), (ThreadPool, STREAM)],
)
def test_a_generator_is_closed_when_its_item_is_over(kind: Any, verb: int, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def endless(x: int) -> AsyncIterator[int]:
        try:
            while True:
                yield x
        finally:
            await asyncio.sleep(0)
            log.write_text("closed")

    async def main() -> None:
        gc.disable()
        try:
            pool, done = pool_of(kind, Step("endless", endless, verb))
            await pool.open()
            pool.submit([Task(1)])
            if verb == SPREAD:
                await until(lambda: done)
            else:
                await asyncio.sleep(0.05)
                await pool.abort()
            assert log.read_text() == "closed"
            await pool.abort()
        finally:
            gc.enable()

    go(main())


# -- the loop and its threads ------------------------------------------------------------------------------------------


async def cancel_itself_later(x: str) -> str:
    if x == "late":
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, task.cancel)
    return x


def test_a_resident_that_is_cancelled_between_items_fails_the_pool() -> None:
    async def main() -> None:
        failures: list[BaseException] = []
        pool, _ = pool_of(LoopPool, Step("step", cancel_itself_later), failures=failures)
        await pool.open()
        pool.submit([Task("late")])
        await until(lambda: failures)
        assert "CancelledError" in str(failures[0])
        pool.submit([Task("next")])  # nobody takes it, and nothing breaks
        await pool.abort()

    go(main())


@pytest.mark.parametrize("kind", [ThreadPool, ProcessPool], ids=lambda kind: kind.__name__)
def test_a_worker_that_cant_be_replaced_fails_the_pool(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        failures: list[BaseException] = []
        pool, done = pool_of(kind, Step("hang", time.sleep, timeout=0.2), failures=failures)
        await pool.open()

        def full(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", full)
            pool.submit([Task(3.0), Task(0.0)])
            await until(lambda: failures and done)
        assert "can't start new thread" in str(failures[0])
        assert [task.value for task in done] == [3.0]
        await pool.abort()

    go(main())


def test_classes_made_by_the_thousand_don_t_pile_up() -> None:
    async def main() -> int:
        pool, done = pool_of(ThreadPool, Step("make", lambda n: type(f"Made{n}", (), {})()))
        await pool.open()
        pool.submit([Task(n) for n in range(3000)])
        await until(lambda: len(done) == 3000)
        done.clear()
        gc.collect()
        left = sum(1 for kind in gc.get_objects() if isinstance(kind, type) and kind.__name__.startswith("Made"))
        await pool.close()
        return left

    assert go(main()) <= 1001
