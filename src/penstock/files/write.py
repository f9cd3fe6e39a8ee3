"""``ps.write``: where a flow's outputs go. Each function returns a sink for ``.to(...)``; nothing is opened yet.

All four commit outputs and progress in one act, so that a job which is killed and run again ends with the output of
one that was never disturbed. The journal stands beside the output (``out.jsonl.journal``), for ``sqlite`` in the same
database. While a job runs, no other can write the same output, in any process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.files.csvfile import CsvOutput
    from penstock.files.jsonl import JsonLinesOutput
    from penstock.files.parquet import ParquetOutput
    from penstock.files.sqlite import SqliteOutput

__all__ = ["csv", "jsonl", "parquet", "sqlite"]


def jsonl(path: str | os.PathLike[str]) -> JsonLinesOutput:
    """Write one line of JSON for each output: any JSON value, dataclass, Struct, date, numpy array, ``Failed`` …

    ``path``: also ``.jsonl.gz`` and ``.jsonl.zst``, compressed anew at each commit, so commits there are a second
    apart. Directories are made. NaN and the infinities become ``null``; bytes become base64.

    Raises, when run: OutputInUse, ForeignOutput (a file that isn't this job's is never cut), ResumeMismatch,
    WriteFailed for a full disk. A value without a JSON form is that item's error, CannotEncode.

    >>> import penstock as ps
    >>> ps.write.jsonl("out.jsonl")
    write.jsonl('out.jsonl')
    """
    from penstock.files.jsonl import JsonLinesOutput

    return JsonLinesOutput(path)


def csv(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> CsvOutput:
    """Write one row for each output, a dict, dataclass or Struct, below a header.

    ``columns``: the header, also of a table without rows; by default the first row's keys. A row with other keys is
    that item's error. None is an empty cell, True is ``true``, lists and dicts are JSON text. ``.csv.gz`` and
    ``.csv.zst`` as for ``jsonl``.

    Raises, when run, what ``jsonl`` raises.

    >>> import penstock as ps
    >>> ps.write.csv("out.csv", columns=["name", "score"])
    write.csv('out.csv')
    """
    from penstock.files.csvfile import CsvOutput

    return CsvOutput(path, columns)


def parquet(
    path: str | os.PathLike[str], schema: Any = None, rows: int = 100_000, max_age: float = 5.0
) -> ParquetOutput:
    """Write rows (dicts, dataclasses, Structs) into a directory of Parquet files, which appear when they count.

    ``schema``: a pyarrow.Schema; by default inferred from the first rows, where floats among integers make the column
    one of floats. Arrays become lists, also of lists, Enums their values, paths text. A value that its column wouldn't
    hold as it is is that item's error: a fraction among integers, a time of day among dates, a datetime without a
    time zone among those with one. ``rows``: the most rows of a file. ``max_age``: seconds between commits; each ends
    a file.

    Needs pyarrow (``penstock[parquet]``), else MissingDependency. Raises, when run, what ``jsonl`` raises.

    >>> import penstock as ps
    >>> ps.write.parquet("vectors.parquet", rows=10_000)
    write.parquet('vectors.parquet')
    """
    from penstock.files.parquet import ParquetOutput

    return ParquetOutput(path, schema, rows, max_age)


def sqlite(path: str | os.PathLike[str], table: str = "outputs", key: str | None = None) -> SqliteOutput:
    """Insert rows (dicts, dataclasses, Structs) into ``table`` of an SQLite database, with their progress.

    The table is made from the first row's keys, or may be there, empty. Rows may lack columns; a column that the
    table lacks is that item's error, and so is what a table of your own refuses (by CHECK, UNIQUE, a trigger …): into
    such a table rows go at once, so that other programs can hardly write to the database while the job runs.
    ``key``: the column that identifies a row; a later row replaces an earlier one of the same key. Lists, dicts and
    arrays are stored as JSON text. The database is put into WAL mode, and holds the journal in tables that begin with
    ``_penstock_``. While a job runs, look at it from another process: in this one, the standard library's ``sqlite3``
    doesn't see the job's locks, nor the job those of ``sqlite3``.

    Raises, when run, what ``jsonl`` raises.

    >>> import penstock as ps
    >>> ps.write.sqlite("out.db", table="scores", key="id")
    write.sqlite('out.db')
    """
    from penstock.files.sqlite import SqliteOutput

    return SqliteOutput(path, table, key)
