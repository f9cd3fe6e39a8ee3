"""Rows as Arrow columns: inferring a schema, converting by it, and naming the item and column that don't fit."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.errors import CannotEncode, OutputRejected
from penstock.files.arrow import arrow, parquet_module
from penstock.files.exact import check_exact, is_lax

__all__ = ["columns_of", "infer", "refusal", "retyped"]


def refusal(schema: Any) -> str | None:
    """Why Parquet can't hold this schema; None if it can."""
    pa = arrow()
    try:
        parquet_module().write_table(schema.empty_table(), pa.BufferOutputStream())
    except (pa.ArrowException, TypeError, ValueError) as error:
        return str(error)
    return None


def infer(rows: Sequence[Mapping[str, Any]], known: Any = None, *, widening: bool = True) -> Any:
    """The schema of some rows; ``known``: that of earlier ones, of which a column without a type is open.

    ``widening``: a column of integers becomes one of floats when the first float comes.
    """
    pa = arrow()
    names = list(dict.fromkeys(str(name) for row in rows for name in row)) if known is None else known.names
    fields = []
    for at, name in enumerate(names):
        before = known.field(at).type if known is not None else pa.null()
        values = [row.get(name) for row in rows]
        if not pa.types.is_null(before):
            widens = widening and before.equals(pa.int64()) and any(isinstance(value, float) for value in values)
            fields.append(pa.field(name, pa.float64()) if widens else known.field(at))
            continue
        try:
            kind = _array(values).type
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            kind = _first_type(values)
        fields.append(pa.field(name, kind))
    return pa.schema(fields)


def _array(values: list[Any], kind: Any = None) -> Any:
    """Values as an array. What Arrow doesn't take as it is, it may take in a plainer form."""
    pa = arrow()
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.array([_plain(value) for value in values], type=kind)


def _plain(value: Any) -> Any:
    """Arrays of several dimensions as lists of arrays of one, Enums by value, paths as text, in whatever holds them."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return [_plain(part) for part in value] if value.ndim > 1 else value if value.ndim else value.item()
    if numpy is not None and isinstance(value, numpy.datetime64):
        item = value.item()
        return value if isinstance(item, int) else item  # nanoseconds, which Python's own datetime can't hold
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def retyped(column: Any, kind: Any) -> Any:
    """A column in the type that later rows gave it. Raises ArrowInvalid for integers that no float holds."""
    pa = arrow()
    if column.type.equals(kind):
        return column
    return pa.nulls(len(column), kind) if pa.types.is_null(column.type) else column.cast(kind)


def _first_type(values: list[Any]) -> Any:
    """The type of the first value that has one: the others will be named as not fitting."""
    pa = arrow()
    for value in values:
        if value is not None:
            try:
                return _array([value]).type
            except (pa.ArrowException, OverflowError, TypeError, ValueError):
                continue
    return pa.null()


def columns_of(rows: Sequence[Mapping[str, Any]], owners: Sequence[int], schema: Any, target: str) -> list[Any]:
    """One array a column. Raises OutputRejected: ``owners`` says which output a row belongs to."""
    pa = arrow()
    rejected: dict[int, Exception] = {}
    names = set(schema.names)
    for row, owner in zip(rows, owners, strict=True):
        further = [str(name) for name in row if name not in names]
        if further:
            reason = f"the schema has no column {', '.join(further)}; its columns are {', '.join(schema.names)}"
            rejected.setdefault(owner, CannotEncode(target, "row", reason))
    arrays = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        try:
            array = _array(values, field.type)
            if is_lax(field.type):
                check_exact(values, field.type)
            if array.null_count and not field.nullable:
                raise ValueError("it may not be null")
            arrays.append(array)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            for value, owner in zip(values, owners, strict=True):
                misfit = _misfit(value, field)
                if misfit is not None:
                    name = type(value).__name__
                    rejected.setdefault(owner, CannotEncode(target, name, f"column {field.name!r}: {misfit}"))
    if rejected:
        raise OutputRejected(sorted(rejected.items()))
    return arrays


def _misfit(value: Any, field: Any) -> str | None:
    pa = arrow()
    is_open = pa.types.is_null(field.type) and value is not None
    try:
        _array([value], None if is_open else field.type)
        check_exact([value], field.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        problem = "has no type in Parquet" if is_open else f"doesn't fit {field.type}"
        return f"{value!r:.60} {problem} ({error})"
    if is_open:
        return "it was null in all the rows that the schema was inferred from; give write.parquet a schema="
    return "it may not be null" if value is None and not field.nullable else None
