"""Outputs of every kind: what is committed stays, the rest doesn't count, and what is foreign is left alone."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import datetime as dt
import enum
import gzip
import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import apsw
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.files.sinks import JOB, NAMES, STREAMS, outputs, rows_of, run, settled, sink_of

import penstock as ps
from penstock.errors import (
    CannotEncode,
    Closed,
    ForeignOutput,
    JournalError,
    MissingDependency,
    OutputInUse,
    OutputRejected,
    PlanError,
    ResumeMismatch,
    WriteFailed,
)
from penstock.files import parquet as parquet_module
from penstock.files import write
from penstock.flow import database as database_module
from penstock.flow.contract import SUFFIXES, Delta, Failed, JobId
from penstock.flow.output import Output
from penstock.flow.sink import as_sink


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_all(sink: Output, values: list[Any], job: JobId = JOB) -> None:
    """Write these values, commit, close."""

    async def main() -> None:
        await sink.open(job)
        try:
            await sink.write([((("in", at),), [value]) for at, value in enumerate(values)])
            await sink.commit(settled(range(len(values))))
        finally:
            await sink.close()

    asyncio.run(main())


def rejected(sink: Output, values: list[Any]) -> list[tuple[int, str]]:
    with pytest.raises(OutputRejected) as caught:
        write_all(sink, values)
    assert all(isinstance(error, CannotEncode) for _, error in caught.value.rejected)
    return [(index, str(error)) for index, error in caught.value.rejected]


# All kinds.


@pytest.mark.parametrize("name", NAMES)
def test_law_commit_what_is_committed_stays_and_the_rest_does_not_count(name: str) -> None:
    async def main() -> None:
        sink = sink_of(name)
        progress = await sink.open(JOB)
        assert not progress.settled
        await sink.write(outputs(range(5)))
        await sink.write(outputs(range(5, 10)))
        await sink.commit(settled(range(10), dead=[90]))
        await sink.write(outputs(range(10, 30)))
        await sink.close()
        await sink.close()
        assert rows_of(name) == list(range(10))
        progress = await sink.open(JOB)  # the same sink again
        assert list(progress.settled.of("in")) == [(0, 10), (90, 91)]
        assert progress.counts == {"delivered": 10, "dead": 1}
        await sink.write(outputs(range(10, 12)))
        await sink.commit(settled(range(10, 12)))
        await sink.commit(Delta(finished=True, report={"issued": 13}))
        await sink.close()
        assert rows_of(name) == list(range(12))
        progress = await sink.open(JOB)
        assert progress.finished
        await sink.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", NAMES)
def test_after_closing_only_output_and_journal_remain(name: str) -> None:
    asyncio.run(run(sink_of(name), range(20)))
    assert sorted(os.listdir()) == sorted({name, name if name == "out.db" else f"{name}.journal"})
    if name == "out.parquet":
        assert sorted(os.listdir(name)) == [f"part-{n:05d}.parquet" for n in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_a_second_job_on_the_output_is_refused(name: str) -> None:
    code = (
        "import asyncio, sys\n"
        "from tests.files.sinks import *\n"
        "from penstock.errors import OutputInUse\n"
        "try:\n    asyncio.run(sink_of(sys.argv[1]).open(JOB))\n"
        "except OutputInUse as error:\n    print(error)\n"
    )

    async def main() -> None:
        sink = sink_of(name)
        await sink.open(JOB)
        await sink.write(outputs([1]))
        with pytest.raises(OutputInUse):
            await sink.open(JOB)
        Path("alias").symlink_to(".")
        for other in (sink_of(name), sink_of(f"alias/{name}")):
            with pytest.raises(OutputInUse):
                await other.open(JOB)
            await other.close()
        shown = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code, name], capture_output=True, text=True, timeout=30,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert (shown.stdout, shown.stderr) == (
            f"{name} is being written by another job. Wait for it to end, or write to another output\n",
            "",
        ) or name in shown.stdout
        await sink.commit(settled([1]))
        await sink.close()

    asyncio.run(main())
    assert rows_of(name) == [1]


@pytest.mark.parametrize("name", NAMES)
def test_another_jobs_output_is_refused_and_left_alone(name: str) -> None:
    asyncio.run(run(sink_of(name), range(5)))
    for other in (JobId("other", "source"), JobId("job", "other source")):
        with pytest.raises(ResumeMismatch, match="fresh=True"):
            asyncio.run(run(sink_of(name), [9], other))
    assert rows_of(name) == list(range(5))
    asyncio.run(run(sink_of(name), [5]))
    assert rows_of(name) == list(range(6))


@pytest.mark.parametrize("name", NAMES)
def test_starting_afresh_discards_what_was_there(name: str) -> None:
    asyncio.run(run(sink_of(name), range(20)))
    progress = asyncio.run(run(sink_of(name), [7], JobId("other", "elsewhere", fresh=True)))
    assert not progress.settled
    assert rows_of(name) == [7]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_that_wrote_nothing_leaves_room_for_another(name: str) -> None:
    async def main() -> None:
        sink = sink_of(name)
        await sink.open(JOB)
        await sink.write(outputs(range(50)))
        await sink.close()
        await run(sink_of(name), [1], JobId("other", "elsewhere"))

    asyncio.run(main())
    assert rows_of(name) == [1]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_can_be_done_with_a_closed_output(name: str) -> None:
    sink = sink_of(name)
    for call in (lambda: sink.write(outputs([1])), lambda: sink.commit(Delta())):
        with pytest.raises(Closed):
            asyncio.run(call())
    asyncio.run(sink.close())
    assert os.listdir() == []


@pytest.mark.parametrize("name", NAMES)
def test_many_small_writes_and_large_ones(name: str) -> None:
    """Beyond what is buffered in memory."""
    text = "x" * 3_000

    async def main() -> None:
        sink = sink_of(name)
        await sink.open(JOB)
        for n in range(0, 1000, 5):
            await sink.write([((("in", at),), [{"n": at, "text": text}]) for at in range(n, n + 5)])
        await sink.commit(settled(range(1000)))
        await sink.close()

    asyncio.run(main())
    assert rows_of(name) == list(range(1000))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_without_values_and_with_several(name: str) -> None:
    async def main() -> None:
        sink = sink_of(name)
        await sink.open(JOB)
        await sink.write([((("in", 0),), []), ((("in", 1),), [{"n": 1}, {"n": 2}])])
        await sink.write([((("in", 2),), [])])
        await sink.commit(settled([0, 1, 2]))
        await sink.close()

    asyncio.run(main())
    assert rows_of(name) == [1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_law_cancellation_a_cancelled_open_leaves_the_output_closed(name: str) -> None:
    async def main() -> None:
        sink = sink_of(name)
        for turns in range(4):
            opening = asyncio.create_task(sink.open(JOB))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        await run(sink, [1])

    asyncio.run(main())
    assert rows_of(name) == [1]


@pytest.mark.parametrize("name", NAMES)
def test_the_lock_and_files_are_given_back_when_opening_fails(name: str) -> None:
    asyncio.run(run(sink_of(name), [1]))
    open_before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    for _ in range(3):
        with pytest.raises(ResumeMismatch):
            asyncio.run(sink_of(name).open(JobId("other", "elsewhere")))
    assert not os.path.exists(f"{name}.lock")
    if open_before:
        assert set(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_looked_up_beside_writing(name: str) -> None:
    job = JobId("job", "source", by_id=True)

    async def main() -> None:
        sink = sink_of(name)
        progress = await sink.open(job)
        assert progress.ids is not None
        known = await progress.ids.look_up(["i:1", "i:2"])
        assert [one.done for one in known] == [False, False]
        await sink.write(outputs([1]))
        delta = settled([1])
        delta.keys[("in", 1)] = "i:1"
        await asyncio.gather(sink.commit(delta), progress.ids.look_up(["i:3"]))
        await sink.close()
        progress = await sink.open(job)
        assert progress.ids is not None
        assert not progress.settled
        known = await progress.ids.look_up(["i:2", "i:1", "i:1"])
        assert [(one.key, one.done, one.repeated) for one in known] == [
            ("i:2", False, False),
            ("i:1", True, False),
            ("i:1#2", False, True),
        ]
        await sink.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", NAMES)
def test_the_attributes_of_a_sink(name: str) -> None:
    sink = sink_of(name)
    assert sink.identity.startswith(("jsonl:out", "csv:out", "parquet:out", "sqlite:out.db#outputs"))
    assert sink.exactly_once
    assert sink.keeps_dead
    assert (sink.pace > 0) == (name.endswith((".gz", ".zst", ".parquet")))
    assert repr(sink) == f"write.{sink.kind}({name!r})"


def test_suffixes_name_sinks() -> None:
    kinds = {suffix: as_sink(f"out{suffix}").identity for suffix in SUFFIXES}
    assert kinds[".jsonl.gz"] == "jsonl:out.jsonl.gz"
    assert kinds[".db"] == "sqlite:out.db#outputs"
    assert os.listdir() == []


def test_directories_are_made() -> None:
    for name in NAMES:
        asyncio.run(run(sink_of(f"a/b.c/{name}".replace("b.c", "b")), [1]))


# What is foreign.


@pytest.mark.parametrize("name", STREAMS)
def test_a_file_without_a_journal_is_never_cut(name: str) -> None:
    Path(name).write_text("mine\n")
    with pytest.raises(ForeignOutput, match="no journal"):
        asyncio.run(run(sink_of(name), [1]))
    assert Path(name).read_text() == "mine\n"
    assert os.listdir() == [name]
    asyncio.run(run(sink_of(name), [1], JobId("job", "source", fresh=True)))
    assert rows_of(name) == [1]


@pytest.mark.parametrize("name", STREAMS)
def test_an_empty_file_without_a_journal_is_taken(name: str) -> None:
    Path(name).touch()
    asyncio.run(run(sink_of(name), [1]))
    assert rows_of(name) == [1]


def damage_append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"mine\n")


def damage_shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_last_bytes(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-3] + b"???")


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_append, "5 bytes more than its journal counts"),
        (damage_shorten, "fewer than the"),
        (damage_last_bytes, "was changed"),
        (Path.unlink, "is gone, but its journal is still there: .*. Restore it, or run with fresh=True"),
    ],
)
def test_an_output_that_others_touched_is_refused(name: str, damage: Any, said: str) -> None:
    asyncio.run(run(sink_of(name), range(3)))
    damage(Path(name))
    found = Path(name).read_bytes() if Path(name).exists() else b""
    was_there = Path(name).exists()
    for _ in range(2):
        with pytest.raises(ForeignOutput, match=said):
            asyncio.run(run(sink_of(name), [3]))
        assert Path(name).exists() == was_there
        assert not was_there or Path(name).read_bytes() == found
    asyncio.run(run(sink_of(name), [8], JobId("job", "source", fresh=True)))
    assert rows_of(name) == [8]


def test_what_was_appended_after_a_crash_that_another_run_undid_is_foreign() -> None:
    asyncio.run(run(sink_of("out.jsonl"), [0]))
    code = (
        "import asyncio, os\nfrom tests.files.sinks import *\n"
        "async def main():\n"
        "    sink = sink_of('out.jsonl')\n"
        "    await sink.open(JOB)\n"
        "    await sink.write([(((1, 1),), [{'n': 1, 'text': 'x' * 2_000_000}])])\n"
        "    os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], timeout=30, env=environment).returncode == 9
    assert Path("out.jsonl").stat().st_size > 2_000_000

    async def look() -> None:
        sink = sink_of("out.jsonl")
        await sink.open(JOB)  # undoes it
        await sink.close()

    asyncio.run(look())
    assert rows_of("out.jsonl") == [0]
    damage_append(Path("out.jsonl"))
    with pytest.raises(ForeignOutput, match="5 bytes more"):
        asyncio.run(look())


def test_no_regular_file() -> None:
    os.mkfifo("out.jsonl")
    with pytest.raises(ForeignOutput, match="not a regular file"):
        asyncio.run(run(sink_of("out.jsonl"), [1]))
    os.mkdir("out.csv")
    for fresh in (False, True):
        with pytest.raises(ForeignOutput, match=r"is not a regular file\. Write to another output") as raised:
            asyncio.run(run(sink_of("out.csv"), [1], JobId("a", "b", fresh=fresh)))
        assert "fresh" not in str(raised.value)


def test_a_broken_journal_is_named() -> None:
    asyncio.run(run(sink_of("out.jsonl"), [1]))
    Path("out.jsonl.journal").write_text("broken" * 1000)
    with pytest.raises(JournalError, match=r"out\.jsonl\.journal"):
        asyncio.run(run(sink_of("out.jsonl"), [1]))
    asyncio.run(run(sink_of("out.jsonl"), [2], JobId("job", "source", fresh=True)))
    assert rows_of("out.jsonl") == [2]


# Lines of JSON.


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: float | None = None


class Doc(msgspec.Struct):
    n: int
    text: str = ""


def test_json_lines_of_all_kinds() -> None:
    values = [
        None, 1, "zwei\n", [1, 2], {"a": None}, Point(1), Doc(1), np.arange(2), np.float32(0.5), Path("p"),
        Failed(1, ("a", 0), "s", "r", "e"), Colour.RED, float("nan"),
    ]  # fmt: skip
    write_all(write.jsonl("out.jsonl"), values)
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == [
        None, 1, "zwei\n", [1, 2], {"a": None}, {"x": 1, "y": None}, {"n": 1, "text": ""}, [0, 1], 0.5, "p",
        {"item": 1, "position": ["a", 0], "stage": "s", "reason": "r", "error": "e", "attempts": 1}, "red", None,
    ]  # fmt: skip


def test_a_value_without_json_is_that_items_error_and_nothing_is_taken() -> None:
    sink = write.jsonl("out.jsonl")
    assert [index for index, _ in rejected(sink, [1, object(), 2, {"a": 1j}])] == [1, 3]
    assert Path("out.jsonl").read_bytes() == b""
    assert "an object can't be written to out.jsonl" in rejected(sink, [object()])[0][1]


# CSV.


def test_csv_of_all_kinds() -> None:
    values = [
        {"a": 1, "b": "x,y"}, {"b": 'say "a"\nb', "a": 2.5}, {"a": None, "b": True}, {"a": [1, 2], "b": {"c": None}},
        {"a": np.int64(3), "b": np.array([1.5])}, {"a": Path("p"), "b": Colour.RED},
        {"a": dt.date(2024, 1, 2), "b": dt.datetime(2024, 1, 2, 3, tzinfo=dt.UTC)},
    ]  # fmt: skip
    write_all(write.csv("out.csv"), values)
    with open("out.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["a", "b"], ["1", "x,y"], ["2.5", 'say "a"\nb'], ["", "true"], ["[1,2]", '{"c":null}'], ["3", "[1.5]"],
            ["p", "red"], ["2024-01-02", "2024-01-02T03:00:00+00:00"],
        ]  # fmt: skip


def test_csv_columns_are_fixed() -> None:
    sink = write.csv("out.csv")
    found = rejected(
        sink, [{"a": 1, "b": 2}, {"a": 1}, {"a": 1, "b": 2, "c": 3}, [1], {"a": b"x", "b": 1}, {"a": "\ud800", "b": 1}]
    )
    assert [index for index, _ in found] == [1, 2, 3, 4, 5]
    assert found[0][1].endswith("its columns are a, b, and this row has no b")
    assert found[1][1].endswith("and this row has c besides")
    assert Path("out.csv").read_bytes() == b""
    write_all(sink, [Point(1)])  # what was refused has fixed nothing
    write_all(sink, [Point(2, 3.0)])
    assert Path("out.csv").read_text() == "x,y\n1,\n2,3.0\n"
    assert rejected(sink, [{"a": 1}]) == [
        (0, "a row can't be written to out.csv: its columns are x, y, and this row has no x, y and has a besides")
    ]


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.text('\r\n",\0 \ufeff', max_size=4)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"a": cells, "b": cells}), max_size=10))
def test_csv_is_read_back_as_it_was_written(rows: list[dict[str, str]]) -> None:
    write_all(write.csv("out.csv"), rows, JobId("job", "source", fresh=True))
    assert ps.read.csv("out.csv").collect_sync() == rows if rows else True


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz"])
def test_csv_of_no_rows_has_its_header(name: str) -> None:
    job = ps.Flow([{"a": 1, "b": 2}], name="rows").filter(lambda row: False).to(write.csv(name, columns=["b", "a"]))
    job.run_sync(progress=False)
    text = gzip.decompress(Path(name).read_bytes()) if name.endswith("gz") else Path(name).read_bytes()
    assert text == b"b,a\n"
    assert "nothing to do" in str(job.run_sync(progress=False))
    assert ps.read.csv(name).collect_sync() == []


def test_csv_of_no_rows_goes_on_below_its_header() -> None:
    Path("in.jsonl").touch()
    job = ps.read.jsonl("in.jsonl").to(write.csv("out.csv", columns=["a"]))
    job.run_sync(progress=False)
    Path("in.jsonl").write_text('{"a": 1}\n')
    job.run_sync(progress=False)
    assert Path("out.csv").read_text() == "a\n1\n"


def test_csv_columns_may_be_mended_before_anything_is_written() -> None:
    def job(columns: list[str]) -> ps.Job:
        return ps.Flow([{"a": 1}], name="rows").to(write.csv("out.csv", columns=columns))

    with pytest.raises(CannotEncode, match="its columns are b"):
        job(["b"]).run_sync(progress=False)
    job(["a"]).run_sync(progress=False)
    assert Path("out.csv").read_text() == "a\n1\n"


def test_csv_columns_that_were_given() -> None:
    write_all(write.csv("out.csv", columns=["y", "x"]), [Point(1)])
    assert Path("out.csv").read_text() == "y,x\n,1\n"
    with pytest.raises(ResumeMismatch, match="columns= asks for x"):
        write_all(write.csv("out.csv", columns=["x"]), [])
    for wrong in ("xy", []):
        with pytest.raises(PlanError, match="columns="):
            write.csv("out.csv", columns=wrong)


def test_a_row_without_columns() -> None:
    assert rejected(write.csv("out.csv"), [{}])[0][1].endswith("it has no columns")
    assert rejected(write.parquet("out.parquet"), [{}])[0][1].endswith("it has no columns")
    assert rejected(write.sqlite("out.db"), [{}])[0][1].endswith("it has no columns")


# SQLite.


def table(query: str = "SELECT * FROM outputs") -> list[Any]:
    with closing(sqlite3.connect("out.db")) as database:
        return database.execute(query).fetchall()


def test_sqlite_rows() -> None:
    values = [
        {"a": 1, "b": "x"}, {"b": None}, {"a": True, "b": [1]}, {"a": b"raw", "b": np.float64(0.5)},
    ]  # fmt: skip
    write_all(write.sqlite("out.db"), values)
    assert table() == [(1, "x"), (None, None), (1, "[1]"), (b"raw", 0.5)]
    found = rejected(write.sqlite("out.db"), [{"a": 2**63}, {"c": 1}, {"a": "\ud800"}, 5, {"a": 1j}])
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]
    assert "64 bits" in found[0][1]
    assert "table 'outputs' has no column c (a, b)" in found[1][1]


def test_sqlite_with_a_key_replaces_rows() -> None:
    write_all(write.sqlite("out.db", key="a"), [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 1, "b": "z"}])
    assert table() == [(1, "z"), (2, "y")]
    assert "key 'a' is missing or null" in rejected(write.sqlite("out.db", key="a"), [{"b": "x"}])[0][1]
    with pytest.raises(PlanError, match="no such column"):
        write_all(write.sqlite("out.db", key="c"), [])
    assert "it has no c" in rejected(write.sqlite("new.db", key="c"), [{"b": "x"}])[0][1]


def test_sqlite_into_a_table_that_is_there() -> None:
    with closing(sqlite3.connect("out.db")) as database, database:
        database.execute('CREATE TABLE "my ""table"(a INTEGER CHECK(a > 0), b DEFAULT 7)')
        database.execute("CREATE TABLE other(x)")
        database.execute("INSERT INTO other VALUES (1)")
    sink = write.sqlite("out.db", table='my "table')
    write_all(sink, [{"a": 1}, {"b": 2, "a": 5}])
    assert table('SELECT * FROM "my ""table"') == [(1, None), (5, 2)]
    assert table("SELECT * FROM other") == [(1,)]
    with pytest.raises(ForeignOutput, match="has rows in its table 'other'"):
        write_all(write.sqlite("out.db", table="other"), [{"x": 1}])
    write_all(write.sqlite("out.db", table="third"), [{"x": 1}], JobId("another", "elsewhere"))
    write_all(write.sqlite("out.db", table="other"), [{"y": 1}], JobId("job", "source", fresh=True))
    assert table("SELECT * FROM other") == [(1,)]
    assert table('SELECT * FROM "my ""table"') == [(1, None), (5, 2)]


@pytest.mark.parametrize("raw", [b"raw", bytearray(b"raw"), memoryview(b"raw"), type("Bytes", (bytes,), {})(b"raw")])
def test_bytes_of_all_kinds_are_bytes(raw: Any) -> None:
    write_all(write.sqlite("out.db"), [{"a": raw}])
    assert table() == [(b"raw",)]
    assert "CSV holds text; decode it first" in rejected(write.csv("out.csv"), [{"a": raw}])[0][1]
    write_all(write.parquet("out.parquet"), [{"a": raw}])
    assert pq.read_table("out.parquet").to_pylist() == [{"a": b"raw"}]


RULES = [
    ("a INTEGER NOT NULL CHECK(a > 0), b UNIQUE", "CHECK constraint failed: a > 0", {"a": -1}),
    ("a INTEGER NOT NULL CHECK(a > 0), b UNIQUE", "NOT NULL constraint failed: outputs.a", {"b": 8}),
    ("a INTEGER NOT NULL CHECK(a > 0), b UNIQUE", "UNIQUE constraint failed: outputs.b", {"a": 9, "b": 1}),
    ("a INTEGER PRIMARY KEY, b", "datatype mismatch", {"a": "x"}),
]


@pytest.mark.parametrize(("columns", "reason", "bad"), RULES)
def test_law_errors_what_the_user_s_table_refuses_is_that_item_s_error(columns: str, reason: str, bad: Any) -> None:
    with closing(sqlite3.connect("out.db")) as database:
        database.execute(f"CREATE TABLE outputs({columns})")
    good = [{"a": n, "b": n} for n in range(1, 6)]
    values = [*good[:3], bad, *good[3:]]
    ((index, text),) = rejected(write.sqlite("out.db"), values)
    assert index == 3
    assert f"a row can't be written to out.db: table 'outputs' refuses it: {reason}" in text
    assert table() == []
    with pytest.raises(CannotEncode, match=reason) as raised:
        ps.Flow(values, name="rows").to("out.db").run_sync(progress=False, fresh=False)
    assert "item 3" in raised.value.__notes__[0]
    report = ps.Flow(values, name="rows", on_error="dead_letter").to("out.db").run_sync(progress=False)
    assert (report.delivered + report.earlier.get("delivered", 0), report.dead) == (5, 1)
    assert table() == [(n, n) for n in range(1, 6)]
    (letter,) = ps.read.dead("out.db").collect_sync()
    assert letter.item == bad
    assert reason in letter.error


def test_sqlite_refuses_rows_of_one_write_that_exclude_each_other() -> None:
    with closing(sqlite3.connect("out.db")) as database:
        database.execute("CREATE TABLE outputs(a UNIQUE)")
        database.execute("CREATE TABLE seen(a)")
        database.execute("CREATE TRIGGER t AFTER INSERT ON outputs BEGIN INSERT INTO seen VALUES (new.a); END")
    report = ps.Flow([{"a": n % 4} for n in range(8)], name="rows", on_error="skip").to("out.db").run_sync()
    assert (report.delivered, report.skipped) == (4, 4)
    assert table() == table("SELECT * FROM seen") == [(0,), (1,), (2,), (3,)]


def test_law_commit_rows_that_a_table_of_rules_took_count_at_the_commit() -> None:
    with closing(sqlite3.connect("out.db")) as database:
        database.execute("CREATE TABLE outputs(n INTEGER UNIQUE, text)")

    def found() -> list[int]:  # not by sqlite3, which would drop this process's locks
        with closing(apsw.Connection("out.db")) as database:
            return [n for (n,) in database.execute("SELECT n FROM outputs")]

    async def main() -> None:
        sink = write.sqlite("out.db")
        await sink.open(JOB)
        await sink.write(outputs(range(5)))
        assert found() == []
        await sink.commit(settled(range(5)))
        assert found() == list(range(5))
        await sink.write(outputs(range(5, 9)))
        await sink.close()
        assert found() == list(range(5))
        progress = await sink.open(JOB)
        assert list(progress.settled.of("in")) == [(0, 5)]
        await sink.close()

    asyncio.run(main())


@pytest.mark.parametrize("by_id", [False, True])
def test_sqlite_into_a_table_of_rules_by_id_or_by_position(by_id: bool) -> None:
    with closing(sqlite3.connect("out.db")) as database:
        database.execute("CREATE TABLE outputs(n INTEGER UNIQUE)")
    rows = [{"n": n} for n in range(1000)]
    job = ps.Flow(rows, name="rows", id="n" if by_id else None).to("out.db")
    assert job.run_sync(progress=False).delivered == 1000
    assert table("SELECT count(*) FROM outputs") == [(1000,)]


def test_sqlite_whose_table_undoes_whole_transactions() -> None:
    with closing(sqlite3.connect("out.db")) as database:
        database.execute("CREATE TABLE outputs(a UNIQUE ON CONFLICT ROLLBACK)")
    with pytest.raises(WriteFailed, match="undoes the whole transaction"):
        write_all(write.sqlite("out.db"), [{"a": 1}, {"a": 1}])
    assert table() == []


def test_sqlite_locks_a_table_that_it_made_only_while_it_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_TIMEOUT", 10)
    write_all(write.sqlite("out.db"), [{"n": 1, "text": None}])

    async def main() -> None:
        sink = write.sqlite("out.db")
        await sink.open(JOB)
        await sink.write(outputs(range(5)))
        with closing(apsw.Connection("out.db")) as database:
            database.execute("CREATE TABLE other(x)")
        await sink.close()

    asyncio.run(main())


def test_sqlite_first_rows_of_which_no_table_can_be_made() -> None:
    wide = {f"c{n}": n for n in range(3000)}
    found = rejected(write.sqlite("out.db"), [{"a": 1, "A": 2}, wide, {"a": 3}])
    assert [index for index, _ in found] == [0, 1]
    assert "no table can be made with its columns: duplicate column name: A" in found[0][1]
    assert "too many columns" in found[1][1]


def test_sqlite_into_what_takes_no_rows() -> None:
    with closing(sqlite3.connect("out.db")) as database:
        database.execute("CREATE TABLE outputs(a, b)")
        database.execute("CREATE VIEW shown AS SELECT * FROM outputs")
    with pytest.raises(PlanError, match="table 'shown': cannot modify shown because it is a view"):
        write_all(write.sqlite("out.db", table="shown"), [])
    with pytest.raises(PlanError, match="ON CONFLICT clause does not match"):
        write_all(write.sqlite("out.db", key="a"), [])


def test_sqlite_waits_no_longer_than_it_must_for_a_locked_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_TIMEOUT", 10)
    write_all(write.sqlite("out.db"), [{"a": 1}])
    with closing(apsw.Connection("out.db")) as database:
        database.execute("BEGIN IMMEDIATE")
        with pytest.raises(WriteFailed, match="another program holds it locked"):
            write_all(write.sqlite("out.db"), [{"a": 2}])
        database.execute("ROLLBACK")
    write_all(write.sqlite("out.db"), [{"a": 3}])
    assert table() == [(1,), (3,)]


def test_sqlite_refuses_what_is_no_database_or_lost() -> None:
    Path("out.db").write_text("hello" * 1000)
    with pytest.raises(ForeignOutput, match="no SQLite database"):
        write_all(write.sqlite("out.db"), [])
    assert Path("out.db").read_text() == "hello" * 1000
    write_all(write.sqlite("a.db"), [{"a": 1}])
    with closing(sqlite3.connect("a.db")) as database:
        database.execute("DROP TABLE outputs")
    with pytest.raises(ForeignOutput, match="has lost its table"):
        write_all(write.sqlite("a.db"), [])
    write_all(write.sqlite("out.db"), [{"a": 1}], JobId("job", "source", fresh=True))
    assert table() == [(1,)]
    os.mkdir("folder.db")
    with pytest.raises(ForeignOutput, match="not a regular file"):
        write_all(write.sqlite("folder.db"), [])
    for name in ("", "sqlite_x", "_penstock_x"):
        with pytest.raises(PlanError, match="table="):
            write.sqlite("a.db", table=name)


# Parquet.


def parts(name: str = "out.parquet") -> list[Any]:
    return [row for part in sorted(Path(name).glob("[!.]*")) for row in pq.read_table(part).to_pylist()]


SCHEMA = pa.schema(
    [
        pa.field("a", pa.int32()),
        pa.field("v", pa.list_(pa.float32())),
        pa.field("s", pa.struct([pa.field("x", pa.string())])),
        pa.field("k", pa.string(), nullable=False),
    ]
)


def test_parquet_with_a_schema() -> None:
    good = {"a": 1, "v": np.array([1.0], dtype=np.float32), "s": {"x": "y"}, "k": "k"}
    sink = write.parquet("out.parquet", schema=SCHEMA)
    write_all(sink, [good, {"k": "only"}])
    assert parts() == [
        {"a": 1, "v": [1.0], "s": {"x": "y"}, "k": "k"},
        {"a": None, "v": None, "s": None, "k": "only"},
    ]
    wrong = [
        {**good, "a": "text"}, good, {**good, "a": 2**40}, {**good, "s": {"x": "y", "z": 1}}, {**good, "k": None},
        {**good, "more": 1}, {**good, "v": [["deep"]]}, {"a": 1}, 7,
    ]  # fmt: skip
    found = dict(rejected(sink, wrong[:-1]))
    assert sorted(found) == [0, 2, 3, 4, 5, 6, 7]
    assert "column 'a': 'text' doesn't fit int32" in found[0]
    assert "it has no field z" in found[3]
    assert "column 'k': it may not be null" in found[4]
    assert "the schema has no column more" in found[5]
    assert rejected(sink, wrong)[0][0] == 8
    assert len(parts()) == 2


def test_parquet_takes_what_has_a_plain_form() -> None:
    values = [
        {"a": np.ones((2, 3)), "b": Colour.RED, "c": Path("x"), "d": {"deep": [np.zeros((1, 2))]}, "e": np.array(5)},
        {"a": np.zeros((1, 1)), "b": Colour.RED, "c": None, "d": None, "e": np.array(6)},
    ]
    write_all(write.parquet("out.parquet"), values)
    assert pq.read_table("out.parquet").to_pylist() == [
        {"a": [[1.0] * 3] * 2, "b": Colour.RED.value, "c": "x", "d": {"deep": [[[0.0, 0.0]]]}, "e": 5},
        {"a": [[0.0]], "b": Colour.RED.value, "c": None, "d": None, "e": 6},
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [(10**30, "1(0){30} has no type in Parquet"), (object(), "has no type in Parquet"), ({"x": 1j}, "has no type in")],
)
def test_parquet_says_why_a_value_has_no_type(value: Any, reason: str) -> None:
    ((index, said),) = rejected(write.parquet("out.parquet"), [{"a": None}, {"a": value}])
    assert index == 1
    assert re.search(reason, said)
    assert "null in all" not in said


AWARE = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
NAIVE = dt.datetime(2026, 1, 2)  # noqa: DTZ001  # what it is about


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one], lambda one: {"x": [one]}])
def test_parquet_mixes_no_datetimes_with_and_without_time_zone(wrap: Any) -> None:
    for first, second, reason in [
        (AWARE, NAIVE, "the column has a time zone, and it has none"),
        (NAIVE, AWARE, "it has a time zone, and the column has none"),
    ]:
        ((index, said),) = rejected(write.parquet("out.parquet"), [{"a": wrap(first)}, {"a": wrap(second)}])
        assert index == 1
        assert reason in said


def test_parquet_infers_its_schema_from_the_first_rows() -> None:
    async def main() -> None:
        sink = write.parquet("out.parquet")
        await sink.open(JOB)
        await sink.write([((("in", 0),), [{"a": None, "b": 1}])])
        await sink.write([((("in", 1),), [{"a": "text", "b": None}])])  # now the type of a is known
        with pytest.raises(OutputRejected, match="column 'a': 5 doesn't fit string"):
            await sink.write([((("in", 2),), [{"a": 5, "b": 2}])])
        await sink.commit(settled([0, 1]))
        await sink.close()

    asyncio.run(main())
    assert parts() == [{"a": None, "b": 1}, {"a": "text", "b": None}]
    write_all(write.parquet("out.parquet"), [{"b": 3}])
    assert parts()[2] == {"a": None, "b": 3}
    assert "doesn't fit int64" in rejected(write.parquet("out.parquet"), [{"b": "x"}])[0][1]
    with pytest.raises(ResumeMismatch, match="another schema"):
        write_all(write.parquet("out.parquet", schema=SCHEMA), [])


MORNING = dt.time(6, 0, 0, 1500)
EXACT: list[tuple[Any, Any, Any, str]] = [
    (pa.int64(), 2.0, 0.73, "it would become 0"),
    (pa.uint8(), Decimal(2), Decimal("1.5"), "it would become 1"),
    (pa.int32(), np.float32(2), np.float64(2.9), "it would become 2"),
    (pa.int64(), 1, np.datetime64("2026-01-02T00:00:00.000000005"), "it is a time and no number"),
    (pa.dictionary(pa.int32(), pa.int64()), 1, 0.5, "it would become 0"),
    (pa.date32(), NAIVE.date(), NAIVE.replace(hour=6), "the column holds days, without the time"),
    (pa.date32(), NAIVE, AWARE, "the column holds days, without the time"),
    (pa.date64(), dt.date(2026, 1, 2), 1.5, "it would become 1"),
    (pa.time32("s"), dt.time(6), MORNING, "the column counts whole s"),
    (pa.time32("ms"), dt.time(6, 0, 0, 1000), MORNING, "the column counts whole ms"),
    (pa.time64("us"), MORNING, 0.5, "it would become 0"),
    (pa.time64("us"), MORNING, np.timedelta64(5, "ns"), "it is a time and no number"),
    (pa.timestamp("s"), NAIVE, NAIVE.replace(microsecond=1), "the column counts whole s"),
    (pa.timestamp("ns"), NAIVE.replace(microsecond=1), 0.5, "it would become 0"),
    (pa.duration("ms"), dt.timedelta(milliseconds=5), dt.timedelta(microseconds=5), "the column counts whole ms"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "good", "bad", "reason"), EXACT)
@pytest.mark.parametrize(
    ("outer", "wrap"),
    [
        (lambda kind: kind, lambda one: one),
        (pa.list_, lambda one: [None, one]),
        (lambda kind: pa.struct([("x", kind)]), lambda one: {"x": one}),
        (lambda kind: pa.map_(pa.string(), kind), lambda one: {"x": one}),
        (lambda kind: pa.map_(pa.string(), pa.list_(kind)), lambda one: [("x", [one])]),
    ],
)
def test_parquet_cuts_nothing_off(kind: Any, good: Any, bad: Any, reason: str, outer: Any, wrap: Any) -> None:
    schema = pa.schema([("a", outer(kind))])
    ((index, said),) = rejected(write.parquet("out.parquet", schema=schema), [{"a": wrap(good)}, {"a": wrap(bad)}])
    assert index == 1
    assert reason in said


def test_parquet_widens_integers_while_the_schema_is_open() -> None:
    async def main(*batches: list[Any]) -> None:
        sink = write.parquet("out.parquet")
        await sink.open(JobId("job", "source", fresh=True))
        try:
            for batch in batches:
                await sink.write([((("in", 0),), [{"a": value} for value in batch])])
            await sink.commit(settled([0]))
        finally:
            await sink.close()

    asyncio.run(main([1], [0.73, 3], [0.2], [2]))
    assert [row["a"] for row in parts()] == [1.0, 0.73, 3.0, 0.2, 2.0]
    with pytest.raises(OutputRejected, match=r"column 'a': 0.5 doesn't fit int64 \(it would become 0\)"):
        asyncio.run(main([2**60 + 1], [0.5]))  # which no float holds


def test_parquet_that_counts_is_of_one_schema() -> None:
    write_all(write.parquet("out.parquet"), [{"a": 1}])
    ((_, said),) = rejected(write.parquet("out.parquet"), [{"a": 0.5}])
    assert "0.5 doesn't fit int64 (it would become 0)" in said


def test_parquet_of_mixed_first_rows_takes_the_first_type() -> None:
    assert [index for index, _ in rejected(write.parquet("out.parquet"), [{"a": 1}, {"a": "x"}, {"a": 2}])] == [1]
    assert [index for index, _ in rejected(write.parquet("out.parquet"), [{"a": object()}, {"a": 1}])] == [0]
    assert "no child field" in rejected(write.parquet("out.parquet"), [{"a": {}}])[0][1]


def test_parquet_columns_that_stay_null() -> None:
    write_all(write.parquet("out.parquet"), [{"a": None, "b": 1}])
    assert "give write.parquet a schema=" in rejected(write.parquet("out.parquet"), [{"a": 1, "b": 1}])[0][1]


def test_parquet_parts_have_at_most_so_many_rows() -> None:
    write_all(write.parquet("out.parquet", rows=10), [{"n": n} for n in range(25)])
    assert [pq.read_metadata(part).num_rows for part in sorted(Path("out.parquet").iterdir())] == [10, 10, 5]


def test_parquet_parts_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "_PART_BYTES", 1000)

    async def main() -> None:
        sink = write.parquet("out.parquet")
        await sink.open(JOB)
        for n in range(6):
            await sink.write([((("in", n),), [{"n": n, "text": "x" * 400}])])
        assert sorted(os.listdir("out.parquet")) == [".part-00000.parquet", ".part-00001.parquet"]
        await sink.commit(settled(range(6)))
        await sink.close()

    asyncio.run(main())
    assert [row["n"] for row in parts()] == list(range(6))
    assert len(os.listdir("out.parquet")) == 2


def test_parquet_parts_that_never_counted_are_deleted() -> None:
    write_all(write.parquet("out.parquet"), [{"n": 1}])
    for name in (".part-00001.parquet", ".part-00017.parquet", ".mine"):
        Path("out.parquet", name).touch()
    write_all(write.parquet("out.parquet"), [])
    assert sorted(os.listdir("out.parquet")) == [".mine", "part-00000.parquet"]


def test_parquet_finds_structs_deep_down() -> None:
    good = [{"a": [{"x": 1}], "m": {"in": {"y": 2}}}]
    write_all(write.parquet("out.parquet"), good)
    for wrong in ({"a": [{"x": 1, "z": 2}], "m": None}, {"a": [None, {"z": 2}], "m": None}, {"m": {"in": {"z": 2}}}):
        assert "it has no field z" in rejected(write.parquet("out.parquet"), [wrong])[0][1]
    write_all(write.parquet("out.parquet"), [{"a": None, "m": {"in": None}}])
    assert parts() == [*good, {"a": None, "m": {"in": None}}]


def test_parquet_checks_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (
        {"rows": 0},
        {"rows": True},
        {"max_age": -1},
        {"max_age": "5"},
        {"schema": {"a": int}},
        {"schema": pa.schema([pa.field("a", pa.struct([]))])},
    ):
        with pytest.raises(PlanError):
            write.parquet("out.parquet", **wrong)  # type: ignore[arg-type]  # the point
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"penstock\[parquet\]"):
        write.parquet("out.parquet")


def test_foreign_parquet_directories() -> None:
    os.mkdir("out.parquet")
    Path("out.parquet/mine.parquet").touch()
    with pytest.raises(ForeignOutput, match="isn't empty and has no journal"):
        asyncio.run(run(sink_of("out.parquet"), [1]))
    asyncio.run(run(sink_of("out.parquet"), [1], JobId("job", "source", fresh=True)))
    assert os.listdir("out.parquet") == ["part-00000.parquet"]
    Path("out.parquet/mine.parquet").touch()
    with pytest.raises(ForeignOutput, match=r"holds mine\.parquet"):
        asyncio.run(run(sink_of("out.parquet"), [1]))
    os.rename("out.parquet/part-00000.parquet", "elsewhere")
    os.unlink("out.parquet/mine.parquet")
    with pytest.raises(ForeignOutput, match=r"has lost part-00000\.parquet"):
        asyncio.run(run(sink_of("out.parquet"), [1]))
    os.unlink("out.parquet.journal")
    os.rmdir("out.parquet")
    Path("out.parquet").write_text("a file")
    with pytest.raises(ForeignOutput, match="is a file"):
        asyncio.run(run(sink_of("out.parquet"), [1]))
    asyncio.run(run(sink_of("out.parquet"), [2], JobId("job", "source", fresh=True)))
    assert rows_of("out.parquet") == [2]


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.db"])
def test_columns_are_named_by_text(name: str) -> None:
    said = rejected(sink_of(name), [{"n": 1}, {1: 2}, {"n": 3, None: 4}])
    assert [index for index, _ in said] == [1, 2]
    assert "columns are named by text, and its key 1 is none" in said[0][1]
