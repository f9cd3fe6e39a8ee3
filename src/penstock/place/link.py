"""The parent's end of one worker process: its birth, its socket, what it was given, its end.

*The thread.* Each worker has one daemon thread in the parent that starts it and waits for its end, and does nothing
else. It starts the process because the parent-death signal that the worker asks for is sent when the *thread* that
started it ends, so that thread must live as long as the worker; and it waits because that gives the exact exit code
at once on every system, also when a grandchild keeps the socket open. It blocks SIGINT and SIGTERM for itself, which
the worker inherits until it ignores them: the parent decides what a signal means.

*States.* Starting → ready (it answered READY) → ending (CLOSE was sent) → ended. ``ended`` is called once, on the
loop, after everything the worker had sent was heard. ``kill`` may be called in any state, also before the process
exists. Everything but the thread's two steps happens on the loop.

*The socket* never blocks the loop: what doesn't fit waits in a backlog. End of file without CLOSE means that the
worker is going; if it isn't (its socket was closed by the user's code), it is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import penstock
from penstock.errors import CannotSend
from penstock.place.base import Chain, Task, cores
from penstock.place.pickling import dumps
from penstock.place.remote import in_words
from penstock.place.shm import WHOLE, Arena, Window, create
from penstock.place.wire import Delivery, Inbox, Postbox

__all__ = ["Link", "environment", "what_to_start"]

_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_READ = 65536


def environment(workers: int) -> dict[str, str]:
    """The environment of a worker: numeric libraries share the cores, and this penstock is the one that is found."""
    given = dict(os.environ)
    for name in _THREADS:
        given.setdefault(name, str(max(1, cores() // workers)))
    root = os.path.dirname(os.path.dirname(os.path.abspath(penstock.__file__)))
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        given["PYTHONPATH"] = os.pathsep.join(filter(None, (root, given.get("PYTHONPATH"))))
    return given


def what_to_start(chain: Chain, sent: dict[type, str]) -> tuple[Any, ...]:
    """What a worker is told first, but for its number; pickled once for all of them. Raises CannotSend."""
    try:
        directory = os.getcwd()
    except FileNotFoundError:
        directory = None
    pickled = _pickled(chain, sent)
    return chain.name, list(sys.argv), list(sys.path), directory, os.environ.get("PYTHONPATH"), pickled


def _pickled(chain: Chain, sent: dict[type, str]) -> bytes:
    try:
        return dumps(chain, sent, grows=True)
    except Exception:
        for step in chain.steps:
            try:
                dumps(step.call, {})
            except Exception as error:
                raise CannotSend(step.name, type(step.call).__name__, in_words(error)) from error
        raise


class Link:
    """One worker process, number ``index``, and what it was given and hasn't answered.

    ``tasks`` are in the order in which the worker takes them, the first being number ``first``; ``chunks`` are the
    lengths of the chunks they went in. ``heard`` is called with each delivery, ``ended`` with the exit code, or with
    the error that kept the process from starting.
    """

    def __init__(
        self,
        index: int,
        name: str,
        environment: dict[str, str],
        sent: dict[type, str],
        *,
        heard: Callable[[Link, Delivery], None],
        ended: Callable[[Link, int | None, Exception | None], None],
    ) -> None:
        self.index = index
        self.tasks: deque[Task] = deque()
        self.first = 1
        self.chunks: deque[int] = deque()
        self.since = 0.0  # when it was last known to start on something
        self.ready = False
        self.closing = False
        self.done = False  # whether it has closed its objects
        self.held = False  # whether the pool counts it among what is outside
        self.parts_out = 0
        self.paused = False
        self.parted = False  # whether the first task has handed over a part
        self.condemned: tuple[int, int, BaseException] | None = None  # task number, outcome, error
        self.timer: asyncio.TimerHandle | None = None
        self._heard = heard
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._doomed = False
        self._last_stamp: tuple[int, int, float] | None = None
        self._backlog: deque[bytes | memoryview] = deque()
        self._socket, theirs = socket.socketpair()
        inward = outward = -1
        try:
            inward = create(WHOLE)
            outward = create(WHOLE)
            self.inbox = Inbox(Window(inward))
            self.postbox = Postbox(Arena(outward), sent, grows=True)
            self._socket.setblocking(False)
            self._thread = threading.Thread(
                target=self._live,
                args=(theirs, inward, outward, environment),
                name=f"penstock-{name}-{index}-process",
                daemon=True,
            )
            self._thread.start()
        except BaseException:
            self._socket.close()
            _let_go(theirs, inward, outward)
            raise
        self._loop.add_reader(self._socket.fileno(), self._on_readable)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _live(self, theirs: socket.socket, inward: int, outward: int, environment: dict[str, str]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        code: int | None = None
        error: Exception | None = None
        try:
            self._process = _start(theirs.fileno(), inward, outward, environment)
        except Exception as problem:
            error = problem
        finally:
            _let_go(theirs, inward, outward)
        if self._process is not None:
            if self._doomed:
                self._process.kill()
            code = self._process.wait()
        try:
            self._loop.call_soon_threadsafe(self._on_end, code, error)
        except RuntimeError:  # the loop was closed, and with it all that could listen
            self._socket.close()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Send a frame, now or when the socket takes it. If the worker is gone, its end says so."""
        if self._backlog:
            self._backlog.append(frame)
            return
        sent = self._try_send(frame)
        if sent < len(frame):
            self._backlog.append(memoryview(frame)[sent:])
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _try_send(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)

    def _on_writable(self) -> None:
        while self._backlog:
            data = self._backlog.popleft()
            sent = self._try_send(data)
            if sent < len(data):
                self._backlog.appendleft(memoryview(data)[sent:])
                return
        self._loop.remove_writer(self._socket.fileno())

    def _on_readable(self) -> None:
        if self._read() is False:
            self._loop.remove_reader(self._socket.fileno())
            if not self.closing:
                self.kill()

    def _read(self) -> bool | None:
        """Take what the socket holds. None if it holds nothing now, False if it never will again."""
        try:
            data = self._socket.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return False
        self.inbox.feed(data)
        while (delivery := self.inbox.next()) is not None:
            self._heard(self, delivery)
        return bool(data)

    def drain(self) -> None:
        """Hear everything that has arrived."""
        while self._read():
            pass

    def take_back(self, count: int) -> list[Task]:
        """The first so many tasks, which are answered."""
        popleft, chunks = self.tasks.popleft, self.chunks
        tasks = [popleft() for _ in range(count)]
        self.first += count
        self.since = time.monotonic()
        while count >= chunks[0]:
            count -= chunks.popleft()
            if not count:
                return tasks
        chunks[0] -= count
        return tasks

    def stamp(self) -> tuple[int, int, float]:
        """What the worker does now: the task's number (0: nothing), the step, and the monotonic time it began."""
        if self._last_stamp is not None:
            return self._last_stamp
        words, times = self.inbox.window.words, self.inbox.window.times
        while True:
            word = words[0]
            began = times[1]
            if words[0] == word:
                return word >> 16, word & 0xFFFF, began

    def kill(self) -> None:
        """End the process at once. ``ended`` follows."""
        self._doomed = True
        if self._process is not None:
            self._process.kill()

    def _on_end(self, code: int | None, error: Exception | None) -> None:
        self._thread.join()  # calling this was its last act
        if self._socket.fileno() >= 0:  # nobody has given up on it
            self.drain()
            self._last_stamp = self.stamp()
            self.discard()
        self._ended(self, code, error)

    def discard(self) -> None:
        """Let go of the socket and the memory; arrays that the user holds stay valid. Safe to call twice."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self.inbox.window.retire()
            self.postbox.arena.close()
            del self.inbox, self.postbox
        if self.timer is not None:
            self.timer.cancel()

    @property
    def pid(self) -> int | None:
        """The process's number; None while it is being started."""
        return None if self._process is None else self._process.pid


def _start(wire: int, inward: int, outward: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    flags: Any = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    return subprocess.Popen(
        [
            sys.executable,
            *flags,
            "-P",
            "-m",
            "penstock.place.worker",
            *map(str, (wire, inward, outward, os.getpid())),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=(wire, inward, outward),
        env=environment,
    )


def _let_go(theirs: socket.socket, *descriptors: int) -> None:
    theirs.close()
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
