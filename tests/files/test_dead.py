"""Dead letters as a source: read while a job runs, redone into the same output, or into another."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from tests.files.sinks import JOB, NAMES, outputs, rows_of, run, settled, sink_of

from penstock.errors import MissingInput, PlanError, ResumeMismatch
from penstock.files import read, write
from penstock.files.dead import DeadSource
from penstock.flow.contract import Delta, Failed, JobId
from penstock.flow.progress import Intervals, Position, Positions, Progress


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def letters(source: Any, settled: Positions | None = None) -> list[tuple[Position, Failed]]:
    found = []
    async for batch in source.read(Progress(settled=settled or Positions())):
        found += batch
    return found


async def fill(name: str, alive: Any, dead: Any, job: JobId = JOB) -> None:
    sink = sink_of(name)
    await sink.open(job)
    await sink.write(outputs(alive))
    await sink.commit(settled(alive, dead))
    await sink.close()


@pytest.mark.parametrize("name", NAMES)
def test_letters_are_read_redone_and_gone(name: str) -> None:
    async def main() -> None:
        await fill(name, range(5), [5, 6, 7])
        flow = read.dead(name, on_error="skip", name="again")
        assert (flow.name, flow.defaults) == ("again", {"on_error": "skip"})
        source = flow.source
        assert source is not None
        assert source.replayable
        sink = sink_of(name)
        assert source.joins(sink)
        assert not source.joins(sink_of(f"other-{name}"))
        assert not source.joins(object())
        job = JobId("again", source.identity)
        with pytest.raises(PlanError, match="discard"):
            await sink.open(JobId("again", source.identity, fresh=True))
        assert await sink.open(job) == Progress()
        found = await letters(source)
        assert [failed.item for _, failed in found] == [{"n": 5}, {"n": 6}, {"n": 7}]
        assert [failed.position for _, failed in found] == [("in", 5), ("in", 6), ("in", 7)]
        (first, _), (second, failed), (third, _) = found
        await sink.write([((first,), [{"n": 5, "text": ""}])])
        delta = Delta(counts={"delivered": 1, "dead": 1}, finished=True, snapshot=await source.snapshot())
        delta.settled.add(first)
        delta.settled.add(second)
        delta.dead = [Failed(failed, second, "fix", "KeyError", "still", 2)]
        await sink.commit(delta)
        await sink.write([((third,), [{"n": 7, "text": ""}])])
        await sink.close()  # the third wasn't committed
        assert rows_of(name) == [0, 1, 2, 3, 4, 5]
        left = await letters(source)
        assert left[0] == (second, Failed({"n": 6}, ("in", 6), "fix", "KeyError", "still", 3))
        assert left[1] == found[2]
        assert await letters(source, Positions({"dead": Intervals([(0, second[1] + 1)])})) == left[1:]
        progress = await run(sink_of(name), [8])  # the main job goes on as if nothing had been
        assert progress.settled.of("in").watermark == 8
        assert progress.counts == {"delivered": 6, "dead": 2}
        assert not progress.finished
        assert rows_of(name) == [0, 1, 2, 3, 4, 5, 8]

    asyncio.run(main())


def test_letters_that_come_while_they_are_read_wait_for_the_next_reading() -> None:
    async def main() -> None:
        sink = write.jsonl("out.jsonl")
        await sink.open(JOB)
        await sink.commit(settled([], range(700)))
        source = DeadSource("out.jsonl")
        found = []
        async for batch in source.read(Progress()):
            if not found:
                await sink.commit(settled([], range(700, 800)))
            found += batch
        assert [failed.item["n"] for _, failed in found] == list(range(700))
        assert len(await letters(source)) == 800
        await sink.close()

    asyncio.run(main())


def test_redoing_into_another_output_remembers_there() -> None:
    async def main() -> None:
        await fill("out.jsonl", [], [1, 2])
        source = DeadSource("out.jsonl")
        job = JobId("mend", source.identity)
        other = write.jsonl("other.jsonl")
        await other.open(job)
        [(first, _), (second, _)] = await letters(source)
        delta = Delta(snapshot=await source.snapshot())
        delta.settled.add(first)
        await other.commit(delta)
        await other.close()
        progress = await other.open(job)
        await other.close()
        assert [position for position, _ in await letters(source, progress.settled)] == [second]
        assert await source.changed(progress.snapshot) is None
        await fill("out.jsonl", [], [3], JobId("job", "source", fresh=True))
        assert "started afresh" in str(await source.changed(progress.snapshot))
        with pytest.raises(ResumeMismatch):
            await other.open(JobId("mend", "elsewhere"))

    asyncio.run(main())


def test_items_of_any_type_are_read_back() -> None:
    items: list[Any] = [Path("a"), ("x", 1), {"a": {1, 2}}, None, float("inf"), lambda: 1]

    async def main() -> None:
        sink = write.jsonl("out.jsonl")
        await sink.open(JOB)
        await sink.commit(Delta(dead=[Failed(item, ("in", n), "s", "r", "e") for n, item in enumerate(items)]))
        await sink.close()
        found = [failed.item for _, failed in await letters(DeadSource("out.jsonl"))]
        assert found[:-1] == items[:-1]
        assert found[-1]() == 1

    asyncio.run(main())


def test_an_output_without_a_journal() -> None:
    with pytest.raises(MissingInput, match=r"out\.jsonl\.journal"):
        read.dead("out.jsonl")
    Path("out.jsonl").write_text("{}\n")
    with pytest.raises(MissingInput):
        read.dead("out.jsonl")


def test_letters_of_a_table() -> None:
    async def main() -> None:
        for table, source in (("a", "one"), ("b", "two")):
            sink = write.sqlite("out.db", table=table)
            await sink.open(JobId("job", source))
            await sink.commit(Delta(dead=[Failed(table, ("in", 1), "s", "r", "e")]))
            await sink.close()
        with pytest.raises(PlanError, match="table="):
            read.dead("out.db")
        flow = read.dead("out.db", table="b")
        assert flow.source is not None
        assert [failed.item for _, failed in await letters(flow.source)] == ["b"]
        assert flow.source.joins(write.sqlite("out.db", table="b"))
        assert not flow.source.joins(write.sqlite("out.db", table="a"))

    asyncio.run(main())


def test_the_identity_is_that_of_the_real_file() -> None:
    asyncio.run(fill("out.jsonl", [], [1]))
    Path("alias").symlink_to("out.jsonl")
    assert DeadSource("alias").identity == f"dead:{os.path.realpath('out.jsonl')}"
    assert DeadSource("alias").joins(write.jsonl("./out.jsonl"))
    assert repr(DeadSource("alias")) == "read.dead('alias')"
