"""In-memory sources: what can be read again and resumed, what only once, and what tells two inputs apart."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from array import array
from collections import UserList, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import PlanError, ResumeMismatch, SourceExhausted
from penstock.flow.contract import Source
from penstock.flow.memory import AsyncSource, IterableSource, SequenceSource, _read_once, as_source, position_of
from penstock.flow.progress import Intervals, Position, Positions, Progress

DEADLINE = 60


def generator(count: int = 3) -> Iterator[int]:
    yield from range(count)


async def stream(count: int = 3) -> AsyncIterator[int]:
    for x in range(count):
        yield x


class Again:
    """An iterable, and an async iterable, that begins anew each time."""

    def __iter__(self) -> Iterator[int]:
        return generator()


class AgainAsync:
    def __aiter__(self) -> AsyncIterator[int]:
        return stream()


def read(source: Source[Any], after: Progress | None = None) -> list[tuple[Position, Any]]:
    async def main() -> list[tuple[Position, Any]]:
        return [one async for batch in source.read(after or Progress()) for one in batch]

    return asyncio.run(main())


def snapshot(source: Source[Any]) -> Any:
    return asyncio.run(source.snapshot())


def changed(items: Any, before: Any) -> str | None:
    return asyncio.run(SequenceSource(items, None).changed(before))


# -- which is which ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "kind", "identity", "replayable", "total"),
    [
        ([1, 2, 3], SequenceSource, "memory:list", True, 3),
        ((1, 2), SequenceSource, "memory:list", True, 2),
        (np.arange(3), SequenceSource, "memory:list", True, 3),
        (range(10**12), SequenceSource, "memory:list", True, 10**12),
        (UserList([1]), SequenceSource, "memory:list", True, 1),
        ({1: 2}, IterableSource, "memory:iterable", False, None),
        ({1, 2}, IterableSource, "memory:iterable", False, None),
        (Again(), IterableSource, "memory:iterable", False, None),
        (iter([1]), IterableSource, "memory:iterable", False, None),
        (generator(), IterableSource, "memory:generator", False, None),
        (AgainAsync(), AsyncSource, "memory:async iterable", False, None),
        (stream(), AsyncSource, "memory:stream", False, None),
        (ps.Flow([1]), AsyncSource, "memory:async iterable", False, None),
    ],
)
def test_what_flow_reads_from(items: Any, kind: type, identity: str, replayable: bool, total: int | None) -> None:
    source = as_source(items, None)
    assert type(source) is kind
    assert (source.identity, source.replayable, source.total) == (identity, replayable, total)
    assert as_source(items, "mine").identity == "memory:mine"
    if not replayable:
        assert snapshot(source) is None
        assert asyncio.run(source.changed(None)) is None


def test_a_source_of_ones_own_is_taken_as_it_is() -> None:
    source = SequenceSource([1], "mine")
    assert as_source(source, "other") is source


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (5, r"Flow\(5\) was given an int, which can't be iterated"),
        (2.5, "given a float"),
        (print, "given a builtin_function_or_method"),
        ("notes.txt", r"Flow\('notes.txt'\) was given a single str, whose items are its characters"),
        (b"bytes", "a single bytes"),
        (bytearray(b"bytes"), "a single bytearray"),
        ("x" * 100, r"Flow\('x{40}'\) was"),
    ],
)
def test_what_is_no_source(value: Any, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        as_source(value, None)


def test_a_source_in_memory_has_nobody_to_tell() -> None:
    async def main() -> None:
        source = SequenceSource([1, 2], None)
        positions = Positions({"": Intervals([(0, 1)])})
        await source.settle(positions)
        await source.give_back(positions)
        assert not source.joins(Recorder())

    asyncio.run(main())


def test_positions_in_words() -> None:
    assert position_of(("", 3)) == "item 3"
    assert position_of(("a.jsonl", 3)) == "a.jsonl, record 4"


# -- reading ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 1500)), max_size=5))
def test_a_sequence_yields_what_isnt_settled_each_position_once(count: int, ranges: list[tuple[int, int]]) -> None:
    settled = Intervals([(start, start + length) for start, length in ranges])
    progress = Progress(settled=Positions({"": settled}))
    items = range(100, 100 + count)
    assert read(SequenceSource(items, None), progress) == [
        (("", index), 100 + index) for index in range(count) if index not in settled
    ]


@pytest.mark.parametrize("make", [Again, lambda: generator(3), AgainAsync, lambda: stream(3)])
def test_positions_count_from_0(make: Any) -> None:
    assert read(as_source(make(), None)) == [(("", x), x) for x in range(3)]


def test_what_an_iterable_raises_comes_after_what_it_gave() -> None:
    def breaks() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("no more")

    async def main() -> list[Any]:
        seen = []
        with pytest.raises(LookupError, match="no more"):
            async for batch in as_source(breaks(), None).read(Progress()):
                seen += [value for _, value in batch]
        return seen

    assert asyncio.run(main()) == [1, 2]


def test_an_item_waits_for_no_slow_one_behind_it() -> None:
    """The source gives the second item only when the first has come out at the other end."""

    def slow() -> Iterator[int]:
        yield 1
        assert out.wait(30)
        yield 2

    out = threading.Event()

    def put(x: int) -> None:
        out.set()

    assert ps.Flow(slow()).to(put).run_sync(progress=False).delivered == 2


def test_an_iterable_is_read_in_a_thread_of_its_own_and_closed_in_it() -> None:
    seen: list[str] = []

    def watched() -> Iterator[int]:
        try:
            for x in range(1_000_000):
                if not x:
                    seen.append(threading.current_thread().name)
                yield x
        finally:
            seen.append(threading.current_thread().name)

    assert ps.Flow(watched()).take(3).collect_sync() == [0, 1, 2]
    assert seen == ["penstock-source-watched"] * 2


def test_an_async_iterable_is_closed_when_reading_stops() -> None:
    closed: list[bool] = []

    async def watched() -> AsyncIterator[int]:
        try:
            for x in range(1_000_000):
                yield x
        finally:
            closed.append(True)

    assert ps.Flow(watched()).take(3).collect_sync() == [0, 1, 2]
    assert closed == [True]


class NoClosing:
    """An async iterator that isn't a generator."""

    def __init__(self) -> None:
        self.left = 2

    def __aiter__(self) -> NoClosing:
        return self

    async def __anext__(self) -> int:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.left


def test_an_async_iterator_needs_no_aclose() -> None:
    assert ps.Flow(NoClosing()).collect_sync() == [1, 0]


# -- a second pass ----------------------------------------------------------------------------------------------------


@dataclass
class Unhashable:
    left: int = 3

    def __iter__(self) -> Unhashable:
        return self

    def __next__(self) -> int:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left


@dataclass(frozen=True)
class AllEqual:
    """Iterators that are equal and have one hash, and yet are two."""

    items: Iterator[int] = field(compare=False)

    def __iter__(self) -> AllEqual:
        return self

    def __next__(self) -> int:
        return next(self.items)


ONE_SHOT: dict[str, Any] = {
    "a generator": generator,
    "an async generator": stream,
    "an async iterator": NoClosing,
    "a built-in iterator": lambda: iter([1, 2]),
    "an unhashable iterator": Unhashable,
    "an iterator equal to others": lambda: AllEqual(generator()),
}


@pytest.mark.parametrize("kind", ONE_SHOT)
def test_a_second_pass_over_an_iterator_is_refused(kind: str) -> None:
    flow = ps.Flow(ONE_SHOT[kind]())
    assert flow.collect_sync()
    with pytest.raises(SourceExhausted, match=r"was already read by an earlier run.*Give Flow a list, a file"):
        flow.map(str).collect_sync()
    assert ps.Flow(ONE_SHOT[kind]()).collect_sync(), "another one is refused, too"


@pytest.mark.parametrize("kind", [kind for kind in ONE_SHOT if kind != "a built-in iterator"])
def test_another_flow_over_the_same_iterator_is_refused(kind: str) -> None:
    items = ONE_SHOT[kind]()
    assert ps.Flow(items).collect_sync()
    with pytest.raises(SourceExhausted):
        ps.Flow(items).collect_sync()


def test_a_pass_that_was_left_early_was_one() -> None:
    flow = ps.Flow(generator())
    assert flow.take(1).collect_sync() == [0]
    with pytest.raises(SourceExhausted, match="the generator 'generator'"):
        flow.collect_sync()


def test_what_begins_anew_can_be_read_again() -> None:
    for items in (Again(), AgainAsync(), {0: 1, 1: 1, 2: 1}, ps.Flow(range(3))):
        flow: ps.Flow[Any] = ps.Flow(items)
        assert [flow.collect_sync() for _ in range(3)] == [[0, 1, 2]] * 3


def test_iterators_that_were_read_are_forgotten_when_they_are_gone() -> None:
    gc.collect()
    before = len(_read_once)
    for _ in range(50):
        ps.Flow(generator()).collect_sync()
    gc.collect()
    assert len(_read_once) == before


# -- what tells two inputs apart --------------------------------------------------------------------------------------


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x


class Slotted:
    __slots__ = ("__weakref__", "unset", "x")

    def __init__(self, x: Any) -> None:
        self.x = x


PAIRS: list[tuple[Any, Any]] = [
    (1, 2),
    ("a", "b"),
    (None, 0),
    ({"a": 1}, {"a": 2}),
    ({1, 2}, {1, 3}),
    ({("a", 1): 1}, {("a", 1): 2}),
    ({("a", 1): {1}}, {("a", 1): {2}}),
    ("\ud800", "\ud801"),
    (2**70, 2**70 + 1),
    (PurePosixPath("a"), PurePosixPath("b")),
    (Fraction(1, 2), Fraction(1, 3)),
    (Plain(1), Plain(2)),
    (Plain(Plain({1})), Plain(Plain({2}))),
    (Slotted(1), Slotted(2)),
    (Slotted(Plain("\ud800")), Slotted(Plain("\ud801"))),
    (np.arange(3), np.arange(3) + 1),
    (array("i", [1]), array("i", [2])),
    (generator, stream),
    (Plain, Slotted),
    (ps.Failed(1, ("", 0), "s", "r", "e"), ps.Failed(2, ("", 0), "s", "r", "e")),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_changed_item_is_noticed_wherever_it_stands(one: Any, other: Any) -> None:
    for at in (0, 5, 1500):
        items = [{"x": index} for index in range(2000)]
        items[at] = one
        before = snapshot(SequenceSource(items, None))
        assert before["length"] == 2000
        assert changed(items, before) is None
        assert changed([*items, other], before) is None, "it only grew"
        items[at] = other
        assert changed(items, before) == "the first items of the list differ from those that were last read"
    assert changed(items[:-1], before) == "the list had 2000 items when it was last read and has 1999 now"


@given(st.lists(st.integers() | st.text() | st.none()), st.lists(st.integers() | st.text() | st.none(), max_size=3))
def test_a_list_differs_unless_it_only_grew(items: list[Any], more: list[Any]) -> None:
    before = snapshot(SequenceSource(items, None))
    assert changed(items + more, before) is None
    if more + items != items + more:
        assert (changed(more + items, before) is None) == ((more + items)[: len(items)] == items)


def test_a_range_is_known_without_reading_it() -> None:
    before = snapshot(SequenceSource(range(10**15), None))
    assert changed(range(10**15 + 5), before) is None
    assert changed(range(1, 10**15 + 1), before) is not None


def test_what_contains_itself_has_a_digest_too() -> None:
    cycle: list[Any] = [1]
    cycle.append(cycle)
    other: list[Any] = [2]
    other.append(other)
    before = snapshot(SequenceSource([cycle], None))
    assert changed([cycle], before) is None
    assert changed([other], before) is not None


def test_the_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Whatever the addresses of objects and the order of sets."""
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, sys\n"
        "from penstock.flow.memory import SequenceSource\n"
        "ballast = [object() for _ in range(int(sys.argv[1]))]\n"
        "class Plain:\n"
        "    def __init__(self, x):\n"
        "        self.x = x\n"
        "class Empty:\n"
        "    pass\n"
        "items = [{'a', 'b', 'c'}, Plain({'a', 'b', Empty()}), Empty(), len, Plain, {(1, 'a'): Plain(Empty())}]\n"
        "print(asyncio.run(SequenceSource(items, None).snapshot()))\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-P", str(program), str(1000 * seed)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(said) == 1


# -- going on ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(count=st.integers(1, 300), breaks=st.integers(0, 299), grown=st.integers(0, 50))
def test_a_job_over_a_list_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, count: int, breaks: int, grown: int
) -> None:
    out = tmp_path_factory.mktemp("job") / "out.jsonl"
    called: list[int] = []

    def work(x: int) -> int:
        called.append(x)
        if x == breaks and healthy is False:
            raise LookupError(x)
        return x

    def job(items: list[int]) -> ps.Job:
        return ps.Flow(items, name="numbers").map(work, place="loop", concurrency=1).to(out)

    healthy = False
    if breaks < count:
        with pytest.raises(LookupError):
            job(list(range(count))).run_sync(progress=False)
    healthy = True
    called.clear()
    report = job(list(range(count + grown))).run_sync(progress=False)
    assert out.read_text().split() == [str(x) for x in range(count + grown)]
    if breaks < count:
        assert report.earlier.get("delivered", 0) + report.delivered == count + grown
        assert called == list(range(report.earlier.get("delivered", 0), count + grown))


def test_another_list_is_refused_and_its_output_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    items = [{"x": x, "where": PurePosixPath(f"{x}.txt")} for x in range(5)]

    def job(items: list[Any], name: str = "rows") -> ps.Job:
        return ps.Flow(items, name=name).map(lambda row: row["x"]).to(out)

    assert job(items).run_sync(progress=False).delivered == 5
    assert "nothing to do" in str(job(items).run_sync(progress=False))
    before = out.read_bytes()
    for other, reason in (
        (job([{"x": 9, "where": None}, *items[1:]]), "the first items of the list differ"),
        (job([{**items[0], "where": PurePosixPath("other.txt")}, *items[1:]]), "the first items of the list differ"),
        (job(items[:-1]), "had 5 items when it was last read and has 4 now"),
        (job(items, name="others"), "others"),
    ):
        with pytest.raises(ResumeMismatch, match=f"{reason}.*fresh=True"):
            other.run_sync(progress=False)
        assert out.read_bytes() == before
    assert job(items[:-1]).run_sync(fresh=True, progress=False).delivered == 4
    assert out.read_text().split() == ["0", "1", "2", "3"]


def test_what_can_be_read_only_once_says_so_and_loses_no_output(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    job = ps.Flow(generator()).to(out)
    assert job.run_sync(progress=False).guarantee.startswith("at least once: memory:generator can't be read again")
    with pytest.raises(SourceExhausted):
        job.run_sync(progress=False)
    assert out.read_text().split() == ["0", "1", "2"]


class Unsliced(Sequence[int]):
    """A sequence as its protocol asks for it: an index, and no slice."""

    def __len__(self) -> int:
        return 3000

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError("an index")
        return index


@pytest.mark.parametrize("items", [deque(range(3000)), Unsliced()], ids=["deque", "own"])
def test_a_sequence_neednt_know_slices(items: Any) -> None:
    assert ps.Flow(items).collect_sync() == list(range(3000))
    assert snapshot(SequenceSource(items, None)) == snapshot(SequenceSource(list(range(3000)), None))
