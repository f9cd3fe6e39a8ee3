"""What the tests of outputs share: each kind of output, how to fill it, and how to read it back."""

from __future__ import annotations

import csv
import gzip
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from penstock.files import write
from penstock.flow.contract import Delta, Failed, JobId
from penstock.flow.output import Output
from penstock.flow.progress import Progress

JOB = JobId("job", "source")

NAMES = ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.csv", "out.csv.gz", "out.parquet", "out.db"]
STREAMS = NAMES[:5]


def sink_of(name: str) -> Output:
    kind = name.split(".")[1]
    if kind == "parquet":
        return write.parquet(name, rows=7)
    return {"jsonl": write.jsonl, "csv": write.csv, "db": write.sqlite}[kind](name)


def rows_of(name: str) -> list[int]:
    """The values of n in an output, in order; every part of it must be whole."""
    path = Path(name)
    kind = name.split(".")[1]
    if not path.exists():
        return []
    if kind == "parquet":
        import pyarrow.parquet as pq  # slow to import: children that are killed at once do without

        parts = sorted(part for part in path.iterdir() if not part.name.startswith("."))
        return [row["n"] for part in parts for row in pq.read_table(part).to_pylist()]
    if kind == "db":
        with closing(sqlite3.connect(path)) as database:
            there = database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'outputs'").fetchall()
            return [n for (n,) in database.execute("SELECT n FROM outputs ORDER BY rowid")] if there else []
    data = path.read_bytes()
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    elif name.endswith(".zst") and data:
        import zstandard

        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    text = data.decode()
    assert not text or text.endswith("\n")
    if kind == "csv":
        return [int(row["n"]) for row in csv.DictReader(text.splitlines())]
    return [json.loads(line)["n"] for line in text.splitlines()]


def outputs(numbers: Sequence[int]) -> list[tuple[Any, list[Any]]]:
    return [((("in", n),), [{"n": n, "text": f"row {n}"}]) for n in numbers]


def settled(numbers: Sequence[int], dead: Sequence[int] = ()) -> Delta:
    delta = Delta(counts={"delivered": len(numbers), "dead": len(dead)})
    for n in (*numbers, *dead):
        delta.settled.add(("in", n))
    delta.dead = [Failed({"n": n}, ("in", n), "stage", "ValueError", "no") for n in dead]
    return delta


async def run(sink: Output, numbers: Sequence[int], job: JobId = JOB) -> Progress:
    """Open, write and commit these, close; returns what was known before."""
    progress = await sink.open(job)
    try:
        if numbers:
            await sink.write(outputs(numbers))
        await sink.commit(settled(numbers))
    finally:
        await sink.close()
    return progress
