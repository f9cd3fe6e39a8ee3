"""SIGINT and SIGTERM, heard by an event loop for as long as something runs there.

A signal's number comes through the wake-up descriptor, which the system's own handler writes to at once. A handler in
Python would have to wait until the main thread runs byte code, and that thread may have begun, in that very
moment, to wait for something that only the signal could bring about.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupts", "heard_on"]

_BOTH = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Calls ``heard`` with each of these signals, on the loop that listens; what stood before is restored on leaving.

    To be entered and left on the main thread. What comes when nobody listens (yet, or any more) isn't lost: it is
    heard when somebody does, or on leaving. Other signals go where they went before.
    """

    def __init__(self, heard: Callable[[signal.Signals], None], numbers: Sequence[signal.Signals] = _BOTH) -> None:
        self._heard = heard
        self._numbers = numbers
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._inward, self._outward = socket.socketpair()
        self._inward.setblocking(False)
        self._outward.setblocking(False)
        self._elsewhere = signal.set_wakeup_fd(self._outward.fileno(), warn_on_full_buffer=False)
        try:
            for number in self._numbers:
                self._handlers[number] = signal.signal(number, _leave_it)
        except BaseException:  # one came before the handlers were all in place, and the old one raised
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        finally:  # the handlers are back, and may raise
            signal.set_wakeup_fd(self._elsewhere)
            self._hear()
            self._inward.close()
            self._outward.close()

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on ``heard`` is called on this loop, which is the running one."""
        loop.add_reader(self._inward.fileno(), self._hear)

    def ignore(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop listens no more."""
        loop.remove_reader(self._inward.fileno())

    def _hear(self) -> None:
        with suppress(BlockingIOError, InterruptedError):
            for number in self._inward.recv(4096):
                if number in self._numbers:
                    self._heard(signal.Signals(number))
                elif self._elsewhere >= 0:
                    with suppress(OSError):  # it is full, so it will be read anyway
                        os.write(self._elsewhere, bytes([number]))


_heard_on: dict[asyncio.AbstractEventLoop, tuple[Interrupts, list[Callable[[signal.Signals], None]]]] = {}
"""The loops that listen now, and for whom: they may stop in any order, and what stood before is restored once."""


def heard_on(loop: asyncio.AbstractEventLoop, heard: Callable[[signal.Signals], None]) -> Callable[[], None] | None:
    """Hear them on this running loop, as do all that asked before; returns how to stop. None off the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return None
    if loop not in _heard_on:
        everybody: list[Callable[[signal.Signals], None]] = []

        def tell(number: signal.Signals) -> None:
            for each in tuple(everybody):
                each(number)

        interrupts = Interrupts(tell)
        interrupts.__enter__()
        interrupts.listen(loop)
        _heard_on[loop] = interrupts, everybody
    _heard_on[loop][1].append(heard)

    def restore() -> None:
        interrupts, everybody = _heard_on[loop]
        if len(everybody) == 1:
            del _heard_on[loop]
            interrupts.ignore(loop)
            interrupts.__exit__()  # it may be told of one that came just now
        everybody.remove(heard)

    return restore


def _leave_it(number: int, frame: FrameType | None) -> None:
    """Only that there is a handler keeps a signal from ending the process."""
