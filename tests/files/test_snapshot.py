"""What counts as the same input: growing is, everything else is named."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import MissingInput
from penstock.files import paths, read
from penstock.flow.flow import Flow


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def snapshot(flow: Flow[Any]) -> Any:
    assert flow.source is not None
    return json.loads(json.dumps(asyncio.run(flow.source.snapshot())))


def changed(flow: Flow[Any], before: Any) -> str | None:
    """As a later process would ask: with a source of its own."""
    assert flow.source is not None
    return asyncio.run(flow.source.changed(before))


def touch(path: str) -> None:
    """Another time, so that what follows can't be taken for unchanged without a look."""
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))


def write(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)
    touch(path)


BEFORE = b"one\ntwo\n"


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (BEFORE, None),
        (BEFORE + b"three\n", None),
        (BEFORE + b"three", None),
        (b"one\ntwO\n", "was changed: what was there before differs"),
        (b"ONE\ntwo\nthree\n", "was changed: what was there before differs"),
        (b"one\n", "shrank from 8 to 4 bytes"),
        (b"", "shrank from 8 to 0 bytes"),
    ],
)
@pytest.mark.parametrize("kind", [read.lines, read.jsonl, read.csv])
def test_a_file_that_grew_is_the_same(kind: Any, now: bytes, said: str | None) -> None:
    write("a.txt", BEFORE)
    before = snapshot(kind("a.txt"))
    write("a.txt", now)
    assert changed(kind("a.txt"), before) == (f"a.txt {said}" if said else None)


@pytest.mark.parametrize(
    ("before", "appended", "same"),
    [
        (b"one\ntwo", b"more\n", False),
        (b"one\ntwo", b"\nmore\n", True),
        (b"one\ntwo", b"\r\nmore\n", True),
        (b"one\ntwo", b"\r", False),
        (b"one\ntwo\n", b"more", True),
        (b"", b"more", True),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_last_line_that_was_continued_is_a_change(name: str, before: bytes, appended: bytes, same: bool) -> None:
    def pack(data: bytes) -> bytes:
        if name.endswith(".gz"):
            return gzip.compress(data, mtime=0)
        return zstandard.compress(data) if name.endswith(".zst") else data

    if name != "a.txt" and before == b"one\ntwo":
        same = False  # what comes next in compressed files isn't looked at
    write(name, pack(before))
    seen = snapshot(read.lines(name))
    write(name, pack(before) + pack(appended))
    found = changed(read.lines(name), seen)
    expected = f"{name} ended without a newline and was appended to, which changes its last line"
    assert found == (None if same else expected)


@pytest.mark.parametrize(
    ("before", "same"),
    [(b'a,b\n1,"two\n', False), (b'a,b\n1,"two\n"\n', True), (b'a,b\n1,2" pipe\n', True), (b'a,"b\n', False)],
)
def test_a_row_that_was_open_and_continued_is_a_change(before: bytes, same: bool) -> None:
    write("a.csv", before)
    seen = snapshot(read.csv("a.csv"))
    write("a.csv", before + b'3,"4"\n')
    expected = "a.csv ended within a quoted field and was appended to, which changes its last row"
    assert changed(read.csv("a.csv"), seen) == (None if same else expected)


def test_an_incomplete_compressed_file_that_grew_is_a_change() -> None:
    whole = gzip.compress(b"one\ntwo\n" * 100)
    write("a.gz", whole[:-5])
    seen = snapshot(read.lines("a.gz"))
    write("a.gz", whole)
    assert "was incomplete (the compressed data ends too early" in str(changed(read.lines("a.gz"), seen))


def test_new_files_are_growth_and_lost_ones_are_not() -> None:
    write("a1.txt", BEFORE)
    write("a2.txt", BEFORE)
    before = snapshot(read.lines("a*.txt"))
    assert set(before) == {"a1.txt", "a2.txt"}
    write("a0.txt", BEFORE)
    assert changed(read.lines("a*.txt"), before) is None
    Path("a1.txt").unlink()
    assert changed(read.lines("a*.txt"), before) == "a1.txt is gone"


def test_input_that_is_gone_altogether() -> None:
    write("a1.txt", BEFORE)
    flow = read.lines("a*.txt")
    before = snapshot(flow)
    Path("a1.txt").unlink()
    with pytest.raises(MissingInput):
        changed(flow, before)


def test_a_parquet_file_does_not_grow() -> None:
    pq.write_table(pa.table({"n": [1]}), "a.parquet")
    size = os.path.getsize("a.parquet")
    before = snapshot(read.parquet("a.parquet"))
    write("a.parquet", Path("a.parquet").read_bytes() + b"more")
    assert changed(read.parquet("a.parquet"), before) == f"a.parquet had {size} bytes and has {size + 4} now"
    os.truncate("a.parquet", size)
    touch("a.parquet")
    assert changed(read.parquet("a.parquet"), before) is None
    pq.write_table(pa.table({"n": [2]}), "a.parquet")
    touch("a.parquet")
    assert changed(read.parquet("a.parquet"), before) is not None


def test_files_are_compared_by_size_and_not_read() -> None:
    write("a.bin", b"abc")
    os.chmod("a.bin", 0)
    before = snapshot(read.files("*.bin"))
    os.chmod("a.bin", 0o600)
    write("a.bin", b"abd")
    assert changed(read.files("*.bin"), before) is None
    write("a.bin", b"abcd")
    assert changed(read.files("*.bin"), before) == "a.bin had 3 bytes and has 4 now"


def test_an_unchanged_file_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt", BEFORE)
    before = snapshot(read.lines("a.txt"))
    read_again: list[str] = []
    digest = paths._digest
    monkeypatch.setattr(paths, "_digest", lambda path, size: read_again.append(path) or digest(path, size))
    flow = read.lines("a.txt")
    assert changed(flow, before) is None
    assert snapshot(flow) == before
    assert read_again == []
    touch("a.txt")
    assert changed(flow, before) is None
    assert read_again == ["a.txt"]
    assert snapshot(flow)["a.txt"]["time"] == before["a.txt"]["time"] + 1_000_000_000


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(3000, 9000), data=st.data())
def test_a_large_file_is_digested_in_samples(size: int, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_WHOLE": 2000, "_END": 100, "_SAMPLES": 8, "_SAMPLE": 50}.items():
            patch.setattr(paths, name, value)
        content = b"x" * (size - 1) + b"\n"
        write("big.txt", content)
        before = snapshot(read.lines("big.txt"))
        write("big.txt", content + b"appended\n" * data.draw(st.integers(0, 500)))
        assert changed(read.lines("big.txt"), before) is None
        step = (size - 200) // 8
        sampled = [*range(100), *range(size - 100, size)]
        sampled += [100 + n * step + at for n in range(8) for at in range(min(50, step))]
        at = data.draw(st.sampled_from(sampled))
        write("big.txt", content[:at] + b"?" + content[at + 1 :])
        assert changed(read.lines("big.txt"), before) == "big.txt was changed: what was there before differs"
