"""Files that grow at their end: lines and rows, plain or compressed, counted by a committed length.

The journal holds the committed length and a digest of the last bytes before it. Opening compares both with the file:
what is beyond the length is cut if the journal says that a job was writing when it ended, and refused otherwise.
A compressed file gets a member (gzip) or frame (zstd) of its own for each commit, so that it is whole at each.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from penstock.errors import ForeignOutput
from penstock.files.compressed import is_compressed, zstandard
from penstock.flow.contract import Delta, Origin
from penstock.flow.disk import sync_directory, sync_file, write_whole
from penstock.flow.journal import Journal, remove_journal
from penstock.flow.output import ELSEWHERE, START_OVER, Output

__all__ = ["StreamOutput"]

_BUFFER = 1 << 20
_TAIL = 4096
_COMPRESSED_PACE = 1.0  # seconds: each commit costs a header and forgets what the compressor learned


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class StreamOutput(Output):
    """An output of bytes in their order. Subclasses encode values; here they are buffered, written and counted."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        if is_compressed(self.path):
            self.pace = _COMPRESSED_PACE
        if self.path.endswith(".zst"):
            zstandard()
        # Filled on the loop, emptied on the desk: a deque, since a write may go on while an earlier one's
        # cancelled flush still runs.
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._descriptor = -1

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        """Take these outputs; they count at the next commit, also if this call is cancelled. Raises OutputRejected."""
        desk = self._opened()
        data = self._encode(outputs)
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= _BUFFER:
            self._size = 0
            await desk.call(self._guarded, self._flush)

    @abstractmethod
    def _encode(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> bytes:
        """The bytes of these outputs. Raises OutputRejected, and remembers nothing of them then."""

    def _details(self) -> dict[str, Any]:
        """What a subclass keeps in the journal besides the length."""
        return {}

    def _remember(self, state: dict[str, Any]) -> None:
        """Take back what ``_details`` gave at the last commit."""

    def _prepare(self, *, fresh: bool) -> None:
        try:
            found = os.stat(self.real)
        except FileNotFoundError:
            found = None
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise ForeignOutput(self.path, "is not a regular file", ELSEWHERE)
        if fresh:
            remove_journal(self.journal)
            if found is not None:
                os.truncate(self.real, 0)
        elif found is not None and found.st_size and not os.path.exists(self.journal):
            raise ForeignOutput(self.path, f"holds {found.st_size:,} bytes and has no journal beside it")

    def _recover(self, journal: Journal) -> None:
        self._waiting.clear()
        self._size = 0
        self._begun = False
        self._compressor: _Compressor | None = None
        is_new = not os.path.exists(self.real)
        if is_new and journal.state.get("length"):
            raise ForeignOutput(self.path, f"is gone, but its journal is still there: {journal.path}", START_OVER)
        descriptor = os.open(self.real, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if is_new:
                sync_directory(os.path.dirname(self.real))
            self._length = self._end = self._cut(descriptor, journal)
            self._remember(journal.state)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _cut(self, descriptor: int, journal: Journal) -> int:
        """Compare the file with what the journal knows of it, cut what an ended job left, return the length."""
        length: int = journal.state.get("length", 0)
        size = os.fstat(descriptor).st_size
        if size < length:
            reason = f"holds {size:,} bytes, fewer than the {length:,} its journal counts"
            raise ForeignOutput(self.path, reason, START_OVER)
        self._tail = os.pread(descriptor, min(length, _TAIL), max(0, length - _TAIL))
        if length and _digest(self._tail) != journal.state["tail"]:
            raise ForeignOutput(self.path, "was changed: its last counted bytes aren't those its journal knows")
        if size > length:
            if not journal.running:
                raise ForeignOutput(self.path, f"holds {size - length:,} bytes more than its journal counts")
            os.ftruncate(descriptor, length)
            sync_file(descriptor)  # before anything says that no job was writing
        os.lseek(descriptor, length, os.SEEK_SET)
        return length

    def _flush(self) -> None:
        """Write what waits, through the compressor if there is one."""
        pieces = []
        while self._waiting:
            pieces.append(self._waiting.popleft())
        data = b"".join(pieces)
        if data and is_compressed(self.path):
            if self._compressor is None:
                self._compressor = _compressor(self.path)
            data = self._compressor.compress(data)
        self._append(data)

    def _append(self, data: bytes) -> None:
        if not data:
            return
        if not self._begun:
            self._journal.begin()
            self._begun = True
        write_whole(self._descriptor, data)
        self._end += len(data)
        self._tail = data[-_TAIL:] if len(data) >= _TAIL else (self._tail + data)[-_TAIL:]

    def _commit(self, delta: Delta) -> None:
        self._size = 0
        self._flush()
        if self._compressor is not None:
            self._append(self._compressor.flush())
            self._compressor = None
        if self._end > self._length:
            sync_file(self._descriptor)
        state = {"length": self._end, "tail": _digest(self._tail), **self._details()}
        self._journal.transaction(delta, state)
        self._begun = True
        self._length = self._end

    def _undo(self) -> bool:
        self._waiting.clear()
        if self._descriptor < 0:
            return False
        if self._end > self._length:
            os.ftruncate(self._descriptor, self._length)
            sync_file(self._descriptor)
        return True

    def _free(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _compressor(path: str) -> _Compressor:
    if path.endswith(".gz"):
        return zlib.compressobj(6, zlib.DEFLATED, 31)
    made: _Compressor = zstandard().ZstdCompressor(level=3).compressobj()
    return made
