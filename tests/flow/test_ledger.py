"""The accounts of a run, against a naive one: an item is open as long as anything that came of it is."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import count, product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.flow.contract import Failed
from penstock.flow.ledger import DEAD, DELIVERED, FATES, SKIPPED, Ledger
from penstock.flow.origin import FILTERED, Merged, Passed, Stream, positions_of
from penstock.flow.progress import Intervals, Position, Positions
from penstock.place.base import Task
from penstock.testing import run_virtual

LETTER = Failed("what the stage was given", ("", -1), "s", "ValueError", "bad", 2)
ENDS = (FILTERED, SKIPPED, DEAD)


@dataclass(eq=False)
class Whole:
    """What came of one item by whole expansions, also by expansions of their outputs."""

    positions: tuple[Position, ...]
    arrived: list[Any] = field(default_factory=list)
    died: bool = False


@dataclass(eq=False)
class Thing:
    """Something on its way, or (with ``stream``) an item that is being expanded one by one."""

    positions: tuple[Position, ...]
    task: Task
    whole: Whole | None = None
    one_by_one: bool = False
    stream: Stream | None = None
    given: int = 0
    furthest: int = 0


class Naive:
    """Drives a ledger, and knows what must be true of it from what is on its way and from what has ended how."""

    def __init__(self, *, holds: bool, commits: bool) -> None:
        self.ledger = Ledger(holds=holds, commits=commits, keeps_items=True)
        self.issued = 0
        self.values = count()
        self.moving: list[Thing] = []
        self.wholes: list[Whole] = []
        self.unwritten: list[tuple[tuple[Position, ...], list[Any]]] = []
        self.ends: dict[Position, int] = {}
        self.passed: list[tuple[int, tuple[Position, ...]]] = []
        self.committed: set[Position] = set()
        self.taken: Counter[int] = Counter()
        self.letters: list[Failed] = []
        self.children: dict[Position, Intervals] = {}
        self.streamed = False

    def move(self, verb: str, which: int, number: int) -> None:
        """One step; it does nothing where the plan of a flow wouldn't allow it."""
        if verb in ("issue", "write", "commit"):
            getattr(self, verb)(number)
        elif verb == "merge":
            singles = [one for one in self.moving if one.whole is None and one.stream is None]
            self.merge(singles[: 1 + number % 3])
        else:
            streams = verb in ("give", "again", "end")
            able = [one for one in self.moving if (one.stream is not None) is streams]
            if able:
                getattr(self, verb)(able[which % len(able)], number)
        self.check()

    def issue(self, number: int) -> None:
        tasks = [Task(next(self.values), ("", self.issued + index)) for index in range(number % 4)]
        self.issued += len(tasks)
        self.ledger.issue(tasks)
        self.moving += [Thing((task.origin,), task) for task in tasks]

    def expand(self, thing: Thing, number: int) -> None:
        self.moving.remove(thing)
        origin = self.ledger.expand(thing.task.origin, number % 4)
        whole = thing.whole
        if whole is None:
            whole = Whole(thing.positions)
            self.wholes.append(whole)
        outputs = [Task(next(self.values), origin) for _ in range(number % 4)]
        self.moving += [Thing(thing.positions, task, whole, thing.one_by_one) for task in outputs]
        self.end_at(thing.positions, FILTERED)
        self.complete()

    def merge(self, things: list[Thing]) -> None:
        if things:
            self.moving = [one for one in self.moving if one not in things]
            task = Task(next(self.values), Merged([one.task.origin for one in things]))
            positions = tuple(position for one in things for position in one.positions)
            self.moving.append(Thing(positions, task, one_by_one=any(one.one_by_one for one in things)))

    def take(self, thing: Thing, number: int) -> None:
        self.ledger.admit(thing.task, number % 2)
        self.passed.append((number % 2, thing.positions))

    def expand_one_by_one(self, thing: Thing, number: int) -> None:
        if thing.whole is None and not thing.one_by_one:
            self.streamed = True
            thing.stream = self.ledger.stream(thing.task.origin)

    def give(self, thing: Thing, number: int) -> None:
        assert thing.stream is not None
        outputs = [(thing.task.value, thing.given + index) for index in range(number % 4)]
        thing.given += len(outputs)
        tasks = thing.stream.children(outputs)
        assert [task.value for task in tasks] == [output for output in outputs if output[1] >= thing.furthest]
        thing.furthest = max(thing.furthest, thing.given)
        self.moving += [Thing(thing.positions, task, one_by_one=True) for task in tasks]

    def again(self, thing: Thing, number: int) -> None:
        assert thing.stream is not None
        thing.stream.again()
        thing.given = 0

    def end(self, thing: Thing, number: int) -> None:
        assert thing.stream is not None
        self.moving.remove(thing)
        fate = ENDS[number % 3]
        self.ledger.stream_ended(thing.stream, LETTER if fate == DEAD else None, fate)
        self.end_at(thing.positions, fate)

    def settle(self, thing: Thing, number: int) -> None:
        self.moving.remove(thing)
        fate = ENDS[number % 3]
        self.ledger.settle(thing.task.origin, fate, LETTER if fate == DEAD else None)
        self.end_at(thing.positions, fate)
        if thing.whole is not None and fate == DEAD:
            thing.whole.died = True
        self.complete()

    def arrive(self, thing: Thing, number: int) -> None:
        self.moving.remove(thing)
        self.ledger.arrive([thing.task])
        if thing.whole is not None and self.ledger.holds:
            thing.whole.arrived.append(thing.task.value)
            self.end_at(thing.positions, DELIVERED)
        else:
            self.unwritten.append((thing.positions, [thing.task.value]))
        self.complete()

    def write(self, number: int) -> None:
        entries, self.ledger.entries = self.ledger.entries, []
        self.ledger.delivered(entries)
        for positions, _ in self.unwritten:
            self.end_at(positions, DELIVERED)
        self.unwritten = []

    def commit(self, number: int) -> None:
        delta = self.ledger.take_delta()
        settled = members(delta.settled)
        assert not settled & self.committed
        self.committed |= settled
        assert delta.counts == Counter(FATES[self.ends[position]] for position in settled)
        self.taken.update(delta.taken)
        self.letters += delta.dead
        assert not delta.children.keys() & self.committed
        for position, children in delta.children.items():
            before = self.children.setdefault(position, Intervals())
            assert not any(index in before for start, stop in children for index in range(start, stop))
            before.update(children)
        self.ledger.committed(delta, Positions())

    def end_at(self, positions: tuple[Position, ...], fate: int) -> None:
        for position in positions:
            self.ends[position] = max(fate, self.ends.get(position, FILTERED))

    def complete(self) -> None:
        """A whole of which nothing is on its way any more is to be written, if none of it died."""
        for whole in self.wholes:
            if not any(thing.whole is whole for thing in self.moving):
                self.wholes.remove(whole)
                if whole.arrived and not whole.died:
                    self.unwritten.append((whole.positions, whole.arrived))
                return

    def check(self) -> None:
        ledger = self.ledger
        everything = {("", index) for index in range(self.issued)}
        still = {position for thing in self.moving for position in thing.positions}
        still |= {position for positions, _ in self.unwritten for position in positions}
        settled = self.committed if ledger.commits else everything - still
        assert ledger.issued == self.issued == sum(ledger.fates) + ledger.released + ledger.open
        assert ledger.fates == [sum(self.ends[position] == fate for position in settled) for fate in range(4)]
        assert written(ledger.entries, positions_of) == written(self.unwritten, tuple)
        assert set(ledger.items) == still
        if ledger.commits:
            assert not settled & still
            assert members(ledger.unfinished) == everything - settled
            if not self.streamed:  # an output by itself is recorded before its item is
                assert self.taken == Counter(
                    number for number, positions in self.passed if settled.issuperset(positions)
                )

    def finish(self) -> None:
        """Everything arrives, is written and committed."""
        while self.moving:
            thing = self.moving[0]
            (self.end if thing.stream is not None else self.arrive)(thing, 0)
        self.move("write", 0, 0)
        self.move("commit", 0, 0)
        assert self.ledger.open == self.ledger.expanded == self.ledger.uncommitted == 0
        assert not self.ledger.items
        if self.ledger.commits:
            assert self.taken == Counter(number for number, _ in self.passed)
            dead = [position for position, fate in self.ends.items() if fate == DEAD]
            assert sorted(letter.position for letter in self.letters) == sorted(dead)
            for letter in self.letters:
                told = (letter.stage, letter.reason, letter.error, letter.attempts)
                assert told == (LETTER.stage, LETTER.reason, LETTER.error, LETTER.attempts)


def members(positions: Positions) -> set[Position]:
    return {
        (name, index)
        for name, intervals in positions.partitions.items()
        for start, stop in intervals
        for index in range(start, stop)
    }


def written(entries: Any, positions: Any) -> list[Any]:
    return sorted((sorted(positions(origin)), sorted(map(repr, values))) for origin, values in entries)


VERBS = ("issue", "expand", "merge", "take", "expand_one_by_one", "give", "again", "end", "settle", "arrive")
MOVES = st.tuples(
    st.sampled_from([*VERBS, "arrive", "settle", "write", "commit"]), st.integers(0, 9), st.integers(0, 5)
)


NESTED = [("expand", 0, 2), ("take", 0, 0), ("expand", 0, 1), ("take", 1, 1), ("arrive", 1, 0), ("commit", 0, 0)]
HALF = [("expand", 0, 2), ("take", 0, 0), ("arrive", 0, 0), ("settle", 0, 0), ("commit", 0, 0)]


@settings(max_examples=600)
@example(moves=[("issue", 0, 1), *NESTED], sink="file")
@example(moves=[("issue", 0, 1), *HALF], sink="file")
@given(moves=st.lists(MOVES, max_size=40), sink=st.sampled_from(["file", "function", "caller"]))
def test_the_books_agree_with_a_naive_account_at_every_step(moves: list[tuple[str, int, int]], sink: str) -> None:
    naive = Naive(holds=sink == "file", commits=sink != "caller")
    for move in moves:
        naive.move(*move)
    naive.finish()


# -- takes within expansions -------------------------------------------------------------------------------------------


def ten(x: Any) -> list[Any]:
    return [(x, index) for index in range(10)]


def two(x: Any) -> list[Any]:
    return [(x, "left"), (x, "right")]


def run(flow: ps.Flow[Any]) -> tuple[Recorder, ps.Report]:
    recorder = Recorder()
    return recorder, run_virtual(flow.to(recorder).run(progress=False))


@pytest.mark.parametrize("first", [1, 3, 4, 10, 15, 40])
@pytest.mark.parametrize("last", [1, 3, 8, 15, 40])
@pytest.mark.parametrize("between", ["nothing", "map", "expand", "unordered"])
def test_two_takes_within_expansions_let_pass_what_slices_would(first: int, last: int, between: str) -> None:
    async def late(x: Any) -> Any:
        await asyncio.sleep(x[1] % 3)
        return x

    flow: ps.Flow[Any] = ps.Flow(range(3)).flat_map(ten).take(first)
    expected: list[Any] = [output for x in range(3) for output in ten(x)][:first]
    if between == "map":
        flow = flow.map(late, concurrency=4)
    elif between == "unordered":
        flow = flow.map(late, concurrency=4, ordered=False)
    elif between == "expand":
        flow = flow.flat_map(two)
        expected = [output for one in expected for output in two(one)]
    recorder, report = run(flow.take(last))
    if between == "unordered":
        assert len(recorder.outputs) == min(last, len(expected))
        assert set(recorder.outputs) <= set(expected)
        return
    assert recorder.outputs == expected[:last]
    assert report.delivered == len(set(recorder.origins))
    assert report.issued == report.delivered + report.released
    assert recorder.progress.taken[3 if between in ("map", "expand") else 2] == len(recorder.outputs)


@pytest.mark.parametrize("taken", [None, 50])
def test_one_dead_output_of_nested_expansions_delivers_none_also_after_a_take(taken: int | None) -> None:
    def die(x: Any) -> Any:
        if x == ((1, "right"), "left"):
            raise ValueError(x)
        return x

    flow: ps.Flow[Any] = ps.Flow(range(3)).flat_map(two)
    if taken is not None:
        flow = flow.take(taken)
    recorder, report = run(flow.flat_map(two).map(die, on_error="dead_letter"))
    assert recorder.outputs == [output for x in (0, 2) for one in two(x) for output in two(one)]
    assert (report.delivered, report.dead) == (2, 1)
    assert list(recorder.letters) == [("", 1)]


# -- one move at a time ------------------------------------------------------------------------------------------------


def books(count: int = 3, *, holds: bool = True, commits: bool = True) -> tuple[Ledger, list[Task]]:
    ledger = Ledger(holds=holds, commits=commits, keeps_items=True)
    tasks = [Task(f"item {index}", ("", index)) for index in range(count)]
    ledger.issue(tasks)
    return ledger, tasks


@pytest.mark.parametrize("fates", list(product(range(4), repeat=2)))
def test_the_worst_fate_of_its_outputs_is_the_items(fates: tuple[int, int]) -> None:
    """dead > delivered > skipped > filtered, for outputs that wait for each other and for those that don't."""
    for one_by_one in (False, True):
        ledger, (task,) = books(1)
        if one_by_one:
            stream = ledger.stream(task.origin)
            outputs = stream.children(["left", "right"])
        else:
            family = ledger.expand(task.origin, 2)
            outputs = [Task("left", family), Task("right", family)]
        for output, fate in zip(outputs, fates, strict=True):
            if fate == DELIVERED:
                ledger.arrive([output])
            else:
                ledger.settle(output.origin, fate, LETTER if fate == DEAD else None)
        ledger.delivered(ledger.entries)
        if one_by_one:
            ledger.stream_ended(stream)
        delta = ledger.take_delta()
        assert delta.counts == {FATES[max(fates)]: 1}
        assert [letter.item for letter in delta.dead] == ["item 0"] * (DEAD in fates)


def test_an_item_that_expands_to_nothing_is_filtered_and_makes_room() -> None:
    ledger, tasks = books(2)
    freed: list[int] = []
    ledger.freed = lambda: freed.append(ledger.expanded)
    ledger.expand(tasks[0].origin, 0)
    family = ledger.expand(tasks[1].origin, 1)
    ledger.expand(family, 0)
    assert freed == [0, 0]
    assert ledger.take_delta().counts == {"filtered": 2}


def test_what_is_known_of_an_expansion_isnt_given_again() -> None:
    ledger, (task,) = books(1)
    ledger.known[task.origin] = (Intervals([(0, 2), (3, 4)]), DELIVERED)
    stream = ledger.stream(task.origin)
    first = stream.children(list("abc"))
    assert [child.value for child in first] == ["c"]
    stream.again()
    more = stream.children(list("abcde"))
    assert [child.value for child in more] == ["e"]
    for child in first:
        ledger.settle(child.origin, SKIPPED)
    delta = ledger.take_delta()
    assert list(delta.children[task.origin]) == [(2, 3)]
    assert delta.fates == {task.origin: DELIVERED}
    ledger.stream_ended(stream)
    ledger.settle(more[0].origin, FILTERED)
    delta = ledger.take_delta()
    assert (delta.counts, delta.children, delta.fates) == ({"delivered": 1}, {}, {})


def test_under_ids_what_is_unfinished_is_told_with_key_and_digest() -> None:
    ledger, tasks = books(2)
    for task, key in zip(tasks, ("i:7", "i:9"), strict=True):
        ledger.keys[task.origin] = key
        ledger.digests[task.origin] = key.encode()
    stream = ledger.stream(tasks[0].origin)
    child, last = stream.children(["a", "b"])
    ledger.settle(child.origin, DEAD, LETTER)
    ledger.settle(tasks[1].origin, FILTERED)
    delta = ledger.take_delta()
    assert delta.keys == {("", 0): "i:7", ("", 1): "i:9"}
    assert delta.digests == {"i:7": b"i:7"}
    assert [(letter.position, letter.item) for letter in delta.dead] == [(("", 0), "item 0")]
    ledger.settle(last.origin, DEAD, LETTER)
    ledger.stream_ended(stream, LETTER, DEAD)
    delta = ledger.take_delta()
    assert (delta.counts, delta.keys, delta.dead) == ({"dead": 1}, {("", 0): "i:7"}, [])
    assert not ledger.keys
    assert not ledger.digests


def test_an_expansion_that_dies_itself_is_told_at_once_though_outputs_are_on_their_way() -> None:
    ledger, tasks = books(1)
    ledger.keys[tasks[0].origin] = "i:7"
    stream = ledger.stream(tasks[0].origin)
    stream.children(["a"])
    ledger.stream_ended(stream, LETTER, DEAD)
    delta = ledger.take_delta()
    assert (delta.fates, delta.keys, len(delta.dead)) == ({("", 0): DEAD}, {("", 0): "i:7"}, 1)
    assert not delta.settled


def test_what_another_reader_has_by_now_counts_as_released() -> None:
    ledger, tasks = books(3)
    for task in tasks:
        ledger.settle(task.origin, DELIVERED)
    fenced = Positions()
    fenced.add(("", 1))
    ledger.committed(ledger.take_delta(), fenced)
    assert (ledger.fates[DELIVERED], ledger.released, ledger.open) == (2, 1, 0)


def test_law_accounting_whatever_was_to_become_of_what_another_reader_has() -> None:
    ledger, tasks = books(8)
    fates = (DELIVERED, SKIPPED, DEAD, FILTERED)
    for task, fate in zip(tasks, fates * 2, strict=True):
        ledger.settle(task.origin, fate, LETTER if fate == DEAD else None)
    delta = ledger.take_delta()
    ledger.issue([Task(8, ("", 8))])
    ledger.settle(("", 8), FILTERED)  # while the others are being committed
    fenced = Positions()
    for number in range(4):
        fenced.add(("", number))
    ledger.committed(delta, fenced)
    assert (ledger.fates, ledger.released, ledger.open) == ([1, 1, 1, 1], 4, 1)
    ledger.committed(ledger.take_delta(), Positions())
    assert (ledger.fates, ledger.released, ledger.open) == ([2, 1, 1, 1], 4, 0)


def test_what_is_left_at_the_end_is_released_and_known_by_its_positions() -> None:
    ledger = Ledger(holds=True, commits=True, keeps_items=False)
    tasks = [Task(0, ("a", 0)), Task(0, ("a", 1)), Task(0, ("b", 5)), Task(0, ("b", 7)), Task(0, ("a", 2))]
    ledger.issue(tasks)
    ledger.settle(("a", 1), SKIPPED)
    ledger.settle(("b", 7), SKIPPED)
    ledger.committed(ledger.take_delta(), Positions())
    assert members(ledger.unfinished) == {("a", 0), ("a", 2), ("b", 5)}
    assert not ledger.items
    ledger.release()
    ledger.release()
    assert (ledger.released, ledger.open, ledger.fates) == (3, 0, [0, 2, 0, 0])


def test_without_a_sink_items_are_counted_as_they_are_handed_over_or_taken_back() -> None:
    ledger, _ = books(5, holds=False, commits=False)
    ledger.deliver_plain(3)
    ledger.withdraw(1)
    assert (ledger.fates[DELIVERED], ledger.released, ledger.open) == (3, 1, 1)
    assert not ledger.unfinished


def test_the_source_positions_of_every_kind_of_origin() -> None:
    ledger, (first, second, third) = books(3)
    child = ledger.stream(second.origin).children(["a"])[0].origin
    merged = Merged([Passed(first.origin, 0), child])
    assert positions_of(first.origin) == (("", 0),)
    assert positions_of(child) == (("", 1),)
    assert positions_of(merged) == (("", 0), ("", 1))
    assert positions_of(Passed(ledger.expand(merged, 2), 1)) == (("", 0), ("", 1))
    assert positions_of(ledger.expand(third.origin, 1)) == (("", 2),)
