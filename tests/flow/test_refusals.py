"""Nine things that can't be run: a documented exception from Python, and one clear sentence from ``penstock run``."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import penstock as ps
from penstock.cli.load import load_job
from penstock.errors import MissingInput, PenstockError, PlanError, SourceExhausted

DEADLINE = 60


async def ask(x: Any) -> Any:
    return x


def seen_in(directory: Path, text: str) -> str:
    path = directory / "work.py"
    path.write_text(f"import penstock as ps\n{text}\n")
    return str(path)


@dataclass(frozen=True)
class Refusal:
    """``attempt`` raises ``error``, whose sentence holds ``says``, and each of ``documented`` names the error."""

    attempt: Callable[[Path], object]
    error: type[PenstockError]
    says: str
    documented: tuple[Any, ...]


def exhausted() -> ps.Flow[int]:
    flow = ps.Flow(x for x in (1, 2))
    assert flow.collect_sync() == [1, 2]
    return flow


def to_nothing(x: Any) -> None:
    """Where outputs go."""


unbound = ps.Flow().map(str)
untyped: Any = ps.Flow([1])

REFUSALS: dict[str, Refusal] = {
    "a file that isn't there": Refusal(
        lambda folder: load_job(str(folder / "gone.py")), MissingInput, "there is no file '", (load_job,)
    ),
    "an input that isn't there": Refusal(
        lambda folder: ps.read.jsonl(folder / "gone.jsonl"),
        MissingInput,
        "there is no file '",
        (ps.read.jsonl, ps.read.csv, ps.read.lines, ps.read.parquet, ps.read.files),
    ),
    "a file without a job": Refusal(
        lambda folder: load_job(seen_in(folder, "x = 1")), PlanError, "work.py defines no job", (load_job,)
    ),
    "two jobs and no name": Refusal(
        lambda folder: load_job(seen_in(folder, "a = ps.Flow([1]).to('a.jsonl')\nb = ps.Flow([1]).to('b.jsonl')")),
        PlanError,
        "work.py defines 2 jobs: a, b. Name one of its jobs: ",
        (load_job,),
    ),
    "workers=0": Refusal(
        lambda folder: untyped.map(str, workers=0),
        PlanError,
        "stage 'str': workers=0. Give a whole number of at least 1",
        (ps.Flow.map, ps.Flow.filter, ps.Flow.flat_map, ps.Flow.map_batches),
    ),
    "workers=0 for all stages": Refusal(
        lambda folder: ps.Flow([1], workers=0), PlanError, "Flow(): workers=0. Give a whole number", (ps.Flow,)
    ),
    "workers on an async stage": Refusal(
        lambda folder: untyped.map(ask, workers=2),
        PlanError,
        "stage 'ask': workers= is for threads and processes, and this stage runs on the event loop. Give concurrency=",
        (ps.Flow.map, ps.Flow.filter, ps.Flow.flat_map, ps.Flow.map_batches),
    ),
    "Flow(5)": Refusal(
        lambda folder: ps.Flow(5),  # type: ignore[arg-type]
        PlanError,
        "Flow(5) was given an int, which can't be iterated. Give a list, a generator, an async iterable, or one of",
        (ps.Flow,),
    ),
    "map on something that isn't callable": Refusal(
        lambda folder: untyped.map("upper"),
        PlanError,
        "map('upper') was given a str, which isn't callable. Give a function of one item, or per_worker(Class, ...)",
        (ps.Flow.map, ps.Flow.filter, ps.Flow.flat_map, ps.Flow.map_batches),
    ),
}
RUNS: dict[str, Callable[[ps.Flow[Any]], object]] = {
    "collect": lambda flow: asyncio.run(flow.collect()),
    "collect_sync": lambda flow: flow.collect_sync(),
    "async for": lambda flow: asyncio.run(consume(flow)),
    "for": list,
    "run": lambda flow: asyncio.run(flow.to(to_nothing).run(progress=False)),
    "run_sync": lambda flow: flow.to(to_nothing).run_sync(progress=False),
    "start": lambda flow: asyncio.run(enter(flow.to(to_nothing))),
}
HOMES = {
    "collect": ps.Flow.collect,
    "collect_sync": ps.Flow.collect_sync,
    "async for": ps.Flow.__aiter__,
    "for": ps.Flow.__iter__,
    "run": ps.Job.run,
    "run_sync": ps.Job.run_sync,
    "start": ps.Job.start,
}
for how, run in RUNS.items():
    REFUSALS[f"an exhausted generator: {how}"] = Refusal(
        lambda folder, run=run: run(exhausted()),  # type: ignore[misc]
        SourceExhausted,
        "the generator '<genexpr>' was already read by an earlier run, and an iterator can be read only once. Give",
        (HOMES[how],),
    )
    REFUSALS[f"an unbound flow: {how}"] = Refusal(
        lambda folder, run=run: run(unbound),  # type: ignore[misc]
        PlanError,
        "this flow is unbound: it has no source. Bind it with flow.over(source), or serve live requests with flow.open",
        (HOMES[how],),
    )
for what, explain in {"flow": unbound.explain, "job": lambda: unbound.to(to_nothing).explain()}.items():
    REFUSALS[f"an unbound {what} explained"] = Refusal(
        lambda folder, explain=explain: explain(),  # type: ignore[misc]
        PlanError,
        "this flow is unbound",
        (ps.Flow.explain, ps.Job.explain),
    )


async def consume(flow: ps.Flow[Any]) -> None:
    async for _ in flow:
        pass


async def enter(job: ps.Job) -> None:
    async with job.start(progress=False) as run:
        await run.finish()


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("penstock"):
            del sys.modules[name]


@pytest.mark.parametrize("what", REFUSALS)
def test_the_exception_is_itself_and_says_what_was_given_and_what_to_do(what: str, tmp_path: Path) -> None:
    refusal = REFUSALS[what]
    with pytest.raises(PenstockError) as caught:
        refusal.attempt(tmp_path)
    error = caught.value
    assert type(error) is refusal.error
    assert refusal.says in str(error)
    assert "\n" not in str(error)
    assert "<lambda> at" not in str(error)
    assert error.__cause__ is None


def doc_of(home: Any) -> str:
    """A docstring, and the one it refers to by name: ``_sync`` twins and iterators are as their coroutines."""
    text = inspect.getdoc(home) or ""
    for name, other in (("``collect``", ps.Flow.collect), ("``run``", ps.Job.run), ("see ``run``", ps.Job.run)):
        if name in text and other is not home:
            text += doc_of(other)
    return text


@pytest.mark.parametrize("what", REFUSALS)
def test_the_exception_is_documented_where_it_is_raised(what: str) -> None:
    refusal = REFUSALS[what]
    for home in refusal.documented:
        assert refusal.error.__name__ in doc_of(home), f"{home.__qualname__} doesn't name {refusal.error.__name__}"


def test_they_are_the_exceptions_that_python_programs_expect() -> None:
    assert issubclass(PlanError, ValueError)
    assert issubclass(MissingInput, FileNotFoundError)
    assert issubclass(SourceExhausted, RuntimeError)


# -- penstock run -----------------------------------------------------------------------------------------------------

ONE_JOB = "job = ps.Flow([1]).to('a.jsonl')"

FILES: dict[str, tuple[str | None, str]] = {
    "a file that isn't there": (None, "there is no file 'work.py'. Check the path"),
    "a file without a job": ("x = 1", "work.py defines no job. Assign one at the top level"),
    "two jobs and no name": (f"{ONE_JOB}\nother = ps.Flow([1]).to('b.jsonl')", "work.py defines 2 jobs: job, other."),
    "workers=0": ("job = ps.Flow([1]).map(str, workers=0).to('a.jsonl')", "workers=0. Give a whole number of at least"),
    "workers on an async stage": (
        "async def ask(x):\n    return x\njob = ps.Flow([1]).map(ask, workers=2).to('a.jsonl')",
        "workers= is for threads and processes, and this stage runs on the event loop. Give concurrency=",
    ),
    "Flow(5)": ("job = ps.Flow(5).to('a.jsonl')", "Flow(5) was given an int, which can't be iterated. Give a list"),
    "map on something that isn't callable": (
        "job = ps.Flow([1]).map('upper').to('a.jsonl')",
        "map('upper') was given a str, which isn't callable. Give a function",
    ),
    "a second pass over an exhausted generator": (
        "flow = ps.Flow(x for x in [1])\nflow.collect_sync()\njob = flow.to('a.jsonl')",
        "was already read by an earlier run, and an iterator can be read only once. Give Flow a list",
    ),
    "an unbound flow run without over": (
        "job = ps.Flow().map(str).to('a.jsonl')",
        "this flow is unbound: it has no source. Bind it with flow.over(source)",
    ),
    "an output's on_error": ("job = ps.Flow([1]).to('a.jsonl', on_error='keep')", "to(on_error='keep'), which a sink"),
}


@pytest.mark.parametrize("what", FILES)
def test_the_command_says_one_sentence_and_exits_2(what: str, tmp_path: Path) -> None:
    """What is wrong stands on one line; where in the file it is may follow, and nothing else."""
    text, sentence = FILES[what]
    if text is not None:
        seen_in(tmp_path, text)
    result = subprocess.run(
        [sys.executable, "-P", "-m", "penstock.cli", "run", "work.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    said, *where = result.stderr.splitlines()
    assert said.startswith("penstock: ")
    assert sentence in said
    assert said.endswith((".", ")"))
    assert len(where) <= 1
    assert all(line.startswith("  in work.py, line ") for line in where)
