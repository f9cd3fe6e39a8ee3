from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import penstock as ps
from penstock.errors import PlanError
from penstock.place.base import is_async
from penstock.testing import Faults, InjectedFault, run_virtual


def double(x: int) -> int:
    """Twice."""
    return 2 * x


async def double_later(x: int) -> int:
    return 2 * x


async def count_up(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


def test_the_plan_follows_from_the_seed_and_the_item() -> None:
    one = Faults(3, fail=0.2, stall=0.1, kill=0.05, scratch="unused")
    plan = [one.planned(item) for item in range(4000)]
    assert plan == [Faults(3, fail=0.2, stall=0.1, kill=0.05, scratch="other").planned(item) for item in range(4000)]
    assert plan != [Faults(4, fail=0.2, stall=0.1, kill=0.05, scratch="other").planned(item) for item in range(4000)]
    assert 700 < plan.count("fail") < 900
    assert 320 < plan.count("stall") < 480
    assert 140 < plan.count("kill") < 260


def test_the_plan_is_the_same_in_another_process() -> None:
    code = "from penstock.testing import Faults; print([i for i in range(99) if Faults(1, fail=0.2).planned(str(i))])"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == str([i for i in range(99) if Faults(1, fail=0.2).planned(str(i))])


@pytest.mark.parametrize("attempts", [1, 3])
def test_an_item_fails_at_its_first_attempts(attempts: int) -> None:
    shaky = Faults(0, fail=1, attempts=attempts)(double)
    for attempt in range(1, attempts + 1):
        with pytest.raises(InjectedFault) as caught:
            shaky(5)
        assert (caught.value.item, caught.value.attempt) == ("5", attempt)
    assert shaky(5) == 10


def test_a_poison_item_always_fails() -> None:
    shaky = Faults(0, fail=1, attempts=None)(double)
    for _ in range(20):
        with pytest.raises(InjectedFault):
            shaky(5)


def test_attempts_are_counted_across_copies_in_scratch(tmp_path: Path) -> None:
    faults = Faults(0, fail=1, attempts=2, scratch=tmp_path / "scratch")
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(faults(double)))
        with pytest.raises(InjectedFault):
            copy(5)
    assert faults(double)(5) == 10


def test_async_functions_stay_async_and_stall_on_the_loop() -> None:
    async def main() -> tuple[int, float]:
        slow = Faults(0, fail=0, stall=1, seconds=30)(double_later)
        assert is_async(slow)
        return await slow(4), asyncio.get_running_loop().time()

    assert run_virtual(main()) == (8, 30.0)


def test_async_generators_go_through() -> None:
    async def main() -> list[int]:
        wrapped = Faults(0, fail=0)(count_up)
        assert is_async(wrapped)
        return [i async for i in await wrapped(3)]  # type: ignore[misc]  # calling it is awaited by the stage

    assert run_virtual(main()) == [0, 1, 2]


def test_a_plain_function_stalls_and_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    slow = Faults(0, fail=0, stall=1, seconds=0.5)(double)
    assert (slow(1), slow(1), slept) == (2, 2, [0.5])
    assert not is_async(slow)
    assert (slow.__name__, inspect.getdoc(slow), slow.__wrapped__) == ("double", "Twice.", double)  # type: ignore[attr-defined]


def test_the_wrapped_function_travels() -> None:
    copy = pickle.loads(pickle.dumps(Faults(0, fail=0)(double)))
    assert copy(4) == 8
    assert copy.__name__ == "double"


def test_a_fault_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(InjectedFault("5", 2)))
    assert str(copy) == "injected on purpose for 5, attempt 2"


def test_nothing_but_a_worker_is_killed(tmp_path: Path) -> None:
    deadly = Faults(0, fail=0, kill=1, scratch=tmp_path)(double)
    with pytest.raises(PlanError, match="place='process'"):
        deadly(1)


def test_a_worker_is_killed_once_by_signal_or_exit(tmp_path: Path) -> None:
    """In a process that was started as a worker is; a package of that name stands before the real one."""
    worker = tmp_path / "penstock" / "place"
    worker.mkdir(parents=True)
    real = Path(inspect.getfile(Faults)).parents[1]
    (tmp_path / "penstock" / "__init__.py").write_text(f"__path__.append({str(real)!r})\n")
    (worker / "__init__.py").write_text(f"__path__.append({str(real / 'place')!r})\n")
    (worker / "worker.py").write_text(
        "import sys\n"
        "from penstock.testing.faults import Faults\n"
        f"print(Faults(0, fail=0, kill=1, scratch={str(tmp_path / 'scratch')!r})(abs)(int(sys.argv[1])))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def start(item: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "penstock.place.worker", str(item)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)

    codes = {start(item).returncode for item in range(8)}
    assert codes == {-9, 70}
    assert start(0).stdout == "0\n"


@pytest.mark.parametrize("shares", [{"fail": 1.5}, {"stall": -0.1}, {"fail": 0.6, "stall": 0.6}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="from 0 to 1, at most 1 together"):
        Faults(0, **shares)


def test_kill_without_scratch_and_what_cannot_be_called_are_refused() -> None:
    with pytest.raises(PlanError, match="scratch="):
        Faults(0, kill=0.1)
    with pytest.raises(PlanError, match="given a int"):
        Faults(0)(5)  # type: ignore[type-var]


class Plain:
    @Faults(seed=7, fail=1.0)
    def __call__(self, x: int) -> int:
        return x + 1


class Async:
    @Faults(seed=7, fail=1.0)
    async def __call__(self, x: int) -> int:
        return x + 1


@pytest.mark.parametrize("kind", [Plain, Async])
def test_the_call_of_an_object_that_a_worker_builds_is_wrapped(kind: Any) -> None:
    report = ps.Flow([1, 2]).map(ps.per_worker(kind), retry=ps.Retry(1, backoff=0)).to(lambda x: None).run_sync()
    assert (report.delivered, report.retried) == (2, 2)
