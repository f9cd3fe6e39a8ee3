"""What outputs made of rows share: values as rows of fixed columns, and cells that hold what isn't a scalar."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from penstock.errors import CannotEncode, OutputRejected
from penstock.flow.codec import encode_json, row_of
from penstock.flow.contract import Origin

__all__ = ["cell", "each_row", "fits"]

T = TypeVar("T")


def each_row(
    outputs: Sequence[tuple[Origin, Sequence[Any]]], target: str, make: Callable[[Mapping[str, Any]], T]
) -> list[T]:
    """What ``make`` makes of each output's row. Raises OutputRejected for those where it raises CannotEncode."""
    made: list[T] = []
    rejected: list[tuple[int, Exception]] = []
    for index, (_, values) in enumerate(outputs):
        try:
            made.extend([make(_named(row_of(value, target), target)) for value in values])
        except CannotEncode as error:
            rejected.append((index, error))
    if rejected:
        raise OutputRejected(rejected)
    return made


def _named(row: Mapping[Any, Any], target: str) -> Mapping[str, Any]:
    for name in row:
        if not isinstance(name, str):
            raise CannotEncode(target, "row", f"columns are named by text, and its key {name!r} is none")
    return row


def fits(row: Mapping[str, Any], columns: Sequence[str], target: str) -> None:
    """Raise CannotEncode unless the row has exactly these columns, in any order."""
    if len(row) == len(columns) and all(column in row for column in columns):
        return
    missing = [column for column in columns if column not in row]
    further = [str(key) for key in row if key not in columns]
    wrong = [f"has no {', '.join(missing)}"] if missing else []
    wrong += [f"has {', '.join(further)} besides"] if further else []
    raise CannotEncode(target, "row", f"its columns are {', '.join(columns)}, and this row {' and '.join(wrong)}")


def cell(value: Any, target: str) -> Any:
    """A value for one cell: None, str, int, float and bytes (also as bytearray or memoryview) as they are; numpy
    scalars as numbers, dates, paths and Enums as text, and whatever has parts (lists, dicts, arrays) as JSON. Raises
    CannotEncode."""
    if value is None or type(value) in (str, int, float, bytes):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return cell(value.item(), target)
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    data = encode_json(value, target)
    if data[:1] == b'"':
        return msgspec.json.decode(data)
    return data.decode()
