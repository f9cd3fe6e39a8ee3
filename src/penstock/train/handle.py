"""Handle: a parameter server as another process sees it.

``ParameterServer`` travels to other processes as its address; what arrives is a ``Handle``, one for each process and
server. It connects when it is first used. Requests are made one after the other, from whichever thread; a request that
was begun is waited for, so cancelling an ``await`` leaves it to finish in the background.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from penstock.errors import Closed
from penstock.place.remote import thaw_error
from penstock.train.kernels import Array
from penstock.train.params import Layout, as_version
from penstock.train.slot import FAILED, MESSAGE, PULL, PUSH, Slot

__all__ = ["AT_ONCE", "Handle", "handle_of"]

AT_ONCE = 1 << 20
"""Bytes of parameters up to which work is done on the asking thread: about 0.1 ms."""

_HIGHEST = 1 << 62

_handles: weakref.WeakValueDictionary[str, Handle] = weakref.WeakValueDictionary()
_making = threading.Lock()


def handle_of(address: str, layout: Layout) -> Handle:
    """This process's handle of the server at that address."""
    with _making:
        handle = _handles.get(address)
        if handle is None:
            handle = _handles[address] = Handle(address, layout)
        return handle


class Handle:
    """Pulls and pushes as ``ParameterServer`` does, from another process. Raises Closed when the server is closed."""

    def __init__(self, address: str, layout: Layout) -> None:
        self._socket: socket.socket | None = None
        self.layout = layout
        self._address = address
        self._lock = threading.Lock()
        self._slot: Slot

    def __del__(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def __reduce__(self) -> Any:
        return handle_of, (self._address, self.layout)

    def __repr__(self) -> str:
        return f"ParameterServer({len(self.layout.names)} parameters, in another process)"

    async def pull(self) -> tuple[Any, int]:
        """A copy of the parameters, and their version. See ``ParameterServer.pull``."""
        if self.layout.bytes <= AT_ONCE:
            return self.pull_sync()
        return await asyncio.to_thread(self.pull_sync)

    async def push(self, gradients: Any, *, version: int) -> int:
        """Apply gradients; returns the version afterwards. See ``ParameterServer.push``."""
        if self.layout.bytes <= AT_ONCE:
            return self.push_sync(gradients, version=version)
        return await asyncio.to_thread(self.push_sync, gradients, version=version)

    def pull_sync(self) -> tuple[Any, int]:
        """``pull`` for code that isn't async."""
        vectors, version = self.copy()
        return self.layout.tree(vectors), version

    def push_sync(self, gradients: Any, *, version: int) -> int:
        """``push`` for code that isn't async."""
        vectors = self.layout.vectors(gradients)
        version = as_version(version, _HIGHEST)
        with self._lock:
            return self._ask(self._connected(), PUSH, version, vectors)

    def copy(self) -> tuple[list[Array], int]:
        """A copy of the weights as vectors, all of one version."""
        with self._lock:
            version = self._ask(self._connected(), PULL, 0)
            return [vector.copy() for vector in self._slot.vectors], version

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(self._address)
            _, descriptors, _, _ = socket.recv_fds(connected, MESSAGE.size, 1)
            if not descriptors:
                raise Closed("the parameter server")
            self._slot = Slot(descriptors[0], self.layout)
        except OSError:
            connected.close()
            raise Closed("the parameter server") from None
        except BaseException:
            connected.close()
            raise
        self._socket = connected
        return connected

    def _ask(
        self, connected: socket.socket, what: bytes, version: int, gradients: Sequence[Array] | None = None
    ) -> int:
        """Ask, having published gradients if there are any, and wait for the answer.

        An interrupt in between leaves the socket closed: what was published is applied, and the answer is lost.
        """
        try:
            if gradients is not None:
                self._slot.publish(gradients, version)
            connected.sendall(MESSAGE.pack(what, version))
            kind, number = MESSAGE.unpack(_received(connected, MESSAGE.size))
            told = _received(connected, number) if kind == FAILED else b""
        except BaseException as error:
            self._socket = None
            connected.close()
            if isinstance(error, OSError):
                raise Closed("the parameter server") from None
            raise
        if kind == FAILED:
            raise thaw_error(pickle.loads(told))
        return int(number)


def _received(connected: socket.socket, count: int) -> bytes:
    data = connected.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise ConnectionResetError
    return data
