"""The file of an open log: its connections, its lock, its leases, and who waits for what is published.

In memory the same tables stand in a database of their own, which lives as long as the log is open: nothing is shared
with other processes there, and there is no lock, no bell, and one connection for all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from penstock.errors import LogError, WriteFailed
from penstock.events.clock import boot_time
from penstock.events.live import Presence
from penstock.events.schema import connect, prepare, reported, unrecoverable
from penstock.events.transaction import Transaction

__all__ = ["MEMORY", "FileStore"]

logger = logging.getLogger("penstock")

MEMORY = ":memory:"
_LOOK_EVERY = 1.0  # seconds between two looks at the file, for a writer that was killed before it rang


class FileStore:
    """What a ``Writer`` writes to. ``begin`` to ``renew`` and ``close`` are called on its thread, ``open`` before
    it."""

    def __init__(self, path: str, durability: str) -> None:
        self.path = path if path == MEMORY else os.path.abspath(path)
        self.durability = durability
        self.presence = None if path == MEMORY else Presence(self.path)
        self.jobs: set[str] = set()
        """The jobs that write to topics here, by the prefix of their journal's tables."""
        self._connection: Any = None
        self._leases: dict[int, float] = {}
        self._renewed = 0.0
        self._waiting: dict[int, set[Callable[[], None]]] = {}
        self._counts: dict[int, int] = {}
        self._rung = 0
        self._lock = threading.Lock()
        self._watching: threading.Thread | None = None
        self._nudge, self._nudged = -1, -1
        self._over = False

    @property
    def session(self) -> str:
        """What names this open log among those of other processes."""
        return self.presence.name if self.presence is not None else MEMORY

    @property
    def directory(self) -> str | None:
        """Where processes tell of themselves; None in memory."""
        return None if self.presence is None else self.presence.directory

    def is_alive(self, session: str) -> bool:
        """Whether the process of another open log of this file still lives."""
        return self.presence is None or self.presence.is_alive(session)

    def open(self) -> None:
        """Open the file, or make it. Raises LogError, WriteFailed."""
        if self.presence is not None:
            self.presence.enter()
        try:
            self._take_lock()
            try:
                self._connection = self._connected()
            finally:
                self._give_lock()
        except BaseException as error:
            if self.presence is not None:
                self.presence.leave(trace=not isinstance(error, LogError))
            raise

    def _connected(self) -> Any:
        connection = connect(self.path, self.durability)
        try:
            prepare(connection, self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def reader(self) -> Any:
        """Another connection, to read from. Not in memory."""
        connection = connect(self.path, self.durability)
        connection.execute("PRAGMA query_only = ON")
        return connection

    def _take_lock(self) -> None:
        if self.presence is not None:
            self.presence.lock()

    def _give_lock(self) -> None:
        if self.presence is not None:
            self.presence.unlock()

    # -- transactions -----------------------------------------------------------------------------------------------

    def begin(self) -> Transaction:
        """Take the lock, open the file if it failed before, begin. Raises LogError, WriteFailed."""
        self._take_lock()
        try:
            if self._connection is None:
                self._connection = self._connected()
            with reported(self.path):
                self._connection.execute("BEGIN IMMEDIATE")
        except BaseException as error:
            self._give_lock()
            self._drop_if_broken(error)
            raise
        return Transaction(self._connection)

    def end(self, transaction: Transaction, *, commit: bool) -> None:
        """Commit or undo, and give the lock back. Raises LogError or WriteFailed: nothing of it counts then."""
        try:
            with reported(self.path):
                if commit:
                    transaction.flush()
                    self._connection.execute("COMMIT")
                elif self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        except BaseException as error:
            with suppress(Exception):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            self._drop_if_broken(error)
            raise
        finally:
            self._give_lock()

    def _drop_if_broken(self, error: BaseException) -> None:
        cause = error.__cause__ if isinstance(error, (WriteFailed, LogError)) else error
        if self.presence is not None and self._connection is not None and cause is not None and unrecoverable(cause):
            with suppress(Exception):
                self._connection.close()
            self._connection = None

    def after(self, transaction: Transaction) -> None:
        """Wake whoever waits for what this transaction brought, here and in other processes."""
        if transaction.changed:
            if self.presence is not None:
                self.presence.ring()
            self.wake(transaction.changed)

    # -- leases -----------------------------------------------------------------------------------------------------

    def keep(self, owner: int, lease: float) -> None:
        """Renew this owner's lease from now on."""
        self._leases[owner] = lease

    def drop(self, owner: int) -> None:
        self._leases.pop(owner, None)

    def renew(self) -> float | None:
        """Renew all leases once a third of the shortest has passed; returns when the next time is."""
        leases = dict(self._leases)
        if not leases:
            self._renewed = boot_time()
            return None
        every = min(leases.values()) / 3
        now = boot_time()
        if now - self._renewed >= every:
            self._renewed = now
            try:
                transaction = self.begin()
                try:
                    transaction.connection.executemany(
                        "UPDATE owners SET expires = max(expires, ?) WHERE owner = ? AND expires > ?",
                        [(now + lease, owner, now) for owner, lease in leases.items()],
                    )
                except BaseException:
                    self.end(transaction, commit=False)
                    raise
                self.end(transaction, commit=True)
            except Exception as error:  # who has lost its lease is told when it claims or acknowledges
                logger.warning("%s: the leases couldn't be renewed: %s", self.path, error)
        return max(0.001, self._renewed + every - boot_time())

    # -- waiting ----------------------------------------------------------------------------------------------------

    def look(self, topic: int) -> int:
        """A number to wait by: take it, look at what there is, and wait with it if that isn't enough."""
        if self.presence is not None and self.presence.empty():
            self.wake(None)  # the ring was for all
        return self._counts.get(topic, 0) + self._rung

    async def changed(self, topic: int, seen: int, timeout: float | None) -> None:
        """Wait until something came to a topic since ``look`` gave ``seen``, or for so many seconds.

        Cancelling leaves nothing.
        """
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not woken.done():
                woken.set_result(None)

        def wake() -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(settle)

        with self._lock:
            if self._counts.get(topic, 0) + self._rung != seen:
                return
            self._waiting.setdefault(topic, set()).add(wake)
            self._watch()
        timer = loop.call_later(timeout, settle) if timeout is not None else None
        try:
            await woken
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                others = self._waiting[topic]
                others.discard(wake)
                if not others:
                    del self._waiting[topic]

    def wake(self, topics: set[int] | None) -> None:
        """Wake who waits for these topics, or for any."""
        with self._lock:
            if topics is None:
                self._rung += 1
            for topic in topics or ():
                self._counts[topic] = self._counts.get(topic, 0) + 1
            for topic, waiting in self._waiting.items():
                if topics is None or topic in topics:
                    for wake in waiting:
                        wake()

    def _watch(self) -> None:
        """Have the bell listened to while somebody waits."""
        if self.presence is None:
            return
        if self._watching is None:
            self._nudged, self._nudge = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
            self._watching = threading.Thread(target=self._listen, name="penstock-bell", daemon=True)
            self._watching.start()
        elif sum(map(len, self._waiting.values())) == 1:
            os.write(self._nudge, b"!")

    def _listen(self) -> None:
        """The thread of the bell: asleep while nobody waits, else on the bell, with a look at the file once a
        second. What goes wrong there (no descriptor is free, say) is logged, and tried again after a second."""
        assert self.presence is not None
        asleep, awake = select.poll(), select.poll()
        asleep.register(self._nudged, select.POLLIN)
        awake.register(self._nudged, select.POLLIN)
        awake.register(self.presence.bell, select.POLLIN)
        looker: Any = None
        version: Any = None
        try:
            while not self._over:
                if not self._waiting:
                    asleep.poll()
                    os.read(self._nudged, 4096)
                    version = None
                    continue
                rung = [descriptor for descriptor, _ in awake.poll(1000 * _LOOK_EVERY)]
                if self._nudged in rung:
                    os.read(self._nudged, 4096)
                if self.presence.bell in rung:
                    self.presence.empty()
                    self.wake(None)
                if rung:
                    continue
                try:
                    looker = looker or self.reader()
                    before, version = version, looker.pragma("data_version")
                    if self.presence.has_lost_somebody():
                        self.presence.ring()
                        self.wake(None)
                    elif before is not None and before != version:
                        self.wake(None)
                except Exception as error:
                    logger.warning("%s: it can't be looked at: %s", self.path, error)
        finally:
            if looker is not None:
                looker.close()

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close everything. Safe to call twice."""
        self._over = True
        if self._watching is not None:
            os.write(self._nudge, b"!")
            self._watching.join()
            os.close(self._nudge)
            os.close(self._nudged)
            self._watching = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self.presence is not None:
            self.presence.leave()
        self.wake(None)
