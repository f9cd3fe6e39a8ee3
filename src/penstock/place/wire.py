"""What two processes say to each other: frames on a socket, and parcels of values in them.

A frame is a head (kind, number of sections, bytes that follow), a table of its sections and the sections that
travel inline. A section of LEAST bytes or more lies in shared memory if there is room, and the table says where.
Section 0 is the body: plain data, among it the values that are plain themselves and the pickles of the others. The
further sections are the buffers that these left out of band, in order.

Values are frozen when they are added to a parcel: what the user's code does to them afterwards doesn't show on the
other side. They are thawed one by one, so that one that can't be read leaves the others alone.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from typing import Any

from penstock.place.pickling import Pickler
from penstock.place.shm import LEAST, Arena, Window

__all__ = [
    "CLOSE",
    "DONE",
    "GRANT",
    "PART",
    "PLAIN",
    "READY",
    "RESULTS",
    "START",
    "TASKS",
    "Delivery",
    "Frozen",
    "Inbox",
    "Parcel",
    "Postbox",
    "Section",
]

# From the parent; then from the worker. DONE is its answer to CLOSE.
START, TASKS, GRANT, CLOSE, READY, RESULTS, PART, DONE = range(8)

PLAIN = frozenset({str, bytes, int, float, bool, type(None)})
"""Types whose values can't change and hold nothing: many of them are pickled at once."""

_HEAD = struct.Struct("=IIQ")
_SECTION = struct.Struct("=qQ")
_INLINE = -1


Section = tuple[int, int, bytes | None]
"""Offset in shared memory (or _INLINE), size, and the bytes if they travel inline."""


Frozen = tuple[bytes, Sequence[Section]]
"""One value as it was when it was frozen: its pickle, and where its buffers are."""

_NOTHING: tuple[list[Any], list[int], dict[int, int]] = ([], [], {})


class _Body:
    """Collects the pieces of a pickle; a large bytes object arrives as itself, uncopied."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.write = self.pieces.append


class Postbox:
    """The sending end: freezes values with one pickler, places what is large in one arena, and makes frames.

    Of one thread at a time. ``sent`` and ``grows`` are the pickler's.
    """

    def __init__(self, arena: Arena, sent: dict[type, str], *, grows: bool) -> None:
        self.arena = arena
        self._body = _Body()
        self.pickler = Pickler(self._body, sent, grows=grows, take=self._take)
        self._placed: list[Section] = []

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a large buffer out of the pickle, copying it; a small one stays in band."""
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if view.nbytes < LEAST:
            return True
        self._placed.append(self._place([view], view.nbytes))
        return False

    def _place(self, pieces: Sequence[bytes | memoryview], size: int) -> Section:
        offset = self.arena.place(pieces, size) if size >= LEAST else _INLINE
        return offset, size, b"".join(pieces) if offset == _INLINE else None

    def freeze(self, value: Any) -> Frozen:
        """A value as it is now. Raises what its pickling raises."""
        pieces = self._body.pieces
        try:
            self.pickler.dump(value)
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if not self._placed:
                return data, ()
            return data, self._placed.copy()
        except BaseException:
            self.take_back(self._placed)
            raise
        finally:
            pieces.clear()
            if self._placed:
                self._placed.clear()

    def take_back(self, sections: Sequence[Section]) -> None:
        """Free what was placed and won't be sent."""
        for offset, _, _ in sections:
            if offset != _INLINE:
                self.arena.free(offset)

    def frame(self, kind: int, body: Any, parcel: Parcel | None = None) -> bytes:
        """The bytes to send. ``body`` is plain data; a parcel given along is used up."""
        collected = _Body()
        plain = pickle.Pickler(collected, protocol=5)
        plain.fast = True  # no memo: plain values have no identity to keep
        plain.dump((body, _NOTHING if parcel is None else parcel.manifest()))
        sections = [self._place(collected.pieces, sum(map(len, collected.pieces)))]
        if parcel is not None:
            sections += parcel.sections()
        table = b"".join([_SECTION.pack(offset, size) for offset, size, _ in sections])
        inline = [data for _, _, data in sections if data is not None]
        return b"".join([_HEAD.pack(kind, len(sections), len(table) + sum(map(len, inline))), table, *inline])


class Parcel:
    """Values on their way to the other process: as they are if they are plain, else as pickles."""

    __slots__ = ("_buffers", "_frozen", "_postbox", "_sections", "size", "values")

    def __init__(self, postbox: Postbox) -> None:
        self._postbox = postbox
        self.values: list[Any] = []
        self.size = 0
        self._frozen: list[int] = []  # which values are pickles
        self._buffers: dict[int, int] = {}  # … and how many buffers those have that have any
        self._sections: list[Section] = []

    def add(self, value: Any) -> None:
        """Freeze one value. Raises what its pickling raises, and then holds what it held."""
        kind = type(value)
        if kind in PLAIN:
            if kind is bytes or kind is str:
                self.size += len(value)
            self.values.append(value)
        else:
            self.put(self._postbox.freeze(value))

    def put(self, frozen: Frozen) -> None:
        """Take a value that is frozen already."""
        data, sections = frozen
        values = self.values
        self._frozen.append(len(values))
        self.size += len(data)
        if sections:
            self._buffers[len(values)] = len(sections)
            self._sections += sections
            self.size += sum([size for _, size, _ in sections])
        values.append(data)

    def manifest(self) -> tuple[list[Any], list[int] | bool, dict[int, int]]:
        """What the body says of the values."""
        return self.values, len(self._frozen) == len(self.values) or self._frozen, self._buffers

    def sections(self) -> list[Section]:
        """Where the buffers are, in order."""
        return self._sections

    def discard(self) -> None:
        """Free what these values hold; they won't be sent."""
        self._postbox.take_back(self._sections)


class Delivery:
    """A frame that arrived. ``body`` is read at once; values are thawed when they are asked for, in order."""

    __slots__ = ("_buffers", "_counts", "_frozen", "_next", "_window", "body", "kind", "plain", "values")

    def __init__(self, kind: int, count: int, data: memoryview, window: Window) -> None:
        self.kind = kind
        self._window = window
        sections: list[tuple[int, int, memoryview | None]] = []
        at = count * _SECTION.size
        for offset, size in _SECTION.iter_unpack(data[:at]):
            if offset == _INLINE:
                sections.append((offset, size, data[at : at + size]))
                at += size
            else:
                sections.append((offset, size, None))
        self.body, (self.values, frozen, self._counts) = self._load(sections[0])
        self.plain = not frozen  # whether the values can be used as they are
        self._frozen = frozen if frozen is True else frozenset(frozen)
        self._buffers = sections
        self._next = 1

    def _load(self, section: tuple[int, int, memoryview | None]) -> Any:
        offset, size, inline = section
        if inline is not None:
            return pickle.loads(inline)
        try:
            return pickle.loads(self._window.read(offset, size))
        finally:
            self._window.release(offset)

    def thaw(self, index: int) -> Any:
        """One value, to be asked for in order and once. Raises what its unpickling raises."""
        value = self.values[index]
        if self._frozen is not True and index not in self._frozen:
            return value
        if index not in self._counts:
            return pickle.loads(value)
        begin = self._next
        self._next = begin + self._counts[index]
        lend = self._window.lend
        buffers = [
            lend(offset, size) if inline is None else bytearray(inline)
            for offset, size, inline in self._buffers[begin : self._next]
        ]
        return pickle.loads(value, buffers=buffers)


class Inbox:
    """Bytes from a socket on one side, deliveries on the other."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what the socket gave."""
        self._bytes += data

    def next(self) -> Delivery | None:
        """The next whole frame; None until more was fed."""
        arrived = self._bytes
        if len(arrived) < _HEAD.size:
            return None
        kind, count, length = _HEAD.unpack_from(arrived)
        end = _HEAD.size + length
        if len(arrived) < end:
            return None
        data = memoryview(arrived[_HEAD.size : end])  # a copy: the delivery outlives the buffer
        del arrived[:end]
        return Delivery(kind, count, data, self.window)
