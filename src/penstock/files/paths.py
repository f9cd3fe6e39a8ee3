"""Which files a pattern means, what they looked like, and whether they still do.

A snapshot holds size, time and a digest of each file. Comparing accepts what only grew: new files, and text appended
to old ones; everything else is named. A file up to 64 MB is digested whole, a larger one in samples: its first and
last megabyte and 64 blocks between them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Sequence
from typing import Any, BinaryIO

from penstock.errors import MissingInput, PlanError
from penstock.files.compressed import is_compressed, open_bytes
from penstock.flow.text import printable

__all__ = ["FileSet", "Pattern", "partition_of"]

Pattern = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A path, a glob with ``*``, ``?``, ``[…]`` or ``**``, or a list or tuple of those."""

_WHOLE = 64 << 20
_END = 1 << 20
_SAMPLES = 64
_SAMPLE = 64 << 10
_BLOCK = 1 << 20
_NAMED = 3


def partition_of(path: str) -> str:
    r"""The partition that a file's records stand in: its path, if that is Unicode.

    One that isn't is escaped and ends in a slash, as no file's path does, so that each has a partition of its own.

    >>> partition_of("a.txt"), partition_of(os.fsdecode(b"\xe9.txt"))
    ('a.txt', '\\udce9.txt/')
    """
    text = printable(path)
    return path if text == path else printable(path.replace("\\", "\\\\")) + "/"


class FileSet:
    """The files of a pattern, looked up anew each time, since some may have come.

    ``kind`` begins the identity; ``suffix`` is that of the files a directory stands for, None where a directory is
    no input; ``grows``: whether what is appended to a file leaves what was there as it was; ``contents``: whether the
    files' contents matter, or only which there are. Raises MissingInput at once if nothing matches.
    """

    def __init__(
        self, kind: str, pattern: Pattern, *, suffix: str | None = None, grows: bool = True, contents: bool = True
    ) -> None:
        given: list[Any] = list(pattern) if isinstance(pattern, (list, tuple)) else [pattern]
        self.patterns = [os.fspath(one) for one in given if isinstance(one, (str, os.PathLike))]
        if not all(self.patterns) or len(self.patterns) != len(given) or not given:
            raise PlanError(
                f"read.{kind}({pattern!r:.60}) names no file", "Give a path, a pattern like 'texts/*.jsonl', or a list"
            )
        self.kind = kind
        self._suffix = suffix
        self._grows = grows
        self._contents = contents
        self._seen: dict[str, dict[str, Any]] = {}
        for path in self.paths():
            self._check(path)

    @property
    def identity(self) -> str:
        """The same for the same patterns: paths as they were given, not where they lead."""
        if len(self.patterns) <= _NAMED:
            return f"{self.kind}:{','.join(map(partition_of, self.patterns))}"
        digest = hashlib.blake2b("\0".join(self.patterns).encode("utf-8", "surrogateescape"), digest_size=8)
        return f"{self.kind}:{partition_of(self.patterns[0])},… ({len(self.patterns)} paths, {digest.hexdigest()})"

    def paths(self) -> list[str]:
        """The matching files, each once: sorted within a glob, globs in their order. Raises MissingInput."""
        found: dict[str, None] = {}
        for pattern in self.patterns:
            if os.path.lexists(pattern) or not glob.has_magic(pattern):
                matches = [pattern]
            else:
                matches = sorted(glob.iglob(pattern, recursive=True))
                if self._suffix is None:
                    matches = [path for path in matches if not os.path.isdir(path)]
            if not matches:
                raise MissingInput(pattern)
            for path in matches:
                if not os.path.exists(path):
                    raise MissingInput(path)
                if self._suffix is not None and os.path.isdir(path):
                    found.update(dict.fromkeys(sorted(glob.iglob(os.path.join(glob.escape(path), f"*{self._suffix}")))))
                else:
                    found[path] = None
        return list(found)

    def paths_of(self, snapshot: dict[str, dict[str, Any]] | None) -> list[tuple[str, int | None]]:
        """The files of a snapshot, each with the size it had; without one the matching files. Raises MissingInput."""
        if snapshot is None:
            return [(path, None) for path in self.paths()]
        there = [(path, snapshot[one]["size"]) for path in self.paths() if (one := partition_of(path)) in snapshot]
        if len(there) < len(snapshot):
            raise MissingInput(min(set(snapshot) - {partition_of(path) for path, _ in there}))
        return there

    def hold(self, path: str) -> bool:
        """Whether ``path``, or a file in it, is one of the files, by whatever name."""
        try:
            there, files = os.stat(path), self.paths()
        except OSError:  # MissingInput is one: nothing can be the same as nothing
            return False
        in_it = stat.S_ISDIR(there.st_mode)
        return any(os.path.samestat(there, os.stat(os.path.dirname(one) or "." if in_it else one)) for one in files)

    def grown(self, before: dict[str, dict[str, Any]]) -> list[tuple[str, int]]:
        """The files that are larger than in a snapshot, each with the size it had."""
        sizes = [(path, before[one]["size"]) for path in self.paths() if (one := partition_of(path)) in before]
        return [(path, size) for path, size in sizes if os.stat(path).st_size > size]

    def _check(self, path: str) -> None:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise PlanError(f"{path!r} is a directory", f"Name the files in it: {os.path.join(path, '*')!r}")
        if self._contents and not stat.S_ISREG(mode):
            raise PlanError(
                f"{path!r} is a pipe or device, which can't be read twice",
                "Give Flow an iterator over it, such as sys.stdin",
            )

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Size, time and digest of each file, by partition. One of the size and time of an earlier look isn't read."""
        taken = {}
        for path in self.paths():
            found = os.stat(path)
            before = self._seen.get(partition_of(path))
            if before is None or not _same(before, found):
                before = {"size": found.st_size}
                if self._contents:
                    before["time"] = found.st_mtime_ns
                    before["digest"] = _digest(path, found.st_size)
            taken[partition_of(path)] = before
        self._seen = taken
        return taken

    def changed(self, before: dict[str, dict[str, Any]]) -> str | None:
        """Which file differs from ``before``, and how; None if they only grew."""
        current = {partition_of(path): path for path in self.paths()}
        for partition, then in before.items():
            if partition not in current:
                return f"{partition} is gone"
            how = self._changed(current[partition], then)
            if how is not None:
                return f"{partition} {how}"
        return None

    def _changed(self, path: str, then: dict[str, Any]) -> str | None:
        found = os.stat(path)
        size = then["size"]
        if _same(then, found):
            self._seen[partition_of(path)] = then
            return None
        if not self._contents:
            return f"had {size:,} bytes and has {found.st_size:,} now"
        if found.st_size < size:
            return f"shrank from {size:,} to {found.st_size:,} bytes"
        if found.st_size > size and not self._grows:
            return f"had {size:,} bytes and has {found.st_size:,} now"
        if _digest(path, size) != then["digest"]:
            return "was changed: what was there before differs"
        if found.st_size > size:
            try:
                if not _ends_a_line(path, size):
                    return "ended without a newline and was appended to, which changes its last line"
            except EOFError as error:
                return f"was incomplete ({error}) and has grown"
        return None


def _ends_a_line(path: str, size: int) -> bool:
    """Whether what is appended after the first ``size`` bytes begins a line of its own."""
    if size == 0:
        return True
    if is_compressed(path):
        last = b""
        with open_bytes(path, size) as file:
            for block in file:
                last = block[-1:]
        return last in (b"\n", b"")
    with open(path, "rb") as plain:
        plain.seek(size - 1)
        around = plain.read(3)
    return around[:1] == b"\n" or around[1:].removeprefix(b"\r")[:1] == b"\n"


def _same(then: dict[str, Any], found: os.stat_result) -> bool:
    same_time: bool = "time" not in then or then["time"] == found.st_mtime_ns
    return same_time and then["size"] == found.st_size


def _digest(path: str, size: int) -> str:
    """A digest of the first ``size`` bytes of a file: of all, or of samples that depend on ``size`` alone."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if size <= _WHOLE:
            _feed(state, file, 0, size)
        else:
            _feed(state, file, 0, _END)
            step = (size - 2 * _END) // _SAMPLES
            for number in range(_SAMPLES):
                _feed(state, file, _END + number * step, _SAMPLE)
            _feed(state, file, size - _END, _END)
    return state.hexdigest()


def _feed(state: Any, file: BinaryIO, offset: int, count: int) -> None:
    file.seek(offset)
    while count > 0 and (block := file.read(min(_BLOCK, count))):
        state.update(block)
        count -= len(block)
