"""How other processes reach a parameter server: a thread that answers each, by a slot of shared memory of its own.

*Protocol.* A process connects, and is sent a slot (``train/slot.py``). Then it asks, one request at a time: PULL, which
is answered when the weights stand in the slot; or PUSH, having published gradients there, which is answered when they
are applied. Published gradients are applied even if the process has died before it could ask: the end of its socket
says that nothing more comes. Nobody but the server's own process ever touches weights.

*Threads.* One accepts; one for each process waits for what that asks, so that an answer takes one switch and no look at
anybody else. All end when the listener closes: their sockets are shut down, what was asked is answered first. The
answers are shorter than any socket's buffer, so a process that doesn't read them holds up nobody.

*Who may.* On Linux the address is a name outside of any file system, and whoever connects has to be of the same user;
on macOS it is a socket in a directory that only this user may enter.
"""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from penstock.errors import PenstockError
from penstock.place.remote import freeze_error
from penstock.train.slot import FAILED, HELLO, MESSAGE, OK, PULL, PUSH, Slot, make_slot
from penstock.train.weights import Weights

__all__ = ["Listener"]

_BACKLOG = 128
_PAUSE = 0.05  # seconds until the next try where nobody can be let in
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Listener:
    """Answers the handles of ``weights`` until it is closed. ``refusal``: why it takes no gradients, if it doesn't."""

    def __init__(self, weights: Weights, refusal: PenstockError | None) -> None:
        self._weights = weights
        self._refusal = refusal
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._closing = False
        self._directory: str | None = None
        if sys.platform == "linux":
            self.address = f"\0penstock-{os.getpid()}-{secrets.token_hex(8)}"
        else:
            self._directory = tempfile.mkdtemp(prefix="penstock-")
            self.address = os.path.join(self._directory, "server")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(self.address)
            self._socket.listen(_BACKLOG)
        except BaseException:
            self._free()
            raise
        self._thread = threading.Thread(target=self._accept, name="penstock-server-shared", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what was asked, then hang up on everybody. Blocks for as long as one update takes."""
        with self._lock:
            self._closing = True
            connections = list(self._connections)
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.connect(self.address)  # wakes the accepting thread on every system
        self._thread.join()
        for connection in connections:
            connection.hang_up()
        self._free()

    def _free(self) -> None:
        self._socket.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _accept(self) -> None:
        while True:
            try:
                found, _ = self._socket.accept()
            except OSError:  # it has gone again, or there are no descriptors left
                if self._closing:
                    return
                time.sleep(_PAUSE)
                continue
            with self._lock:
                if self._closing:
                    found.close()
                    return
                connection: _Connection | None = None
                try:
                    _check_user(found)
                    connection = _Connection(found, self._weights, self._refusal, self._connections.discard)
                    self._connections.add(connection)
                    connection.thread.start()
                except (OSError, RuntimeError):  # it has gone, isn't of this user, or no thread can be started
                    if connection is not None:
                        self._connections.discard(connection)
                    found.close()


def _check_user(connected: socket.socket) -> None:
    if hasattr(socket, "SO_PEERCRED"):
        told = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(told)[1] != os.getuid():
            raise PermissionError


class _Nonsense(Exception):
    """A process doesn't keep to the protocol."""


class _Connection:
    """One process that asks, and the thread that answers. ``over`` is called at its end."""

    def __init__(
        self,
        connected: socket.socket,
        weights: Weights,
        refusal: PenstockError | None,
        over: Callable[[_Connection], None],
    ) -> None:
        self._socket = connected
        self._weights = weights
        self._refusal = refusal
        self._over = over
        descriptor = make_slot(weights.layout)
        try:
            socket.send_fds(connected, [MESSAGE.pack(HELLO, weights.version)], [descriptor])
        except BaseException:
            os.close(descriptor)
            raise
        self._slot = Slot(descriptor, weights.layout)
        self.thread = threading.Thread(target=self._serve, name="penstock-server-slot", daemon=True)

    def hang_up(self) -> None:
        """Read no more, and wait until what was asked is answered."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self.thread.join()

    def _serve(self) -> None:
        connected = self._socket
        try:
            with suppress(OSError, _Nonsense):  # it hung up
                while len(said := connected.recv(MESSAGE.size, socket.MSG_WAITALL)) == MESSAGE.size:
                    connected.sendall(self._answer(said[:1]))
            with suppress(Exception):
                self._apply()
        finally:
            connected.close()
            self._over(self)

    def _answer(self, asked: bytes) -> bytes:
        try:
            if asked == PULL:
                return MESSAGE.pack(OK, self._weights.copy_into(self._slot.vectors))
            if asked != PUSH:
                raise _Nonsense
            return MESSAGE.pack(OK, self._apply())
        except _Nonsense:
            raise
        except Exception as error:  # it is the asking process's to deal with
            told = pickle.dumps(freeze_error(error, "the process of the parameter server,"))
            return MESSAGE.pack(FAILED, len(told)) + told

    def _apply(self) -> int:
        """Apply what is published and isn't applied yet; returns the version afterwards."""
        version = self._slot.published()
        weights = self._weights
        if version is None:
            return weights.version
        if self._refusal is not None:
            raise self._refusal
        return weights.push(self._slot.vectors, weights.checked_version(version))
