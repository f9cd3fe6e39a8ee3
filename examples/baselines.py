"""What a model of bytes has to beat: tables of what follows what, and a compressor."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np


def by_table(read: Iterable[bytes], held_out: Sequence[bytes], order: int) -> float:
    """Bits a byte by counts of which byte follows which ``order`` bytes, mixed with counts of single bytes."""
    counts = np.zeros((256**order, 256), np.float32)
    for raw in read:
        before, byte = _split(raw, order)
        np.add.at(counts, (before, byte), 1)
    alone = (counts.sum(axis=0) + 1) / (counts.sum() + 256)
    chances = (counts + 2 * alone) / (counts.sum(axis=1, keepdims=True) + 2)
    total = size = 0.0
    for raw in held_out:
        before, byte = _split(raw, order)
        total -= float(np.log2(chances[before, byte]).sum())
        size += len(byte)
    return total / size


def by_zlib(held_out: Sequence[bytes]) -> float:
    """Bits a byte of ``zlib -9``, which has read nothing before."""
    return 8 * sum(len(zlib.compress(raw, 9)) for raw in held_out) / sum(map(len, held_out))


def _split(raw: bytes, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes from number ``order`` on, and those before each as one number."""
    data = np.frombuffer(raw, np.uint8).astype(np.int64)
    before = np.zeros(max(0, len(data) - order), np.int64)
    for back in range(order, 0, -1):
        before = before << 8 | data[order - back : len(data) - back]
    return before, data[order:]
