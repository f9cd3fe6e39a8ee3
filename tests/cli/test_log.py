"""``penstock log`` and ``penstock dead`` on an event log, as a user types them."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest

import penstock as ps
from penstock.cli.commands import application
from penstock.cli.logfile import read_place, shortened
from penstock.errors import PlanError
from penstock.events.probe import is_log

T = TypeVar("T")

DEADLINE = 60
PENSTOCK = [sys.executable, "-P", "-m", "penstock.cli"]


def penstock(*arguments: object, given: str | bytes = "") -> subprocess.CompletedProcess[str]:
    data = given if isinstance(given, bytes) else given.encode()
    command = [*PENSTOCK, *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=DEADLINE)
    assert b"Traceback" not in done.stderr, done.stderr
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def inside(*arguments: object, given: bytes = b"") -> int:
    """The exit code of the command, run in this process: as good for what is refused, and quicker."""
    with tempfile.TemporaryFile() as file:
        file.write(given)
        file.seek(0)
        before = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            with pytest.raises(SystemExit) as ended:
                application()([str(argument) for argument in arguments])
        finally:
            os.dup2(before, 0)
            os.close(before)
    code = ended.value.code
    assert isinstance(code, int)
    return code


def in_log(path: Path, work: Callable[[ps.EventLog], Awaitable[T]]) -> T:
    async def main() -> T:
        async with ps.EventLog(path) as log:
            return await work(log)

    return asyncio.run(main())


def events(path: Path, topic: str) -> list[Any]:
    async def read(log: ps.EventLog) -> list[Any]:
        return [event async for event in log.topic(topic).read()]

    return in_log(path, read)


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows_inside(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert inside(*arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
def numbers(path: Path) -> Path:
    """A log with the topic ``numbers``: 0 … 19."""

    async def fill(log: ps.EventLog) -> None:
        await log.topic("numbers").publish_many(range(20))

    in_log(path, fill)
    return path


@pytest.fixture
def letters(path: Path) -> Path:
    """A log with two topics, whose groups gave some up: 1 and 3 of ``a``, 0 of ``b``."""

    async def fill(log: ps.EventLog) -> None:
        for name, dead in (("a", (1, 3)), ("b", (0,))):
            topic = log.topic(name)
            await topic.publish_many([{"n": number} for number in range(4)])
            async with topic.subscribe(f"group of {name}", until="drained", max_attempts=1) as deliveries:
                async for delivery in deliveries:
                    async with delivery:
                        if delivery.position in dead:
                            raise ValueError(f"[bold]odd[/bold]: {delivery.position}\nand more")

    in_log(path, fill)
    return path


# -- topics -------------------------------------------------------------------------------------------------------


def test_topics_for_programs_and_for_people(letters: Path) -> None:
    one, two = rows(penstock("log", "topics", letters))
    assert one["name"] == "a"
    assert (one["events"], one["first"], one["next"], one["bytes"], one["dead"]) == (4, 0, 4, 28, 2)
    assert one["groups"] == [{"name": "group of a", "behind": 0, "held": 0, "waiting": 0, "dead": 2, "readers": 0}]
    assert two["name"] == "b"
    said = on_a_terminal([*PENSTOCK, "log", "topics", str(letters)])
    assert "group of b" in said
    assert "behind" in said


# -- tail ---------------------------------------------------------------------------------------------------------


def test_the_last_events(numbers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["value"] for row in rows(penstock("log", "tail", numbers, "numbers"))] == list(range(10, 20))
    (row,) = rows_inside(capsys, "log", "tail", numbers, "numbers", "-n", 1)
    assert row.pop("time").startswith(str(datetime.now(UTC).year))
    assert row == {"position": 19, "key": None, "id": None, "headers": {}, "value": 19}


def test_from_a_position_or_a_time(numbers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(rows_inside(capsys, "log", "tail", numbers, "numbers", "--start", 3)) == 17
    since = events(numbers, "numbers")[0].time.isoformat()
    assert len(rows_inside(capsys, "log", "tail", numbers, "numbers", "--start", since)) == 20


def test_what_isnt_json_is_shown_too_and_does_nothing_to_a_terminal(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fill(log: ps.EventLog) -> None:
        await log.topic("raw", type=bytes).publish(b"\xff\x1b[2J", key="k\x1b7", headers={"a": "b"})

    in_log(path, fill)
    (row,) = rows_inside(capsys, "log", "tail", path, "raw")
    assert row["bytes"] == "/xtbMko="
    assert row["headers"] == {"a": "b"}
    said = on_a_terminal([*PENSTOCK, "log", "tail", str(path), "raw"])
    assert "k\\x1b7" in said
    assert "\x1b" not in said


def test_a_tail_is_woken_by_what_is_published_and_ends_by_an_interrupt(numbers: Path) -> None:
    command = [*PENSTOCK, "log", "tail", str(numbers), "numbers", "-f", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert json.loads(tail.stdout.readline())["value"] == 19
        for value in ("first", "second"):
            assert penstock("log", "publish", numbers, "numbers", "--text", given=f"{value}\n").returncode == 0
            assert json.loads(tail.stdout.readline())["value"] == value
        tail.send_signal(signal.SIGINT)
        assert tail.wait(DEADLINE) == 130
        assert tail.stdout.read() == tail.stderr.read() == b""


def test_who_reads_a_tail_may_have_had_enough(numbers: Path) -> None:
    async def fill(log: ps.EventLog) -> None:
        await log.topic("numbers").publish_many(["long" * 100] * 2000)

    in_log(numbers, fill)
    command = [*PENSTOCK, "log", "tail", str(numbers), "numbers", "--start", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert json.loads(tail.stdout.readline())["value"] == 0
        tail.stdout.close()
        assert tail.wait(DEADLINE) == 0
        assert tail.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_one_sentence(numbers: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [*PENSTOCK, "log", "tail", str(numbers), "numbers"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE)
    assert done.returncode == 1
    assert done.stderr.startswith(b"penstock: standard output can't be written: ")
    assert done.stderr.count(b"\n") == 1


# -- publish ------------------------------------------------------------------------------------------------------


def test_lines_are_published_with_keys_and_ids(path: Path) -> None:
    given = "".join(f'{{"order": "o{number}", "customer": {number % 2}}}\n' for number in range(2500))
    options = ("log", "publish", path, "orders", "--key", "customer", "--id", "order")
    done = penstock(*options, given=given)
    assert (done.returncode, done.stdout) == (0, "2,500 lines were published to 'orders'\n"), done.stderr
    assert inside(*options, given=b'\n{"order": "o1", "customer": 1}') == 0
    found = events(path, "orders")
    assert [event.value["order"] for event in found] == [f"o{number}" for number in range(2500)]
    assert (found[3].key, found[3].id) == ("1", "o3")


def test_lines_of_text(path: Path) -> None:
    assert inside("log", "publish", path, "words", "--text", given=b'one\r\n\n"two"') == 0
    assert [event.value for event in events(path, "words")] == ["one", "", '"two"']


@pytest.mark.parametrize(
    ("line", "options", "says"),
    [
        ('{"a": ', (), "Input data was truncated"),
        ('["a"]', ("--key", "a"), "an object with a field 'a' was expected, and this is an array"),
        ('{"b": "x"}', ("--id", "a"), "the object has no field 'a'"),
        ('{"a": true}', ("--key", "a"), "the field 'a' is true or false"),
        (b"\xff", ("--text",), "can't decode byte"),
        ('"' + "x" * (16 << 20) + '"', (), "over the limit"),
    ],
)
def test_a_bad_line_is_named_and_those_before_it_count(
    path: Path, capsys: pytest.CaptureFixture[str], line: str | bytes, options: tuple[str, ...], says: str
) -> None:
    data = line if isinstance(line, bytes) else line.encode()
    given = b'{"a": "x"}\n\n{"a": "y"}\n\n' + data + b'\n{"a": "z"}\n'
    assert inside("log", "publish", path, "t", *options, given=given) == 1
    said = capsys.readouterr().err
    assert said.startswith("penstock: standard input, line 5: ")
    assert says in said
    before = 4 if options == ("--text",) else 2
    assert f"{before} lines were published, up to line {4 if before == 4 else 3}" in said
    assert len(events(path, "t")) == before


def test_a_first_line_that_is_bad(path: Path) -> None:
    done = penstock("log", "publish", path, "t", given="nonsense\n")
    assert done.returncode == 1
    assert done.stderr.startswith("penstock: standard input, line 1: ")
    assert "no line was published" in done.stderr


def test_what_comes_slowly_is_published_at_once_and_an_interrupt_says_how_far_it_got(path: Path) -> None:
    command = [*PENSTOCK, "log", "publish", str(path), "slow"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)

    async def follow(log: ps.EventLog) -> None:
        try:
            assert process.stdin is not None
            assert process.stderr is not None
            reading = log.topic("slow").read(follow=True)
            for number in range(3):
                process.stdin.write(b"%d\n" % number)
                process.stdin.flush()
                event = await asyncio.wait_for(anext(reading), DEADLINE)
                assert event.value == number
            await reading.aclose()
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait, DEADLINE) == 130
            assert process.stderr.read() == b"penstock: interrupted: 3 lines were published, up to line 3\n"
        finally:
            process.kill()
            process.communicate()

    in_log(path, follow)


# -- trim ---------------------------------------------------------------------------------------------------------


def test_trimming_by_each_limit(numbers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert penstock("log", "trim", numbers, "numbers", "--before", 5).stdout == "5 events were removed from 'numbers'\n"
    for option, limit, says in (
        ("--keep", 10, "5 events were"),
        ("--max-bytes", 2, "9 events were"),
        ("--before", "2099-01-01", "1 event was"),
    ):
        assert inside("log", "trim", numbers, "numbers", option, limit) == 0
        assert capsys.readouterr().out == f"{says} removed from 'numbers'\n"


def test_what_a_group_needs_stays_unless_forced(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, limit, removed in (("--keep", 0, 1), ("--before", 4, 0), ("--before", "2099-01-01", 0)):
        assert inside("log", "trim", letters, "a", option, limit) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{removed} event")
        assert "--force" in said
    assert inside("log", "trim", letters, "a", "--before", 1) == 0
    assert capsys.readouterr().out == "0 events were removed from 'a'\n"
    assert inside("log", "trim", letters, "a", "--keep", 0, "--force") == 0
    assert capsys.readouterr().out == "3 events were removed from 'a'\n"


# -- dead ---------------------------------------------------------------------------------------------------------


def test_dead_letters_for_programs_and_for_people(letters: Path) -> None:
    found = rows(penstock("dead", letters))
    assert [(row["topic"], row["position"]) for row in found] == [("a", 1), ("a", 3), ("b", 0)]
    assert found[0]["group"] == "group of a"
    assert found[0]["value"] == {"n": 1}
    assert found[0]["reason"] == "ValueError"
    assert found[0]["error"] == "ValueError: [bold]odd[/bold]: 1"
    assert found[0]["traceback"].startswith("Traceback")
    said = on_a_terminal([*PENSTOCK, "dead", str(letters)])
    assert "3 dead letters" in said
    assert "ValueError: [bold]odd[/bold]: 3" in said


def test_requeue_delivers_them_again(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = penstock("dead", letters, "--requeue", "--topic", "a", "--position", 3, "--position", 0)
    assert (one.returncode, one.stdout) == (0, "1 dead letter is delivered again\n"), one.stderr
    assert inside("dead", letters, "--requeue") == 0
    assert capsys.readouterr().out == "2 dead letters are delivered again\n"

    async def again(log: ps.EventLog) -> list[int]:
        async with log.topic("a").subscribe("group of a", until="drained") as deliveries:
            found = []
            async for delivery in deliveries:
                async with delivery:
                    found.append(delivery.position)
            return found

    assert sorted(in_log(letters, again)) == [1, 3]
    assert rows_inside(capsys, "dead", letters) == []


def test_only_some_dead_letters(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows_inside(capsys, "dead", letters, "--group", "group of a", "--position", 3, "--position", 0)
    assert [(row["topic"], row["position"]) for row in found] == [("a", 3)]


def test_what_a_job_into_a_topic_gave_up(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def odd(x: int) -> int:
        if x % 2:
            raise ValueError(f"odd: {x}")
        return x

    log = ps.EventLog(letters)
    job = ps.Flow(range(4), name="numbers").map(odd, on_error="dead_letter").to(log.topic("c"))
    assert job.run_sync(progress=False).dead == 2
    found = [row for row in rows(penstock("dead", letters)) if "job" in row]
    assert [(row["item"], row["error"]) for row in found] == [(1, "odd: 1"), (3, "odd: 3")]
    assert "numbers" in found[0]["job"]
    assert rows_inside(capsys, "dead", letters, "--topic", "c") == []
    said = on_a_terminal([*PENSTOCK, "dead", str(letters)])
    assert "3 dead letters" in said
    assert "2 dead letters" in said
    assert "odd: 3" in said
    assert inside("dead", letters, "--requeue") == 0
    said = capsys.readouterr().out
    assert said.startswith("3 dead letters are delivered again\n2 dead letters of the job ")
    (redo,) = re.findall(r"ps.read.dead\(.*?\)", said)
    redone = eval(redo, {"ps": ps}).map(lambda failed: -failed.item).to(log.topic("c"))
    assert redone.run_sync(progress=False).delivered == 2
    assert rows_inside(capsys, "dead", letters) == []


# -- what can't be done -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("log topics gone.db", "there is no file 'gone.db'"),
        ("log tail gone.db t", "there is no file 'gone.db'"),
        ("log trim gone.db t --keep 1", "there is no file 'gone.db'"),
        ("dead gone.db --requeue", "gone.db"),
        ("log topics other.db", "other.db is no event log"),
        ("log publish other.db t", "other.db is no event log"),
        ("log publish notes.txt t", "notes.txt is no event log"),
        ("log publish :memory: t", "memory"),
        ("log publish events.db t --text --key a", "--text"),
        ("log tail events.db nowhere", "Give one that it has: 'a', 'b'"),
        ("log tail events.db a --start soon", "--start 'soon'"),
        ("log tail events.db a -n 1 --start 1", "-n and --start"),
        ("log trim events.db a", "--keep, --before or --max-bytes"),
        ("log trim events.db nowhere --keep 1", "Give one that it has: 'a', 'b'"),
        ("dead events.db --topic nowhere", "Give one that it has: 'a', 'b'"),
        ("dead events.db --group nobody", "Give one that it has: 'group of a', 'group of b'"),
        ("dead notes.txt --group nobody", "--topic, --group and --position"),
    ],
)
def test_what_cant_be_done_is_one_sentence_and_makes_nothing(
    letters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    folder = letters.parent
    monkeypatch.chdir(folder)
    (folder / "notes.txt").write_text("no log")
    with sqlite3.connect(folder / "other.db") as other:
        other.execute("CREATE TABLE t(x)")
    other.close()
    before = sorted(folder.rglob("*"))
    assert inside(*options.split(), given=b"1\n") == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(folder.rglob("*")) == before


def test_a_log_is_known_for_one_while_it_is_new_and_open(path: Path) -> None:
    async def look(log: ps.EventLog) -> list[dict[str, Any]]:
        await log.topic("t").publish(1)
        return rows(await asyncio.to_thread(penstock, "log", "topics", path))  # all of it is in the file beside it

    assert not is_log(path)
    assert [row["name"] for row in in_log(path, look)] == ["t"]
    assert is_log(path)
    assert not is_log(path.parent)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "soon", "1e3", "9" * 30, "²", "2026-13-01"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(PlanError, match="no position and no time"):
        read_place("--start", text)


def test_places_as_people_write_them() -> None:
    assert read_place("--start", " 7 ") == 7
    assert read_place("--start", "2026-03-01T12:00Z") == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert read_place("--start", "2026-03-01 12:00") == datetime(2026, 3, 1, 12).astimezone()
    assert shortened("a\tb" + "c" * 20, 8) == "a\\tbccc…"


def on_a_terminal(command: list[str]) -> str:
    """What a command prints where a person looks on, 200 columns wide."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    try:
        while chunk := _read(ours):
            said += chunk
        assert process.wait(DEADLINE) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return said.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""
