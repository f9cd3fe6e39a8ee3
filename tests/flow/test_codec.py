"""Between values and bytes: decoding by type, JSON lines, ids, and items that must survive as they are."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import CannotEncode, IdError, PlanError
from penstock.flow.codec import (
    converter,
    decoder,
    encode_json,
    encode_lines,
    id_key,
    pack,
    row_digest,
    row_of,
    unpack,
)
from penstock.flow.contract import Failed


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: float | None = None


class Doc(msgspec.Struct):
    id: int
    text: str
    score: float | None = None
    note: str | None = None


class Row(TypedDict):
    n: int


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
any_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[]))  # lone surrogates too
    | st.binary()
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=4)
    ),
    max_leaves=20,
)


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same types all the way down: 1, 1.0 and True are three values."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(map(same, left.values(), right.values()))
    return bool(left == right)


@settings(max_examples=50)
@given(any_values)
def test_packed_items_come_back_as_they_were(value: Any) -> None:
    assert same(unpack(pack(value)), value)


@given(json_values)
def test_plain_items_are_stored_as_json(value: Any) -> None:
    """So that reading them needs no pickle."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return
    assert pack(value)[:1] == b"j"


@pytest.mark.parametrize(
    "value", [Point(1), Path("a"), {1, 2}, (1, [2]), Colour.RED, float("inf"), Doc(1, "a"), b"a", 2**80, {1: 2}]
)
def test_items_of_other_types_come_back(value: Any) -> None:
    assert unpack(pack(value)) == value


def test_arrays_and_nan_come_back() -> None:
    assert math.isnan(unpack(pack(float("nan"))))
    assert np.array_equal(unpack(pack(np.arange(3))), np.arange(3))


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")

    def __repr__(self) -> str:
        return "<the thing>"


class Unspeakable(Unpicklable):
    def __repr__(self) -> str:
        raise RuntimeError("no name")


def test_what_cannot_be_pickled_comes_back_as_its_repr() -> None:
    assert unpack(pack(Unpicklable())) == "<the thing>"
    assert unpack(pack([Unpicklable()])) == "[<the thing>]"
    assert unpack(pack(Unspeakable())) == "<Unspeakable>"


def test_an_endless_item_can_be_packed() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert unpack(pack(endless)) is not None


def test_items_of_a_script_are_read_by_another(tmp_path: Path) -> None:
    """A class of __main__ travels by value, or the item is its repr: never an error."""
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses, sys\n"
        "from penstock.flow.codec import pack\n"
        "@dataclasses.dataclass\n"
        "class Mine:\n"
        "    x: int\n"
        "sys.stdout.buffer.write(pack(Mine(3)))\n"
    )
    packed = subprocess.run([sys.executable, str(script)], capture_output=True, check=True, timeout=30).stdout
    assert repr(unpack(packed)) in ("Mine(x=3)", "'Mine(x=3)'")
    gone = packed.replace(b"dataclasses", b"dataklasses")
    assert unpack(gone) == "Mine(x=3)"


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({(1, 2): 3}, "the keys of JSON's objects are text, and (1, 2) is a tuple"),
        ({None: 1}, "the keys of JSON's objects are text, and None is a NoneType"),
        ([{"a": ({"b": 1}, {frozenset(): 2})}], "the keys of JSON's objects are text, and frozenset() is a frozenset"),
        (Point({object: 1}), "the keys of JSON's objects are text, and <class 'object'> is a type"),  # type: ignore[arg-type]
        (cyclic(), "it is nested too deeply, or holds itself"),
        ({"a": 1j}, "JSON has no form for a complex"),
        (Point(1j), "JSON has no form for a complex"),  # type: ignore[arg-type]
    ],
)
def test_what_has_no_json_form_is_named(value: Any, reason: str) -> None:
    with pytest.raises(CannotEncode) as raised:
        encode_json(value, "out.jsonl")
    assert raised.value.reason == reason


@pytest.mark.parametrize("key", [1, 1.5, True, np.int64(4), Colour.RED, dt.date(2026, 1, 2), b"x"])
def test_keys_with_a_form_as_text(key: Any) -> None:
    assert encode_json({key: 1})[:2] == b'{"'


@given(json_values)
def test_json_is_read_back(value: Any) -> None:
    try:
        encoded = encode_json(value)
    except CannotEncode:
        with pytest.raises(UnicodeEncodeError):
            str(value).encode()
        return
    assert b"\n" not in encoded
    assert same(decoder()(encoded), value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), "0.5"),
        (np.int64(3), "3"),
        (np.bool_(True), "true"),
        (np.str_("a"), '"a"'),
        (np.array([[1, 2], [3, 4]]), "[[1,2],[3,4]]"),
        ({"v": np.array([1.5])}, '{"v":[1.5]}'),
        (Path("a/b"), '"a/b"'),
        ({7}, "[7]"),
        (frozenset({7}), "[7]"),
        (Colour.RED, '"red"'),
        (Point(1), '{"x":1,"y":null}'),
        (Doc(1, "a"), '{"id":1,"text":"a","score":null,"note":null}'),
        (float("nan"), "null"),
        (dt.date(2024, 1, 2), '"2024-01-02"'),
        (b"ab", '"YWI="'),
        (range(3), "[0,1,2]"),
        (type("Name", (str,), {})("x"), '"x"'),
        (
            Failed(1, ("a", 2), "s", "r", "e"),
            '{"item":1,"position":["a",2],"stage":"s","reason":"r","error":"e","attempts":1}',
        ),
    ],
)
def test_json_of_values(value: Any, expected: str) -> None:
    assert encode_json(value).decode() == expected
    assert encode_lines([value, 1]).decode() == f"{expected}\n1\n"


@pytest.mark.parametrize("value", [object(), 1j, {(1, 2): 3}, "\ud800", [len], {"a": {"b": object()}}])
def test_what_has_no_json_form_is_refused(value: Any) -> None:
    with pytest.raises(CannotEncode) as caught:
        encode_json(value, "out.jsonl")
    assert caught.value.target == "out.jsonl"
    assert caught.value.type_name == type(value).__name__
    with pytest.raises(CannotEncode):
        encode_lines([1, value])


def test_encoding_json_does_not_load_numpy() -> None:
    code = "import sys; from penstock.flow.codec import *; import pathlib; encode_json(pathlib.Path('a'));"
    code += "print('numpy' in sys.modules, 'cloudpickle' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert shown.stdout.split() == ["False", "False"]


def test_decoding_checks_the_type() -> None:
    assert decoder(Doc)(b'{"id": 1, "text": "a"}') == Doc(1, "a")
    assert decoder(Point)(b'{"x": 1}') == Point(1)
    assert decoder(Row)(b'{"n": 1}') == {"n": 1}
    with pytest.raises(msgspec.ValidationError, match="Expected `int`, got `str`"):
        decoder(Doc)(b'{"id": "1", "text": "a"}')
    with pytest.raises(msgspec.DecodeError):
        decoder()(b"{")


@pytest.mark.parametrize("make", [decoder, converter])
def test_a_type_that_cannot_be_decoded_is_refused(make: Any) -> None:
    with pytest.raises(PlanError, match="can't be decoded"):
        make(dict[tuple[int, int], object()])  # type: ignore[misc]  # the point


def test_rows_of_text_are_parsed() -> None:
    convert = converter(Doc, text=True)
    assert convert({"id": "3", "text": "", "score": "", "note": ""}) == Doc(3, "", None, "")
    assert convert({"id": "3", "text": "7", "score": "1.5"}) == Doc(3, "7", 1.5)
    with pytest.raises(msgspec.ValidationError):
        convert({"id": "", "text": "a"})
    assert converter(Point, text=True)({"x": "1", "y": ""}) == Point(1)
    assert converter(Row, text=True)({"n": "4"}) == {"n": 4}


def test_rows_of_values_are_checked() -> None:
    convert = converter(Doc)
    assert convert({"id": 3, "text": "a"}) == Doc(3, "a")
    with pytest.raises(msgspec.ValidationError):
        convert({"id": "3", "text": "a"})


def test_rows() -> None:
    assert row_of(Point(1, 2.0), "f") == {"x": 1, "y": 2.0}
    assert row_of(Doc(1, "a"), "f") == {"id": 1, "text": "a", "score": None, "note": None}
    for value in ([1], "a", 3, None, Point):
        with pytest.raises(CannotEncode, match="a row is wanted"):
            row_of(value, "f")


@pytest.mark.parametrize(
    ("value", "field", "key"),
    [
        ({"id": 7}, "id", "i:7"),
        ({"id": "7"}, "id", 'i:"7"'),
        (Doc(7, "a"), "id", "i:7"),
        ("abc", len, "i:3"),
        ({"a": 1, "b": 2}, lambda row: {"z": row["b"], "y": row["a"]}, 'i:{"y":1,"z":2}'),
        ({"id": np.int64(7)}, "id", "i:7"),
        ({"id": 0}, "id", "i:0"),
        ({"id": ""}, "id", 'i:""'),
    ],
)
def test_keys(value: Any, field: Any, key: str) -> None:
    assert id_key(value, field) == key


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"id": None}, "id"),
        ({}, "id"),
        (Doc(1, "a"), "name"),
        ("abc", "id"),
        ({"id": object()}, "id"),
        ({"id": float("nan")}, "id"),
        ("abc", lambda _: None),
    ],
)
def test_items_without_an_id(value: Any, field: Any) -> None:
    with pytest.raises(IdError):
        id_key(value, field)


def test_what_the_id_function_raises_is_the_cause() -> None:
    with pytest.raises(IdError, match=r"id= of the item \{\} raised KeyError: 'id'") as raised:
        id_key({}, lambda row: row["id"])
    assert isinstance(raised.value.__cause__, KeyError)


def test_row_digests_tell_rows_apart() -> None:
    assert row_digest({"a": 1, "b": 2}) == row_digest({"b": 2, "a": 1})
    digests = {row_digest(value) for value in ({"a": 1}, {"a": 2}, "a", Point(1), (1, 1j), None)}
    assert len(digests) == 6
    assert all(len(digest) == 16 for digest in digests)
