"""A job that was interrupted and is run again: with a mended function, another input, another plan, by ids, redone.

What interrupts is an exception where that is enough, and otherwise SIGKILL, at an instant that the job itself chooses.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import penstock as ps
from penstock.files.jsonl import JsonLinesOutput
from penstock.flow.contract import Origin
from penstock.flow.letters import JournalReader

pytestmark = pytest.mark.usefixtures("unmeasured")

DEADLINE = 60

Row = dict[str, Any]


class Interrupted(Exception):
    """Ends a run in the middle."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def interrupted(job: ps.Job) -> None:
    with pytest.raises(Interrupted):
        job.run_sync(progress=False)


def breaks_at(n: int) -> Callable[[int], int]:
    """Fails at ``n`` until a file says that the cause is mended."""

    def work(x: int) -> int:
        if x == n and not Path("mended").exists():
            raise Interrupted
        return x

    return work


def mend() -> None:
    Path("mended").touch()


def values(path: str = "out.jsonl") -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def counts(path: str = "out.jsonl") -> dict[str, int]:
    reader = JournalReader(path)
    try:
        return {name: amount for name, amount in reader.counts().items() if amount}
    finally:
        reader.close()


def write_rows(rows: Sequence[Row], path: str = "in.jsonl") -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def life(program: str, *, killed: bool = False) -> str:
    """Run a program; it has to end well, or by its own SIGKILL."""
    Path("program.py").write_text(PRELUDE + textwrap.dedent(program))
    result = subprocess.run([sys.executable, "-P", "program.py"], capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == (-signal.SIGKILL if killed else 0), result.stderr
    return result.stdout


PRELUDE = '''
import os, signal, threading
from pathlib import Path
import penstock as ps
from penstock.files.jsonl import JsonLinesOutput

def hold():
    """Keeps the run from ending until it is killed; never again after that."""
    if not Path("died").exists():
        threading.Event().wait()

def die_after(least):
    """Kill this process, all of it, once a run has committed so many items (or outputs of unfinished ones)."""
    committed = 0
    commit = JsonLinesOutput.commit
    async def dying(sink, delta):
        nonlocal committed
        fenced = await commit(sink, delta)
        committed += len(delta.settled) + sum(map(len, delta.children.values()))
        if committed >= least and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return fenced
    JsonLinesOutput.commit = dying
'''


# -- the same job, mended ---------------------------------------------------------------------------------------------


def test_what_was_finished_before_an_error_stays_and_the_rest_follows() -> None:
    job = ps.Flow(range(500), name="numbers").map(breaks_at(300), workers=2).to("out.jsonl")
    interrupted(job)
    before = values()
    assert before == list(range(len(before)))
    assert len(before) <= 300
    mend()
    report = job.run_sync()
    assert values() == list(range(500))
    assert report.earlier.get("delivered", 0) == len(before)
    assert report.delivered == 500 - len(before)
    assert counts() == {"delivered": 500}


def test_a_finished_job_has_nothing_to_do() -> None:
    job = ps.Flow(range(10), name="numbers").map(str).to("out.jsonl")
    job.run_sync()
    report = job.run_sync()
    assert report.issued == report.delivered == 0
    assert report.earlier["delivered"] == 10
    assert "nothing to do" in str(report)
    assert len(values()) == 10


def test_take_goes_on_counting() -> None:
    job = ps.Flow(range(500), name="numbers").map(breaks_at(100), workers=2).take(200).to("out.jsonl")
    interrupted(job)
    assert len(values()) <= 100
    mend()
    job.run_sync()
    assert values() == list(range(200))
    assert "nothing to do" in str(job.run_sync())
    assert values() == list(range(200))


@pytest.mark.parametrize("by_id", [False, True])
def test_law_accounting_what_a_take_left_is_there_for_a_plan_that_takes_more(by_id: bool) -> None:
    Path("in.txt").write_text("".join(f"{n}\n" for n in range(10)))

    def run(first: int | None) -> ps.Report:
        flow = ps.read.lines("in.txt", id=str if by_id else None)
        return (flow if first is None else flow.take(first)).to("out.jsonl").run_sync(progress=False)

    wanted = [str(n) for n in range(10)]
    for first, had, has in [(3, 0, 3), (6, 3, 6), (4, 6, 6), (None, 6, 10), (12, 10, 10)]:
        report = run(first)
        assert report.delivered == has - had
        assert values() == wanted[:has]
        again = run(first)
        assert again.issued == 0
        assert "nothing to do" in str(again)
        assert values() == wanted[:has]


def test_a_take_that_has_enough_stays_satisfied_when_the_input_grows() -> None:
    Path("in.txt").write_text("1\n2\n3\n")
    job = ps.read.lines("in.txt").take(3).to("out.jsonl")
    job.run_sync(progress=False)
    with open("in.txt", "a") as file:
        file.write("4\n")
    assert "nothing to do" in str(job.run_sync(progress=False))
    assert values() == ["1", "2", "3"]


def test_law_accounting_what_a_take_left_of_an_expansion_is_there_for_a_plan_that_takes_more() -> None:
    def run(flow: ps.Flow[str]) -> ps.Report:
        return flow.to("out.jsonl").run_sync(progress=False)

    flow = ps.Flow(["abc", "def"], name="words").flat_map(list, whole=False)
    run(flow.take(4))
    assert values() == list("abcd")
    run(flow)
    assert values() == list("abcdef")
    assert "nothing to do" in str(run(flow))


def test_take_goes_on_counting_after_a_kill() -> None:
    program = """
        die_after(20)
        def work(x):
            if x >= 100:
                hold()
            return x
        job = ps.Flow(range(10**6), name="numbers").map(work, workers=2, ordered=False).take(200).to("out.jsonl")
        report = job.run_sync(progress=False)
        print(report.earlier["delivered"], report.delivered)
    """
    life(program, killed=True)
    before = len(values())
    earlier, delivered = map(int, life(program).split())
    assert 20 <= earlier <= before
    assert earlier + delivered == 200
    assert len(values()) == len(set(values())) == 200


def test_a_doomed_run_stops_and_goes_on_when_the_cause_is_mended() -> None:
    """What died until then are dead letters, redone afterwards."""

    def work(x: int) -> int:
        if x % 3 == 0 and not Path("mended").exists():
            raise ConnectionError("the service is down")
        return x

    job = ps.Flow(range(300), name="numbers").map(work, workers=2, on_error="dead_letter", max_failures=5)
    job = job.to("out.jsonl")
    with pytest.raises(ps.errors.FailureBudgetExceeded, match="the service is down") as raised:
        job.run_sync()
    assert raised.value.failed == 6
    dead = ps.read.dead("out.jsonl").collect_sync()
    assert len(dead) <= 6  # those that were settled before the run stopped
    mend()
    report = job.run_sync()
    assert report.dead == 0
    assert report.earlier.get("dead", 0) == len(dead)
    found = counts()
    assert (found["delivered"], found.get("dead", 0)) == (300 - len(dead), len(dead))
    redone = ps.read.dead("out.jsonl").map(lambda letter: work(letter.item)).to("out.jsonl").run_sync()
    assert redone.delivered == len(dead)
    assert sorted(values()) == list(range(300))
    assert counts() == {"delivered": 300}
    assert ps.read.dead("out.jsonl").collect_sync() == []


def test_a_job_of_batches_goes_on() -> None:
    job = ps.Flow(range(500), name="numbers").batch(7).map(lambda xs: [breaks_at(300)(x) for x in xs]).unbatch()
    interrupted(job.to("out.jsonl"))
    mend()
    report = job.to("out.jsonl").run_sync()
    assert values() == list(range(500))
    assert report.earlier.get("delivered", 0) + report.delivered == 500


def test_a_changed_plan_warns_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    flow = ps.Flow(range(500), name="numbers")
    interrupted(flow.map(breaks_at(400), workers=2).to("out.jsonl"))
    before = len(values())
    with caplog.at_level(logging.WARNING, logger="penstock"):
        report = flow.map(lambda x: x + 1000).to("out.jsonl").run_sync()
    assert "the plan has changed" in caplog.text
    assert any("the plan has changed" in note for note in report.notes)
    assert values() == [x if x < before else x + 1000 for x in range(500)]


def test_law_commit_what_is_written_when_the_run_is_cancelled_counts_with_its_progress() -> None:
    """A cancellation in the middle of a write: neither lost nor written twice."""

    class Slow(JsonLinesOutput):
        async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
            await super().write(outputs)
            written.set()
            await gate.wait()

    written, gate = asyncio.Event(), asyncio.Event()
    flow = ps.Flow(range(100), name="numbers").map(lambda x: x)

    async def main() -> None:
        task = asyncio.create_task(flow.to(Slow("out.jsonl")).run())
        await written.wait()
        task.cancel()
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert 0 < len(values()) == counts()["delivered"]
    flow.to("out.jsonl").run_sync()
    assert values() == list(range(100))


# -- another input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_input_is_refused_and_fresh_starts_over(finished: bool) -> None:
    write_rows([{"x": x} for x in range(300)])
    job = ps.read.jsonl("in.jsonl").map(lambda row: breaks_at(-1 if finished else 200)(row["x"])).to("out.jsonl")
    if finished:
        job.run_sync()
    else:
        interrupted(job)
    before = values()
    write_rows([{"x": x + 1000} for x in range(300)])
    with pytest.raises(ps.errors.ResumeMismatch, match="fresh=True"):
        job.run_sync()
    assert values() == before
    job.run_sync(fresh=True)
    assert values() == list(range(1000, 1300))
    assert counts() == {"delivered": 300}


@pytest.mark.parametrize("finished", [True, False])
def test_a_grown_input_goes_on(finished: bool) -> None:
    write_rows([{"x": x} for x in range(300)])
    job = ps.read.jsonl("in*.jsonl").map(lambda row: breaks_at(-1 if finished else 200)(row["x"])).to("out.jsonl")
    if finished:
        job.run_sync()
    else:
        interrupted(job)
    mend()
    write_rows([{"x": x} for x in range(400)])
    write_rows([{"x": x} for x in range(400, 450)], "in-2.jsonl")
    job.run_sync()
    assert sorted(values()) == list(range(450))
    assert counts() == {"delivered": 450}
    assert "nothing to do" in str(job.run_sync())


def test_a_list_is_known_by_name_length_and_digest() -> None:
    rows = [{"x": x, "tags": {f"{x}", "b"}} for x in range(200)]

    def job(items: list[Row], name: str = "rows") -> ps.Job:
        return ps.Flow(items, name=name).map(lambda row: breaks_at(150)(row["x"]), workers=1).to("out.jsonl")

    interrupted(job(rows))
    with pytest.raises(ps.errors.ResumeMismatch, match="the first items of the list differ"):
        job([{**rows[0], "x": -1}, *rows[1:]]).run_sync()
    with pytest.raises(ps.errors.ResumeMismatch, match="199"):
        job(rows[:-1]).run_sync()
    with pytest.raises(ps.errors.ResumeMismatch, match="others"):
        job(rows, name="others").run_sync()
    mend()
    job([*rows, {"x": 200, "tags": set()}]).run_sync()
    assert values() == list(range(201))


def test_a_list_is_the_same_in_another_process() -> None:
    """Its digest depends neither on addresses nor on the order of a set."""
    program = """
        die_after(20)
        class Item:
            def __init__(self, x):
                self.x, self.tags = x, {str(x), "b", "c"}
        def work(item):
            if item.x == 200:
                hold()
            return item.x
        flow = ps.Flow([Item(x) for x in range(400)], name="items").map(work, workers=1)
        print(flow.to("out.jsonl").run_sync(progress=False).earlier["delivered"])
    """
    life(program, killed=True)
    assert int(life(program)) >= 20
    assert values() == list(range(400))


# -- by ids -----------------------------------------------------------------------------------------------------------


def test_a_reordered_and_grown_export_goes_on_by_ids() -> None:
    """Killed, exported anew with other positions and other neighbours, and killed once more."""
    program = """
        die_after(LEAST)
        def work(row):
            if row["at"] == 300:
                hold()
            return row["id"]
        flow = ps.read.jsonl("in.jsonl", id="id").map(work, workers=2, ordered=False)
        flow.to("out.jsonl").run_sync(progress=False)
    """
    rows = [{"id": f"r{x}", "at": x} for x in range(500)]
    write_rows(rows)
    life(program.replace("LEAST", "30"), killed=True)
    assert 30 <= len(values()) < 500
    Path("died").unlink()
    random.Random(5).shuffle(rows)
    write_rows(rows + [{"id": f"new {x}", "at": x} for x in range(50)])
    life(program.replace("LEAST", "20"), killed=True)
    rows.reverse()
    write_rows([{"id": f"new {x}", "at": -x} for x in range(50)] + rows)
    life(program.replace("LEAST", "1"))
    assert Counter(values()) == Counter([f"r{x}" for x in range(500)] + [f"new {x}" for x in range(50)])
    assert counts() == {"delivered": 550}


def test_an_expansion_by_ids_goes_on_and_notices_a_changed_row() -> None:
    """Outputs of an unfinished row are committed: the row, wherever it stands now, has to be the same."""
    program = """
        die_after(30)
        def parts(row):
            for part in range(3000):
                if part == 2000:
                    hold()
                yield [row["id"], part + row.get("shift", 0)]
        flow = ps.read.jsonl("in.jsonl", id="id").flat_map(parts, whole=False, workers=1)
        try:
            flow.to("out.jsonl").run_sync(progress=False)
        except ps.errors.ResumeMismatch as error:
            print(error)
    """
    rows = [{"id": f"r{x}"} for x in range(5)]
    write_rows(rows)
    life(program, killed=True)
    assert counts() == {}
    write_rows([{**row, "shift": 1} for row in rows])
    assert "changed while its expansion was unfinished" in life(program)
    write_rows(list(reversed(rows)))
    assert life(program) == ""
    assert Counter(map(tuple, values())) == Counter((row["id"], part) for row in rows for part in range(3000))
    assert counts() == {"delivered": 5}


def bad_rows() -> list[Row]:
    return [{"id": 1}, {"id": 2}, {"id": 1, "again": True}, {"name": "none"}, {"id": None}, {"id": 3}]


def test_a_repeated_missing_or_null_id_stops_the_run_by_default() -> None:
    write_rows(bad_rows())
    with pytest.raises(ps.errors.IdError, match="came before") as raised:
        ps.read.jsonl("in.jsonl", id="id").map(lambda row: row["id"]).to("out.jsonl").run_sync()
    assert "record 3" in "".join(raised.value.__notes__)


def test_law_errors_an_id_function_that_raises_fails_for_its_item_alone() -> None:
    write_rows([{"a": 1}, {"b": 2}, {"a": 3}])

    def flow(on_error: Any = None) -> ps.Flow[Any]:
        return ps.read.jsonl("in.jsonl", id=lambda row: row["a"], on_error=on_error)

    with pytest.raises(ps.errors.IdError, match=r"id= of the item \{'b': 2\} raised KeyError: 'a'") as raised:
        flow().to("out.jsonl").run_sync()
    assert "at stage 'read', in.jsonl, record 2" in raised.value.__notes__[0]
    assert isinstance(raised.value.__cause__, KeyError)
    job = flow("dead_letter").to("out.jsonl")
    report = job.run_sync()
    assert (report.delivered + report.earlier.get("delivered", 0), report.dead) == (2, 1)
    assert [row["a"] for row in values()] == [1, 3]
    assert [letter.item for letter in ps.read.dead("out.jsonl").collect_sync()] == [{"b": 2}]
    assert "nothing to do" in str(job.run_sync())


def test_law_errors_an_item_needs_an_id_also_where_none_are_kept() -> None:
    seen: list[Row] = []
    for sink in (None, seen.append):
        seen.clear()

        def run(on_error: Any = None, sink: Any = sink) -> Any:
            flow = ps.Flow(bad_rows(), id="id", on_error=on_error)
            return flow.collect_sync() if sink is None else flow.to(sink).run_sync(progress=False)

        with pytest.raises(ps.errors.IdError, match="has no 'id'") as raised:
            run()
        assert "item 3" in raised.value.__notes__[0]
        seen.clear()
        result = run("skip")
        good = [row for row in bad_rows() if row.get("id") is not None]
        assert (result if sink is None else seen) == good  # repeated ones too: nothing remembers the others


def test_letters_are_redone_whatever_ids_the_flow_asks_for() -> None:
    rows = [{"id": n} for n in range(5)]
    job = ps.Flow(rows, name="rows", id="id").map(breaks_at_row, on_error="dead_letter").to("out.jsonl")
    job.run_sync()
    mend()
    work = ps.Flow(id="id").map(lambda failed: failed.item)
    report = work.over(ps.read.dead("out.jsonl")).to("out.jsonl").run_sync()
    assert report.delivered == 1
    assert sorted(row["id"] for row in values()) == list(range(5))


def breaks_at_row(row: Row) -> Row:
    breaks_at(2)(row["id"])
    return row


def test_repeated_missing_and_null_ids_are_those_items_errors() -> None:
    write_rows(bad_rows())
    job = ps.read.jsonl("in.jsonl", id="id", on_error="dead_letter").map(lambda row: row["id"]).to("out.jsonl")
    report = job.run_sync()
    assert values() == [1, 2, 3]
    assert (report.delivered, report.dead) == (3, 3)
    letters = ps.read.dead("out.jsonl").collect_sync()
    assert {(letter.position[1], letter.reason) for letter in letters} == {(n, "IdError") for n in (2, 3, 4)}
    assert [letter.item for letter in sorted(letters, key=lambda one: one.position)] == bad_rows()[2:5]
    assert job.run_sync().dead == 0
    assert counts() == {"delivered": 3, "dead": 3}
    assert len(ps.read.dead("out.jsonl").collect_sync()) == 3


# -- redoing the dead -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [None, True, False])
def test_the_dead_are_redone_into_the_same_output_across_kills(whole: bool | None) -> None:
    """Each letter gives two outputs, or dies again; with ``whole`` by an expansion that is redone as well."""
    first = """
        def fails(x):
            raise ValueError(f"{x} is refused")
        job = ps.Flow(range(400), name="numbers").map(fails, on_error="dead_letter").to("out.jsonl")
        job.run_sync(progress=False)
    """
    redo = f"""
        die_after(50)
        whole = {whole}
        def twice(letter):
            if letter.item == 300:
                hold()
            if letter.item % 10 == 7 and whole is None:
                raise KeyError(letter.item)
            return [letter.item, letter.item]
        def checked(x):
            if x % 10 == 7:
                raise KeyError(x)
            return x
        flow = ps.read.dead("out.jsonl")
        if whole is None:
            flow = flow.map(twice, workers=2, on_error="dead_letter")
        else:
            flow = flow.flat_map(twice, workers=2, whole=whole).map(checked, on_error="dead_letter")
        print(flow.to("out.jsonl").run_sync(progress=False).delivered)
    """
    life(first)
    assert counts() == {"dead": 400}
    life(redo, killed=True)
    life(redo)
    left = ps.read.dead("out.jsonl").collect_sync()
    assert sorted(letter.item for letter in left) == list(range(7, 400, 10))
    assert {letter.reason for letter in left} == {"KeyError"}
    fine = [x for x in range(400) if x % 10 != 7]
    found = values() if whole is None else [[x, x] for x in values()[::2]]
    assert sorted(found) == [[x, x] for x in fine]
    assert counts() == {"delivered": 360, "dead": 40}


# -- two at once ------------------------------------------------------------------------------------------------------


def test_two_jobs_in_one_process_cannot_write_one_output() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def wait(x: int) -> int:
            await gate.wait()
            return x

        async with ps.Flow([1], name="one").map(wait).to("out.jsonl").start() as run:
            with pytest.raises(ps.errors.OutputInUse):
                await ps.Flow([2], name="two").to("out.jsonl").run()
            gate.set()
            await run.finish()

    asyncio.run(main())
    assert values() == [1]


def test_two_jobs_in_two_processes_cannot_write_one_output() -> None:
    """The second is refused while the first runs, and not when that was killed."""
    Path("program.py").write_text(
        "import penstock as ps\n"
        "def wait(x):\n"
        "    print('at work', flush=True)\n"
        "    input()\n"
        "    return x\n"
        "ps.Flow([1], name='one').map(wait).to('out.jsonl').run_sync(progress=False)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "program.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "at work\n"
            with pytest.raises(ps.errors.OutputInUse, match=r"out\.jsonl"):
                ps.Flow([2], name="two").to("out.jsonl").run_sync()
        finally:
            first.kill()
    ps.Flow([1], name="one").to("out.jsonl").run_sync()
    assert values() == [1]
