"""All ends that a process can bring about by itself, in one place and one order: ``inside.py PLACE ORDER``.

Each cell runs a flow to one kind of end and then looks for what is left of it. One line of JSON says what was found
in each; a cell that hangs ends the program with the stacks of all threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psutil
from residue import Residue

import penstock as ps

DEADLINE = 20
PLACE, ORDER = sys.argv[1:3]

cells: list[Callable[[], Any]] = []


class Deliberate(Exception):
    """What these cells raise."""


def options(**more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"place": PLACE, ("concurrency" if PLACE == "loop" else "workers"): 2}
    if ORDER == "unordered":
        given["ordered"] = False
    if ORDER == "keyed":
        given["key"] = lambda x: x % 3
    return given | more


def on(place: str, function: Callable[[int], Any]) -> Any:
    """The function as the place wants it: a coroutine function on the loop."""
    if place != "loop":
        return function

    async def coroutine(x: int) -> Any:
        await asyncio.sleep(0)
        return function(x)

    coroutine.__name__ = function.__name__
    return coroutine


def work(x: int) -> int:
    return x


def fails_at_50(x: int) -> int:
    if x == 50:
        raise Deliberate("the stage")
    return x


async def on_the_loop(x: int) -> int:
    return x


def endless(**more: Any) -> Any:
    """A flow that never ends by itself, with a second segment behind the one in question."""
    return ps.Flow(itertools.count()).map(on(PLACE, work), **options(**more)).map(on_the_loop)


def cell(function: Callable[[], Any]) -> Callable[[], Any]:
    cells.append(function)
    return function


async def all_others() -> None:
    """Wait until no task but the caller's is left on the loop."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


@contextlib.contextmanager
def raised(kind: type[BaseException], text: str, *notes: str) -> Iterator[None]:
    """Expect this very exception, with these words in its notes."""
    try:
        yield
    except kind as error:
        said = str(error)
        told = "\n".join(getattr(error, "__notes__", ()))
    else:
        raise AssertionError(f"{kind.__name__} wasn't raised")
    assert text in said
    for note in notes:
        assert note in told, f"{note!r} isn't in the notes: {told!r}"


# -- break ------------------------------------------------------------------------------------------------------------


@cell
async def break_async_for() -> None:
    async for x in endless():
        if x >= 30:
            break
    await all_others()


@cell
async def break_with_aclosing() -> None:
    async with contextlib.aclosing(aiter(endless())) as outputs:
        async for x in outputs:
            if x >= 30:
                break
    assert asyncio.all_tasks() == {asyncio.current_task()}


@cell
def break_for() -> None:
    for x in endless():
        if x >= 30:
            break


@cell
async def consumer_raises() -> None:
    with raised(Deliberate, "the consumer"):
        async for x in endless():
            if x >= 30:
                raise Deliberate("the consumer")
    await all_others()


@cell
async def leave_a_started_job() -> None:
    seen = asyncio.Event()
    async with endless().to(lambda x: loop.call_soon_threadsafe(seen.set)).start():
        await seen.wait()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@cell
async def take_is_satisfied() -> None:
    assert len(await endless().take(30).collect()) == 30


# -- raise ------------------------------------------------------------------------------------------------------------


def failing_source() -> Iterator[int]:
    yield from range(50)
    raise Deliberate("the source")


async def failing_async_source() -> AsyncIterator[int]:
    for x in range(50):
        yield x
    raise Deliberate("the source")


@cell
async def raise_in_source() -> None:
    with raised(Deliberate, "the source"):
        await ps.Flow(failing_source()).map(on(PLACE, work), **options()).collect()


@cell
async def raise_in_async_source() -> None:
    with raised(Deliberate, "the source"):
        await ps.Flow(failing_async_source()).map(on(PLACE, work), **options()).to("source.jsonl").run()


@cell
async def raise_in_stage() -> None:
    flow = ps.Flow(itertools.count()).map(on(PLACE, fails_at_50), **options()).map(on_the_loop)
    with raised(Deliberate, "the stage", "fails_at_50", "item 50", "50"):
        await flow.collect()


@cell
def raise_in_stage_of_a_job() -> None:
    flow = ps.Flow(range(5000), name="numbers").map(on(PLACE, fails_at_50), **options())
    with raised(Deliberate, "the stage", "fails_at_50"):
        flow.to("stage.jsonl").run_sync()


@cell
async def raise_in_stage_among_those_that_wait() -> None:
    """The others are at work on what never ends, or wait to be tried again."""

    async def waits(x: int) -> int:
        if x == 1:
            raise Deliberate("the stage")
        if x:
            raise ConnectionError("to be tried again")
        await asyncio.Event().wait()
        return x

    retry = ps.Retry(attempts=5, backoff=3600, jitter=False, on=ConnectionError)
    flow = ps.Flow([3, 2, 0, 1, 4]).map(waits, retry=retry, concurrency=4)
    with raised(Deliberate, "the stage"):
        await flow.map(on(PLACE, work), **options()).collect()


@cell
async def raise_in_sink() -> None:
    def sink(x: int) -> None:
        if x >= 50:
            raise Deliberate("the sink")

    with raised(Deliberate, "the sink"):
        await endless().to(sink).run()


@cell
async def raise_in_file_sink() -> None:
    def to_object(x: int) -> Any:
        return x if x < 50 else {1: {2: object()}}

    with raised(ps.errors.CannotEncode, "object"):
        await ps.Flow(range(5000), name="n").map(on(PLACE, work), **options()).map(to_object).to("sink.jsonl").run()


class Unbuildable:
    """Can be built in one worker, and in the other not."""

    def __init__(self, which: int) -> None:
        if ps.worker_index() == which:
            raise Deliberate("the constructor")

    def __call__(self, x: int) -> int:
        return x

    def close(self) -> None:
        pass


class UnbuildableOnTheLoop(Unbuildable):
    async def __call__(self, x: int) -> int:  # type: ignore[override]
        return x


@cell
async def raise_in_constructor() -> None:
    factory = UnbuildableOnTheLoop if PLACE == "loop" else Unbuildable
    stage = ps.per_worker(factory, 0 if PLACE == "loop" else 1)
    read: list[int] = []

    def source() -> Iterator[int]:
        for x in itertools.count():
            read.append(x)
            yield x

    with raised(Deliberate, "the constructor"):
        await ps.Flow(source()).map(stage, **options()).map(on(PLACE, work), **options()).collect()
    assert not read, "items were read although the stage couldn't be built"


# -- cancel -----------------------------------------------------------------------------------------------------------


async def cancelled(coroutine: Any, seen: asyncio.Event) -> None:
    task = asyncio.ensure_future(coroutine)
    waiting = asyncio.ensure_future(seen.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not task.done(), task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    await asyncio.wait([waiting])
    assert asyncio.all_tasks() == {asyncio.current_task()}


@cell
async def cancel_run() -> None:
    seen = asyncio.Event()
    await cancelled(endless().to(lambda x: loop.call_soon_threadsafe(seen.set)).run(), seen)


@cell
async def cancel_run_to_a_file() -> None:
    seen = asyncio.Event()

    async def tell(x: int) -> int:
        if x == 100:
            seen.set()
        return x

    flow = ps.Flow(range(10**9), name="many").map(on(PLACE, work), **options()).map(tell)
    await cancelled(flow.to("cancelled.jsonl").run(), seen)


@cell
async def cancel_collect() -> None:
    seen = asyncio.Event()

    async def tell(x: int) -> int:
        seen.set()
        return x

    await cancelled(endless().map(tell).collect(), seen)


@cell
async def cancel_the_consumer() -> None:
    seen = asyncio.Event()

    async def consume() -> None:
        async for x in endless():
            if x >= 30:
                seen.set()
                await asyncio.Event().wait()

    task = asyncio.ensure_future(consume())
    await seen.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    del task
    await all_others()


class Gated:
    """Tells that it is being built, and is built when the gate closes; a process needn't wait for that."""

    def __init__(self) -> None:
        os.close(os.open("told", os.O_WRONLY))
        with open("gate", "rb") as gate:
            gate.read()

    def __call__(self, x: int) -> int:
        return x


@cell
async def cancel_while_opening() -> None:
    """While a worker is being built. No thread can be interrupted in that, so there the gate is opened then."""
    if PLACE == "loop":  # it builds on the loop, so nobody can cancel meanwhile
        return
    os.mkfifo("told")
    os.mkfifo("gate")
    gate = os.open("gate", os.O_RDWR)
    task = asyncio.ensure_future(ps.Flow(itertools.count()).map(ps.per_worker(Gated), **options(workers=1)).collect())
    await asyncio.to_thread(lambda: os.close(os.open("told", os.O_RDONLY)))
    await asyncio.get_running_loop().shutdown_default_executor()
    task.cancel()
    if PLACE == "thread":
        asyncio.get_running_loop().call_soon(os.close, gate)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if PLACE == "process":
        os.close(gate)
    assert task.cancelled()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# -- a worker is killed -----------------------------------------------------------------------------------------------


def dies_once(x: int) -> int:
    """Kills its own process at item 30, the first time."""
    if x == 30:
        try:
            os.close(os.open("died", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return x
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def exits(x: int) -> int:
    if x == 30:
        os._exit(7)
    return x


if PLACE == "process":

    @cell
    async def worker_killed_and_tried_again() -> None:
        retry = ps.Retry(attempts=2, backoff=0)
        outputs = await ps.Flow(range(500)).map(dies_once, **options(retry=retry)).map(on_the_loop).collect()
        assert sorted(outputs) == list(range(500))
        if ORDER == "ordered":
            assert outputs == list(range(500))
        if ORDER == "keyed":
            for key in range(3):
                assert [x for x in outputs if x % 3 == key] == list(range(key, 500, 3))

    @cell
    async def worker_killed_from_outside() -> None:
        """An idle or a busy one, whatever it is: the item it had started is charged and tried again."""
        killed: list[int] = []

        async def kill(x: int) -> int:
            if not killed:
                workers = psutil.Process().children()
                killed.append(workers[0].pid)
                workers[0].kill()
            return x

        retry = ps.Retry(attempts=2, backoff=0)
        outputs = await ps.Flow(range(1000)).map(work, **options(retry=retry)).map(kill).collect()
        assert sorted(outputs) == list(range(1000))

    @cell
    async def worker_killed_without_retry() -> None:
        with raised(ps.errors.WorkerDied, "killed by signal 9", "dies_once", "item 30"):
            await ps.Flow(range(5000)).map(dies_once, **options()).collect()

    @cell
    async def worker_exits_without_retry() -> None:
        with raised(ps.errors.WorkerDied, "stage 'exits': its worker process exited with code 7 while it worked on 30"):
            await ps.Flow(range(5000)).map(exits, **options()).collect()


# -- the program ------------------------------------------------------------------------------------------------------

loop: asyncio.AbstractEventLoop


def run(function: Callable[[], Any]) -> None:
    """A cell in a directory and, if it is asynchronous, on a loop of its own."""
    with tempfile.TemporaryDirectory(dir=".") as directory:
        here = os.getcwd()
        os.chdir(directory)
        try:
            result = function()
            if asyncio.iscoroutine(result):

                async def whole() -> None:
                    global loop
                    loop = asyncio.get_running_loop()
                    await result
                    assert asyncio.all_tasks() == {asyncio.current_task()}, asyncio.all_tasks()

                asyncio.run(whole())
        finally:
            os.chdir(here)


def main() -> None:
    # Debugging asyncio (-X dev) also tells of slow callbacks: on a busy machine there are some.
    logging.getLogger("asyncio").addFilter(lambda record: not str(record.msg).startswith("Executing "))
    chosen = [function for function in cells if not sys.argv[3:] or function.__name__ in sys.argv[3:]]
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    ps.Flow([1]).map(on(PLACE, work), **options(workers=1) if PLACE != "loop" else options()).collect_sync()
    for function in chosen:
        faulthandler.dump_traceback_later(DEADLINE, exit=True)
        before = Residue()
        problem: str | None = None
        try:
            run(function)
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
            del error
        left = before.left()
        if problem is None and left:
            problem = f"left behind: {left}"
        print(json.dumps([function.__name__, problem]), flush=True)
    faulthandler.cancel_dump_traceback_later()
    assert threading.current_thread() is threading.main_thread()


if __name__ == "__main__":
    main()
