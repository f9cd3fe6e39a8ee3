"""A slot: shared memory for one set of the parameters, between the server and one other process.

Weights arrive in it, and gradients leave by it. It belongs to whoever speaks next: the messages on the socket beside it
(fixed in size, one request, one answer) say when it changes hands, so neither side ever reads what the other is
writing, on any processor. The end of the socket is such a message, too.

A gradient is *published* when the word that counts them is set, after the gradient and its version: from then on it is
applied, whatever becomes of the process that computed it. The message that follows only says so.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

import numpy as np

from penstock.place.shm import create
from penstock.train.kernels import Array
from penstock.train.params import Layout

__all__ = ["FAILED", "HELLO", "MESSAGE", "OK", "PULL", "PUSH", "Slot", "make_slot"]

MESSAGE = struct.Struct("<cq")
"""A message: what it is, and a version (or, of FAILED, how many bytes of a pickled exception follow)."""

HELLO, PULL, PUSH, OK, FAILED = b"h", b"w", b"g", b"o", b"f"

_ALIGNED = 64
_COUNT, _VERSION = 0, 1  # the words in front


class Slot:
    """Maps the slot behind a descriptor, which it closes."""

    def __init__(self, descriptor: int, layout: Layout) -> None:
        try:
            self._map = mmap.mmap(descriptor, _size(layout))
        finally:
            os.close(descriptor)
        self._words = memoryview(self._map)[:_ALIGNED].cast("q")
        self._count = 0  # of those published, as far as this side knows
        self.vectors: list[Array] = []
        at = _ALIGNED
        for size, kind in zip(layout.sizes, layout.kinds, strict=True):
            self.vectors.append(np.frombuffer(self._map, kind, size, at))
            at += _aligned(size * kind.itemsize)

    def publish(self, gradients: Sequence[Array], version: int) -> None:
        """Hand in gradients: the worker's side."""
        for target, vector in zip(self.vectors, gradients, strict=True):
            target[:] = vector
        self._words[_VERSION] = version
        self._count += 1
        self._words[_COUNT] = self._count

    def published(self) -> int | None:
        """The version of the gradients that stand in the slot and weren't asked for before; None if there are none."""
        count = self._words[_COUNT]
        if count == self._count:
            return None
        self._count = count
        return self._words[_VERSION]


def make_slot(layout: Layout) -> int:
    """A new slot, as a descriptor that the caller owns."""
    return create(_size(layout))


def _size(layout: Layout) -> int:
    return _ALIGNED + sum(_aligned(size * kind.itemsize) for size, kind in zip(layout.sizes, layout.kinds, strict=True))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
