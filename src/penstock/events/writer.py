"""The one thread of an open log that writes: it takes all that was asked meanwhile and commits it together.

States: *asleep* (on the queue, until something is asked or a lease must be renewed), *gathering* (what is in the queue,
up to a bound), *writing* (the lock is held, a transaction is open), *answering* (each request on the loop that asked).
There is no timer between requests and their commit: what is asked within one turn of a loop is handed over together
after it, and while one commit waits for the disk, the next ones gather.

Nobody can cancel a request once it is asked: whoever cancels the wait for it drops the answer, and the work is done all
the same. What a request raises, alone, is its own error: the others are done again without it. When the disk fails, all
of the transaction fail with WriteFailed and nothing of it counts; the file is closed, and opened anew for what is asked
next. Before the thread ends it does what was asked before ``close``; what another loop asks in that very turn may be
refused (Closed).
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from penstock.errors import Closed
from penstock.events.transaction import Appended, Transaction
from penstock.flow.blocking import Ending
from penstock.flow.commit import uninterrupted
from penstock.place.base import outside

__all__ = ["Store", "Writer"]

T = TypeVar("T")

_MOST_BYTES = 32 << 20  # of a transaction
_MOST_IN_TURN = 1 << 20  # published to one topic: then the turn is handed over before it ends
_BESIDE = 100  # bytes that an event takes beside its payload


class _Request(ABC):
    """Some work, and what came of it. ``size``: bytes that it writes, about."""

    __slots__ = ("error", "result", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.result: Any = None
        self.error: BaseException | None = None

    @abstractmethod
    def do(self, transaction: Transaction) -> Any:
        """Called in the transaction, on the writer's thread; what it returns is the result."""

    @abstractmethod
    def settle(self) -> None:
        """Tell who waits, on the loop that asked."""


def _settle(answer: asyncio.Future[Any], error: BaseException | None, result: Any) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


class _Asked(_Request):
    """A function, and who waits for what it returns."""

    __slots__ = ("answer", "arguments", "function")

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], size: int, answer: asyncio.Future[Any]
    ) -> None:
        super().__init__(size)
        self.function = function
        self.arguments = arguments
        self.answer = answer

    def do(self, transaction: Transaction) -> Any:
        return self.function(transaction, *self.arguments)

    def settle(self) -> None:
        _settle(self.answer, self.error, self.result)


def _nothing(transaction: Transaction) -> None:
    pass


class _Together(_Request):
    """What is asked alike within a turn, one item after the other, and who waits for what came of each."""

    __slots__ = ("answers", "function", "items", "place")

    def __init__(self, function: Callable[..., Sequence[Any]], place: tuple[Any, ...]) -> None:
        super().__init__(0)
        self.function = function
        self.place = place
        self.items: list[Any] = []
        self.answers: list[asyncio.Future[Any] | tuple[asyncio.Future[Any], int]] = []
        """For one item, or with their number for many."""

    def do(self, transaction: Transaction) -> Sequence[Any]:
        return self.function(transaction, *self.place, self.items)

    def settle(self) -> None:
        at = 0
        error, results = self.error, self.result
        for answer in self.answers:
            if isinstance(answer, tuple):
                many, count = answer
                _settle(many, error, None if error else results[at : at + count])
                at += count
                continue
            if error is not None:
                _settle(answer, error, None)
            elif not answer.done():
                answer.set_result(results[at])
            at += 1


class _Turn:
    """What is asked within one turn of a loop."""

    __slots__ = ("alike", "loop", "requests")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.requests: list[_Request] = []
        self.alike: dict[Any, _Together] = {}

    def begin(self, key: Any, function: Callable[..., Sequence[Any]], *place: Any) -> _Together:
        """Where what is asked alike gathers, under a key in ``alike``."""
        alike = self.alike[key] = _Together(function, place)
        self.requests.append(alike)
        return alike

    def settle(self) -> None:
        outside.count -= 1
        for request in self.requests:
            request.settle()


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
    """The thread and its queue. Its methods but ``close`` are called on a loop; each turn of a loop is its own."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._queue: SimpleQueue[_Turn | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._turns: dict[asyncio.AbstractEventLoop, _Turn] = {}
        self._closed = False
        self._ending = Ending()

    def ask(self, function: Callable[..., Any], *arguments: Any, size: int = 0) -> asyncio.Future[Any]:
        """Have ``function(transaction, *arguments)`` called in a transaction; its answer, when that is durable: what
        it returned or raised, WriteFailed, or Closed. Cancelling the answer drops it, and nobody is told."""
        turn = self._turn()
        answer: asyncio.Future[Any] = turn.loop.create_future()
        turn.requests.append(_Asked(function, arguments, size, answer))
        return answer

    def ask_alike(self, function: Callable[..., Sequence[T]], *place: Any, item: Any) -> asyncio.Future[T]:
        """The same for ``function(transaction, *place, items)``, called once for all items that are asked in this turn
        for one place: it returns what becomes of each. What it raises, it raises for all."""
        turn = self._turn()
        key = function, place
        alike = turn.alike.get(key) or turn.begin(key, function, *place)
        answer: asyncio.Future[T] = turn.loop.create_future()
        alike.items.append(item)
        alike.answers.append(answer)
        return answer

    async def finished(self, answer: asyncio.Future[T]) -> T:
        """An answer, awaited to its end also by who is cancelled meanwhile; the cancellation is raised then."""
        try:
            return await answer
        except asyncio.CancelledError:
            with suppress(Closed):  # in which case it has been done, too
                await uninterrupted(self.ask(_nothing))  # after what was asked before
            raise

    def publish(self, topic: int, event: Appended) -> asyncio.Future[int]:
        """Have an event appended to a topic; its number, when that is durable. Fails as ``ask`` does."""
        turn = self._turn()
        alike = turn.alike.get(topic) or turn.begin(topic, Transaction.append, topic)
        answer: asyncio.Future[int] = turn.loop.create_future()
        alike.items.append(event)
        alike.answers.append(answer)
        self._add(turn, alike, len(event.body) + _BESIDE)
        return answer

    def publish_many(self, topic: int, events: Sequence[Appended]) -> asyncio.Future[list[int]]:
        """The same for many, all or none of them."""
        turn = self._turn()
        alike = turn.alike.get(topic) or turn.begin(topic, Transaction.append, topic)
        answer: asyncio.Future[list[int]] = turn.loop.create_future()
        alike.items += events
        alike.answers.append((answer, len(events)))
        self._add(turn, alike, sum(len(event.body) + _BESIDE for event in events))
        return answer

    def _add(self, turn: _Turn, alike: _Together, size: int) -> None:
        alike.size += size
        if alike.size >= _MOST_IN_TURN:
            self._hand_over(turn)

    def _turn(self) -> _Turn:
        """What the running loop asks in this turn."""
        loop = asyncio.get_running_loop()
        turn = self._turns.get(loop)
        if turn is None:
            if self._closed:
                raise Closed(self._name)
            turn = self._turns[loop] = _Turn(loop)
            loop.call_soon(self._hand_over, turn)
        return turn

    def _hand_over(self, turn: _Turn) -> None:
        """The turn is over, or long enough."""
        if self._turns.get(turn.loop) is not turn:  # it was long enough before
            return
        del self._turns[turn.loop]
        with self._lock:
            if not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="penstock-log", daemon=True)
                    self._thread.start()
                outside.count += 1
                self._queue.put(turn)
                return
        error = Closed(self._name)
        for request in turn.requests:
            request.error = error
            request.settle()

    async def close(self) -> None:
        """Do what was asked, then end the thread and close the store. Safe to call twice; cancelling changes
        nothing."""
        turn = self._turns.get(asyncio.get_running_loop())
        if turn is not None:
            self._hand_over(turn)
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
            turns, over = self._gather(store.renew())
            if turns:
                self._do([request for turn in turns for request in turn.requests])
                self._answer(turns)
            del turns
        try:
            store.close()
        finally:
            self._ending.over()

    def _gather(self, timeout: float | None) -> tuple[list[_Turn], bool]:
        try:
            first = self._queue.get(timeout=timeout)
        except Empty:
            return [], False
        turns: list[_Turn] = []
        size = 0
        while first is not None:
            turns.append(first)
            size += sum(request.size for request in first.requests)
            if size >= _MOST_BYTES:
                return turns, False
            try:
                first = self._queue.get_nowait()
            except Empty:
                return turns, False
        return turns, True

    def _do(self, requests: Sequence[_Request]) -> None:
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

    def _transact(self, requests: Sequence[_Request]) -> None:
        transaction = self._store.begin()
        try:
            for request in requests:
                request.result = request.do(transaction)
        except BaseException:
            self._store.end(transaction, commit=False)
            raise
        self._store.end(transaction, commit=True)
        self._store.after(transaction)

    def _answer(self, turns: Sequence[_Turn]) -> None:
        for turn in turns:
            try:
                turn.loop.call_soon_threadsafe(turn.settle)
            except RuntimeError:  # that loop has ended, and nobody waits any more
                outside.count -= 1
