"""Law 4, exactly once: jobs of every kind, killed at random instants and run again, leave what undisturbed ones leave.

A job is drawn from a seed. What it must leave is told twice: by a model in plain Python, with which an undisturbed run
is compared, and by that run, with which ``torture`` compares those that were killed: outputs (in order, where the flow
is), dead letters and cumulative counts.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import penstock as ps
from penstock.testing.comparing import remains
from penstock.testing.killing import torture

pytestmark = pytest.mark.usefixtures("unmeasured")

Row = dict[str, Any]

ITEMS = 200
SINKS = ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "parquet", "sqlite"]
SOURCES = ["range", "list", "jsonl", "csv", "lines", "parquet"]
PLACES = ["loop", "thread", "process"]


# -- what the jobs do, to one item ------------------------------------------------------------------------------------


class Refused(Exception):
    """What fails for good."""


def row_of(item: Any) -> Row:
    """The row that an item of any source stands for."""
    if isinstance(item, str):
        item = json.loads(item)
    x = int(item) if isinstance(item, int) else int(item["x"])
    return {"x": x, "part": 0, "digest": ""}


def work(row: Row) -> Row:
    """About half a millisecond."""
    return {**row, "digest": hashlib.pbkdf2_hmac("sha256", b"%d" % row["x"], b"%d" % row["part"], 600).hex()[:8]}


_tried: set[int] = set()


def flaky(row: Row) -> Row:
    """Fails at the first attempt in each process, for some."""
    if row["x"] % 11 == 4 and row["x"] not in _tried:
        _tried.add(row["x"])
        raise ConnectionError("for the moment")
    return row


def dies(row: Row, scratch: str) -> Row:
    """Ends its worker process, once in each run, for some."""
    if row["x"] % 60 == 13:
        try:
            os.close(os.open(f"{scratch}/died-{os.getppid()}-{row['x']}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return row
        os._exit(70)
    return row


def refuses(row: Row) -> Row:
    if row["x"] % 17 == 3:
        raise Refused(f"{row['x']} for good")
    return row


def refuses_part(row: Row) -> Row:
    if (row["x"] + row["part"]) % 29 == 5:
        raise Refused(f"a part of {row['x']} for good")  # which one died first differs in an unordered flow
    return row


def keeps(row: Row) -> bool:
    return bool(row["x"] % 5)


def parts(row: Row) -> Iterator[Row]:
    """None to three, and now and then many."""
    for part in range(60 if row["x"] % 40 == 7 else row["x"] % 4):
        yield {**row, "part": part}


def list_of_parts(row: Row) -> list[Row]:
    return list(parts(row))


async def async_parts(row: Row) -> Any:
    for part in parts(row):
        await asyncio.sleep(0)
        yield part


def key_of(row: Row) -> int:
    return int(row["x"]) % 7


def work_batch(rows: list[Row]) -> list[Row]:
    return [work(row) for row in rows]


def on_the_loop(function: Callable[[Any], Any]) -> Any:
    async def coroutine(item: Any) -> Any:
        await asyncio.sleep(0)
        return function(item)

    coroutine.__name__ = function.__name__
    return coroutine


# -- a job ------------------------------------------------------------------------------------------------------------


@dataclass
class Draw:
    """One job, drawn: what it reads, does and writes."""

    source: str
    sink: str
    by_id: bool
    place: str
    ordered: bool
    keyed: bool
    first: int | None
    failing: str | None
    filtered: bool
    expanding: str | None
    failing_part: str | None
    batching: str | None
    flaky: bool = True
    dying: bool = False
    seed: int = field(default=0)

    def __str__(self) -> str:
        said = [self.source, "id" if self.by_id else "position", self.place, "ordered" if self.ordered else "not"]
        said += (
            ["dying"] * self.dying
            + ["keyed"] * self.keyed
            + ["take"] * (self.first is not None)
            + ["filter"] * self.filtered
        )
        said += [what for what in (self.failing, self.expanding, self.failing_part, self.batching) if what]
        return f"{'-'.join(said)}-{self.sink}"


def draw(seed: int, **given: Any) -> Draw:
    """Any job; ``given`` settles some of it."""
    chance = random.Random(seed)
    source = given.get("source") or chance.choice(SOURCES)
    expanding = chance.choice([None, "whole", "one by one"])
    one = Draw(
        source=source,
        sink=chance.choice(SINKS),
        by_id=source not in ("range", "lines") and chance.random() < 0.5,
        place=chance.choice(PLACES),
        ordered=chance.random() < 0.5,
        keyed=chance.random() < 0.3,
        first=None,
        failing=chance.choice([None, "dead_letter", "skip"]),
        filtered=chance.random() < 0.5,
        expanding=expanding,
        failing_part=chance.choice([None, "dead_letter"]),
        batching=chance.choice([None, "map_batches", "batch"]),
        seed=seed,
    )
    if chance.random() < 0.2:
        one.first, one.ordered = ITEMS - 40, True
    one.dying = chance.random() < 0.5
    for name, value in given.items():
        setattr(one, name, value)
    one.dying = one.dying and one.place == "process"
    if one.expanding == "whole" and one.batching == "batch":
        one.batching = "map_batches"
    return one


def numbers(one: Draw) -> list[int]:
    """What the source holds, in its order."""
    return list(range(ITEMS)) if one.source == "range" else random.Random(one.seed).sample(range(2 * ITEMS), ITEMS)


def make_source(one: Draw, directory: Path) -> Any:
    """A flow over the input, which is written first if it is a file."""
    rows = [{"id": f"row {x}", "x": x} for x in numbers(one)]
    given: dict[str, Any] = {"name": "input"}
    if one.by_id:
        given["id"] = "id"
    if one.source == "range":
        return ps.Flow(range(ITEMS), **given)
    if one.source == "list":
        return ps.Flow(rows, **given)
    lines = [json.dumps(row) for row in rows]
    if one.source == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), directory / "in.parquet", row_group_size=50)
        return ps.read.parquet(directory / "in.parquet", **given)
    if one.source == "csv":
        with (directory / "in.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "x"])
            writer.writeheader()
            writer.writerows(rows)
        return ps.read.csv(directory / "in.csv", **given)
    half = len(lines) // 2
    (directory / "in-1.jsonl").write_text("\n".join(lines[:half]) + "\n")
    with gzip.open(directory / "in-2.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[half:]))  # without a newline at its end
    read = ps.read.lines if one.source == "lines" else ps.read.jsonl
    return read(str(directory / "in-*.jsonl*"), **given)


def make_job(one: Draw, directory: Path) -> ps.Job:
    at: dict[str, Any] = {"place": one.place, ("concurrency" if one.place == "loop" else "workers"): 2}
    at["ordered"] = one.ordered
    near = {**at, "place": "thread"} if one.place == "process" else at  # a few processes are enough
    fit: Callable[[Callable[[Any], Any]], Any] = on_the_loop if one.place == "loop" else lambda function: function
    keyed: dict[str, Any] = {"key": key_of} if one.keyed else {}

    flow = make_source(one, directory)
    if one.first is not None:
        flow = flow.take(one.first)
    flow = flow.map(row_of, workers=1)
    if one.flaky:
        flow = flow.map(fit(flaky), retry=ps.Retry(attempts=5, backoff=0.001), **near)
    if one.dying:
        flow = flow.map(partial(dies, scratch=str(directory)), retry=ps.Retry(attempts=3, backoff=0.001), **at)
    if one.failing:
        flow = flow.map(fit(refuses), on_error=one.failing, **near)
    if one.filtered:
        flow = flow.filter(fit(keeps), **near)
    if one.expanding == "whole":
        flow = flow.flat_map(fit(list_of_parts) if one.place == "loop" else parts, **(near if one.dying else at))
    if one.expanding == "one by one":
        flow = flow.flat_map(async_parts if one.place == "loop" else parts, whole=False, **(near if one.dying else at))
    if one.failing_part:
        flow = flow.map(fit(refuses_part), on_error=one.failing_part, **near)
    if one.batching == "map_batches":
        flow = flow.map_batches(fit(work_batch), batch_size=8, **at)
    elif one.batching == "batch":
        flow = flow.batch(8).map(fit(work_batch), **at).unbatch()
    else:
        flow = flow.map(fit(work), **at, **keyed)
    return flow.to(make_sink(one, directory))


def make_sink(one: Draw, directory: Path) -> Any:
    if one.sink == "parquet":
        return ps.write.parquet(directory / "out.parquet", max_age=0.05)
    return str(directory / f"out.{one.sink}")


# -- what it must leave -----------------------------------------------------------------------------------------------


def model(one: Draw) -> tuple[list[Row], Counter[str]]:
    """Outputs in the order of the input, and what became of the items."""
    outputs: list[Row] = []
    counts: Counter[str] = Counter()
    for x in numbers(one)[: one.first]:
        row = row_of(x)
        fate, mine = "delivered", [row]
        if one.failing and x % 17 == 3:
            fate, mine = "dead" if one.failing == "dead_letter" else "skipped", []
        elif one.filtered and not keeps(row):
            fate, mine = "filtered", []
        elif one.expanding:
            mine = list_of_parts(row)
        if mine and one.failing_part:
            fine = [part for part in mine if (x + part["part"]) % 29 != 5]
            if len(fine) < len(mine):
                fate = "dead"
                fine = [] if one.expanding == "whole" else fine
            mine = fine
        if not mine and fate == "delivered":
            fate = "filtered"
        counts[fate] += 1
        outputs += map(work, mine)
    return outputs, counts


def texts(rows: list[Row]) -> Counter[str]:
    """The rows as the outputs of a sink are compared: values alone, since each sink spells them in its own way."""
    return Counter(f"{row['x']} {row['part']} {row['digest']}" for row in rows)


def found_rows(sink: str, outputs: list[str]) -> list[Row]:
    if sink.startswith("csv"):
        return list(csv.DictReader(outputs))
    if sink == "sqlite":
        return [dict(zip(("x", "part", "digest"), json.loads(line), strict=True)) for line in outputs]
    return [json.loads(line) for line in outputs if line]


def check(one: Draw, directory: Path, kills: int) -> None:
    job = make_job(one, directory)
    expected, counts = model(one)
    report = job.run_sync(progress=False)
    path = next(path for path in directory.glob("out.*") if not path.name.endswith(".journal"))
    left = remains(path, "outputs" if one.sink == "sqlite" else None)
    rows = found_rows(one.sink, left.outputs)
    assert texts(rows) == texts(expected)
    if one.ordered and (not one.keyed or one.batching):
        assert [int(row["x"]) for row in rows] == [row["x"] for row in expected]
    assert {name: left.counts[name] for name in counts} == counts
    assert {name: getattr(report, name) for name in counts} == counts
    assert len(left.dead) == counts["dead"]
    assert report.in_flight == 0

    result = torture(job, kills=kills, seed=one.seed)
    if not result.passed and result.scratch is not None:
        shutil.rmtree(result.scratch)
    assert result.passed, f"{one}\n{result}"
    assert result.kills == kills
    assert "exactly once" in result.guarantee


by_position = partial(draw, by_id=False)

SHORT = [
    by_position(1, source="jsonl", sink="jsonl", place="thread", ordered=True, keyed=False, expanding="whole",
                failing="dead_letter", filtered=True, failing_part=None, batching=None),
    by_position(2, source="range", sink="jsonl", place="loop", ordered=False, keyed=False, expanding="one by one",
                failing="dead_letter", filtered=True, failing_part="dead_letter", batching=None),
    by_position(3, source="lines", sink="jsonl", place="process", ordered=True, keyed=False, expanding="one by one",
                failing="skip", filtered=False, failing_part="dead_letter", batching=None, dying=True),
    by_position(4, source="list", sink="jsonl", place="thread", keyed=True, ordered=True, expanding=None,
                failing="dead_letter", filtered=True, batching=None),
    by_position(5, source="csv", sink="csv", place="thread", ordered=True, keyed=False, expanding=None,
                failing="skip", filtered=True, batching="batch", first=ITEMS - 40),
    by_position(6, source="parquet", sink="parquet", place="thread", ordered=False, keyed=False, expanding="whole",
                failing="dead_letter", failing_part="dead_letter", batching="map_batches"),
    by_position(7, source="range", sink="sqlite", place="process", ordered=False, keyed=False, expanding="whole",
                failing="dead_letter", filtered=True, failing_part="dead_letter", batching=None, dying=False),
    by_position(8, source="jsonl", sink="jsonl.gz", place="loop", ordered=True, keyed=False, expanding="one by one",
                failing="dead_letter", filtered=True, batching="batch", failing_part=None),
    draw(9, source="jsonl", sink="jsonl", by_id=True, place="thread", ordered=True, keyed=False, expanding=None,
         failing="dead_letter", filtered=True, batching="map_batches"),
    draw(10, source="parquet", sink="sqlite", by_id=True, place="thread", ordered=False, keyed=False,
         expanding="one by one", failing="dead_letter", failing_part="dead_letter", batching=None),
    draw(11, source="csv", sink="parquet", by_id=True, place="loop", ordered=True, keyed=True, expanding="whole",
         failing="skip", filtered=True, failing_part="dead_letter", batching=None),
    draw(12, source="list", sink="jsonl", by_id=True, place="process", ordered=False, keyed=True,
         expanding="one by one", failing="dead_letter", filtered=False, failing_part=None, batching=None, dying=False),
]  # fmt: skip


LONGER = (2, 3, 4, 10, 11, 12)  # by their seeds


@pytest.mark.parametrize(
    "one", [pytest.param(one, marks=pytest.mark.soak) if one.seed in LONGER else one for one in SHORT], ids=str
)
def test_law_exactly_once(one: Draw, tmp_path: Path) -> None:
    check(one, tmp_path, kills=2)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(200))
def test_law_exactly_once_for_any_job(seed: int, tmp_path: Path) -> None:
    check(draw(seed), tmp_path, kills=5)
