"""Between values and bytes: decoding by type, JSON lines, the keys of ``id=``, and any item at all.

JSON here is msgspec's, so the types a user names (Struct, dataclass, TypedDict, built-in) are checked as they are read.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import isfinite
from typing import Any, TypeVar

import msgspec

from penstock.errors import CannotEncode, IdError, PlanError
from penstock.flow.text import with_article

__all__ = [
    "converter",
    "decoder",
    "encode_json",
    "encode_lines",
    "id_key",
    "is_plain",
    "pack",
    "row_digest",
    "row_of",
    "unpack",
]

T = TypeVar("T")

_JSON, _PICKLE, _REPR = b"j", b"p", b"r"
_REPR_LENGTH = 10_000


def decoder(kind: Any = None) -> Callable[[bytes], Any]:
    """A function that decodes one JSON value and checks it against ``kind``; None: any JSON value.

    The function raises msgspec.DecodeError (or its ValidationError), whose text says what is wrong where.
    Raises PlanError for a type that JSON can't be decoded into.

    >>> decoder(dict[str, int])(b'{"a": 1}')
    {'a': 1}
    """
    try:
        return msgspec.json.Decoder(Any if kind is None else kind).decode
    except TypeError as error:
        raise _unusable(kind, error) from None


def converter(kind: Any, *, text: bool = False) -> Callable[[dict[str, Any]], Any]:
    """A function that turns a row (a dict by column) into ``kind``, a Struct, dataclass, TypedDict or dict type.

    ``text``: the values are strings, as in CSV, and are parsed: ``"3"`` is an int where an int is wanted, and an
    empty cell is None where None is allowed and a string isn't. The function raises msgspec.ValidationError.
    Raises PlanError for a type that a row can't be converted into.

    >>> converter(dict[str, int], text=True)({"a": "1"})
    {'a': 1}
    """
    try:
        msgspec.json.Decoder(kind)
    except TypeError as error:
        raise _unusable(kind, error) from None
    convert = msgspec.convert
    if not text:
        return lambda row: convert(row, kind)
    empty_is_none = _nullable_fields(kind)
    if not empty_is_none:
        return lambda row: convert(row, kind, strict=False)

    def from_text(row: dict[str, Any]) -> Any:
        for name in empty_is_none:
            if row.get(name) == "":
                row[name] = None
        return convert(row, kind, strict=False)

    return from_text


def _unusable(kind: Any, error: TypeError) -> PlanError:
    name = getattr(kind, "__name__", str(kind))
    return PlanError(
        f"type={name} can't be decoded: {error}", "Give a msgspec Struct, a dataclass, a TypedDict or a built-in type"
    )


def _nullable_fields(kind: Any) -> list[str]:
    """The fields of ``kind`` for which an empty cell can only mean None."""
    found = []
    for field in getattr(msgspec.inspect.type_info(kind), "fields", ()):
        if isinstance(field.type, msgspec.inspect.UnionType):
            kinds = {one.__class__ for one in field.type.types}
            if msgspec.inspect.NoneType in kinds and msgspec.inspect.StrType not in kinds:
                found.append(field.encode_name)
    return found


def _plain_of(value: Any) -> Any:
    """What stands in JSON for a value that msgspec doesn't know; raises NotImplementedError if nothing does."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return value.tolist()
        if isinstance(value, numpy.generic):
            return value.item()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Sequence, AbstractSet, deque)):
        return list(value)
    raise NotImplementedError(f"JSON has no form for a {type(value).__name__}")


_encoder = msgspec.json.Encoder(enc_hook=_plain_of)
_canonical = msgspec.json.Encoder(enc_hook=_plain_of, order="deterministic")
_REFUSALS = (TypeError, ValueError, NotImplementedError, OverflowError, RecursionError, msgspec.MsgspecError)


def encode_json(value: Any, target: str = "JSON") -> bytes:
    """One line of JSON, without the newline.

    Beyond JSON's own: dataclasses, Structs and TypedDicts by field, Enums by value, dates in ISO form, bytes in
    base64, paths as text, tuples and sets as lists, numpy arrays as nested lists and numpy scalars as numbers.
    NaN and the infinities become ``null``, since JSON has no word for them.

    Raises CannotEncode, which names ``target``, for anything else.

    >>> encode_json({"a": (1, 2), "b": float("nan")})
    b'{"a":[1,2],"b":null}'
    """
    try:
        return _encoder.encode(value)
    except _REFUSALS as error:
        raise CannotEncode(target, type(value).__name__, _why(value, error)) from None


def _why(value: Any, error: Exception) -> str:
    """Why a value has no JSON form. What the encoder says of a dict's key is of no use: it asks for a plainer value."""
    try:
        found = _bad_key(value)
    except RecursionError:
        return "it is nested too deeply, or holds itself"
    if found is not None:
        return f"the keys of JSON's objects are text, and {_brief(found[0])} is {with_article(type(found[0]).__name__)}"
    return "it is nested too deeply, or holds itself" if isinstance(error, RecursionError) else str(error)


def _bad_key(value: Any) -> tuple[Any] | None:
    """The first key in a value (in a tuple, since it may be None) that has no form as text."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if type(key) is not str:
                try:
                    _encoder.encode({key: None})
                except _REFUSALS:
                    return (key,)
            found = _bad_key(part)
            if found is not None:
                return found
    elif isinstance(value, (list, tuple, AbstractSet, deque)):
        return next(filter(None, map(_bad_key, value)), None)
    elif isinstance(value, msgspec.Struct) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return _bad_key(row_of(value, ""))
    return None


def encode_lines(values: list[Any], target: str = "JSON") -> bytes:
    """The lines of several values, each with its newline. Raises CannotEncode if one of them can't be encoded."""
    try:
        return _encoder.encode_lines(values)
    except _REFUSALS as error:
        raise CannotEncode(target, "value", str(error)) from None


def row_of(value: Any, target: str) -> Mapping[str, Any]:
    """A value as a row, by column: a mapping as it is, a dataclass or Struct by its fields.

    Raises CannotEncode, which names ``target``, for what has no columns.

    >>> row_of({"a": 1}, "out.csv")
    {'a': 1}
    """
    if isinstance(value, Mapping):
        return value
    names: Iterable[str] | None = None
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
    if names is None:
        raise CannotEncode(
            target, type(value).__name__, "a row is wanted: a dict, a dataclass or a Struct, with a value by column"
        )
    return {name: getattr(value, name) for name in names}


_MISSING = object()


def id_key(value: Any, field: str | Callable[[Any], Any], parameter: str = "id=") -> str:
    """The key that identifies an item under ``id=`` (or another ``parameter``): ``i:`` and the id as JSON.

    ``field`` is a field's name (a key of a mapping, or an attribute) or a function of the item. Raises IdError if the
    id is missing, null, or can't be written as JSON, and if finding it raises, with that as its cause.

    >>> id_key({"doc": "a7"}, "doc")
    'i:"a7"'
    """
    what = f"{field!r}" if isinstance(field, str) else parameter
    try:
        if not isinstance(field, str):
            found = field(value)
        elif isinstance(value, Mapping):
            found = value.get(field, _MISSING)
        else:
            found = getattr(value, field, _MISSING)
    except Exception as error:  # a user's function or property may raise anything
        raise IdError(f"{what} of the item {_brief(value)} raised {type(error).__name__}: {error}") from error
    if found is _MISSING:
        raise IdError(f"the item {_brief(value)} has no {what}")
    if found is None or (isinstance(found, float) and not isfinite(found)):
        raise IdError(f"{what} of the item {_brief(value)} is {found}")
    try:
        return "i:" + _canonical.encode(found).decode()
    except _REFUSALS as error:
        raise IdError(f"{what} of the item {_brief(value)} can't be written as JSON ({error})") from None


def _brief(value: Any) -> str:
    shown = _shown(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def row_digest(value: Any) -> bytes:
    """Sixteen bytes that are the same for the same item in every process, and differ for a changed one."""
    try:
        data = _canonical.encode(value)
    except _REFUSALS:
        data = pack(value)
    return hashlib.blake2b(data, digest_size=16).digest()


def pack(value: Any) -> bytes:
    """Any item as bytes, for ``unpack``: plain JSON types as JSON, others pickled, what can't be pickled as its repr.

    >>> unpack(pack((1, {"a": None})))
    (1, {'a': None})
    """
    try:
        if is_plain(value):
            return _JSON + _encoder.encode(value)
    except (ValueError, RecursionError):
        pass
    shown = _shown(value).encode("utf-8", "backslashreplace")
    try:
        pickled = _pickled(value)
    except Exception:  # a user's __reduce__ may raise anything; the repr is then all there is
        return _REPR + shown
    return _PICKLE + len(shown).to_bytes(4, "little") + shown + pickled


def unpack(data: bytes) -> Any:
    """What ``pack`` was given; its repr, a string, if it couldn't be pickled or its class can't be found here.

    Reads pickles: only for files that this user's own jobs wrote.
    """
    kind, body = data[:1], data[1:]
    if kind == _JSON:
        return msgspec.json.decode(body)
    if kind == _REPR:
        return body.decode()
    length = int.from_bytes(body[:4], "little")
    try:
        return pickle.loads(body[4 + length :])
    except Exception:  # a class that moved, or that belongs to another script: anything may be raised
        return body[4 : 4 + length].decode()


def _pickled(value: Any) -> bytes:
    from penstock.place.pickling import dumps  # imported on use: few items need it

    return dumps(value, {})


def _shown(value: Any) -> str:
    try:
        return repr(value)[:_REPR_LENGTH]
    except Exception:  # a user's __repr__ may raise anything
        return f"<{type(value).__name__}>"


_ATOMS = frozenset({str, int, bool, type(None)})


def is_plain(value: Any) -> bool:
    """Whether a value is made of JSON's types alone, so that decoding its JSON gives an equal one."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is float:
        return isfinite(value)
    if kind is list:
        return all(map(is_plain, value))
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(is_plain, value.values()))
    return False
