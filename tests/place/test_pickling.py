"""What travels by value, and how. That instances keep their class across processes stands in test_process*.py."""

from __future__ import annotations

import collections
import enum
import functools
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import msgspec
import pytest

from penstock.place import pickling
from penstock.place.pickling import LostClass, Pickler, dumps

ROOT = Path(__file__).parents[2]
SOURCE = str(ROOT / "src")
T = TypeVar("T")


@pytest.fixture(autouse=True)
def this_module_cant_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != ROOT])
    pickling._importable.cache_clear()
    yield
    pickling._importable.cache_clear()


class Sender:
    """Pickles for one imagined process."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.sent: dict[type, str] = {}
        self.pickler = Pickler(types.SimpleNamespace(write=self.pieces.append), self.sent, grows=True)

    def __call__(self, value: Any) -> bytes:
        self.pieces.clear()
        self.pickler.dump(value)
        return b"".join(self.pieces)


def elsewhere(code: str, *pickles: bytes) -> list[Any]:
    """Run code in a fresh process: `values` are what the pickles hold; what it puts in `answers` comes back."""
    script = f"""
import pickle, sys
sys.path.insert(0, {SOURCE!r})
from penstock.place.pickling import dumps, received
values = [pickle.loads(data) for data in pickle.load(sys.stdin.buffer)]
answers = []
{code}
sys.stdout.buffer.write(pickle.dumps([dumps(answer, received) for answer in answers]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], input=pickle.dumps(pickles), capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return [pickle.loads(data) for data in pickle.loads(done.stdout)]


class Base(msgspec.Struct, frozen=True, tag="base", rename="camel", kw_only=True):
    kind: ClassVar[int] = 7
    first_part: int
    rest: list[int] = msgspec.field(default_factory=list)
    named: str = msgspec.field(default="x", name="NAMED")
    parent: Base | None = None

    def __post_init__(self) -> None:
        if self.first_part < 0:
            raise ValueError("negative")

    def next(self) -> Base:
        return Base(first_part=self.first_part + 1, parent=self)


class Derived(Base, frozen=True, weakref=True):
    more: int = 4


class Further(Derived, frozen=True):
    """It inherits its room for weak references."""


class Box(msgspec.Struct, Generic[T], dict=True, order=True):
    content: T

    @functools.cached_property
    def twice(self) -> Any:
        return self.content * 2  # type: ignore[operator]


@dataclass(slots=True)
class Slotted:
    a: int
    b: list[int] = field(default_factory=list)


class Private:
    __slots__ = ("__hidden", "__weakref__")

    def __init__(self) -> None:
        self.__hidden = 3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Private) and self.__hidden == other.__hidden

    __hash__ = None  # type: ignore[assignment]


class Colour(enum.Flag):
    RED = 1
    BLUE = 2


class Point(NamedTuple):
    x: int
    label: str = "here"

    def __repr__(self) -> str:
        return f"Point {self.x} {self.label}"

    def moved(self) -> Point:
        return self._replace(x=self.x + 1)


class Farther(Point):
    __slots__ = ()

    def twice(self) -> int:
        return 2 * self.x


class Wrapped(NamedTuple, Generic[T]):
    content: T


Pair = collections.namedtuple("Pair", "left right")  # noqa: PYI024  # as people write it


class Odd(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.detail = detail

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and (str(self), self.detail) == (str(other), other.detail)

    __hash__ = None  # type: ignore[assignment]


VALUES = [
    Base(first_part=3, parent=Derived(first_part=1)),
    Derived(first_part=1, more=2),
    Further(first_part=5),
    Box(3),
    Slotted(3, [4]),
    Private(),
    Colour.RED | Colour.BLUE,
    Pair(1, 2),
    Point(1),
    Farther(2, "there"),
    Wrapped([1]),
    Odd(4, detail="d"),
    Slotted,
    Colour,
    type(None),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
]


def test_there_and_back_is_the_same_class() -> None:
    send = Sender()
    answers = elsewhere("answers = values", *map(send, VALUES))
    for value, answer in zip(VALUES, answers, strict=True):
        assert type(answer) is type(value)
        if isinstance(value, UnicodeDecodeError):
            assert str(answer) == str(value)
        else:
            assert answer == value


def test_a_struct_works_in_the_other_process() -> None:
    code = """
import msgspec, weakref
base, derived, box = values
Base, Derived = type(base), type(derived)
assert Base.kind == 7 and Base.__name__ == "Base"
assert msgspec.json.encode(base) == b'{"type":"base","firstPart":3,"rest":[],"NAMED":"x","parent":null}'
assert msgspec.json.decode(b'{"type":"base","firstPart":1,"parent":{"type":"base","firstPart":2}}', type=Base) == Base(
    first_part=1, parent=Base(first_part=2))
for wrong in (b'{"type":"base","firstPart":"1"}', b'{"type":"base","firstPart":-1}', b'{"type":"other","firstPart":1}'):
    try:
        msgspec.json.decode(wrong, type=Base)
    except msgspec.ValidationError:
        pass
    else:
        raise AssertionError(wrong)
try:
    base.first_part = 4
except AttributeError:
    pass
else:
    raise AssertionError("frozen")
assert base.rest is not Base(first_part=1).rest
weakref.ref(derived)
assert box.twice == 6 and box < type(box)(4)
answers = [base.next()]
"""
    send = Sender()
    base = Base(first_part=3)
    (following,) = elsewhere(code, send(base), send(Derived(first_part=1)), send(Box(3)))
    assert following == base.next()
    assert type(following.parent) is Base


def test_a_named_tuple_works_in_the_other_process() -> None:
    code = """
point, farther, wrapped = values
assert repr(point) == "Point 1 here" and point == (1, "here") and not hasattr(point, "__dict__")
assert farther.twice() == 4 and type(point)(5).label == "here"
assert type(wrapped)[int](3).content == 3
answers = [point.moved(), type(farther)(7), wrapped._replace(content=2)]
"""
    send = Sender()
    answers = elsewhere(code, send(Point(1)), send(Farther(2, "there")), send(Wrapped("x")))
    assert [type(answer) for answer in answers] == [Point, Farther, Wrapped]
    assert answers == [(2, "here"), (7, "here"), (2,)]


def test_a_class_travels_once() -> None:
    send = Sender()
    for value in (Base(first_part=1), Slotted(1), Odd(1, detail="")):
        first, second = send(value), send(value)
        assert len(second) < min(300, len(first) / 2)
    assert set(send.sent) >= {Base, Slotted, Odd}
    send.pickler.forget()
    assert len(send(Slotted(1))) > 1000


def test_a_definition_that_wasnt_sent_doesnt_count() -> None:
    send = Sender()
    with pytest.raises(TypeError, match="lock"):
        send([Slotted(1), threading.Lock()])
    assert send.sent == {}
    assert elsewhere("answers = values", send(Slotted(2))) == [Slotted(2)]


def test_a_reference_to_a_lost_class_says_so() -> None:
    send = Sender()
    send(Slotted(1))
    code = f"""
from penstock.place.pickling import LostClass
try:
    pickle.loads({send(Slotted(2))!r})
except LostClass as error:
    answers = ["lost"]
"""
    assert elsewhere(code) == ["lost"]
    assert issubclass(LostClass, pickle.UnpicklingError)


def test_known_classes_are_left_as_they_are() -> None:
    method = Slotted.__init__
    assert type(pickle.loads(dumps(Slotted(1), {}))) is Slotted
    assert Slotted.__init__ is method


def test_classes_beyond_the_bound_are_defined_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.place.pickling._MOST_CLASSES", 1)
    send = Sender()
    send(Slotted(1))
    first, second = send(Colour.RED), send(Colour.RED)
    assert len(first) == len(second)
    assert list(send.sent) == [Slotted]
    assert elsewhere("answers = values", first, second) == [Colour.RED, Colour.RED]


def test_importable_code_travels_as_a_name() -> None:
    assert b"json.decoder" in dumps(__import__("json").JSONDecoder, {})
    assert len(dumps(Path, {})) < 60
    assert len(dumps(collections.OrderedDict.fromkeys, {})) < 100


def test_a_module_that_cant_be_imported_travels_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("loaded_by_other_means")
    module.__file__ = str(tmp_path / "loaded_by_other_means.py")
    exec("OFFSET = 5\ndef shift(x):\n    return x + OFFSET\nclass Thing:\n    pass\n", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    shift, thing = elsewhere("answers = [values[0](1), values[1]()]", dumps(module.shift, {}), dumps(module.Thing, {}))
    assert shift == 6
    assert type(thing) is module.Thing
