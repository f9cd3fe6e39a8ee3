"""Signals reach the loop that listens, and afterwards everything is as it was."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable

import pytest

from penstock.flow.interrupts import Interrupts, heard_on

HEARD = (signal.SIGINT, signal.SIGTERM)


def state() -> tuple[object, ...]:
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return fd, *map(signal.getsignal, HEARD)


def test_both_signals_are_heard_on_the_loop_that_listens() -> None:
    async def main() -> list[signal.Signals]:
        heard: list[signal.Signals] = []
        both = asyncio.Event()

        def hear(number: signal.Signals) -> None:
            heard.append(number)
            if len(heard) == 2:
                both.set()

        loop = asyncio.get_running_loop()
        with Interrupts(hear) as interrupts:
            interrupts.listen(loop)
            for number in HEARD:
                signal.raise_signal(number)
            await both.wait()
            interrupts.ignore(loop)
        return heard

    before = state()
    assert asyncio.run(main()) == list(HEARD)
    assert state() == before


def test_what_comes_while_nobody_listens_is_heard_on_leaving() -> None:
    heard: list[signal.Signals] = []
    before = state()
    with Interrupts(heard.append):
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
    assert heard == [signal.SIGTERM]
    assert state() == before


def test_a_loop_in_another_thread_hears_while_the_main_thread_waits_for_it() -> None:
    """The main thread runs no byte code until the loop has answered."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    answered = threading.Lock()
    answered.acquire()
    try:
        with Interrupts(lambda number: answered.release()) as interrupts:
            loop.call_soon_threadsafe(interrupts.listen, loop)
            main = threading.main_thread().ident
            assert main is not None
            loop.call_soon_threadsafe(signal.pthread_kill, main, signal.SIGINT)
            assert answered.acquire(timeout=30)
            stopped = threading.Event()
            loop.call_soon_threadsafe(lambda: (interrupts.ignore(loop), stopped.set()))
            stopped.wait()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize("raising", [lambda: None, lambda: 1 / 0], ids=["well", "by an error"])
def test_other_signals_go_where_they_went_before(raising: Callable[[], object]) -> None:
    inward, outward = socket.socketpair()
    outward.setblocking(False)
    usr1 = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    fd = signal.set_wakeup_fd(outward.fileno())
    before = state()
    try:
        try:
            with Interrupts(lambda number: None):
                signal.raise_signal(signal.SIGUSR1)
                raising()
        except ZeroDivisionError:
            pass
        assert inward.recv(10) == bytes([signal.SIGUSR1])
        assert state() == before
    finally:
        signal.set_wakeup_fd(fd)
        signal.signal(signal.SIGUSR1, usr1)
        inward.close()
        outward.close()


def test_several_on_a_loop_hear_together_and_stop_in_any_order() -> None:
    before = state()

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        heard: list[str] = []
        told = asyncio.Event()

        def hear(name: str) -> Callable[[signal.Signals], None]:
            return lambda number: (heard.append(f"{name} {number.name}"), told.set())[0]

        stops = [heard_on(loop, hear(name)) for name in "abc"]
        for first in (0, 2):
            signal.raise_signal(signal.SIGTERM)
            await told.wait()
            told.clear()
            stop = stops[first]
            assert stop is not None
            stop()
        signal.raise_signal(signal.SIGTERM)
        await told.wait()
        assert stops[1] is not None
        stops[1]()
        return heard

    assert asyncio.run(main()) == [f"{name} SIGTERM" for name in ("a", "b", "c", "b", "c", "b")]
    assert state() == before
