"""How other processes reach a parameter server: a thread that answers them, one slot of shared memory for each.

*Protocol.* A process connects, and is sent a slot (``train/slot.py``). Then it asks, one request at a time: PULL, which
is answered when the weights stand in the slot; or PUSH, having written gradients there. A push is published with its
message: from then on it is applied, whatever becomes of the process. One whose process dies before has not happened.
Nobody but this thread, and the server's own process, ever touches weights.

*States of a connection.* It is read, answered, and closed at its end of file or its first error; then its slot is
freed. The answers are shorter than any socket's buffer, so a process that doesn't read them holds up nobody.

*Who may.* On Linux the address is a name outside of any file system, and whoever connects has to be of the same user;
on macOS it is a socket in a directory that only this user may enter.
"""

from __future__ import annotations

import os
import pickle
import secrets
import selectors
import shutil
import socket
import struct
import sys
import tempfile
import threading
from contextlib import suppress

from penstock.errors import PenstockError
from penstock.train.params import Layout
from penstock.train.slot import FAILED, HELLO, MESSAGE, OK, PULL, PUSH, Slot, make_slot
from penstock.train.weights import Weights

__all__ = ["Listener"]

_BACKLOG = 128
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Listener:
    """Answers the handles of ``weights`` until it is closed. ``refusal``: why it takes no gradients, if it doesn't."""

    def __init__(self, weights: Weights, refusal: PenstockError | None) -> None:
        self._weights = weights
        self._refusal = refusal
        self._directory: str | None = None
        if sys.platform == "linux":
            self.address = f"\0penstock-{os.getpid()}-{secrets.token_hex(8)}"
        else:
            self._directory = tempfile.mkdtemp(prefix="penstock-")
            self.address = os.path.join(self._directory, "server")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._bell, self._rung = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="penstock-server-shared", daemon=True)
        try:
            self._socket.bind(self.address)
            self._socket.listen(_BACKLOG)
            self._socket.setblocking(False)
        except BaseException:
            self._free()
            raise
        self._thread.start()

    def close(self) -> None:
        """Answer what was asked, then hang up on everybody. Blocks for as long as one update takes."""
        self._bell.send(b"!")
        self._thread.join()
        self._free()

    def _free(self) -> None:
        for one in (self._socket, self._bell, self._rung):
            one.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._rung, selectors.EVENT_READ)
            connections: dict[socket.socket, _Connection] = {}
            ending = False
            while not ending:
                for key, _ in selector.select():
                    if key.fileobj is self._rung:
                        ending = True
                    elif key.fileobj is self._socket:
                        connection = self._accept()
                        if connection is not None:
                            connections[connection.socket] = connection
                            selector.register(connection.socket, selectors.EVENT_READ)
                    else:
                        found = connections[key.fileobj]  # type: ignore[index]  # those alone are registered
                        if not found.serve():
                            selector.unregister(found.socket)
                            del connections[found.socket]
                            found.socket.close()
            for connection in connections.values():
                connection.socket.close()

    def _accept(self) -> _Connection | None:
        try:
            found, _ = self._socket.accept()
        except OSError:  # it has gone again, or there are no descriptors left
            return None
        try:
            if hasattr(socket, "SO_PEERCRED"):
                told = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(told)[1] != os.getuid():
                    raise PermissionError
            found.setblocking(False)
            return _Connection(found, self._weights, self._refusal)
        except OSError:
            found.close()
            return None


class _Connection:
    """One process that asks."""

    def __init__(self, connected: socket.socket, weights: Weights, refusal: PenstockError | None) -> None:
        self.socket = connected
        self._weights = weights
        self._refusal = refusal
        self._read = b""
        layout: Layout = weights.layout
        descriptor = make_slot(layout)
        try:
            socket.send_fds(connected, [MESSAGE.pack(HELLO, weights.version)], [descriptor])
        except BaseException:
            os.close(descriptor)
            raise
        self._slot = Slot(descriptor, layout)

    def serve(self) -> bool:
        """Read what came and answer it; False if the process has hung up, or doesn't keep to the protocol."""
        with suppress(BlockingIOError):
            try:
                data = self.socket.recv(MESSAGE.size - len(self._read))
                self._read += data
                if not data:
                    return False
                if len(self._read) == MESSAGE.size:
                    asked, version = MESSAGE.unpack(self._read)
                    self._read = b""
                    self.socket.sendall(self._answer(asked, version))
            except BlockingIOError:
                raise
            except OSError:
                return False
        return True

    def _answer(self, asked: bytes, version: int) -> bytes:
        weights, vectors = self._weights, self._slot.vectors
        try:
            if asked == PULL:
                return MESSAGE.pack(OK, weights.copy_into(vectors))
            if asked != PUSH:
                raise OSError(f"a process asked the parameter server for {asked!r}")
            if self._refusal is not None:
                raise self._refusal
            weights.check_version(version)
            return MESSAGE.pack(OK, weights.push(vectors, version))
        except OSError:
            raise
        except Exception as error:  # it is the asking process's to deal with
            told = pickle.dumps(error.with_traceback(None))
            return MESSAGE.pack(FAILED, len(told)) + told
