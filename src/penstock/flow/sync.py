"""The ``_sync`` twins: one background loop, in one daemon thread, for all of a process.

A caller blocks until its coroutine has ended on that loop, whatever loop runs in its own thread: nothing is patched or
nested. After a fork the child makes a loop of its own. On the main thread a Ctrl-C while waiting cancels the
coroutine and waits for it to clean up before KeyboardInterrupt goes on. The background loop is what hears it: a
handler in Python would run only when the main thread does, which may just have begun to wait.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from penstock.errors import WrongLoop
from penstock.flow.interrupts import Interrupts

if TYPE_CHECKING:
    from penstock.flow.job import Job
    from penstock.flow.report import Report

__all__ = ["background_loop", "on_background_loop", "run_blocking", "run_job_blocking"]

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_process = 0
_tasks: dict[concurrent.futures.Future[Any], asyncio.Task[Any]] = {}


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop of the background thread, started on first use."""
    global _loop, _thread, _process
    with _lock:
        if _loop is None or _process != os.getpid():
            loop = _new_loop()
            started = threading.Event()

            def serve() -> None:
                asyncio.set_event_loop(loop)
                loop.call_soon(started.set)
                while True:
                    try:
                        return loop.run_forever()
                    except (KeyboardInterrupt, SystemExit):
                        pass  # of a task, which has it as its outcome; the loop serves others too

            _loop, _process = loop, os.getpid()
            _thread = threading.Thread(target=serve, name="penstock-loop", daemon=True)
            _thread.start()
            started.wait()
        return _loop


@atexit.register
def _stop_background_loop() -> None:
    """At the end of the process: what still runs is cancelled, so that nothing is left behind."""
    if _loop is None or _thread is None or _process != os.getpid():
        return
    loop = _loop

    async def end() -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=5)
        await loop.shutdown_asyncgens()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    _thread.join(6)
    if not _thread.is_alive():
        loop.close()


def on_background_loop() -> bool:
    """Whether the caller runs in the background loop's own thread, where nothing may wait for that loop."""
    return threading.current_thread() is _thread


def run_blocking(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``make()`` on the background loop and return its result; raises what it raised, or WrongLoop there.

    An interrupt while waiting cancels the coroutine and waits for its end first.
    """
    if on_background_loop():
        raise WrongLoop(
            "a _sync call would block the event loop that it waits for",
            "Await the async form here, or make the call in a thread: asyncio.to_thread, or a def stage",
        )
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a handler of the user's stays
    if ours and threading.current_thread() is threading.main_thread():
        return _wait_interruptibly(make)
    return _wait(make)


def _wait_interruptibly(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """On the main thread: the background loop hears Ctrl-C, and cancels the coroutine."""
    at_work: list[asyncio.Task[Any]] = []
    heard = False

    def hear(_: signal.Signals) -> None:
        nonlocal heard
        heard = True
        for task in at_work:
            task.cancel()

    async def listening() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        at_work.append(task)
        interrupts.listen(loop)
        try:
            return await make()
        finally:
            at_work.clear()
            interrupts.ignore(loop)

    try:
        with Interrupts(hear, (signal.SIGINT,)) as interrupts:
            return _wait(listening)
    finally:
        if heard:
            raise KeyboardInterrupt from None


def _wait(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    try:
        _submit(make, future)
        return future.result()
    except (KeyboardInterrupt, SystemExit):
        if not future.done():  # it came from outside, perhaps before anything was submitted
            background_loop().call_soon_threadsafe(_cancel, future)
            concurrent.futures.wait([future])
        raise
    finally:
        del future  # an exception's traceback must not keep itself alive


def _submit(make: Callable[[], Coroutine[Any, Any, T]], future: concurrent.futures.Future[T]) -> None:
    loop = background_loop()

    def start() -> None:
        task = loop.create_task(make())
        _tasks[future] = task
        task.add_done_callback(finish)

    def finish(task: asyncio.Task[T]) -> None:
        del _tasks[future]
        if task.cancelled():
            _settle_cancelled(future)
        elif (error := task.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    loop.call_soon_threadsafe(start)  # in a copy of the caller's context


def _cancel(future: concurrent.futures.Future[Any]) -> None:
    task = _tasks.get(future)
    if task is not None:
        task.cancel()
    elif not future.done():
        _settle_cancelled(future)


def _settle_cancelled(future: concurrent.futures.Future[Any]) -> None:
    future.cancel()
    future.set_running_or_notify_cancel()


def run_job_blocking(
    job: Job, *, fresh: bool, inline: bool, progress: bool | None, until: Literal["drained"] | None
) -> Report:
    """``Job.run`` on the background loop, with the signals of the main thread if this is it."""
    run = job.start(fresh=fresh, inline=inline, progress=progress, until=until)

    async def whole() -> Report:
        async with run:
            return await run.finish()

    if threading.current_thread() is not threading.main_thread():
        return run_blocking(whole)

    async def listening(interrupts: Interrupts) -> Report:
        loop = asyncio.get_running_loop()
        interrupts.listen(loop)
        try:
            return await whole()
        finally:
            interrupts.ignore(loop)

    with Interrupts(run.interrupt) as interrupts:
        report = run_blocking(lambda: listening(interrupts))
    if run.interrupted == signal.SIGINT:
        raise KeyboardInterrupt
    if run.interrupted == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    return report
