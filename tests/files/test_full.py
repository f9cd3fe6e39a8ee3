"""A full disk: an error that names the file, and with space made the next run goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.files.sinks import NAMES, rows_of

from penstock.errors import WriteFailed
from penstock.flow import disk

# Writes until the limit on a file's size stops it, then once more without the limit.
CHILD = """
import asyncio, random, resource, sys
from tests.files.sinks import *
from penstock.errors import WriteFailed
name, limit = sys.argv[1], int(sys.argv[2])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
pick = random.Random(1)
async def fill(stop):
    sink = sink_of(name)
    progress = await sink.open(JOB)
    n = progress.settled.of("in").watermark
    try:
        while n < stop:
            text = "".join(chr(pick.randrange(33, 126)) for _ in range(3_000))
            await sink.write([((("in", n),), [{"n": n, "text": text}])])
            n += 1
            if n % 10 == 0:
                await sink.commit(settled(range(n - 10, n)))
    finally:
        for _ in range(2):
            try:
                await sink.commit(settled([9999]))
            except WriteFailed as error:
                print("still", error.path)
        await sink.close()
    return n
async def main():
    await fill(20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        await fill(1_000_000)
    except WriteFailed as error:
        print("failed", error.path, "|", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print("went on from", await fill(400))
asyncio.run(main())
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_named_and_the_next_run_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Parts and the database's log grow apart from the output: their own size meets the limit.
    limit = {"out.parquet": 20_000, "out.db": 300_000}.get(name, 300_000)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, name, str(limit)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    [failed] = [line for line in lines if line.startswith("failed")]
    assert name in failed
    assert "Make space, give permission, or whatever it needs, and run again" in failed
    assert lines[-1] == "went on from 400"
    assert rows_of(name) == list(range(400))
    assert sorted(os.listdir()) == sorted({name, name if name == "out.db" else f"{name}.journal"})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES])
def test_what_the_system_refuses_is_reported_with_the_path(code: int) -> None:
    with pytest.raises(WriteFailed, match=r"a\.jsonl can't be written") as caught, disk.writing("a.jsonl"):
        raise OSError(code, os.strerror(code))
    assert caught.value.path == "a.jsonl"


def test_another_file_than_the_output_is_named_too() -> None:
    said = r"a\.jsonl can't be written: no \(a\.jsonl\.lock\)\. Make space, give permission"
    with pytest.raises(WriteFailed, match=said), disk.writing("a.jsonl"):
        raise PermissionError(errno.EACCES, "no", "a.jsonl.lock")


def test_errors_of_penstock_are_themselves() -> None:
    error = WriteFailed("a.jsonl.journal", "a reason")
    with pytest.raises(WriteFailed) as caught, disk.writing("a.jsonl"):
        raise error
    assert caught.value is error


def test_whole_buffers_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = os.write

    def hesitant(descriptor: int, data: Any) -> int:
        return write(descriptor, data[:3])

    monkeypatch.setattr(os, "write", hesitant)
    with open(tmp_path / "a", "wb") as file:
        disk.write_whole(file.fileno(), b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
