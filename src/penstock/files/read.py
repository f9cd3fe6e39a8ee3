"""``ps.read``: flows over files. Each function looks which files there are and returns a Flow; nothing is read yet.

``pattern`` is a path, a glob (``*``, ``?``, ``**``; sorted), or a list of them. ``name`` and ``id`` are those of
``ps.Flow``; ``defaults`` are stage parameters for all stages, and their ``on_error`` also says what becomes of what
can't be read. All are read in bounded memory, and resumed where an earlier run of the job ended; files that grew since,
and new ones, are read on from there, and any other change stops the job with ResumeMismatch. So does naming a file
otherwise than before (absolutely, or from another directory): it is known by its path as given. A run of a job reads
what there was when it began, and leaves to the next run what comes meanwhile.
"""

# id= and type= are the names that users know

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from penstock.files.paths import FileSet, Pattern
from penstock.flow.contract import Failed
from penstock.flow.flow import Flow

if TYPE_CHECKING:
    from penstock.flow.stage import Defaults

__all__ = ["csv", "dead", "files", "jsonl", "lines", "parquet"]

T = TypeVar("T")
_Id = str | Callable[[Any], Any] | None


def lines(
    pattern: Pattern,
    *,
    encoding: str = "utf-8",
    id: _Id = None,
    name: str | None = None,
    **defaults: Unpack[Defaults],
) -> Flow[str]:
    """Each line of text files as a string, without its newline. ``.gz`` and ``.zst`` are decompressed.

    ``encoding``: any in which a newline is one byte. A line that can't be decoded, or is longer than 64 MB, is an
    error with file and line, subject to ``on_error``.

    ``id``, ``name`` and the further ``defaults``: see ``Flow``.

    Raises MissingInput if nothing matches, PlanError for an encoding that won't do.

    >>> import pathlib, tempfile
    >>> import penstock as ps
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "example.txt")
    ...     _ = path.write_text("one\\ntwo")
    ...     ps.read.lines(path).collect_sync()
    ['one', 'two']
    """
    from penstock.files.text import LineSource

    return Flow(LineSource(FileSet("lines", pattern), encoding), name=name, id=id, **defaults)


@overload
def jsonl(
    pattern: Pattern, *, type: type[T], id: _Id = ..., name: str | None = ..., **defaults: Unpack[Defaults]
) -> Flow[T]: ...
@overload
def jsonl(
    pattern: Pattern, *, type: Any = ..., id: _Id = ..., name: str | None = ..., **defaults: Unpack[Defaults]
) -> Flow[Any]: ...
def jsonl(
    pattern: Pattern, *, type: Any = None, id: _Id = None, name: str | None = None, **defaults: Unpack[Defaults]
) -> Flow[Any]:
    """Each line of JSON-lines files as a value. ``.gz`` and ``.zst`` are decompressed; blank lines are passed over.

    ``type``: a Struct, dataclass, TypedDict or built-in type that each value must have. A line that isn't JSON, or
    not of the type, is an error with file, line and reason, subject to ``on_error``.

    ``id``, ``name`` and the further ``defaults``: see ``Flow``.

    Raises MissingInput if nothing matches, PlanError for a type that can't be decoded.

    >>> import pathlib, tempfile
    >>> import penstock as ps
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "example.jsonl")
    ...     _ = path.write_text('{"a": 1}\\n{"a": 2}\\n')
    ...     ps.read.jsonl(path).collect_sync()
    [{'a': 1}, {'a': 2}]
    """
    from penstock.files.text import JsonLinesSource

    return Flow(JsonLinesSource(FileSet("jsonl", pattern), type), name=name, id=id, **defaults)


@overload
def csv(
    pattern: Pattern,
    *,
    type: type[T],
    delimiter: str = ...,
    encoding: str = ...,
    id: _Id = ...,
    name: str | None = ...,
    **defaults: Unpack[Defaults],
) -> Flow[T]: ...
@overload
def csv(
    pattern: Pattern,
    *,
    type: None = ...,
    delimiter: str = ...,
    encoding: str = ...,
    id: _Id = ...,
    name: str | None = ...,
    **defaults: Unpack[Defaults],
) -> Flow[dict[str, str]]: ...
def csv(
    pattern: Pattern,
    *,
    type: Any = None,
    delimiter: str = ",",
    encoding: str = "utf-8",
    id: _Id = None,
    name: str | None = None,
    **defaults: Unpack[Defaults],
) -> Flow[Any]:
    """Each row of CSV files, below the header, as a dict of strings. ``.gz`` and ``.zst`` are decompressed.

    ``type``: a Struct, dataclass or TypedDict into which each row is converted: ``"3"`` becomes an int where one is
    wanted, an empty cell None where None is allowed and a string isn't. A row with another number of fields than the
    header, or that doesn't convert, is an error with file, line and reason, subject to ``on_error``; so is a file
    whose header can't be read. Quoted fields may hold newlines.

    ``id``, ``name`` and the further ``defaults``: see ``Flow``.

    Raises MissingInput if nothing matches; PlanError for a type, delimiter or encoding that won't do.

    >>> import pathlib, tempfile
    >>> import penstock as ps
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "example.csv")
    ...     _ = path.write_text("name,age\\nAda,36\\n")
    ...     ps.read.csv(path).collect_sync()
    [{'name': 'Ada', 'age': '36'}]
    """
    from penstock.files.table import CsvSource

    return Flow(CsvSource(FileSet("csv", pattern), type, delimiter, encoding), name=name, id=id, **defaults)


@overload
def parquet(
    pattern: Pattern, *, type: type[T], id: _Id = ..., name: str | None = ..., **defaults: Unpack[Defaults]
) -> Flow[T]: ...
@overload
def parquet(
    pattern: Pattern, *, type: None = ..., id: _Id = ..., name: str | None = ..., **defaults: Unpack[Defaults]
) -> Flow[dict[str, Any]]: ...
def parquet(
    pattern: Pattern, *, type: Any = None, id: _Id = None, name: str | None = None, **defaults: Unpack[Defaults]
) -> Flow[Any]:
    """Each row of Parquet files as a dict. A directory, such as ``ps.write.parquet`` makes, stands for its files.

    ``type``: a Struct, dataclass or TypedDict into which each row is converted; one that doesn't convert is an error
    with file and row, subject to ``on_error``. So is a file that can't be read, and a row group: one error each, whose
    item is the path. Read a row group at a time.

    ``id``, ``name`` and the further ``defaults``: see ``Flow``.

    Raises MissingInput if nothing matches, MissingDependency without pyarrow (``penstock[parquet]``), PlanError for
    a type that can't be decoded.
    """
    from penstock.files.table import ParquetSource

    source = ParquetSource(FileSet("parquet", pattern, suffix=".parquet", grows=False), type)
    return Flow(source, name=name, id=id, **defaults)


def files(pattern: Pattern, *, id: _Id = None, name: str | None = None, **defaults: Unpack[Defaults]) -> Flow[Path]:
    """The matching files themselves, as paths; nothing of them is read, so a change is noticed by size alone.

    ``id``, ``name`` and the further ``defaults``: see ``Flow``.

    Raises MissingInput if nothing matches.

    >>> import pathlib, tempfile
    >>> import penstock as ps
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "example.txt")
    ...     _ = path.write_text("one")
    ...     ps.read.files(f"{folder}/example.*").map(lambda path: path.suffix).collect_sync()
    ['.txt']
    """
    from penstock.files.source import PathSource

    return Flow(PathSource(FileSet("files", pattern, contents=False)), name=name, id=id, **defaults)


def dead(
    output: str | os.PathLike[str], *, table: str | None = None, name: str | None = None, **defaults: Unpack[Defaults]
) -> Flow[Failed]:
    """What failed for good, beside an output, as ``Failed``: item, position, stage, reason, error, attempts.

    To redo it, give a flow of it to the same output: what succeeds is added there and its letter removed, in one
    transaction; what dies again keeps its letter. ``table``: for an SQLite database that holds several outputs.
    An item that couldn't be stored is read back as its repr. Items that aren't plain JSON are stored by pickle:
    read only what your own jobs wrote.

    Raises MissingInput if the output has no journal, JournalError if that can't be read.
    """
    from penstock.files.dead import DeadSource

    return Flow(DeadSource(output, table), name=name, **defaults)
