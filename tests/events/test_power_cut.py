"""A power cut: what was written and not yet synced is lost, kept, torn or reordered; what was acknowledged is there.

A file system of SQLite's (VFS) in Python notes every write, sync and truncation of one run. Then, for one moment after
the other, the files are made as a cut at that moment may leave them: all that was synced, and of the writes since then
any, whole or in parts of a sector. They are opened as a log, and read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest

import penstock as ps
from penstock.errors import LogError
from penstock.events import schema, store

SECTOR = 512


@dataclass
class Disk:
    """What happened, in order: (file, "write", offset, data), (file, "sync"), (file, "cut", size), (file, "gone")."""

    done: list[tuple[Any, ...]] = field(default_factory=list)
    acknowledged: list[tuple[int, int]] = field(default_factory=list)

    def after_a_cut(self, moment: int, draw: random.Random) -> dict[str, bytes]:
        """The files as a cut after so many steps may leave them."""
        files: dict[str, bytearray] = {}
        unsynced: dict[str, list[tuple[Any, ...]]] = {}
        for step in self.done[:moment]:
            name, what = step[:2]
            if what == "sync":
                for late in unsynced.pop(name, []):
                    apply(files, late)
            elif what == "gone":
                unsynced.pop(name, None)
                files.pop(name, None)
            else:
                unsynced.setdefault(name, []).append(step)
        for steps in unsynced.values():
            for late in draw.sample(steps, len(steps)) if draw.random() < 0.3 else steps:
                if late[1] == "cut":
                    if draw.random() < 0.5:
                        apply(files, late)
                    continue
                name, _, offset, data = late
                for start in range(0, len(data), SECTOR):
                    if draw.random() < 0.6:
                        apply(files, (name, "write", offset + start, data[start : start + SECTOR]))
        return {name: bytes(data) for name, data in files.items()}


def apply(files: dict[str, bytearray], step: tuple[Any, ...]) -> None:
    name, what, *rest = step
    data = files.setdefault(name, bytearray())
    if what == "cut":
        del data[rest[0] :]
        return
    offset, written = rest
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(written)] = written


class NotingFile(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.disk = disk
        self.name = Path(name.filename() if isinstance(name, apsw.URIFilename) else name).name

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        super().xWrite(data, offset)
        self.disk.done.append((self.name, "write", offset, bytes(data)))

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self.disk.done.append((self.name, "sync"))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        super().xTruncate(size)
        self.disk.done.append((self.name, "cut", size))


class NotingDisk(apsw.VFS):
    def __init__(self, disk: Disk) -> None:
        super().__init__("noting", "")
        self.disk = disk

    def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802
        return NotingFile(self.disk, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        super().xDelete(name, sync)
        self.disk.done.append((Path(name).name, "gone"))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Logs are opened on a disk that takes notes. Without shared memory, so by one connection alone."""
    noted = Disk()
    noting = NotingDisk(noted)
    connect = schema.connect
    real = apsw.Connection

    def connection(path: str, **options: Any) -> Any:
        opened = real(path, vfs="noting", **options)
        opened.execute("PRAGMA locking_mode = EXCLUSIVE")
        return opened

    def on_it(path: str, durability: str) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(apsw, "Connection", connection)
            opened = connect(path, durability)
        opened.execute("PRAGMA wal_autocheckpoint = 30")
        return opened

    monkeypatch.setattr(store, "connect", on_it)
    yield noted
    noting.unregister()


async def publish(path: Path, disk: Disk, count: int, **options: Any) -> None:
    """One after the other, several at once, and acknowledgements between them."""
    async with ps.EventLog(path, **options) as log:
        topic = log.topic("t")
        for start in range(0, count, 10):
            for number in range(start, start + 5):
                await topic.publish(f"{number:200}")
                disk.acknowledged.append((len(disk.done), number))
            await asyncio.gather(*(topic.publish(f"{number:200}") for number in range(start + 5, start + 10)))
            disk.acknowledged += [(len(disk.done), number) for number in range(start + 5, start + 10)]


def stored(directory: Path, files: dict[str, bytes]) -> list[int] | None:
    """What a log holds that is made of these files; None if there is no log yet."""
    for old in directory.iterdir():
        if old.is_file():
            old.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)

    async def read() -> list[int]:
        async with ps.EventLog(directory / "events.db") as log:
            return [int(event.value) async for event in log.topic("t").read()]

    try:
        return asyncio.run(read())
    except LogError:
        return None


@pytest.mark.parametrize("cuts", [150, pytest.param(5000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("durability", ["disk", "process"])
def test_what_was_acknowledged_survives(
    tmp_path: Path, disk: Disk, durability: Any, cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, found = tmp_path / "written", tmp_path / "found"
    written.mkdir()
    found.mkdir()
    asyncio.run(publish(written / "events.db", disk, 200, durability=durability))
    monkeypatch.undo()
    draw = random.Random(cuts)
    lost = 0
    for _ in range(cuts):
        moment = draw.randrange(disk.acknowledged[0][0], len(disk.done) + 1)
        promised = [number for when, number in disk.acknowledged if when <= moment]
        numbers = stored(found, disk.after_a_cut(moment, draw))
        if durability == "disk":
            assert numbers is not None
            assert set(promised) <= set(numbers), f"a cut at step {moment}"
        assert numbers is None or numbers == list(range(len(numbers))), "a hole"
        lost += not set(promised) <= set(numbers or ())
    assert (lost == 0) == (durability == "disk"), "with less than a sync for each, something must be lost"
