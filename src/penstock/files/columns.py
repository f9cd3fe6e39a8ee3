"""Rows as Arrow columns: inferring a schema, converting by it, and naming the item and column that don't fit."""

from __future__ import annotations

import datetime as dt
import enum
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.errors import CannotEncode, MissingDependency, OutputRejected

__all__ = ["arrow", "columns_of", "infer", "parquet_module", "refusal"]


def arrow() -> Any:
    """The pyarrow package, or MissingDependency."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingDependency("pyarrow", "Parquet", "parquet") from None
    return pa


def parquet_module() -> Any:
    """pyarrow's Parquet module, or MissingDependency."""
    arrow()
    import pyarrow.parquet as module

    return module


def refusal(schema: Any) -> str | None:
    """Why Parquet can't hold this schema; None if it can."""
    pa = arrow()
    try:
        parquet_module().write_table(schema.empty_table(), pa.BufferOutputStream())
    except (pa.ArrowException, TypeError, ValueError) as error:
        return str(error)
    return None


def infer(rows: Sequence[Mapping[str, Any]], known: Any = None) -> Any:
    """The schema of some rows; ``known``: that of earlier ones, of which only the columns without a type are open."""
    pa = arrow()
    if known is not None and not any(pa.types.is_null(kind) for kind in known.types):
        return known
    names = list(dict.fromkeys(str(name) for row in rows for name in row)) if known is None else known.names
    fields = []
    for at, name in enumerate(names):
        if known is not None and not pa.types.is_null(known.field(at).type):
            fields.append(known.field(at))
            continue
        values = [row.get(name) for row in rows]
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
            if _is_lax(field.type):
                _check_parts(values, field.type)
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
        _check_parts([value], field.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        problem = "has no type in Parquet" if is_open else f"doesn't fit {field.type}"
        return f"{value!r:.60} {problem} ({error})"
    if is_open:
        return "it was null in all the rows that the schema was inferred from; give write.parquet a schema="
    return "it may not be null" if value is None and not field.nullable else None


def _is_lax(kind: Any) -> bool:
    """Whether Arrow takes values for this type that it doesn't keep whole."""
    pa = arrow()
    if pa.types.is_struct(kind) or pa.types.is_timestamp(kind):
        return True
    return any(_is_lax(kind.field(at).type) for at in range(kind.num_fields))


def _check_parts(values: Any, kind: Any) -> None:
    """Raise ValueError for what Arrow would change without a word: a dict with keys that its struct type lacks, which
    it drops, and a datetime without a time zone in a column with one (or the reverse), which it takes for UTC."""
    pa = arrow()
    if pa.types.is_timestamp(kind):
        for value in values:
            if isinstance(value, dt.datetime) and (value.tzinfo is None) != (kind.tz is None):
                has, lacks = ("the column", "it") if value.tzinfo is None else ("it", "the column")
                raise ValueError(f"{has} has a time zone, and {lacks} has none")
    elif pa.types.is_struct(kind):
        names = [kind.field(at).name for at in range(kind.num_fields)]
        for value in values:
            if isinstance(value, Mapping):
                further = [str(name) for name in value if name not in names]
                if further:
                    raise ValueError(f"it has no field {', '.join(further)}")
                for at, name in enumerate(names):
                    _check_parts([value.get(name)], kind.field(at).type)
    elif any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        for value in values:
            if value is not None and _is_lax(kind.value_type):
                _check_parts(value, kind.value_type)
