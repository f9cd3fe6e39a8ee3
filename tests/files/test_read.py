"""Reading files: what items come out, at which positions, what can't be read, and going on in the middle."""

from __future__ import annotations

import asyncio
import csv as stdlib_csv
import dataclasses
import datetime as dt
import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import DecodeError, MissingDependency, MissingInput, PlanError, ResumeMismatch
from penstock.files import compressed as compressed_module
from penstock.files import read, write
from penstock.files.lines import BadLine, read_lines
from penstock.files.paths import partition_of
from penstock.files.source import Unsettled
from penstock.flow.contract import Failed, Unreadable
from penstock.flow.flow import Flow
from penstock.flow.progress import Intervals, Position, Positions, Progress
from penstock.flow.text import printable


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_all(flow: Flow[Any], settled: Positions | None = None) -> list[tuple[Position, Any]]:
    """Everything a flow's source yields."""
    assert flow.source is not None
    source = flow.source

    async def main() -> list[tuple[Position, Any]]:
        found = []
        async for batch in source.read(Progress(settled=settled or Positions())):
            assert 1 <= len(batch) <= 256
            found += batch
        return found

    return asyncio.run(main())


def source_of(flow: Flow[Any]) -> Any:
    assert flow.source is not None
    return flow.source


def items(flow: Flow[Any]) -> list[Any]:
    return [item for _, item in read_all(flow)]


def errors(flow: Flow[Any]) -> list[tuple[Any, str]]:
    return [(item.raw, str(item.error)) for item in items(flow) if isinstance(item, Unreadable)]


# Lines.


def test_lines() -> None:
    Path("a.txt").write_bytes("one\r\n\nthrée\nlast".encode())
    assert read_all(read.lines("a.txt")) == [
        (("a.txt", 0), "one"),
        (("a.txt", 1), ""),
        (("a.txt", 2), "thrée"),
        (("a.txt", 3), "last"),
    ]
    Path("empty.txt").touch()
    assert items(read.lines("empty.txt")) == []
    Path("marked.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert items(read.lines("marked.txt")) == ["one", "two"]
    assert items(read.lines("marked.txt", encoding="utf-8-sig")) == ["one", "two"]


def test_lines_in_another_encoding() -> None:
    Path("a.txt").write_bytes("é\n".encode("latin-1"))
    assert items(read.lines("a.txt", encoding="latin-1")) == ["é"]
    [(raw, said)] = errors(read.lines("a.txt"))
    assert raw == "\ufffd"
    assert said.startswith("a.txt, line 1: 'utf-8' codec can't decode")
    for encoding in ("utf-16", "no-such"):
        with pytest.raises(PlanError, match="encoding="):
            read.lines("a.txt", encoding=encoding)


def test_a_line_too_long_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_module, "_BLOCK", 64)
    Path("a.txt").write_bytes(b"short\n" + b"x" * 5000 + b"\nafter\n" + b"y" * 500)
    found = [line for lines in read_lines("a.txt", longest=100) for line in lines]
    assert [type(line) for line in found] == [bytes, BadLine, bytes, BadLine]
    assert found[1] == BadLine(b"x" * 1000, "the line has 5,000 bytes, and at most 100 are read")
    assert (found[0], found[2]) == (b"short", b"after")


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200).map(lambda data: data.replace(b"\x00", b"\n")), block=st.integers(1, 40))
def test_lines_are_those_of_split(content: bytes, block: int) -> None:
    Path("a.bin").write_bytes(content)
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressed_module, "_BLOCK", block)
        assert [line for lines in read_lines("a.bin") for line in lines] == expected


# Compressed.


def compressed(path: str, data: bytes) -> bytes:
    return gzip.compress(data) if path.endswith(".gz") else zstandard.compress(data)


@pytest.mark.parametrize("path", ["a.txt.gz", "a.txt.zst"])
def test_compressed_lines(path: str) -> None:
    big = "".join(f"{random.Random(n).random()}\n" for n in range(30_000))
    Path(path).write_bytes(compressed(path, big.encode()) + compressed(path, b"more\nlast"))
    assert items(read.lines(path)) == [*big.splitlines(), "more", "last"]
    Path(path).write_bytes(b"")
    assert items(read.lines(path)) == []
    Path(path).write_bytes(compressed(path, b""))
    assert items(read.lines(path)) == []


def test_gzip_padding_is_passed_over() -> None:
    padding = b"\0" * 40_000
    Path("a.gz").write_bytes(gzip.compress(b"one\n") + padding + gzip.compress(b"two\n") + padding)
    assert items(read.lines("a.gz")) == ["one", "two"]


@pytest.mark.parametrize("path", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_compressed_data_that_is_cut_short_is_an_error_after_its_lines(path: str, size: int) -> None:
    content = "".join(f"{random.Random(n).random()}\n" for n in range(size))
    whole = compressed(path, content.encode())
    for cut in (3, len(whole) // 2, len(whole) - 1):
        Path(path).write_bytes(whole[:cut])
        *good, bad = items(read.lines(path))
        assert good == content.splitlines()[: len(good)]
        assert isinstance(bad, Unreadable)
        assert f"line {len(good) + 1}: the compressed data ends too early" in str(bad.error)
    Path(path).write_bytes(whole + whole[: len(whole) // 2])
    *good, bad = items(read.lines(path))
    assert good[:size] == content.splitlines()
    assert isinstance(bad, Unreadable)


@pytest.mark.parametrize("path", ["a.txt.gz", "a.txt.zst"])
def test_compressed_data_that_is_damaged_is_an_error(path: str) -> None:
    Path(path).write_bytes(b"this was never compressed\n")
    [(_, said)] = errors(read.lines(path))
    assert said.startswith(f"{path}, line 1: the compressed data is damaged")


def test_a_missing_zstandard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependency, match=r"penstock\[zstd\]"):
        items(read.lines("a.zst"))


def test_a_missing_pyarrow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"penstock\[parquet\]"):
        read.parquet("a.parquet")


# JSON lines.


class Doc(msgspec.Struct):
    id: int
    text: str = ""


def test_json_lines() -> None:
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"id":1}\n\n  \t\n[2]\r\n\r\n"three"\nnull')
    assert read_all(read.jsonl("a.jsonl")) == [
        (("a.jsonl", 0), {"id": 1}),
        (("a.jsonl", 1), [2]),
        (("a.jsonl", 2), "three"),
        (("a.jsonl", 3), None),
    ]


def test_a_bad_line_is_named_with_file_line_and_reason() -> None:
    Path("a.jsonl").write_bytes(b'{"id":1}\n\n{"id":\n{"id":"x"}\n\xff\n{"id":2}\n')
    found = items(read.jsonl("a.jsonl", type=Doc))
    assert (found[0], found[4]) == (Doc(1), Doc(2))
    assert errors(read.jsonl("a.jsonl", type=Doc)) == [
        ('{"id":', "a.jsonl, line 3: Input data was truncated"),
        ('{"id":"x"}', "a.jsonl, line 4: Expected `int`, got `str` - at `$.id`"),
        ("\ufffd", "a.jsonl, line 5: JSON is malformed: invalid character (byte 0)"),
    ]


def test_a_type_that_cannot_be_decoded_is_refused_at_once() -> None:
    Path("a.jsonl").touch()
    with pytest.raises(PlanError, match="can't be decoded"):
        read.jsonl("a.jsonl", type=dict[tuple[int, int], object()])  # type: ignore[misc]  # the point


# CSV.


@dataclasses.dataclass
class Person:
    name: str
    age: int | None = None


def test_csv() -> None:
    Path("a.csv").write_text('\ufeffname,age\n"Ada ""the""\nCountess",36\n\nBob,\n', encoding="utf-8")
    assert read_all(read.csv("a.csv")) == [
        (("a.csv", 0), {"name": 'Ada "the"\nCountess', "age": "36"}),
        (("a.csv", 1), {"name": "Bob", "age": ""}),
    ]
    assert items(read.csv("a.csv", type=Person)) == [Person('Ada "the"\nCountess', 36), Person("Bob")]


def test_csv_with_tabs_and_another_encoding() -> None:
    Path("a.tsv").write_bytes("é\tb\n1\t2\n".encode("latin-1"))
    assert items(read.csv("a.tsv", delimiter="\t", encoding="latin-1")) == [{"é": "1", "b": "2"}]
    with pytest.raises(PlanError, match="single character"):
        read.csv("a.tsv", delimiter="::")


def test_rows_that_cannot_be_read() -> None:
    Path("a.csv").write_bytes(b'name,age\nAda,36\nBob\n"Ca\nrl","x"y\nDan,old\n\xff,1\nEve,5\nFay,"open\n')
    found = items(read.csv("a.csv", type=Person))
    assert [item for item in found if not isinstance(item, Unreadable)] == [Person("Ada", 36), Person("Eve", 5)]
    said = errors(read.csv("a.csv", type=Person))
    assert [raw for raw, _ in said] == ["Bob", '"Ca\nrl","x"y', "Dan,old", "\ufffd,1", 'Fay,"open']
    assert [text.split(":")[0] for _, text in said] == [f"a.csv, line {line}" for line in (3, 4, 6, 7, 9)]
    assert said[0][1].endswith("the row has 1 fields, and the header 2")
    assert "Expected `int | null`" in said[2][1]


@pytest.mark.parametrize(
    ("header", "said"), [(b"a,b,a\n1,2,3\n", "'a' more than once"), (b"\xff\n1\n", "header can't")]
)
def test_law_errors_a_header_that_cannot_be_read_fails_for_its_file_alone(header: bytes, said: str) -> None:
    Path("a.csv").write_bytes(header)
    Path("b.csv").write_text("a\n1\n")
    with pytest.raises(DecodeError, match=said) as raised:
        read.csv("*.csv").collect_sync()
    assert raised.value.__notes__ == [
        f"at stage 'read', a.csv, record 1: {header.splitlines()[0].decode(errors='replace')!r}"
    ]
    assert read.csv("*.csv", on_error="skip").collect_sync() == [{"a": "1"}]
    assert read_all(read.csv("*.csv"), Positions({"a.csv": Intervals([(0, 1)])})) == [(("b.csv", 0), {"a": "1"})]


def test_long_fields() -> None:
    Path("a.csv").write_text("a\n" + "x" * 300_000 + "\n")
    assert [len(row["a"]) for row in items(read.csv("a.csv"))] == [300_000]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cells, cells), max_size=20))
def test_csv_is_read_as_it_was_written(rows: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    writer = stdlib_csv.writer(text, lineterminator="\n", quoting=stdlib_csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    Path("a.csv").write_bytes(text.getvalue().encode())
    assert items(read.csv("a.csv")) == [{"a": a, "b": b} for a, b in rows]


# Parquet.


def test_parquet() -> None:
    table = pa.table({"id": list(range(1000)), "text": [None, *["x"] * 999]})
    pq.write_table(table, "a.parquet", row_group_size=300)
    assert read_all(read.parquet("a.parquet")) == [
        (("a.parquet", n), {"id": n, "text": "x" if n else None}) for n in range(1000)
    ]
    found = items(read.parquet("a.parquet", type=Doc))
    assert isinstance(found[0], Unreadable)
    assert str(found[0].error) == "a.parquet, row 1: Expected `str`, got `null` - at `$.text`"
    assert found[1:] == [Doc(n, "x") for n in range(1, 1000)]


def test_a_directory_of_parquet_files() -> None:
    Path("out.parquet").mkdir()
    assert items(read.parquet("out.parquet")) == []
    for number in range(2):
        pq.write_table(pa.table({"n": [number]}), f"out.parquet/part-{number}.parquet")
    pq.write_table(pa.table({"n": [9]}), "out.parquet/.part-9.parquet")
    for pattern in ("out.parquet", "*.parquet", "out.parquet/*.parquet"):
        assert [row["n"] for row in items(read.parquet(pattern))] == [0, 1]


@pytest.mark.parametrize("junk", [b"hello", b"", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_law_errors_a_file_that_is_not_parquet_fails_for_itself_alone(junk: bytes) -> None:
    for name in "ac":
        pq.write_table(pa.table({"n": [1, 2]}), f"{name}.parquet")
    Path("b.parquet").write_bytes(junk)
    with pytest.raises(DecodeError, match="no intact Parquet file") as raised:
        read.parquet("*.parquet").collect_sync()
    assert raised.value.__notes__ == ["at stage 'read', b.parquet, record 1: 'b.parquet'"]
    assert len(read.parquet("*.parquet", on_error="skip").collect_sync()) == 4
    kept = read.parquet("*.parquet", on_error="keep").collect_sync()
    assert [item.item for item in kept if isinstance(item, Failed)] == ["b.parquet"]
    found = read_all(read.parquet("*.parquet"), Positions({"b.parquet": Intervals([(0, 1)])}))
    assert [position[0] for position, _ in found] == ["a.parquet", "a.parquet", "c.parquet", "c.parquet"]


def test_law_errors_damaged_parquet_data_fails_for_its_row_group_alone() -> None:
    table = pa.table({"n": np.random.default_rng(5).integers(0, 2**60, 3000)})
    pq.write_table(table, "a.parquet", row_group_size=1000, use_dictionary=False, compression="gzip")
    second = pq.ParquetFile("a.parquet").metadata.row_group(1).column(0)
    data = bytearray(Path("a.parquet").read_bytes())
    start = second.data_page_offset + 100
    data[start : start + 2000] = b"\xff" * 2000
    Path("a.parquet").write_bytes(data)
    found = read_all(read.parquet("a.parquet"))
    assert [index for (_, index), _ in found] == [*range(1001), *range(2000, 3000)]
    bad = found[1000][1]
    assert isinstance(bad, Unreadable)
    assert str(bad.error).startswith("a.parquet, row 1001: the Parquet data is damaged")
    settled = Positions({"a.parquet": Intervals([(0, 500), (1000, 1001)])})
    assert [index for (_, index), _ in read_all(read.parquet("a.parquet"), settled)] == [
        *range(500, 1000),
        *range(2000, 3000),
    ]


def test_rows_of_parquet_that_python_has_no_value_for() -> None:
    days = pa.array([1, 2**31 - 1, 3], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"day": days}), "a.parquet")
    good, bad, last = items(read.parquet("a.parquet"))
    assert isinstance(bad, Unreadable)
    assert str(bad.error).startswith("a.parquet, row 2: ")
    assert (good, last) == ({"day": dt.date(1970, 1, 2)}, {"day": dt.date(1970, 1, 4)})


def test_a_parquet_file_that_cannot_be_opened_is_not_taken_for_a_damaged_one() -> None:
    pq.write_table(pa.table({"n": [1]}), "a.parquet")
    flow = read.parquet("a.parquet", on_error="skip")
    Path("a.parquet").unlink()
    Path("a.parquet").mkdir()
    Path("a.parquet/x.parquet").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        flow.collect_sync()


# Files.


def test_files() -> None:
    Path("b").mkdir()
    for name in ("b/2.txt", "b/1.txt", "a.txt"):
        Path(name).touch()
    assert read_all(read.files("**/*.txt")) == [((str(p), 0), p) for p in map(Path, ("a.txt", "b/1.txt", "b/2.txt"))]
    assert items(read.files(Path("a.txt"))) == [Path("a.txt")]
    assert items(read.files(["b/*", "a.txt", "b/1.txt"])) == list(map(Path, ("b/1.txt", "b/2.txt", "a.txt")))
    assert read_all(read.files("*"), Positions({"a.txt": Intervals([(0, 1)])})) == []


def test_a_name_that_looks_like_a_pattern() -> None:
    Path("a[1].txt").write_text("x\n")
    assert items(read.lines("a[1].txt")) == ["x"]


@pytest.mark.parametrize("pattern", ["none.jsonl", "none-*.jsonl", ["here.jsonl", "none.jsonl"], "none/**/*.jsonl"])
@pytest.mark.parametrize("kind", [read.lines, read.jsonl, read.csv, read.parquet, read.files])
def test_missing_input_is_an_error_at_once(kind: Any, pattern: Any) -> None:
    Path("here.jsonl").touch()
    with pytest.raises(MissingInput, match="none"):
        kind(pattern)


@pytest.mark.parametrize("pattern", [[], "", [""], [3], 3])
def test_a_pattern_that_is_none(pattern: Any) -> None:
    with pytest.raises(PlanError, match="names no file"):
        read.lines(pattern)


def test_directories_and_devices_are_no_input() -> None:
    Path("folder").mkdir()
    for kind in (read.lines, read.files):
        with pytest.raises(PlanError, match="is a directory"):
            kind("folder")
    with pytest.raises(PlanError, match="pipe or device"):
        read.lines("/dev/null")


def test_the_flow_carries_what_it_was_given() -> None:
    Path("a.jsonl").touch()
    flow = read.jsonl("a.jsonl", id="doc", name="docs", on_error="skip")
    assert (flow.id, flow.name, flow.defaults) == ("doc", "docs", {"on_error": "skip"})
    assert flow.source is not None
    assert flow.source.identity == "jsonl:a.jsonl"
    many = read.lines([f"{n}*" for n in "aaaaa"]).source
    assert many is not None
    assert many.identity.startswith("lines:a*,… (5 paths")
    assert many.replayable
    assert not many.joins(object())
    assert repr(source_of(flow)) == "read.jsonl:a.jsonl"


def test_a_file_does_not_ask_what_became_of_its_lines() -> None:
    Path("a.txt").touch()
    source = source_of(read.lines("a.txt"))

    async def main() -> None:
        await source.settle(Positions())
        await source.give_back(Positions(), 1.0, "why")

    asyncio.run(main())
    assert Path("a.txt").read_bytes() == b""


def test_many_files() -> None:
    Path("many").mkdir()
    for n in range(600):
        Path(f"many/{n:03d}").touch()
    assert len(items(read.files("many/*"))) == 600


# Going on in the middle.


@pytest.mark.parametrize("kind", ["lines", "jsonl", "jsonl.gz", "csv", "parquet"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(settled=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 1500)), max_size=4), data=st.data())
def test_what_is_settled_is_not_read_again(kind: str, settled: list[tuple[int, int]], data: st.DataObject) -> None:
    count = 3000
    name = f"a.{kind}"
    if not Path(name).exists():
        if kind == "csv":
            Path(name).write_text("n\n" + "".join(f"{n}\n" for n in range(count)))
        elif kind == "parquet":
            pq.write_table(pa.table({"n": list(range(count))}), name, row_group_size=700)
        else:
            text = "".join(json.dumps({"n": n}) + "\n" * (1 + (n % 7 == 0 and kind != "lines")) for n in range(count))
            Path(name).write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    done = Intervals([(start, start + length) for start, length in settled])
    function = {"lines": read.lines, "csv": read.csv, "parquet": read.parquet}.get(kind, read.jsonl)
    found = read_all(function(name), Positions({name: done}))
    assert [position[1] for position, _ in found] == [n for n in range(count) if n not in done]
    for (_, index), item in found[:: data.draw(st.integers(1, 100))]:
        assert str(index) in str(item)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6), st.lists(st.integers(1, 20), max_size=9))
def test_unsettled_parts(ranges: list[tuple[int, int]], lengths: list[int]) -> None:
    settled = Intervals([(start, start + length) for start, length in ranges])
    unsettled = Unsettled(settled)
    start = 0
    for length in lengths:
        stop = start + length
        expected = [index for index in range(start, stop) if index not in settled]
        assert unsettled.passes_over(start, stop) == (not expected)
        assert [index for low, high in unsettled.wanted(start, stop) for index in range(low, high)] == expected
        start = stop


def test_settled_records_are_not_decoded() -> None:
    """What is wrong with them was dealt with."""
    Path("a.jsonl").write_text("bad\n{}\n")
    assert read_all(read.jsonl("a.jsonl"), Positions({"a.jsonl": Intervals([(0, 1)])})) == [(("a.jsonl", 1), {})]


# Files that change while they are read.


def growing(name: str, more: bytes) -> Callable[[Any], Any]:
    """A function that appends to a file, and makes another, when it sees its first item."""
    seen: list[Any] = []

    def work(item: Any) -> Any:
        if not seen:
            with open(name, "ab") as file:
                file.write(more)
            Path("b.txt").write_bytes(BIG[:20_004])
        seen.append(item)
        return len(item)

    return work


BIG = b"".join(b"%d%s\n" % (n, b"x" * 10_000) for n in range(1000))


def test_what_comes_while_a_job_runs_is_left_to_the_next_run() -> None:
    Path("a.txt").write_bytes(BIG)
    job = read.lines("*.txt", on_error="skip").map(growing("a.txt", b"half a li"), place="loop").to("out.jsonl")
    assert job.run_sync(progress=False).delivered == 1000
    with open("a.txt", "ab") as file:
        file.write(b"ne\n")
    assert job.run_sync(progress=False).delivered == 3
    assert sorted(map(int, Path("out.jsonl").read_text().split()))[:2] == [11, 10_001]


def test_a_file_that_is_cut_short_while_it_is_read() -> None:
    def cut(line: str) -> str:
        os.truncate("a.txt", 5_000_000)
        return line

    Path("a.txt").write_bytes(BIG)
    read.lines("a.txt", on_error="dead_letter").map(cut).to("out.jsonl").run_sync(progress=False)
    (letter,) = read.dead("out.jsonl").collect_sync()
    assert "the file was cut short while it was read" in letter.error


def test_a_file_that_goes_before_it_is_read() -> None:
    def remove(line: str) -> str:
        Path("b.txt").unlink(missing_ok=True)
        return line

    Path("a.txt").write_bytes(BIG)
    Path("b.txt").write_bytes(BIG)
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        read.lines("*.txt").map(remove).to("out.jsonl").run_sync(progress=False)


def test_a_bomb_is_read_in_bounded_memory() -> None:
    """A gigabyte of zeros in 32 KB, of which one line is skipped."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    with open("a.zst", "wb") as file:
        file.writelines(compressor.compress(bytes(1 << 20)) for _ in range(1024))
        file.write(compressor.flush())
    code = """
import resource, sys
from penstock.files.lines import read_lines
import zstandard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print([line.reason for lines in read_lines("a.zst") for line in lines])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // (1024 if sys.platform != "darwin" else 1 << 20))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    said, grown = shown.stdout.splitlines()
    assert "1,073,741,824 bytes" in said
    assert int(grown) < 40


# Names.


ODD = os.fsdecode(b"caf\xe9")


@pytest.fixture
def _odd_names() -> None:
    try:
        Path(f"{ODD}.txt").write_text("1\n2\n")
    except OSError:
        pytest.skip("this system has no names but Unicode")
    Path("plain.txt").write_text("3\n")


@pytest.mark.usefixtures("_odd_names")
@pytest.mark.parametrize("pattern", ["*.txt", f"{ODD}.txt", ["plain.txt", f"{ODD}.txt"]])
def test_files_whose_names_are_not_unicode(pattern: Any) -> None:
    job = read.lines(pattern).to("out.jsonl")
    report = job.run_sync(progress=False)
    str(report).encode()
    count = report.delivered
    assert count == (2 if pattern == f"{ODD}.txt" else 3)
    assert "nothing to do" in str(job.run_sync(progress=False))
    with open(f"{ODD}.txt", "a") as file:
        file.write("4\n")
    assert job.run_sync(progress=False).delivered == 1
    Path(f"{ODD}.txt").write_text("5\n")
    with pytest.raises(ResumeMismatch, match=r"udce9\.txt/ shrank"):
        job.run_sync(progress=False)


@pytest.mark.usefixtures("_odd_names")
def test_what_cannot_be_read_in_a_file_whose_name_is_not_unicode() -> None:
    Path(f"{ODD}.txt").rename(f"{ODD}.jsonl")
    with open(f"{ODD}.jsonl", "a") as file:
        file.write("bad\n")
    read.jsonl("*.jsonl", on_error="dead_letter").to("out.db").run_sync(progress=False)
    letters = read.dead("out.db").collect_sync()
    assert sorted(letter.reason for letter in letters) == ["CannotEncode", "CannotEncode", "DecodeError"]
    assert all(letter.position[0] == "caf\\udce9.jsonl/" for letter in letters)


@pytest.mark.usefixtures("_odd_names")
def test_paths_that_are_not_unicode_and_errors_that_name_them() -> None:
    def broken(path: Path) -> None:
        raise OSError(f"can't use {path}")

    assert sorted(read.files("*.txt").map(Path.read_text).collect_sync()) == ["1\n2\n", "3\n"]
    read.files("*.txt", on_error="dead_letter").map(broken).to("out.jsonl").run_sync(progress=False)
    letters = read.dead("out.jsonl").collect_sync()
    assert {letter.item for letter in letters} == {Path(f"{ODD}.txt"), Path("plain.txt")}
    assert {letter.error for letter in letters} == {"can't use caf\\udce9.txt", "can't use plain.txt"}


@pytest.mark.usefixtures("_odd_names")
def test_each_file_has_a_partition_of_its_own() -> None:
    names = [ODD, printable(ODD), printable(ODD) + ODD, ODD + printable(ODD), ODD * 2]
    assert len({partition_of(name) for name in names}) == len(names)


@pytest.mark.usefixtures("_odd_names")
def test_an_output_whose_name_is_not_unicode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="the name isn't Unicode"):
        read.lines("plain.txt").to(f"{ODD}.jsonl")
    os.mkdir(ODD)
    monkeypatch.chdir(ODD)
    with pytest.raises(PlanError, match="the name isn't Unicode"):
        read.lines("../plain.txt").to("out.jsonl").run_sync(progress=False)


# Bounds and ends.


def test_law_bounded_reading_a_big_file(tmp_path: Path) -> None:
    """A file of 200 MB in lines of all lengths, read in less than 60 MB."""
    code = """
import asyncio, resource, sys
from penstock.files import read
from penstock.flow.progress import Progress
with open("big.txt", "w") as file:
    for n in range(2_000):
        file.write("x" * 100_000 + "\\n")
async def main():
    count = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async for batch in read.lines("big.txt").source.read(Progress()):
        count += len(batch)
        await asyncio.sleep(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(count, grown // (1024 if sys.platform != "darwin" else 1 << 20))
asyncio.run(main())
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    count, grown = map(int, shown.stdout.split())
    assert count == 2000
    assert grown < 60


def test_law_it_ends_closing_early_closes_file_and_thread() -> None:
    Path("a.txt").write_text("x\n" * 100_000)
    code = """
import asyncio, os, threading
from penstock.files import read
from penstock.flow.progress import Progress
async def main():
    reading = read.lines("a.txt").source.read(Progress())
    await anext(reading)
    await reading.aclose()
    print(threading.active_count())
    print(any(os.path.realpath(f"/proc/self/fd/{fd}").endswith("a.txt") for fd in os.listdir("/proc/self/fd")))
if os.path.isdir("/proc/self/fd"):
    asyncio.run(main())
else:
    print("1 False")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (shown.stdout.split(), shown.stderr) == (["1", "False"], "")


@pytest.mark.parametrize(
    ("pattern", "output"),
    [("a.jsonl", "a.jsonl"), ("*.jsonl", "./a.jsonl"), (["b.jsonl", "a.jsonl"], "link.jsonl"), ("part/*", "part")],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_job_never_writes_over_what_it_reads(pattern: Any, output: str, fresh: bool) -> None:
    Path("part").mkdir()
    for name in ("a.jsonl", "b.jsonl", "part/p.parquet"):
        Path(name).write_text("1\n")
    os.symlink("a.jsonl", "link.jsonl")
    sink: Any = write.parquet(output) if output == "part" else output
    with pytest.raises(PlanError, match="is read by this job, and it is its output, too"):
        read.lines(pattern).to(sink).run_sync(fresh=fresh, progress=False)
    assert Path("a.jsonl").read_text() == Path("part/p.parquet").read_text() == "1\n"
    read.lines("b.jsonl").to("a.jsonl").run_sync(fresh=True, progress=False)  # another file may be written over
