"""A slot: shared memory for one set of the parameters, between the server and one other process.

The process maps it twice over: weights arrive in it, and gradients leave by it. It belongs to whoever speaks next: the
messages on the socket beside it (fixed in size, one request, one answer) say when it changes hands, so neither side
ever reads what the other is writing, on any processor.
"""

from __future__ import annotations

import mmap
import os
import struct

import numpy as np

from penstock.place.shm import create
from penstock.train.kernels import Array
from penstock.train.params import Layout

__all__ = ["FAILED", "HELLO", "MESSAGE", "OK", "PULL", "PUSH", "Slot", "make_slot"]

MESSAGE = struct.Struct("<cq")
"""A message: what it is, and a version (or, of FAILED, how many bytes of a pickled exception follow)."""

HELLO, PULL, PUSH, OK, FAILED = b"h", b"w", b"g", b"o", b"f"

_ALIGNED = 64


class Slot:
    """Maps the slot behind a descriptor, which it closes."""

    def __init__(self, descriptor: int, layout: Layout) -> None:
        try:
            self._map = mmap.mmap(descriptor, _size(layout))
        finally:
            os.close(descriptor)
        self.vectors: list[Array] = []
        at = 0
        for size, kind in zip(layout.sizes, layout.kinds, strict=True):
            self.vectors.append(np.frombuffer(self._map, kind, size, at))
            at += _aligned(size * kind.itemsize)


def make_slot(layout: Layout) -> int:
    """A new slot, as a descriptor that the caller owns."""
    return create(_size(layout))


def _size(layout: Layout) -> int:
    sizes = zip(layout.sizes, layout.kinds, strict=True)
    return max(_ALIGNED, sum(_aligned(size * kind.itemsize) for size, kind in sizes))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
