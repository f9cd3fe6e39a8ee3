"""In-memory sources: what ``Flow(anything iterable)`` reads from.

A sequence (list, tuple, range, array) can be read again and is resumable: it is identified by its name, length and
digest. Any other iterable is not: an iterator is read once, by one run. A blocking iterable gets a thread of its own,
so it can't starve the stages; a sequence is read on the loop, since indexing doesn't block.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import msgspec

from penstock.errors import PlanError, SourceExhausted
from penstock.flow.blocking import feed_each
from penstock.flow.contract import Source
from penstock.flow.demand import Demand
from penstock.flow.progress import Position, Positions, Progress
from penstock.flow.text import with_article
from penstock.place.loop import clock_of

__all__ = ["AsyncSource", "IterableSource", "MemorySource", "SequenceSource", "as_source", "position_of"]

_BATCH = 1024
_LEAST_BATCH = 16
_DEEPEST = 8
_read_once: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Iterators that a run has read, by their id(): two that are equal aren't the same."""


def as_source(value: Any, name: str | None) -> Source[Any]:
    """The source that ``Flow(value)`` reads. Raises PlanError for what can't be iterated."""
    if hasattr(value, "identity") and hasattr(value, "replayable"):  # or a ``Subscribed``
        source: Source[Any] = value
        return source
    if isinstance(value, (str, bytes, bytearray)):
        raise PlanError(
            f"Flow({value[:40]!r}) was given a single {type(value).__name__}, whose items are its characters",
            "To read a file, use ps.read.lines, ps.read.jsonl and their like; for one item, use Flow([item])",
        )
    if isinstance(value, Sequence) or _is_rows(value):
        return SequenceSource(value, name)
    if isinstance(value, AsyncIterable):
        return AsyncSource(value, name)
    if isinstance(value, Iterable):
        return IterableSource(value, name)
    raise PlanError(
        f"Flow({value!r:.60}) was given {with_article(type(value).__name__)}, which can't be iterated",
        "Give a list, a generator, an async iterable, or one of ps.read",
    )


class MemorySource:
    """What all in-memory sources share: nothing to settle, nothing to give back."""

    kind = "iterable"
    replayable = False

    def __init__(self, name: str | None) -> None:
        self.name = name or self.kind

    @property
    def identity(self) -> str:
        return f"memory:{self.name}"

    @property
    def total(self) -> int | None:
        return None

    async def snapshot(self) -> Any:
        return None

    async def changed(self, before: Any) -> str | None:
        return None

    async def settle(self, positions: Positions) -> None:
        """Nobody waits for it."""

    async def give_back(self, positions: Positions, delay: float = 0, reason: str | None = None) -> None:
        """Nobody else would take them."""

    def joins(self, sink: Any) -> bool:
        return False


class SequenceSource(MemorySource):
    """A list, tuple, range, array or any other sequence."""

    kind = "list"
    replayable = True

    def __init__(self, items: Sequence[Any], name: str | None) -> None:
        super().__init__(name)
        self.items = items

    @property
    def total(self) -> int | None:
        return len(self.items)

    async def snapshot(self) -> Any:
        return {"length": len(self.items), "digest": self._digest(len(self.items))}

    async def changed(self, before: Any) -> str | None:
        length = before["length"]
        if len(self.items) < length:
            return f"the list had {length} items when it was last read and has {len(self.items)} now"
        if self._digest(length) != before["digest"]:
            return "the first items of the list differ from those that were last read"
        return None

    def _digest(self, length: int) -> str:
        """A digest of the first items that is the same in every process."""
        state = hashlib.blake2b(digest_size=16)
        encode = msgspec.json.Encoder(enc_hook=_stable, order="deterministic").encode
        if isinstance(self.items, range):
            state.update(repr(self.items[:length]).encode())
            return state.hexdigest()
        for start in range(0, length, _BATCH):
            batch = list(_part(self.items, start, min(start + _BATCH, length)))
            try:
                state.update(encode(batch))
            except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
                state.update(repr(_plain(batch)).encode(errors="backslashreplace"))
        return state.hexdigest()

    async def read(self, after: Progress) -> Any:
        items = self.items
        done = after.settled.of("")
        index = 0
        demand = Demand(
            clock_of(asyncio.get_running_loop()), _LEAST_BATCH, _BATCH
        )  # an item may be made when asked for
        while index < len(items):
            stop = min(index + demand.size, len(items))
            if done:
                batch = [(("", at), items[at]) for at in range(index, stop) if at not in done]
            else:
                batch = list(zip(zip(repeat(""), range(index, stop)), _part(items, index, stop), strict=False))
            if batch:
                yield batch
            demand.note(stop - index)
            index = stop


def _part(items: Sequence[Any], start: int, stop: int) -> Sequence[Any]:
    """Some of the items: a sequence needn't know slices."""
    try:
        return items[start:stop]
    except TypeError:
        return [items[at] for at in range(start, stop)]


class _OneShot(MemorySource):
    """Refuses a second pass over an iterator, which would silently read nothing."""

    def __init__(self, items: Any, name: str | None, once: bool) -> None:
        super().__init__(name or getattr(items, "__name__", None))
        self.items = items
        self.once = once

    def claim(self) -> None:
        if not self.once:
            return
        if _read_once.get(id(self.items)) is self.items:
            raise SourceExhausted(f"the {type(self.items).__name__} {self.name!r}")
        try:
            _read_once[id(self.items)] = self.items
        except TypeError:  # built-in iterators take no weak references: this source remembers for itself
            if getattr(self, "_claimed", False):
                raise SourceExhausted(f"the {type(self.items).__name__} {self.name!r}") from None
            self._claimed = True


class IterableSource(_OneShot):
    """Any iterable: read in a thread of its own, since it may block."""

    kind = "iterable"

    def __init__(self, items: Iterable[Any], name: str | None) -> None:
        super().__init__(items, name, iter(items) is items if hasattr(items, "__next__") else False)

    async def read(self, after: Progress) -> Any:
        self.claim()
        index = 0
        batches = feed_each(lambda: iter(self.items), f"penstock-source-{self.name}")
        try:
            async for batch in batches:
                yield list(zip(zip(repeat(""), range(index, index + len(batch))), batch, strict=False))
                index += len(batch)
        finally:
            await batches.aclose()


class AsyncSource(_OneShot):
    """Any async iterable: each item is passed on as it comes."""

    kind = "async iterable"

    def __init__(self, items: AsyncIterable[Any], name: str | None) -> None:
        super().__init__(items, name, hasattr(items, "__anext__"))

    async def read(self, after: Progress) -> Any:
        self.claim()
        index = 0
        iterator: AsyncIterator[Any] = aiter(self.items)
        try:
            async for item in iterator:
                yield [(("", index), item)]
                index += 1
        finally:
            closer = getattr(iterator, "aclose", None)
            if closer is not None:
                await closer()


def position_of(position: Position) -> str:
    """A position in words: ``item 3``, or ``texts/a.jsonl, record 3``."""
    partition, index = position
    return f"{partition}, record {index + 1}" if partition else f"item {index}"


def _is_rows(value: Any) -> bool:
    """Whether it is an array of NumPy, which is the sequence of its rows."""
    numpy = sys.modules.get("numpy")  # nobody can have made one that was never imported
    return numpy is not None and isinstance(value, numpy.ndarray) and value.ndim > 0


def _stable(value: Any) -> Any:
    """Stands for what JSON can't hold, the same in every process: no addresses, no hash order."""
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_plain(member)) for member in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    tobytes = getattr(value, "tobytes", None)
    if tobytes is not None:
        return hashlib.blake2b(tobytes(), digest_size=16).hexdigest()
    name = getattr(value, "__qualname__", None)
    if name is not None:  # a function or class
        return name
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    fields = {name: getattr(value, name) for name in slots if name != "__weakref__" and hasattr(value, name)}
    fields |= getattr(value, "__dict__", {})
    return [type(value).__qualname__, fields] if fields else [type(value).__qualname__]


def _plain(value: Any, depth: int = _DEEPEST) -> Any:
    """The same in every process where even JSON's own types fail: keys that aren't text, cycles, odd characters."""
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return sorted((repr(_plain(key, depth - 1)), repr(_plain(one, depth - 1))) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(one, depth - 1) for one in value]
    return _plain(_stable(value), depth - 1)
