"""The worker process: ``python -P -m penstock.place.worker SOCKET OUT IN PARENT``, started by a Link.

*Two threads.* The main thread reads the socket, runs the user's functions and collects results in the outbox. The
outbox's watch thread never ends: it flushes what lies too long, and ends the process when the parent is gone.

*The stamp.* Before each step the main thread writes the time, and then the task's number and the step, into words that
the parent reads: timeouts run from them, and if this process dies, the stamped task is the one it died of. It does so
too, without a time, before it reads a value that may run code of the user's. A stream's clock starts anew for each
output and stands still while it waits for a grant; so does that of a result that only waits to be sent.

*The end.* The kernel kills this process when the thread that started it ends, which is when the parent ends; that
also ends a worker inside a long C call. Where there is no such signal the watch thread sees the socket's end. CLOSE
is the orderly end: objects are closed, then DONE, then the interpreter's own shutdown. ``sys.exit`` in a user's
function ends the process with that code, and costs the item that called it.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from penstock.errors import CannotSend
from penstock.place.base import (
    DROPPED,
    FAILED,
    GRACE,
    KEEP,
    MAP,
    PENDING,
    SPREAD,
    STREAM,
    Chain,
    set_worker_index,
    spread,
    spread_async,
)
from penstock.place.objects import bind, close_all
from penstock.place.outbox import Outbox
from penstock.place.pickling import LostClass, received
from penstock.place.remote import freeze_error, in_words, refusal
from penstock.place.shm import Arena, Window
from penstock.place.wire import CLOSE, DONE, GRANT, PLAIN, READY, TASKS, Delivery, Inbox, Postbox

if TYPE_CHECKING:
    import asyncio

__all__ = ["Worker", "main"]

_READ = 65536
_ALWAYS_TIMED = 0.0001
_SAMPLE_EVERY = 32
_PDEATHSIG = 1
_UNREADABLE = "a worker can't load it: "

_KEPT = 16 << 20
"""Bytes of a block that is allocated, and freed untouched, before the work. glibc learns from the largest block freed
what it needn't give back to the system; a fresh process has freed none, and pays for its pages again with each array
of a few hundred KB: decoding pictures took a third longer."""

_CALM = PLAIN | {list, dict, tuple, set, bytearray}
"""Types of results that there is nothing to await of."""


def main(arguments: list[str]) -> None:
    """Work until the parent closes the socket or says CLOSE."""
    wire, outward, inward, parent = map(int, arguments)
    _leave_to_the_parent(signal.SIGINT, signal.default_int_handler)
    _leave_to_the_parent(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    _die_with(parent)
    bytearray(_KEPT)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # a worker may be killed: what it printed is out by then
    worker = Worker(socket.socket(fileno=os.dup(wire)), Arena(outward), Window(inward))
    os.close(outward)
    os.close(inward)
    os.set_inheritable(wire, False)
    # The descriptor `wire` itself is never closed: the parent must not see the socket's end before the exit code
    # is decided, and the interpreter's shutdown closes sockets first.
    try:
        if worker.start():
            worker.work()
    except SystemExit as leaving:
        worker.outbox.flush()
        _end_within(GRACE, leaving)
        raise


def _leave_to_the_parent(number: signal.Signals, usual: Any) -> None:
    """Do nothing at this signal: but processes that the user's code starts know it as usual, as ignoring would not."""
    signal.signal(number, lambda *_: None)
    signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=partial(signal.signal, number, usual))


def _end_within(seconds: float, leaving: SystemExit) -> None:
    """Let the interpreter shut down for so long: threads of the user's may keep it from ending."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))

    threading.Thread(target=end, name="penstock-end", daemon=True).start()


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before we could ask


class Worker:
    """The main thread's side: what arrived, what runs."""

    def __init__(self, wire: socket.socket, arena: Arena, window: Window) -> None:
        self._wire = wire
        self._inbox = Inbox(window)
        self._arrived: deque[Delivery] = deque()
        self._words = arena.words
        self._times = arena.times
        self.outbox = Outbox(wire, Postbox(arena, received, grows=False))
        self._until_sample = 1
        self._runner: asyncio.Runner | None = None
        self._calls: list[Any] = []
        self._verbs: list[int] = []
        self._closers: list[Callable[[], Any]] = []
        self._chain: Chain

    # -- the socket ---------------------------------------------------------------------------------------------------

    def _next(self) -> Delivery:
        """What comes next; nothing lies in the outbox while this waits."""
        return self._arrived.popleft() if self._arrived else self._receive()

    def _receive(self) -> Delivery:
        delivery = self._inbox.next()
        while delivery is None:
            try:
                data = self._wire.recv(_READ, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.outbox.flush()
                data = self._wire.recv(_READ)
            if not data:
                os._exit(1)  # the parent is gone
            self._inbox.feed(data)
            delivery = self._inbox.next()
        return delivery

    # -- beginning and end --------------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Build what the chain needs; False if that failed, which the parent is told."""
        index, name, arguments, path, directory, python_path, chain = self._next().body
        sys.argv[:] = arguments
        sys.path[:] = path
        os.environ.pop("PYTHONPATH", None)
        if python_path is not None:
            os.environ["PYTHONPATH"] = python_path
        set_worker_index(index)
        failure: BaseException | None
        try:
            if directory is not None:
                os.chdir(directory)
            try:
                self._chain = pickle.loads(chain)
            except Exception as error:
                raise CannotSend(name, "function", _UNREADABLE + in_words(error)) from error
            self._verbs = [step.verb for step in self._chain.steps]
            self._calls, self._closers, failure = bind(self._chain)
        except Exception as error:
            failure = error
        if isinstance(failure, Exception):
            close_all(self._closers, name, self._await)
            self.outbox.send(READY, freeze_error(failure))
            return False
        if failure is not None:
            raise failure
        self.outbox.send(READY, None)
        return True

    def work(self) -> None:
        """Do what the parent says until it says CLOSE; then close the objects."""
        while (delivery := self._next()).kind != CLOSE:
            if delivery.kind == TASKS:
                self._run_chunk(delivery)
        failure = close_all(self._closers, self._chain.name, self._await)
        if self._runner is not None:
            self._runner.close()
        self.outbox.send(DONE, None if failure is None else freeze_error(failure))

    # -- tasks ------------------------------------------------------------------------------------------------------

    def _run_chunk(self, delivery: Delivery) -> None:
        """The tasks of one chunk, one after the other; results go when a slice has passed since the last went."""
        first, ats = delivery.body
        values = delivery.values
        outbox = self.outbox
        results, words, times = outbox.results, self._words, self._times
        clock = time.monotonic
        call = self._calls[0]
        simple = self._verbs == [MAP]
        now = clock()
        for index in range(len(values)):
            at = ats.get(index, 0) if ats else 0
            if results and not outbox.armed:
                outbox.ring()
            try:
                if delivery.plain:
                    value = values[index]
                else:
                    times[1] = inf
                    words[0] = (first + index) << 16 | at  # what ends the process while it is read is charged to it
                    value = delivery.thaw(index)
            except Exception as error:
                self._refuse(at, error)
                continue
            self._until_sample -= 1
            if simple and self._until_sample > 0:  # the same as _run, for what is quick
                times[1] = now
                words[0] = (first + index) << 16
                try:
                    result = call(value)
                    if type(result) in PLAIN:
                        results.append(result)
                    else:
                        result = result if type(result) in _CALM else self._await(result)
                        times[1] = inf  # what only waits to be sent is in time
                        self._add(0, result)
                except BaseException as error:
                    self._fail(error, 0, 0, value)
            else:
                self._run(first + index, at, value)
            before, now = now, clock()
            outbox.busy += now - before
            if now >= outbox.flush_at:
                outbox.flush()
                now = clock()
        words[0] = 0

    def _refuse(self, at: int, error: Exception) -> None:
        if isinstance(error, LostClass):
            self.outbox.add_odd(PENDING, at, None)
        else:
            cannot = refusal(self._chain.steps[at].name, None, error, _UNREADABLE)
            self.outbox.add_odd(FAILED, at, freeze_error(cannot))

    def _run(self, number: int, at: int, value: Any) -> None:
        words, times = self._words, self._times
        calls, verbs = self._calls, self._verbs
        clock = time.monotonic
        seconds: list[float] = []
        step = at
        given = value
        began = clock()
        try:
            while step < len(calls):
                given = value
                times[1] = began = clock()
                words[0] = number << 16 | step
                result = calls[step](value)
                verb = verbs[step]
                if verb == MAP:
                    value = result if type(result) in _CALM else self._await(result)
                elif verb == KEEP:
                    if not (result if type(result) in _CALM else self._await(result)):
                        times[1] = inf
                        seconds.append(clock() - began)
                        self._leave(DROPPED, at, step, None, given)
                        break
                elif verb == SPREAD:
                    value = self._spread(self._chain.steps[step].name, result)
                else:
                    self._stream(number, result)
                    value = None
                seconds.append(clock() - began)
                step += 1
            else:
                times[1] = inf
                step -= 1  # if the result can't travel, the last step gets the blame
                self._add(step, value)
        except BaseException as error:
            if len(seconds) == step - at:  # the step itself failed, and not the sending of what it gave
                seconds.append(clock() - began)
            self._fail(error, at, step, given)
        if self._until_sample <= 0:
            self.outbox.timings.append((number, seconds))
            self._until_sample = 1 if sum(seconds) >= _ALWAYS_TIMED else _SAMPLE_EVERY
        if verbs[-1] == STREAM:
            self.outbox.flush()  # an expansion whose outputs are out must not be taken for one that never ran

    def _add(self, step: int, value: Any) -> None:
        try:
            self.outbox.add(value)
        except Exception as error:
            raise refusal(self._chain.steps[step].name, value, error) from None

    def _fail(self, error: BaseException, at: int, step: int, given: Any) -> None:
        if isinstance(error, SystemExit):
            raise error
        self._times[1] = inf
        self._leave(FAILED, at, step, error, given)

    def _leave(self, outcome: int, at: int, step: int, error: BaseException | None, given: Any) -> None:
        """Report what isn't OK, with what the step was given if the parent doesn't have that and may try it again."""
        frozen = None if error is None else freeze_error(error)
        if step > at and outcome != DROPPED:
            with suppress(Exception):  # it can't go back: then the task returns to where it came in
                self.outbox.add_odd(outcome, step, frozen, given)
                return
        self.outbox.add_odd(outcome, step, frozen)

    # -- what functions may return ------------------------------------------------------------------------------------

    def _await(self, result: Any) -> Any:
        """The result itself, awaited on this worker's own loop if it is awaitable."""
        if not hasattr(type(result), "__await__"):
            return result

        async def wait() -> Any:
            return await result

        return self._loop_run(wait())

    def _loop_run(self, coroutine: Any) -> Any:
        if self._runner is None:
            import asyncio

            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def _spread(self, step: str, result: Any) -> list[Any]:
        if hasattr(type(result), "__await__") or hasattr(type(result), "__aiter__"):
            outputs: list[Any] = self._loop_run(spread_async(step, result))
            return outputs
        return spread(step, result)

    def _stream(self, number: int, result: Any) -> None:
        """Hand over the outputs of an expansion in parts, waiting for grants."""
        result = self._await(result)
        self.outbox.begin(number)
        try:
            if hasattr(type(result), "__aiter__"):

                async def drain() -> None:
                    try:
                        async for output in result:
                            self._emit(number, output)
                    finally:
                        if isinstance(result, AsyncGenerator):
                            await result.aclose()

                self._loop_run(drain())
            else:
                for output in result:
                    self._emit(number, output)
        except Exception:
            self._times[1] = inf
            self._end_part(number)  # what came before the failure counts
            raise
        self._times[1] = inf
        self._end_part(number)

    def _emit(self, number: int, output: Any) -> None:
        self._times[1] = inf
        try:
            more = self.outbox.emit(output)
        except Exception as error:
            raise refusal(self._chain.steps[-1].name, output, error) from None
        if not more:
            self._end_part(number)
        if not self.outbox.armed:
            self.outbox.ring()
        self._times[1] = time.monotonic()

    def _end_part(self, number: int) -> None:
        while not self.outbox.end_part():
            began = time.monotonic()
            delivery = self._receive()
            self.outbox.busy -= time.monotonic() - began
            if delivery.kind != GRANT:
                self._arrived.append(delivery)
            elif delivery.body == number:
                self.outbox.grant()


if __name__ == "__main__":
    main(sys.argv[1:])
