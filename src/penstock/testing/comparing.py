"""What a job has left behind, in a form in which two runs can be compared, and the first difference between two."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from penstock.flow.letters import JournalReader
from penstock.flow.text import printable

__all__ = ["Remains", "first_difference", "remains"]

_COUNTED = ("delivered", "filtered", "skipped", "dead")
_LONGEST = 160
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object in memory: another one in each process
_EVERY_LETTER = 2**62


@dataclass(frozen=True, slots=True)
class Remains:
    """Outputs, dead letters and cumulative counts of a job, each output as one line of text."""

    outputs: list[str]
    dead: list[str]
    counts: dict[str, int]


def remains(path: Path, table: str | None = None) -> Remains:
    """Read what a job has left: the rows of a ``table`` or of Parquet parts, the lines of anything else.

    Rows are read in their order; whether that order means anything is the caller's to know.
    """
    if table is not None:
        outputs = _sqlite_rows(path, table)
    elif path.name.endswith(".parquet") or path.is_dir():
        outputs = _parquet_rows(path)
    else:
        outputs = _lines(path)
    reader = JournalReader(str(path), table)
    try:
        letters = [letter for _, letter in reader.letters(0, _EVERY_LETTER, _EVERY_LETTER)]
        counts = reader.counts()
    finally:
        reader.close()
    dead = [
        _ADDRESS.sub("", f"{one.position} {one.stage} {one.reason}: {one.error} ({_text(one.item)})") for one in letters
    ]
    return Remains(outputs, dead, {name: counts.get(name, 0) for name in _COUNTED})


def first_difference(expected: Remains, found: Remains, *, ordered: bool, exactly_once: bool) -> str | None:
    """Where ``found`` departs from the undisturbed ``expected``, in a sentence; None if it doesn't.

    ``ordered``: outputs are compared in order. Without ``exactly_once``, more of the same is no difference.
    """
    difference = _missing("output", expected.outputs, found.outputs)
    difference = difference or _further("output", expected.outputs, found.outputs, exactly_once=exactly_once)
    if difference is None and exactly_once and ordered:
        difference = _out_of_order(expected.outputs, found.outputs)
    difference = difference or _missing("dead letter", expected.dead, found.dead)
    difference = difference or _further("dead letter", expected.dead, found.dead, exactly_once=exactly_once)
    if difference is None and exactly_once and expected.counts != found.counts:
        name = next(name for name in _COUNTED if expected.counts[name] != found.counts[name])
        difference = f"{name}: {found.counts[name]:,} counted, {expected.counts[name]:,} undisturbed"
    return difference


def _missing(what: str, expected: Sequence[str], found: Sequence[str]) -> str | None:
    lost = Counter(expected) - Counter(found)
    if not lost:
        return None
    return f"{lost.total():,} {what}s are missing, the first: {_first(expected, lost)}"


def _further(what: str, expected: Sequence[str], found: Sequence[str], *, exactly_once: bool) -> str | None:
    """What is there that shouldn't be; without ``exactly_once`` the same may be there again."""
    more = Counter(found) - Counter(expected)
    if not exactly_once:
        for line in set(expected):
            del more[line]
    if not more:
        return None
    return f"{more.total():,} {what}s are there that shouldn't be, or doubled, the first: {_first(found, more)}"


def _out_of_order(expected: Sequence[str], found: Sequence[str]) -> str | None:
    for number, (one, other) in enumerate(zip(expected, found, strict=True), 1):
        if one != other:
            return f"output {number:,} is {_short(other)}, and undisturbed it is {_short(one)}"
    return None


def _first(lines: Iterable[str], wanted: Counter[str]) -> str:
    return _short(next(line for line in lines if line in wanted))


def _short(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _text(value: Any) -> str:
    """A value as text that is the same in every process: no order of a set."""
    try:
        return msgspec.json.encode(value, order="deterministic").decode()
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return printable(repr(value))


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        import io

        import zstandard

        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()
    text = data.decode().removesuffix("\n")
    return text.split("\n") if text else []  # not splitlines, which parts lines of JSON at U+2028


def _parquet_rows(path: Path) -> list[str]:
    import pyarrow.parquet

    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path] * path.exists()
    return [_text(row) for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()]


def _sqlite_rows(path: Path, table: str) -> list[str]:
    import apsw

    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        name = table.replace('"', '""')
        return [_text(list(row)) for row in connection.execute(f'SELECT * FROM "{name}" ORDER BY rowid')]
    finally:
        connection.close()
