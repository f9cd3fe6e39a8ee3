"""Shared memory between two processes, one direction: an Arena that writes and a Window that reads.

Both map the same nameless file (``create``), so nothing can be left behind under a name. The writer copies a block
in and tells the reader where it is, over a socket; the reader builds arrays on the block itself.

*Who frees what.* A block has one flag byte in the head of the file. The writer sets it when it fills the block; the
reader clears it when the last buffer that was exported from the block is gone, and from then on the writer may use
the space again. So giving back is one byte stored: no message, no lock, from whichever thread the last array died
in, and also long after the writer ended. (A forked copy of the reader gives nothing back.) The finalizer hangs on
the object that exports the buffer, because arrays keep *that* alive. It can't hang on a ``memoryview``: releasing
one succeeds while an array still lives on the memory behind it, and recycling then would overwrite the user's data.

*Bounds.* An arena is SIZE bytes of address space, of which only what was touched costs memory; the lowest free
place is used first, so that it stays small and warm. When no place is free, ``place`` says so and the caller sends
the bytes another way: nobody ever waits for the user to let go of an array.

*The end.* A reader's mapping lives as long as the last array on it. A retired window gives the pages of everything
that isn't held back to the system, and each held block's when it is let go.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["LEAST", "SIZE", "WHOLE", "Arena", "Window", "create"]

LEAST = 32768
"""Bytes from which a buffer travels through shared memory; smaller ones are cheaper on the socket."""

SIZE = 256 * 1024 * 1024
"""Bytes of one arena: the most one direction of one worker can hold at a time."""

_PAGE = 4096
_WORDS = 4096 // 8
"""64-bit words at the start of the file that the two sides use as they like (the stamp of a worker)."""

_FLAGS = _WORDS * 8
_DATA = _FLAGS + SIZE // LEAST

WHOLE = _DATA + SIZE
"""Bytes of the file of an arena."""

_REMOVE: int | None = getattr(mmap, "MADV_REMOVE", None)


def create(size: int) -> int:
    """A new nameless file of so many bytes, as a descriptor that the caller owns. Sparse: it costs what is touched.

    Raises OSError if the system has no room for it.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("penstock", os.MFD_CLOEXEC)
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class _Mapping:
    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, WHOLE)
        self.bytes = memoryview(self._map)
        self.words = self.bytes[:_FLAGS].cast("q")
        self.times = self.bytes[:_FLAGS].cast("d")


class Arena(_Mapping):
    """The writing end. Of one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._starts = [_DATA]  # free ranges, sorted and never adjacent
        self._stops = [WHOLE]
        self._placed: dict[int, int] = {}
        self._sweep_at = 2

    def place(self, pieces: Sequence[bytes | memoryview], size: int) -> int:
        """Copy the pieces, ``size`` bytes in all, into one block. Returns its offset, or -1 if there is no room."""
        if len(self._placed) >= self._sweep_at:
            self._sweep()
        room = _whole_pages(max(size, LEAST))
        offset = self._take(room)
        if offset < 0:
            self._sweep()
            offset = self._take(room)
            if offset < 0:
                return -1
        self._placed[offset] = room
        target = self.bytes
        at = offset
        for piece in pieces:
            length = len(piece)
            target[at : at + length] = piece
            at += length
        target[_flag(offset)] = 1
        return offset

    def close(self) -> None:
        """Unmap. What the reader holds stays valid."""
        for view in (self.words, self.times, self.bytes):
            view.release()
        self._map.close()

    def free(self, offset: int) -> None:
        """Take back a block that was never sent."""
        self.bytes[_flag(offset)] = 0

    def _take(self, room: int) -> int:
        starts, stops = self._starts, self._stops
        for index, start in enumerate(starts):
            if stops[index] - start >= room:
                starts[index] = start + room
                if starts[index] == stops[index]:
                    del starts[index], stops[index]
                return start
        return -1

    def _sweep(self) -> None:
        """Collect the blocks that the reader has let go."""
        flags = self.bytes
        for offset in [offset for offset in self._placed if not flags[_flag(offset)]]:
            self._give_back(offset, offset + self._placed.pop(offset))
        self._sweep_at = max(2, 2 * len(self._placed))

    def _give_back(self, start: int, stop: int) -> None:
        starts, stops = self._starts, self._stops
        at = bisect_left(starts, start)
        if at < len(starts) and starts[at] == stop:
            stop = stops[at]
            del starts[at], stops[at]
        if at and stops[at - 1] == start:
            stops[at - 1] = stop
        else:
            starts.insert(at, start)
            stops.insert(at, stop)


class Window(_Mapping):
    """The reading end. ``lend`` and ``read`` are of one thread at a time; buffers may die in any."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._lent: dict[int, int] = {}
        self._retired = False
        self._owner = os.getpid()

    def lend(self, offset: int, size: int) -> memoryview:
        """The block as a writable buffer; the writer gets it back when the last thing built on it is gone."""
        block = (ctypes.c_char * size).from_buffer(self._map, offset)
        self._lent[offset] = size
        weakref.finalize(block, self._returned, offset).atexit = False
        return memoryview(block).cast("B")

    def read(self, offset: int, size: int) -> memoryview:
        """The block, to be read at once and then released with ``release``."""
        return self.bytes[offset : offset + size]

    def release(self, offset: int) -> None:
        """Give back a block that was only read."""
        self.bytes[_flag(offset)] = 0

    def retire(self) -> None:
        """The writer is gone: give all memory back to the system but that of the blocks still lent."""
        self._retired = True
        begin = _DATA
        for offset, size in sorted(self._lent.copy().items()):
            self._remove(begin, offset)
            begin = offset + _whole_pages(size)
        self._remove(begin, WHOLE)

    def _returned(self, offset: int) -> None:
        if os.getpid() != self._owner:
            return
        size = self._lent.pop(offset)
        self.bytes[_flag(offset)] = 0
        if self._retired:
            self._remove(offset, offset + _whole_pages(size))

    def _remove(self, start: int, stop: int) -> None:
        if _REMOVE is not None and stop > start:
            self._map.madvise(_REMOVE, start, stop - start)


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _flag(offset: int) -> int:
    # Every block is at least LEAST bytes, so no two of them start in the same cell.
    return _FLAGS + (offset - _DATA) // LEAST
