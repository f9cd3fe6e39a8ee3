"""The journal against a model in plain Python, and what it refuses."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import JournalError, MissingInput, OutputInUse, PlanError, ResumeMismatch
from penstock.flow.contract import Delta, Failed, JobId
from penstock.flow.journal import LETTERS, Journal
from penstock.flow.ledger import DEAD
from penstock.flow.letters import JournalReader, find_journal, tables_prefix
from penstock.flow.lock import OutputLock
from penstock.flow.progress import Intervals, Known, Position, Positions, Progress

JOB = JobId("job", "source")


def opened(path: Path, job: JobId = JOB, prefix: str = "") -> tuple[Journal, Progress]:
    journal = Journal(str(path), output="out.jsonl", letters="dead:out.jsonl", prefix=prefix)
    try:
        return journal, journal.load(job)
    except BaseException:
        journal.close(clean=False)
        raise


def reopened(path: Path, journal: Journal, job: JobId = JOB, prefix: str = "") -> tuple[Journal, Progress]:
    journal.close(clean=True)
    return opened(path, job, prefix)


def positions(*found: Position) -> Positions:
    made = Positions()
    for position in found:
        made.add(position)
    return made


def letters_of(path: Path) -> list[tuple[int, Failed]]:
    with closing(JournalReader(str(path).removesuffix(".journal"))) as reader:
        return reader.letters(0, reader.last_letter(), 1000)


# Against a model.

PARTITIONS = ["", "a.jsonl", "b/ü\n.jsonl"]
places = st.tuples(st.sampled_from(PARTITIONS), st.integers(0, 30))
spans = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), min_size=1, max_size=4).map(
    lambda found: Intervals([(start, start + length) for start, length in found])
)


@dataclass
class Step:
    settled: list[Position]
    children: dict[Position, Intervals]
    fates: dict[Position, int]
    taken: dict[int, int]
    counts: dict[str, int]
    dead: list[Position]
    snapshot: Any
    plan: str | None
    finished: bool
    how: str  # what happens then: nothing, a reopening, or a crash in the middle of the next commit


steps = st.builds(
    Step,
    settled=st.lists(places, max_size=12),
    children=st.dictionaries(places, spans, max_size=3),
    fates=st.dictionaries(places, st.integers(0, 3), max_size=2),
    taken=st.dictionaries(st.integers(0, 3), st.integers(1, 5), max_size=2),
    counts=st.dictionaries(st.sampled_from(["delivered", "filtered", "dead"]), st.integers(1, 5), max_size=2),
    dead=st.lists(places, max_size=2, unique=True),
    snapshot=st.none() | st.dictionaries(st.text(), st.integers()),
    plan=st.none() | st.text(),
    finished=st.booleans(),
    how=st.sampled_from(["on", "reopen", "crash"]),
)


@dataclass
class Model:
    """What the journal must know, in sets and dicts; ``name`` maps a position to what identifies its item."""

    settled: set[Position] = field(default_factory=set)
    children: dict[Position, set[int]] = field(default_factory=dict)
    fates: dict[Position, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    dead: dict[Position, str] = field(default_factory=dict)
    snapshot: Any = None
    plan: str | None = None
    finished: bool = False

    def apply(self, step: Step, number: int) -> None:
        for position, intervals in step.children.items():
            mine = self.children.setdefault(position, set())
            mine.update(index for start, stop in intervals for index in range(start, stop))
        self.fates |= step.fates
        for position in step.fates:
            self.children.setdefault(position, set())
        self.settled.update(step.settled)
        for position in step.settled:
            self.children.pop(position, None)
            self.fates.pop(position, None)
        for stage, amount in step.taken.items():
            self.taken[stage] = self.taken.get(stage, 0) + amount
        for name, amount in step.counts.items():
            self.counts[name] = self.counts.get(name, 0) + amount
        for position in step.dead:
            self.dead[position] = f"error {number}"
        if step.snapshot is not None:
            self.snapshot = step.snapshot
        if step.plan is not None:
            self.plan = step.plan
        if step.finished:
            self.finished = True
        elif step.settled or step.children:
            self.finished = False

    @property
    def is_touched(self) -> bool:
        return bool(self.settled or self.children or self.dead or self.finished)


def delta_of(step: Step, number: int) -> Delta:
    return Delta(
        settled=positions(*step.settled),
        children=step.children,
        fates=step.fates,
        taken=step.taken,
        counts=step.counts,
        dead=[Failed(list(position), position, "stage", "E", f"error {number}") for position in step.dead],
        snapshot=step.snapshot,
        plan=step.plan,
        finished=step.finished,
    )


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(steps, max_size=8))
def test_law_commit_the_journal_knows_exactly_what_was_committed(
    script: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "out.jsonl.journal"
    journal, progress = opened(path)
    model = Model()
    for number, step in enumerate(script):
        if step.how == "crash":
            journal.begin()
            with pytest.raises(Crash):
                journal.transaction(delta_of(step, number), {"length": -1}, crash)
            journal.close(clean=False)
            journal, progress = opened(path)
            assert journal.running
        else:
            journal.transaction(delta_of(step, number), {"length": number})
            model.apply(step, number)
            if step.how == "on":
                continue
            journal, progress = reopened(path, journal)
            assert not journal.running
            assert journal.state == {"length": number}
        if not model.is_touched:
            assert progress == Progress()
            model = Model(taken=model.taken, counts=model.counts)
            return  # what an untouched journal holds besides is any job's: nothing more is promised
        assert progress.settled == positions(*model.settled)
        found = {place: {i for start, stop in spans for i in range(start, stop)} for place, spans in
                 progress.children.items()}  # fmt: skip
        assert found == {place: indexes for place, indexes in model.children.items() if indexes}
        assert progress.fates == model.fates
        assert progress.taken == model.taken
        assert progress.counts == model.counts
        assert (progress.snapshot, progress.plan) == (model.snapshot, model.plan)
        assert progress.finished == model.finished
        letters = letters_of(path)
        assert {letter.position: letter.error for _, letter in letters} == model.dead
        assert all(letter.item == list(letter.position) for _, letter in letters)
    journal.close(clean=True)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.sampled_from("abcdef"), max_size=6), max_size=6), data=st.data())
def test_law_exactly_once_by_id(
    rows: list[list[str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each inner list is a run over rows with these keys, in whatever order; each run settles a part of them."""
    path = tmp_path_factory.mktemp("journal") / "out.jsonl.journal"
    job = JobId("job", "source", by_id=True)
    done: set[str] = set()
    for keys in rows:
        journal, progress = opened(path, job)
        assert not progress.settled
        met: dict[str, int] = {}
        wanted = []
        for key in keys:
            met[key] = met.get(key, 0) + 1
            wanted.append(key if met[key] == 1 else f"{key}#{met[key]}")
        half = len(keys) // 2
        known = journal.look_up(keys[:half]) + journal.look_up(keys[half:])
        assert [one.key for one in known] == wanted
        assert [one.repeated for one in known] == ["#" in key for key in wanted]
        assert [one.done for one in known] == [key in done for key in wanted]
        fresh = [one for one in known if not one.done]
        kept = data.draw(st.sets(st.sampled_from([one.key for one in fresh]))) if fresh else set()
        delta = Delta()
        for index, one in enumerate(fresh):
            if one.key in kept:
                delta.settled.add(("t", index))
                delta.keys["t", index] = one.key
        journal.transaction(delta)
        done |= kept
        journal.close(clean=True)


def test_unfinished_items_by_id(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    job = JobId("job", "source", by_id=True)
    journal, _ = opened(path, job)
    journal.transaction(
        Delta(
            children={("t", 5): Intervals([(0, 3)])},
            fates={("t", 5): 2},
            keys={("t", 5): "i:1"},
            digests={"i:1": b"digest"},
        )
    )
    journal.transaction(Delta(children={("t", 5): Intervals([(3, 4), (7, 8)])}, keys={("t", 5): "i:1"}))
    journal, progress = reopened(path, journal, job)
    assert progress.children == {}
    assert progress.fates == {}
    # The row stands elsewhere now.
    expected = Known("i:1", children=Intervals([(0, 4), (7, 8)]), fate=2, digest=b"digest")
    assert journal.look_up(["i:1", "i:2"]) == [expected, Known("i:2")]
    journal.transaction(Delta(settled=positions(("t", 9)), keys={("t", 9): "i:1"}))
    journal, _ = reopened(path, journal, job)
    assert journal.look_up(["i:1"]) == [Known("i:1", done=True)]
    journal.close(clean=True)


def test_letters_by_id_are_one_an_id(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    job = JobId("job", "source", by_id=True)
    journal, _ = opened(path, job)
    for place, error in ((3, "first"), (8, "second")):
        position = ("t", place)
        letter = Failed({"id": 1}, position, "s", "E", error)
        journal.transaction(Delta(settled=positions(position), keys={position: "i:1"}, dead=[letter]))
    assert [letter.error for _, letter in letters_of(path)] == ["second"]
    journal.close(clean=True)


# Whose it is.


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (JobId("job", "other"), "reads other"),
        (JobId("another", "source"), "this job is 'another'"),
        (JobId("job", "source", by_id=True), "by positions"),
    ],
)
def test_another_jobs_journal_is_refused_and_left_as_it_is(tmp_path: Path, other: JobId, said: str) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    journal.transaction(Delta(settled=positions(("a", 0))))
    journal.close(clean=True)
    with pytest.raises(ResumeMismatch, match=said):
        opened(path, other)
    journal, progress = opened(path)
    assert progress.settled == positions(("a", 0))
    journal.close(clean=True)


def test_a_journal_that_settled_nothing_is_any_jobs(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    journal.transaction(Delta(report={"issued": 0}, snapshot={"x": 1}, plan="p"))
    journal.close(clean=True)
    journal, progress = opened(path, JobId("other", "elsewhere"))
    assert progress == Progress()
    journal.transaction(Delta(settled=positions(("b", 0))))
    journal, progress = reopened(path, journal, JobId("other", "elsewhere"))
    assert (progress.snapshot, progress.plan) == (None, None)
    journal.close(clean=True)


def test_a_source_that_cannot_be_replayed_begins_anew_and_keeps_the_letters(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    job = JobId("job", "source", replayable=False)
    for run in range(2):
        journal, progress = opened(path, job)
        assert progress == Progress()
        letter = Failed(run, ("", 1), "s", "E", "e")
        journal.transaction(Delta(settled=positions(("", 1)), counts={"dead": 1}, dead=[letter]))
        journal.close(clean=True)
    assert [letter.item for _, letter in letters_of(path)] == [0, 1]


# Redoing the dead.

REDO = JobId("redo", "dead:out.jsonl")


def test_redoing_removes_letters_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    letters = [Failed({"n": n}, ("a", n), "s", "E", "e", 2) for n in range(4)]
    done = positions(*[("a", n) for n in range(10)])
    journal.transaction(
        Delta(settled=done, counts={"delivered": 6, "dead": 4}, dead=letters, plan="p", finished=True), {"length": 7}
    )
    journal, progress = reopened(path, journal, REDO)
    assert progress == Progress()
    assert journal.state == {"length": 7}
    numbers = [number for number, _ in letters_of(path)]
    again = Failed(letters[1], (LETTERS, numbers[1]), "fix", "F", "f", 3)
    journal.transaction(
        Delta(
            settled=positions((LETTERS, numbers[0]), (LETTERS, numbers[1])),
            counts={"delivered": 1, "dead": 1},
            dead=[again],
            children={(LETTERS, numbers[2]): Intervals([(0, 5)])},
            fates={(LETTERS, numbers[2]): 1},
            taken={0: 2},
            snapshot={"not": "ours"},
            plan="another",
            finished=True,
        ),
        {"length": 9},
    )
    journal, progress = reopened(path, journal, REDO)
    assert progress.children == {(LETTERS, numbers[2]): Intervals([(0, 5)])}
    assert progress.fates == {(LETTERS, numbers[2]): 1}
    journal.transaction(Delta(settled=positions((LETTERS, numbers[2])), counts={"filtered": 1}))
    journal, progress = reopened(path, journal, REDO)
    assert progress == Progress()
    journal.close(clean=True)
    assert letters_of(path) == [
        (numbers[1], Failed({"n": 1}, ("a", 1), "fix", "F", "f", 5)),
        (numbers[3], letters[3]),
    ]
    journal, progress = opened(path)
    assert progress.settled == done
    assert progress.counts == {"delivered": 7, "filtered": 1, "dead": 2}
    assert (progress.plan, progress.snapshot, progress.taken) == ("p", None, {})
    assert progress.finished
    assert journal.state == {"length": 9}
    journal.close(clean=True)


def test_a_letter_that_died_before_it_was_finished_stays(tmp_path: Path) -> None:
    """Its letter came with its fate, in an earlier commit than the one that settles it."""
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    letters = [Failed(n, ("a", n), "s", "E", "e") for n in range(2)]
    journal.transaction(Delta(settled=positions(("a", 0), ("a", 1)), counts={"dead": 2}, dead=letters))
    journal, _ = reopened(path, journal, REDO)
    one, two = (LETTERS, letters_of(path)[0][0]), (LETTERS, letters_of(path)[1][0])
    again = Failed(letters[0], one, "fix", "F", "f", 3)
    journal.transaction(Delta(children={one: Intervals([(0, 2)])}, fates={one: DEAD}, dead=[again]))
    journal, progress = reopened(path, journal, REDO)
    assert progress.fates == {one: DEAD}
    journal.transaction(Delta(settled=positions(one, two), counts={"dead": 1, "delivered": 1}))
    journal.close(clean=True)
    assert letters_of(path) == [(one[1], Failed(0, ("a", 0), "fix", "F", "f", 4))]
    journal, progress = opened(path)
    assert progress.counts == {"dead": 1, "delivered": 1}
    journal.close(clean=True)


def test_a_letters_number_is_never_used_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    journal.transaction(Delta(dead=[Failed(1, ("a", 1), "s", "E", "e")]))
    [(number, _)] = letters_of(path)
    journal, _ = reopened(path, journal, REDO)
    journal.transaction(Delta(settled=positions((LETTERS, number)), counts={"delivered": 1}))
    journal, _ = reopened(path, journal)
    journal.transaction(Delta(dead=[Failed(1, ("a", 2), "s", "E", "e")]))
    journal.close(clean=True)
    assert [found for found, _ in letters_of(path)] == [number + 1]


# The file.


def test_only_one_file_remains_and_it_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    for number in range(400):
        journal.transaction(
            Delta(settled=positions(("a", number)), counts={"delivered": 1}, report={"issued": number, "x": "y" * 500}),
            {"length": number},
        )
    assert journal.connection.execute("SELECT count(*) FROM progress").get == 1
    journal.close(clean=True)
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size < 200_000
    with closing(JournalReader(str(tmp_path / "out.jsonl"))) as reader:
        assert [run["issued"] for run in reader.runs()] == list(range(300, 400))
        assert reader.counts() == {"delivered": 400}


def test_the_write_ahead_log_does_not_grow_without_bound(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    journal.connection.execute("PRAGMA synchronous = OFF")  # only here: what is measured is the size
    for number in range(5_000):
        journal.transaction(Delta(settled=positions(("a", number))), {"length": number})
    assert Path(f"{path}-wal").stat().st_size < 8 << 20
    journal.close(clean=True)


def test_it_is_read_while_a_job_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    journal.transaction(Delta(dead=[Failed("x", ("a", 1), "s", "E", "e")], report={"issued": 1}))
    code = (
        "import sys; from penstock.flow.letters import JournalReader\n"
        "r = JournalReader(sys.argv[1]); print(len(r.letters(0, r.last_letter(), 10)), r.runs()); r.close()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out.jsonl")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (shown.stdout, shown.stderr) == ("1 [{'issued': 1}]\n", "")
    journal.transaction(Delta(dead=[Failed("x", ("a", 2), "s", "E", "e")]))
    assert len(letters_of(path)) == 2  # in this process, too
    journal.transaction(Delta(dead=[Failed("x", ("a", 3), "s", "E", "e")]))
    journal.close(clean=True)
    assert os.listdir(tmp_path) == [path.name]


def test_a_report_that_json_cannot_hold_is_kept_as_text(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    journal.transaction(Delta(report={"x": 1j}))
    journal.close(clean=True)
    with closing(JournalReader(str(tmp_path / "out.jsonl"))) as reader:
        assert reader.runs() == [{"text": "{'x': 1j}"}]


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    path.write_text("hello " * 1000)
    with pytest.raises(JournalError, match="no intact SQLite database"):
        opened(path)
    with pytest.raises(JournalError):
        JournalReader(str(tmp_path / "out.jsonl"))
    assert path.read_text() == "hello " * 1000


def test_a_database_that_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE photos(name)")
    with pytest.raises(JournalError, match="'photos'"):
        opened(path)


def test_a_corrupt_journal(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    journal, _ = opened(path)
    journal.transaction(Delta(settled=positions(("a", 0))))
    journal.close(clean=True)
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(JournalError):
        opened(path)


def test_a_journal_of_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    opened(path)[0].close(clean=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE meta SET value = 99 WHERE name = 'version'")
    with pytest.raises(JournalError, match="newer penstock wrote it"):
        opened(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE meta SET value = 'old' WHERE name = 'version'")
    with pytest.raises(JournalError, match="isn't a journal's"):
        opened(path)


def test_an_empty_file_becomes_a_journal(tmp_path: Path) -> None:
    """A crash may leave one, made and not yet filled."""
    path = tmp_path / "out.jsonl.journal"
    path.touch()
    journal, progress = opened(path)
    assert progress == Progress()
    journal.close(clean=True)


def test_several_journals_in_one_database(tmp_path: Path) -> None:
    path = tmp_path / "data.db"
    with closing(apsw.Connection(str(path))) as database:
        database.execute("CREATE TABLE mine(x)")
    for table in ("rows", 'a "quoted" one'):
        journal, progress = opened(path, prefix=tables_prefix(table))
        assert progress == Progress()
        journal.transaction(Delta(settled=positions((table, 1)), dead=[Failed(table, (table, 1), "s", "E", "e")]))
        journal, progress = reopened(path, journal, prefix=tables_prefix(table))
        assert progress.settled == positions((table, 1))
        journal.close(clean=True)
    with pytest.raises(PlanError, match="several jobs"):
        find_journal(str(path))
    with pytest.raises(PlanError, match="no journal for a table 'other'"):
        find_journal(str(path), "other")
    with closing(JournalReader(str(path), "rows")) as reader:
        assert [letter.item for _, letter in reader.letters(0, 9, 9)] == ["rows"]
        assert reader.identity == f"dead:{path.resolve()}#rows"


def test_outputs_without_a_journal(tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        find_journal(str(tmp_path / "none.jsonl"))
    (tmp_path / "plain.jsonl").write_text("{}\n" * 1000)
    with pytest.raises(MissingInput):
        find_journal(str(tmp_path / "plain.jsonl"))
    with closing(apsw.Connection(str(tmp_path / "data.db"))) as database:
        database.execute("CREATE TABLE mine(x)")
    with pytest.raises(MissingInput):
        find_journal(str(tmp_path / "data.db"))


# The lock.


def test_the_lock_is_one_holders_and_leaves_nothing(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    lock = OutputLock(output)
    with pytest.raises(OutputInUse, match=r"out\.jsonl"):
        OutputLock(output)
    code = "import sys; from penstock.flow.lock import OutputLock; OutputLock(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", code, output], capture_output=True, text=True, timeout=30)
    assert "OutputInUse" in other.stderr
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == []
    again = OutputLock(output)
    os.unlink(again.path)  # somebody tidies up
    third = OutputLock(output)
    again.release()  # must not remove what is the third's
    with pytest.raises(OutputInUse):
        OutputLock(output)
    third.release()


def test_a_lock_left_by_a_crash_is_taken(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    code = "import os, sys; from penstock.flow.lock import OutputLock; lock = OutputLock(sys.argv[1]); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, output], timeout=30).returncode == 9
    assert os.listdir(tmp_path) == ["out.jsonl.lock"]
    OutputLock(output).release()
    assert os.listdir(tmp_path) == []
