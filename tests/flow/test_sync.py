"""The ``_sync`` twins: the same results with and without a running loop, in any thread, and an end by a signal."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import PlanError, WrongLoop
from penstock.flow import sync
from penstock.flow.sync import background_loop, on_background_loop, run_blocking

DEADLINE = 60


async def ask(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


work = ps.Flow(range(50)).map(ask).filter(lambda x: x % 3)
EXPECTED = [2 * x for x in range(50) if 2 * x % 3]


def run() -> list[int]:
    recorder = Recorder()
    report = work.to(recorder).run_sync(progress=False)
    assert report.delivered == len(recorder.outputs)
    return recorder.outputs


def open_() -> list[int]:
    with ps.Flow().map(ask).open_sync() as call:
        doubled = [call(x) for x in range(50)]
    return [x for x in doubled if x % 3]


TWINS: dict[str, Callable[[], list[int]]] = {
    "collect": work.collect_sync,
    "for": lambda: list(work),
    "run": run,
    "open": open_,
}


@pytest.mark.parametrize("twin", TWINS)
def test_without_a_loop(twin: str) -> None:
    assert TWINS[twin]() == EXPECTED


@pytest.mark.parametrize("twin", TWINS)
def test_while_a_loop_runs_in_the_same_thread(twin: str) -> None:
    """As in a notebook: the loop waits, and is as it was afterwards."""

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        outputs = TWINS[twin]()
        assert asyncio.get_running_loop() is loop
        await asyncio.sleep(0)
        return outputs

    assert asyncio.run(main()) == EXPECTED


@pytest.mark.parametrize("twin", TWINS)
def test_in_many_threads_at_once(twin: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: TWINS[twin](), range(8))) == [EXPECTED] * 8


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["map", "filter", "batch"])), max_size=4))
def test_the_twin_gives_what_the_coroutine_gives(stages: list[tuple[int, str]]) -> None:
    flow: ps.Flow[Any] = ps.Flow(range(20))
    for number, verb in stages:
        if verb == "map":
            flow = flow.map(lambda x, number=number: (x, number))
        elif verb == "filter":
            flow = flow.filter(lambda x, number=number: len(repr(x)) % (number + 2))
        else:
            flow = flow.batch(number + 1)
    assert flow.collect_sync() == asyncio.run(flow.collect()) == list(flow)


def test_a_twin_within_a_stage_of_a_twin() -> None:
    """A plain function runs in a thread, so it may call one; the one background loop serves both."""
    inner = ps.Flow(range(3)).map(ask)
    assert ps.Flow(range(4)).map(lambda x: [x, *inner.collect_sync()]).collect_sync() == [
        [x, 0, 2, 4] for x in range(4)
    ]


@pytest.mark.parametrize("inline", [False, True])
def test_a_twin_on_the_loop_it_would_wait_for_is_refused(inline: bool) -> None:
    async def on_the_loop(x: int) -> list[int]:
        assert on_background_loop()
        return work.collect_sync()

    def inline_on_the_loop(x: int) -> list[int]:
        return work.collect_sync()

    flow = ps.Flow([1]).map(inline_on_the_loop if inline else on_the_loop)
    with pytest.raises(WrongLoop, match=r"would block the event loop that it waits for.*Await the async form"):
        flow.collect_sync(inline=inline)


def test_all_share_one_daemon_thread() -> None:
    async def where() -> threading.Thread:
        return threading.current_thread()

    (thread,) = {run_blocking(where) for _ in range(3)}
    assert thread.name == "penstock-loop"
    assert thread.daemon
    assert background_loop() is background_loop()
    assert not on_background_loop()


def test_the_callers_context_holds_on_the_loop() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("mine")

    async def read(x: int) -> str:
        return variable.get()

    assert ps.Flow([1]).map(read).collect_sync() == ["mine"]


def test_the_original_exception_comes_out_and_keeps_nothing_alive() -> None:
    class Held:
        pass

    def fail(x: int) -> int:
        raise LookupError(x)

    held = Held()
    with pytest.raises(LookupError) as caught:
        ps.Flow([held]).map(fail).collect_sync()  # type: ignore[arg-type]
    assert type(caught.value) is LookupError
    assert caught.value.__notes__
    del caught
    gc.collect()
    assert [one for one in gc.get_objects() if isinstance(one, Held)] == [held]


def test_a_plan_that_cant_run_is_refused_before_the_loop_is_asked() -> None:
    job = ps.Flow().map(ask).to(Recorder())
    with pytest.raises(PlanError, match="unbound"):
        job.run_sync()


def test_a_cancelled_coroutine_is_told_to_the_caller() -> None:
    async def cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(concurrent.futures.CancelledError):
        run_blocking(cancelled)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("twin", ["collect", "for", "run"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_no_exception_comes_out_and_the_loop_lives_on(error: Any, twin: str, asynchronous: bool) -> None:
    def leave(x: int) -> int:
        raise error(3)

    async def leave_the_loop(x: int) -> int:
        raise error(3)

    flow = ps.Flow([1]).map(leave_the_loop if asynchronous else leave)
    attempt = {"collect": flow.collect_sync, "for": lambda: list(flow), "run": flow.to(Recorder()).run_sync}[twin]
    with pytest.raises(error) as caught:
        attempt()
    assert caught.value.args == (3,)
    assert work.collect_sync() == EXPECTED


@pytest.mark.parametrize("first", range(3))
def test_an_interrupt_at_any_moment_of_a_call_leaves_nothing_running(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the coroutine was submitted, before it began, and after it had ended."""
    ran: list[str] = []
    submit = sync._submit

    async def main() -> str:
        ran.append("began")
        return "done"

    def interrupted(make: Any, future: Any) -> None:
        if first:
            submit(make, future)
        if first == 2:
            concurrent.futures.wait([future])
        raise KeyboardInterrupt

    monkeypatch.setattr(sync, "_submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_blocking(main)
    assert not sync._tasks
    assert first or not ran


@pytest.fixture
def press_ctrl_c() -> Iterator[Callable[[], None]]:
    """Interrupts the main thread, once: it must be heard, wherever that thread is at the time."""

    def press() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield press
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", ["python", "user"])
def test_a_handler_of_the_users_own_hears_ctrl_c_itself(handler: str, press_ctrl_c: Any) -> None:
    seen: list[int] = []
    mine = signal.default_int_handler if handler == "python" else lambda number, frame: seen.append(number)
    before = signal.signal(signal.SIGINT, mine)

    async def work() -> str:
        press_ctrl_c()
        await asyncio.sleep(0)
        return "done"

    try:
        if handler == "python":
            with pytest.raises(KeyboardInterrupt):
                run_blocking(work)
        else:
            assert run_blocking(work) == "done"
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("twin", ["collect", "for"])
def test_ctrl_c_while_waiting_cancels_and_waits_for_the_cleaning_up(twin: str, press_ctrl_c: Any) -> None:
    cleaned: list[str] = []

    async def source() -> AsyncIterator[int]:
        yield 1
        try:
            press_ctrl_c()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("source")

    flow = ps.Flow(source()).map(ask)
    with pytest.raises(KeyboardInterrupt):
        flow.collect_sync() if twin == "collect" else list(flow)
    assert cleaned == ["source"]


def test_an_interrupted_for_delivers_each_output_once(press_ctrl_c: Any) -> None:
    """What was handed over before the interrupt isn't counted again when the iterator closes."""

    async def source() -> AsyncIterator[int]:
        yield 1
        yield 2
        await handed.wait()
        while outlet._wanted is None:  # noqa: ASYNC110  # until the main thread waits, which sets no event
            await asyncio.sleep(0)
        press_ctrl_c()
        await asyncio.Event().wait()

    handed = asyncio.Event()
    iterator = iter(ps.Flow(source()))
    assert [next(iterator), next(iterator)] == [1, 2]
    outlet = iterator.gi_frame.f_locals["outlet"]  # type: ignore[attr-defined]
    background_loop().call_soon_threadsafe(handed.set)
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    report = outlet.run.report()
    assert (report.issued, report.delivered, report.in_flight) == (2, 2, 0)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, (KeyboardInterrupt, None)), (signal.SIGTERM, (SystemExit, 143))]
)
def test_the_first_signal_drains_and_commits_what_was_taken(number: signal.Signals, expected: tuple[Any, Any]) -> None:
    main = threading.main_thread().ident
    assert main is not None
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    recorder = Recorder()

    async def source() -> AsyncIterator[int]:
        yield from_the_start
        signal.pthread_kill(main, number)
        await asyncio.Event().wait()

    from_the_start = 21
    kind, code = expected
    with pytest.raises(kind) as caught:
        ps.Flow(source()).map(ask).to(recorder).run_sync(progress=False)
    assert getattr(caught.value, "code", None) == code
    assert recorder.outputs == [42]
    assert not recorder.is_open
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_no_signal_is_touched() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def look(x: int) -> None:
        seen.append(signal.getsignal(signal.SIGINT))

    def job() -> ps.Report:
        return ps.Flow([1]).to(look).run_sync(progress=False)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(job).result().delivered == 1
    assert seen == [before]
    job()
    assert seen[1] != before


# -- the end of the process -------------------------------------------------------------------------------------------


def program(directory: Path, text: str) -> subprocess.CompletedProcess[str]:
    path = directory / "program.py"
    path.write_text("import penstock as ps\n" + textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", str(path)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def test_the_process_ends_with_an_iterator_half_read(tmp_path: Path) -> None:
    """What still runs is cancelled and cleans up; nothing is complained about."""
    result = program(
        tmp_path,
        """
        import asyncio

        async def source():
            try:
                yield 1
                await asyncio.Event().wait()
            finally:
                print("source closed")

        outputs = iter(ps.Flow(source()).map(str))
        print(next(outputs))
        """,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "1\nsource closed\n"


def test_the_process_ends_at_once_when_nothing_runs(tmp_path: Path) -> None:
    result = program(tmp_path, "print(ps.Flow([1, 2]).map(str).collect_sync())")
    assert (result.returncode, result.stdout, result.stderr) == (0, "['1', '2']\n", "")


def test_a_forked_child_has_a_loop_of_its_own(tmp_path: Path) -> None:
    result = program(
        tmp_path,
        """
        import os
        import warnings

        async def ask(x):
            return 2 * x

        flow = ps.Flow([1, 2]).map(ask)
        print(flow.collect_sync())
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside the background thread
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(flow.collect_sync())
        """,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[2, 4]\n" * 3


def test_a_forked_child_drops_its_parents_iterator_and_leaves_the_run_alone(tmp_path: Path) -> None:
    result = program(
        tmp_path,
        """
        import os
        import warnings

        outputs = iter(ps.Flow(range(1000)).map(str))
        first = next(outputs)
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside the background thread
        child = os.fork()
        if not child:
            del outputs
            raise SystemExit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        print([first, *outputs] == list(map(str, range(1000))))
        """,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")


def test_without_uvloop_the_standard_loop_serves(tmp_path: Path) -> None:
    result = program(
        tmp_path,
        """
        import asyncio
        import sys
        sys.modules["uvloop"] = None
        from penstock.flow.sync import background_loop
        print(isinstance(background_loop(), asyncio.BaseEventLoop), ps.Flow([1]).map(str).collect_sync())
        """,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "True ['1']\n", "")
