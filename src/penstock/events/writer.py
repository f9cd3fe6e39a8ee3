"""The one thread of an open log that writes: it takes all that was asked meanwhile and commits it together.

States: *asleep* (on the queue, until something is asked or a lease must be renewed), *gathering* (what is in the queue,
up to a bound), *writing* (the lock is held, a transaction is open), *answering* (each request on the loop that asked).
There is no timer between requests and their commit: while one commit waits for the disk, the next ones gather.

Nobody can cancel a request once it is asked: whoever cancels the wait for it drops the answer, and the work is done all
the same. What a request raises, alone, is its own error: the others are done again without it. When the disk fails, all
of the transaction fail with WriteFailed and nothing of it counts; the file is closed, and opened anew for what is asked
next. Before the thread ends it does what was asked before ``close``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from penstock.errors import Closed
from penstock.events.transaction import Transaction
from penstock.flow.blocking import Ending
from penstock.place.base import outside

__all__ = ["Request", "Store", "Work", "Writer"]

logger = logging.getLogger("penstock")

_MOST = 8192
_MOST_BYTES = 32 << 20


class Work(Protocol):
    """What is asked: called in the transaction, returns its answer. ``size``: bytes that it writes, about."""

    @property
    def size(self) -> int: ...

    def __call__(self, transaction: Transaction) -> Any: ...


class Request:
    """Some work and who waits for it."""

    __slots__ = ("answer", "error", "loop", "result", "work")

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.loop = loop
        self.answer: asyncio.Future[Any] = loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None


class Store(Protocol):
    """Where the writer writes."""

    def begin(self) -> Transaction:
        """Take the lock, open what isn't open, begin a transaction."""

    def end(self, transaction: Transaction, *, commit: bool) -> None:
        """Commit, or undo, and give the lock back. Raises WriteFailed, and nothing counts then."""

    def after(self, transaction: Transaction) -> None:
        """The transaction counts: wake whoever waits for it."""

    def renew(self) -> float | None:
        """Renew the leases if it is time; seconds until the next time, or None if there are none."""

    def close(self) -> None: ...


class Writer:
    """The thread and its queue. ``ask`` and ``close`` may be called from any loop."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._queue: SimpleQueue[Request | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._ending = Ending()

    async def ask(self, work: Work) -> Any:
        """Have the work done in a transaction; its answer, when that is durable. Raises what it raised, WriteFailed, or
        Closed. Cancelling drops the answer: the work is done, or not, and nobody is told."""
        request = Request(work, asyncio.get_running_loop())
        self.submit(request)
        return await request.answer

    def submit(self, request: Request) -> None:
        """Ask without waiting. Raises Closed."""
        with self._lock:
            if self._closed:
                raise Closed(self._name)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="penstock-log", daemon=True)
                self._thread.start()
            outside.count += 1
            self._queue.put(request)

    async def close(self) -> None:
        """Do what was asked, then end the thread and close the store. Safe to call twice; cancelling changes
        nothing."""
        with self._lock:
            first, self._closed = not self._closed, True
            thread = self._thread
        if thread is None:
            self._store.close()
            return
        if first:
            self._queue.put(None)
        await self._ending.awaited()
        thread.join()  # telling was its last act

    def _run(self) -> None:
        store = self._store
        over = False
        while not over:
            requests, over = self._gather(store.renew())
            if requests:
                self._do(requests)
                self._answer(requests)
            del requests
        try:
            store.close()
        finally:
            self._ending.over()

    def _gather(self, timeout: float | None) -> tuple[list[Request], bool]:
        try:
            first = self._queue.get(timeout=timeout)
        except Empty:
            return [], False
        requests: list[Request] = []
        size = 0
        while first is not None:
            requests.append(first)
            size += first.work.size
            if len(requests) >= _MOST or size >= _MOST_BYTES:
                return requests, False
            try:
                first = self._queue.get_nowait()
            except Empty:
                return requests, False
        return requests, True

    def _do(self, requests: Sequence[Request]) -> None:
        """All in one transaction; if one of them raises, each in its own."""
        try:
            self._transact(requests)
        except Exception as error:
            if len(requests) > 1 and not isinstance(error, OSError):
                for request in requests:
                    request.error = None
                    self._do([request])
                return
            for request in requests:
                request.error = error

    def _transact(self, requests: Sequence[Request]) -> None:
        transaction = self._store.begin()
        try:
            for request in requests:
                request.result = request.work(transaction)
        except BaseException:
            self._store.end(transaction, commit=False)
            raise
        self._store.end(transaction, commit=True)
        self._store.after(transaction)

    def _answer(self, requests: Sequence[Request]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Request]] = {}
        for request in requests:
            by_loop.setdefault(request.loop, []).append(request)
        for loop, some in by_loop.items():
            try:
                loop.call_soon_threadsafe(_settle, some)
            except RuntimeError:  # that loop has ended, and nobody waits any more
                outside.count -= len(some)


def _settle(requests: Sequence[Request]) -> None:
    outside.count -= len(requests)
    for request in requests:
        answer = request.answer
        if answer.done():
            continue
        if request.error is None:
            answer.set_result(request.result)
        else:
            answer.set_exception(request.error)
