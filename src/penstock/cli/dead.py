"""``penstock dead``: what failed for good, as a table for people and as JSON lines for programs.

That is what stands beside the output of a job, or in an event log: what its groups gave up, and what was given up by
jobs that write to its topics and read something else.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.cli.outcome import DONE, outcome
from penstock.errors import PlanError
from penstock.flow.failing import short
from penstock.flow.text import printable

if TYPE_CHECKING:
    from penstock.events.event import DeadLetter
    from penstock.events.log import EventLog
    from penstock.events.topic import Topic
    from penstock.flow.contract import Failed
    from penstock.flow.letters import JournalReader

__all__ = ["show_dead"]

_LONGEST = 60
_PAGE = 500


def show_dead(
    output: Path,
    *,
    requeue: bool,
    topic: str | None = None,
    group: str | None = None,
    positions: Sequence[int] = (),
) -> int:
    """Print the dead letters beside ``output``, or in that log, and return the exit code.

    ``requeue``: deliver those of a log again instead. ``topic``, ``group``, ``positions``: only these, of a log.
    """

    def work() -> int:
        from penstock.cli.logfile import piped
        from penstock.events.probe import is_log

        if is_log(output):
            return piped(lambda: _of_log(str(output), requeue, topic, group, positions or None))
        if requeue:
            raise PlanError(
                f"--requeue puts the events of a log back on their topic, and {output} is the output of a job",
                f"Mend the cause, then run ps.read.dead({str(output)!r}) into the same output: what succeeds is "
                "appended and its letter removed",
            )
        if topic is not None or group is not None or positions:
            raise PlanError(
                f"--topic, --group and --position choose among the letters of an event log, and {output} is none",
                "Leave them out",
            )
        return piped(lambda: _of_job(output))

    return outcome(work)


def _of_job(output: Path) -> int:
    from penstock.files import read

    letters = read.dead(output)
    if not sys.stdout.isatty():
        for letter in letters:
            sys.stdout.buffer.write(_json(msgspec.structs.asdict(letter)) + b"\n")
        return DONE
    _table(_COLUMNS, [_row(letter) for letter in letters])
    return DONE


_COLUMNS = ("position", "stage", "reason", "error", "attempts", "item")


def _row(letter: Failed) -> tuple[Any, ...]:
    partition, index = letter.position
    return f"{partition}:{index}", letter.stage, letter.reason, letter.error, letter.attempts, short(letter.item)


def _json(letter: dict[str, Any]) -> bytes:
    """A letter as JSON; its item in words where JSON has no form for it."""
    try:
        return msgspec.json.encode(letter, enc_hook=_in_words)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return msgspec.json.encode({**letter, "item": _in_words(letter["item"])})


def _in_words(value: Any) -> str:
    try:
        return printable(repr(value))
    except Exception:  # a __repr__ of the user's
        return short(value)


def _of_log(path: str, requeue: bool, topic: str | None, group: str | None, positions: Sequence[int] | None) -> int:
    from penstock.cli.logfile import in_log, json_value

    async def again(log: EventLog) -> int:
        return sum([await one.requeue(group, positions) for one in await _chosen(log, topic, group)])

    async def write_them(log: EventLog) -> None:
        async for name, letter in _letters(log, topic, group, positions):
            shown = _shown(name, letter) | json_value(letter.event.value)
            sys.stdout.buffer.write(msgspec.json.encode(shown) + b"\n")

    async def rows(log: EventLog) -> list[tuple[Any, ...]]:
        columns = ("topic", "group", "position", "attempts", "stage", "reason", "error")
        found = []
        async for name, letter in _letters(log, topic, group, positions):
            shown = _shown(name, letter)
            value = (letter.event.value or b"")[: 4 * _LONGEST].decode(errors="backslashreplace")
            found.append((*(shown[column] for column in columns), value))
        return found

    jobs = () if topic is not None or group is not None or positions is not None else _jobs(path)
    if requeue:
        count = in_log(path, again)
        print(f"{count:,} dead letter{'s are' if count != 1 else ' is'} delivered again")
        for table, job, letters in jobs:
            kept = _counted(sum(1 for _ in letters))
            print(f"{kept} of the job {job} came from elsewhere: mend the cause, then {_redo(path, table)}")
    elif sys.stdout.isatty():
        header = ("topic", "group", "position", "attempts", "stage", "reason", "error", "value")
        _table(header, in_log(path, rows))
        for table, job, letters in jobs:
            print(f"\nof the job {job}; {_redo(path, table)}")
            _table(_COLUMNS, map(_row, letters))
    else:
        in_log(path, write_them)
        for table, job, letters in jobs:
            for letter in letters:
                shown = {"job": job, "table": table, **msgspec.structs.asdict(letter)}
                sys.stdout.buffer.write(_json(shown) + b"\n")
    return DONE


def _redo(path: str, table: str) -> str:
    return f"run ps.read.dead({path!r}, table={table!r}) into the same topic"


def _jobs(path: str) -> Iterator[tuple[str, str, Iterator[Failed]]]:
    """The jobs that write to topics of a log and have dead letters: the table for ``read.dead``, the name, the
    letters."""
    from penstock.flow.letters import JournalReader, tables_in

    for table in tables_in(path):
        with closing(JournalReader(path, table)) as reader:
            if reader.last_letter():
                yield table, reader.job(), _letters_in(reader)


def _letters_in(reader: JournalReader) -> Iterator[Failed]:
    after, last = 0, reader.last_letter()
    while page := reader.letters(after, last, _PAGE):
        yield from (letter for _, letter in page)
        after = page[-1][0]


async def _chosen(log: EventLog, topic: str | None, group: str | None) -> list[Topic[bytes]]:
    """The topics that are meant. Raises PlanError for one, or a group, that isn't there."""
    from penstock.cli.logfile import known_topic

    infos = await log.topics() if topic is None else [await known_topic(log, topic)]
    topics = [log.topic(info.name, bytes) for info in infos]
    if group is None:
        return topics
    names: set[str] = set()
    for one in topics:
        names.update(its.name for its in await one.groups())
    if group not in names:
        where = log.address if topic is None else f"the topic {topic!r}"
        known = ", ".join(map(repr, sorted(names)))
        raise PlanError(
            f"{where} has no group {group!r}", f"Give one that it has: {known}" if known else "It has none yet"
        )
    return topics


async def _letters(
    log: EventLog, topic: str | None, group: str | None, positions: Sequence[int] | None
) -> AsyncGenerator[tuple[str, DeadLetter[bytes]], None]:
    wanted = None if positions is None else set(positions)
    for one in await _chosen(log, topic, group):
        async for letter in one.dead(group):
            if wanted is None or letter.event.position in wanted:
                yield one.name, letter


def _shown(topic: str, letter: DeadLetter[bytes]) -> dict[str, Any]:
    """What is shown of a letter beside its value. ``traceback``: of the error, if that was kept."""
    error = _said(letter.error)
    return {
        "topic": topic,
        "group": letter.group,
        "position": letter.event.position,
        "time": letter.time,
        "key": letter.event.key,
        "id": letter.event.id,
        "attempts": letter.attempts,
        "stage": letter.stage,
        "reason": letter.reason,
        "error": error,
        "traceback": letter.error if letter.error.strip() != error else None,
    }


def _said(error: str) -> str:
    """What an error says, in a line: of a traceback the one that names the exception, else the first.

    >>> _said("Traceback (most recent call last):\\n  File ...\\nValueError: odd\\nand more")
    'ValueError: odd'
    """
    lines = error.strip().splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("Traceback (")]
    after = lines[heads[-1] + 1 :] if heads else lines
    return next((line for line in after if not line.startswith(" ")), lines[0] if lines else "")


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from penstock.cli.logfile import shortened

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        cells = (shortened(" ".join(str(cell).split()), _LONGEST) for cell in row)
        table.add_row(*map(Text, cells))  # Text: an error may hold what looks like markup
    console = Console(highlight=False)
    count = table.row_count
    if count:
        console.print(table)
    console.print(_counted(count))


def _counted(count: int) -> str:
    return f"{count} dead letter{'s' * (count != 1)}"
