"""What Arrow would change without a word when it takes a value into a column: refused, so that nothing is lost."""

from __future__ import annotations

import datetime as dt
import enum
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from penstock.files.arrow import arrow

__all__ = ["check_exact", "is_lax"]

_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
_LISTS = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")


def is_lax(kind: Any) -> bool:
    """Whether Arrow takes values for this type that it doesn't keep whole."""
    types = arrow().types
    if types.is_struct(kind) or _scalar_check(kind) is not None:
        return True
    if types.is_dictionary(kind):
        return is_lax(kind.value_type)
    return any(is_lax(kind.field(at).type) for at in range(kind.num_fields))


def check_exact(values: Iterable[Any], kind: Any) -> None:
    """Raise ValueError for a value that a column of this type would hold otherwise than it is.

    A fraction in a column of integers, days or seconds, which Arrow cuts off; a part of a second that the column's unit
    can't hold; a datetime without a time zone in a column with one, or the reverse, which it takes for UTC; a dict with
    keys that its struct type lacks, which it drops; and any of these inside a list, map or struct. A float that a
    narrower column rounds is kept as such a column keeps floats.
    """
    types = arrow().types
    scalar = _scalar_check(kind)
    if scalar is not None:
        plain, check = scalar
        values = list(values)
        if not set(map(type, values)) <= plain:
            for value in values:
                if type(value) not in plain:
                    check(value.value if isinstance(value, enum.Enum) else value, kind)
    elif types.is_dictionary(kind):
        check_exact(values, kind.value_type)
    elif types.is_struct(kind):
        for value in values:
            if isinstance(value, Mapping):
                _check_struct(value, kind)
    elif types.is_map(kind):
        for value in values:
            pairs = list(value.items() if isinstance(value, Mapping) else value or ())
            check_exact([key for key, _ in pairs], kind.key_type)
            check_exact([item for _, item in pairs], kind.item_type)
    elif any(getattr(types, test)(kind) for test in _LISTS) and is_lax(kind.value_type):
        parts: list[Any] = []
        for value in values:
            if value is not None:
                parts += value.tolist() if _is_of_numbers(value) else value
        check_exact(parts, kind.value_type)


def _check_struct(value: Mapping[str, Any], kind: Any) -> None:
    names = [kind.field(at).name for at in range(kind.num_fields)]
    further = [str(name) for name in value if name not in names]
    if further:
        raise ValueError(f"it has no field {', '.join(further)}")
    for at, name in enumerate(names):
        check_exact([value.get(name)], kind.field(at).type)


def _scalar_check(kind: Any) -> tuple[frozenset[type], Callable[[Any, Any], None]] | None:
    """Which types such a column always keeps whole, and the check of all others; None if it keeps all it takes."""
    types = arrow().types
    if types.is_integer(kind):
        return _WHOLE, _check_number
    if types.is_date(kind):
        return _DAYS, _check_day
    if types.is_time(kind) or types.is_duration(kind) or types.is_timestamp(kind):
        return _NONE, _check_moment
    return None


_NONE = frozenset({type(None)})
_WHOLE = frozenset({type(None), int, bool})
_DAYS = frozenset({type(None), dt.date})


def _check_number(value: Any, kind: Any) -> None:
    if _is_numpy_time(value):
        raise ValueError("it is a time and no number")
    if int(value) != value:
        raise ValueError(f"it would become {int(value)}")


def _check_day(value: Any, kind: Any) -> None:
    if isinstance(value, dt.datetime):
        if value.tzinfo is not None or value.time() != dt.time():
            raise ValueError("the column holds days, without the time")
    elif not isinstance(value, dt.date) and not _is_numpy_time(value, "datetime64"):
        _check_number(value, kind)


def _check_moment(value: Any, kind: Any) -> None:
    if isinstance(value, dt.datetime) and (value.tzinfo is None) != (kind.tz is None):
        has, lacks = ("the column", "it") if value.tzinfo is None else ("it", "the column")
        raise ValueError(f"{has} has a time zone, and {lacks} has none")
    if isinstance(value, (dt.datetime, dt.time)):
        rest = value.microsecond
    elif isinstance(value, dt.timedelta):
        rest = value.microseconds
    elif _is_numpy_time(value) and not arrow().types.is_time(kind):
        return  # Arrow itself refuses one that the unit can't hold
    else:
        _check_number(value, kind)
        return
    if rest % _MICROSECONDS.get(kind.unit, 1):
        raise ValueError(f"the column counts whole {kind.unit}")


def _is_of_numbers(value: Any) -> bool:
    """Whether it is a vector of NumPy's, of plain numbers."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf" and value.ndim == 1


def _is_numpy_time(value: Any, *names: str) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = names or ("datetime64", "timedelta64")
    return numpy is not None and isinstance(value, tuple(getattr(numpy, name) for name in kinds))
