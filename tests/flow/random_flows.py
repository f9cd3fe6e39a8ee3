"""Random flows, and a plain-Python model of what must come out of them.

A ``Case`` is data: a source and stages, each with its place, ceiling, order, faults and policies. ``Built`` makes
a flow of it whose functions watch themselves; ``expect`` says what must come out. Values are unique; what happens to
it (dropped, failing for ever, failing at first, taking its time) follows from the value and the stage alone.
"""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import FailureBudgetExceeded, StageTimeout
from penstock.flow.iterate import Outlet
from penstock.flow.plan import make_plan
from penstock.place.base import cores

TIMEOUT = 5.0
FATES = ("filtered", "skipped", "delivered", "dead")


def dice(value: Any, salt: str) -> int:
    """0 … 99, always the same for a value and a salt."""
    return zlib.crc32(f"{salt}:{value!r}".encode()) % 100


class Boom(ValueError):
    """What functions fail with on purpose."""


class Bug(TypeError):
    """A failure of the kind that is never tried again."""


@dataclass(frozen=True)
class Stage:
    """One stage; ``faults`` and ``shaky``: percent of the values that always fail, and that fail at first."""

    verb: str
    number: int
    place: Literal["loop", "thread"] = "loop"
    ceiling: int | None = None
    ordered: bool = True
    keys: int | None = None
    retries: int = 0
    faults: int = 0
    shaky: int = 0
    hangs: bool = False
    on_error: Literal["raise", "skip", "keep", "dead_letter"] = "raise"
    budget: int | None = None
    whole: bool = True
    size: int = 1
    max_wait: float | None = None
    slow: bool = False

    @property
    def name(self) -> str:
        return f"s{self.number}"

    @property
    def calls(self) -> bool:
        return self.verb in ("map", "filter", "flat_map", "map_batches")

    @property
    def limit(self) -> int:
        """The most calls (or batches) in progress."""
        if self.ceiling is not None:
            return self.ceiling
        if self.place == "loop":
            return 32
        return 1 if self.verb == "map_batches" else cores()

    def key(self, value: Any) -> int:
        assert self.keys is not None
        return dice(value, f"key{self.number}") % self.keys

    def poison(self, value: Any) -> type[Exception] | None:
        """What this value fails with at every attempt."""
        if dice(value, f"poison{self.number}") >= self.faults:
            return None
        if self.hangs:
            return StageTimeout
        return Bug if dice(value, f"kind{self.number}") % 4 == 0 else Boom

    def stumbles(self, value: Any) -> int:
        """At how many attempts it fails before it passes."""
        if not self.retries or self.poison(value) or dice(value, f"shaky{self.number}") >= self.shaky:
            return 0
        return 1 + dice(value, f"often{self.number}") % self.retries

    def keeps(self, value: Any) -> bool:
        return dice(value, f"keep{self.number}") < 60

    def result(self, value: Any) -> Any:
        return (self.name, value)

    def outputs(self, value: Any) -> list[Any]:
        return [(self.name, value, index) for index in range(dice(value, f"many{self.number}") % 4)]

    def failure(self, value: Any) -> tuple[str, str, int]:
        """Reason, message and attempts of a value that fails for good."""
        kind = self.poison(value)
        assert kind is not None
        if kind is StageTimeout:
            return "timeout", str(StageTimeout(self.name, TIMEOUT)), self.retries + 1
        return kind.__name__, f"{self.name}: {value!r}", 1 if kind is Bug else self.retries + 1


@dataclass(frozen=True)
class Case:
    """``count`` source items in a list, a generator or an async generator, and the stages they pass."""

    count: int
    source: Literal["list", "generator", "async"]
    stages: tuple[Stage, ...]


# -- the flow ---------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What the function of one stage saw."""

    stage: Stage
    active: int = 0
    peak: int = 0
    calls: int = 0
    attempts: Counter[str] = field(default_factory=Counter)
    keys: Counter[int] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Built:
    """A flow of a case, with functions of its own; ``on_call`` is called on the loop by every function there."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.watches = [Watch(stage) for stage in case.stages]
        self.calls = 0
        self.issued = 0
        self.on_call: Any = lambda calls: None
        self.wrong: list[str] = []
        flow: ps.Flow[Any] = ps.Flow(self._source(), name="random")
        for watch in self.watches:
            flow = self._add(flow, watch)
        self.flow = flow

    @property
    def active(self) -> int:
        return sum(watch.active for watch in self.watches)

    def _source(self) -> Any:
        items = range(self.case.count)

        def generate() -> Iterator[int]:
            for item in items:
                self.issued += 1
                yield item

        async def generate_slowly() -> AsyncIterator[int]:
            for item in items:
                self.issued += 1
                if item % 5 == 4:
                    await asyncio.sleep(0.1)
                yield item

        return {"list": list(items), "generator": generate(), "async": generate_slowly()}[self.case.source]

    def _add(self, flow: ps.Flow[Any], watch: Watch) -> ps.Flow[Any]:
        stage = watch.stage
        if stage.verb == "take":
            return flow.take(stage.size)
        if stage.verb == "unbatch":
            return flow.unbatch()
        if stage.verb == "batch":
            return flow.batch(stage.size, max_wait=stage.max_wait)
        options: dict[str, Any] = {"name": stage.name, "ordered": stage.ordered, "on_error": stage.on_error}
        if stage.ceiling is not None:
            options["concurrency" if stage.place == "loop" else "workers"] = stage.ceiling
        if stage.keys is not None:
            options["key"] = stage.key
        if stage.retries:
            options["retry"] = ps.Retry(stage.retries, backoff=0.5)
        if stage.hangs:
            options["timeout"] = TIMEOUT
        if stage.budget is not None:
            options["max_failures"] = stage.budget
        if stage.verb == "map_batches":
            options |= {"batch_size": stage.size, "max_wait": stage.max_wait}
        if stage.verb == "flat_map":
            options["whole"] = stage.whole
        verb: ps.Flow[Any] = getattr(flow, stage.verb)(self._function(watch), **options)
        return verb

    @contextmanager
    def _call(self, watch: Watch, values: list[Any]) -> Iterator[None]:
        """Count a call in and out, and fail as the stage says."""
        stage = watch.stage
        with watch.lock:
            watch.calls += 1
            watch.active += 1
            watch.peak = max(watch.peak, watch.active)
            if stage.keys is not None:
                key = stage.key(values[0])
                watch.keys[key] += 1
                if watch.keys[key] > 1:
                    self.wrong.append(f"{stage.name}: two items of key {key} at once")
        try:
            for value in values:
                with watch.lock:
                    watch.attempts[repr(value)] += 1
                    attempt = watch.attempts[repr(value)]
                kind = stage.poison(value)
                if (kind is not None and kind is not StageTimeout) or attempt <= stage.stumbles(value):
                    raise (kind or Boom)(f"{stage.name}: {value!r}")
            yield
        finally:
            with watch.lock:
                watch.active -= 1
                if stage.keys is not None:
                    watch.keys[key] -= 1

    def _function(self, watch: Watch) -> Any:
        stage = watch.stage
        answer = {"map": stage.result, "filter": stage.keeps, "flat_map": stage.outputs}.get(stage.verb)

        def plain(value: Any) -> Any:
            values = value if stage.verb == "map_batches" else [value]
            with self._call(watch, values):
                return [stage.result(one) for one in values] if answer is None else answer(value)

        async def loop(value: Any) -> Any:
            values = value if stage.verb == "map_batches" else [value]
            self.calls += 1
            self.on_call(self.calls)
            with self._call(watch, values):
                if stage.hangs and any(stage.poison(one) for one in values):
                    await asyncio.sleep(1e9)
                if stage.slow:
                    await asyncio.sleep(dice(values, stage.name) % 4 / 4)
                return [stage.result(one) for one in values] if answer is None else answer(value)

        def stream(value: Any) -> Iterator[Any]:
            with self._call(watch, [value]):
                yield from stage.outputs(value)

        async def stream_slowly(value: Any) -> AsyncIterator[Any]:
            self.calls += 1
            self.on_call(self.calls)
            with self._call(watch, [value]):
                if stage.hangs and stage.poison(value):
                    await asyncio.sleep(1e9)
                for output in stage.outputs(value):
                    if stage.slow:
                        await asyncio.sleep(0.01)
                    yield output

        if stage.verb == "flat_map" and dice(stage.number, "stream") % 2:
            return stream_slowly if stage.place == "loop" else stream
        return loop if stage.place == "loop" else plain


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Came:
    """What a value came of: ``kind`` item, child (of a whole=False expansion), many (a batch) or whole (a family)."""

    kind: str
    position: int = 0
    index: int = 0
    parts: tuple[Came, ...] = ()

    @property
    def positions(self) -> tuple[int, ...]:
        if self.kind in ("item", "child"):
            return (self.position,)
        return tuple(position for part in self.parts for position in part.positions)


@dataclass(frozen=True)
class Value:
    value: Any
    came: Came
    group: tuple[int, ...] = ()
    members: tuple[Value, ...] = ()


@dataclass
class Expected:
    """``order``: sequence, groups (in order within a group) or none. ``exact``: whether fates are known exactly."""

    outputs: list[Value]
    order: str
    exact: bool
    fates: dict[int, int]
    letters: dict[int, tuple[str, str, str, int]]
    errors: set[tuple[str, str]]

    def count(self, name: str) -> int:
        return sum(fate == FATES.index(name) for fate in self.fates.values())


class _Model:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.values = [Value(item, Came("item", item)) for item in range(case.count)]
        self.order = "sequence"
        self.exact = True
        self.ends: list[tuple[Came, int]] = []
        self.letters: list[tuple[Came, tuple[str, str, str, int]]] = []
        self.errors: set[tuple[str, str]] = set()

    def run(self) -> Expected:
        for stage in self.case.stages:
            if stage.verb == "take":
                self.exact = False
                self.values = self.values[: stage.size]
            elif stage.verb == "batch":
                self.exact = self.exact and self.order == "sequence" and stage.max_wait is None
                self._batch(stage.size)
            elif stage.verb == "unbatch":
                self._unbatch()
            else:
                self._work(stage)
        return self._expected()

    def _batch(self, size: int) -> None:
        values = self.values
        self.values = []
        for start in range(0, len(values), size):
            members = values[start : start + size]
            came = Came("many", parts=tuple(member.came for member in members))
            self.values.append(Value([member.value for member in members], came, members=tuple(members)))

    def _unbatch(self) -> None:
        self.values = [
            replace(member, came=self._whole(value.came)) for value in self.values for member in value.members
        ]

    def _whole(self, came: Came) -> Came:
        return came if came.kind == "whole" else Came("whole", parts=(came,))

    def _expanded(self, stage: Stage, came: Came, index: int) -> Came:
        if stage.whole:
            return self._whole(came)
        return replace(came, kind="child", index=index) if came.kind == "item" else came

    def _work(self, stage: Stage) -> None:
        if not stage.ordered:
            self.order = "none"
        elif stage.keys is not None and self.order != "none":
            self.order = "groups"
        passed: list[Value] = []
        failures = 0
        for value in self.values:
            if stage.keys is not None:
                value = replace(value, group=(*value.group, stage.key(value.value)))
            if stage.poison(value.value) is None:
                passed += self._apply(stage, value)
                continue
            failures += 1
            passed += self._fail(stage, value)
        if stage.on_error != "raise" and stage.budget is not None and failures > stage.budget:
            self.errors.add(("FailureBudgetExceeded", stage.name))
        self.values = passed

    def _apply(self, stage: Stage, value: Value) -> list[Value]:
        if stage.verb == "filter":
            if stage.keeps(value.value):
                return [value]
            self.ends.append((value.came, 0))
            return []
        if stage.verb == "flat_map":
            outputs = stage.outputs(value.value)
            if not outputs:
                self.ends.append((value.came, 0))
            return [
                replace(value, value=output, came=self._expanded(stage, value.came, index))
                for index, output in enumerate(outputs)
            ]
        return [replace(value, value=stage.result(value.value))]

    def _fail(self, stage: Stage, value: Value) -> list[Value]:
        reason, message, attempts = stage.failure(value.value)
        position = value.came.positions[0]
        if stage.on_error == "keep":
            failed = ps.Failed(value.value, ("", position), stage.name, reason, message, attempts)
            return [replace(value, value=failed)]
        if stage.on_error == "skip":
            self.ends.append((value.came, 1))
        elif stage.on_error == "dead_letter":
            self.ends.append((value.came, 3))
            self.letters.append((value.came, (stage.name, reason, message, attempts)))
        else:
            self.errors.add((reason, message))
        return []

    def _expected(self) -> Expected:
        dead = {came for came, fate in self.ends if fate == 3 and came.kind == "whole"}
        outputs = [value for value in self.values if value.came not in dead]
        fates: dict[int, int] = {}
        for came, fate in [*self.ends, *((value.came, 2) for value in outputs)]:
            for position in came.positions:
                fates[position] = max(fate, fates.get(position, 0))
        letters: dict[int, tuple[str, str, str, int]] = {}
        for came, letter in self.letters:
            for position in came.positions:
                letters.setdefault(position, letter)
        return Expected(outputs, self.order, self.exact and not self.errors, fates, letters, self.errors)


def expect(case: Case) -> Expected:
    """What must come out of a case."""
    return _Model(case).run()


def check_outputs(expected: Expected, outputs: list[Any], *, partly: bool = False) -> None:
    """All the outputs, in the order that holds; ``partly``: a run that was cut short may lack some."""
    index = {repr(value.value): number for number, value in enumerate(expected.outputs)}
    assert len(index) == len(expected.outputs)
    numbers = []
    for output in outputs:
        assert repr(output) in index, f"{output!r} should not have come out"
        numbers.append(index[repr(output)])
    assert len(set(numbers)) == len(numbers), "an output came twice"
    if not partly:
        missing = [value.value for number, value in enumerate(expected.outputs) if number not in set(numbers)]
        assert not missing, f"these never came out: {missing}"
    if expected.order == "sequence":
        assert numbers == sorted(numbers)
    elif expected.order == "groups":
        last: dict[tuple[int, ...], int] = {}
        for number in numbers:
            group = expected.outputs[number].group
            assert last.get(group, -1) < number, f"out of order within the key {group}"
            last[group] = number


def check_error(expected: Expected, error: BaseException) -> None:
    """One of the errors that the case must raise."""
    if isinstance(error, FailureBudgetExceeded):
        assert ("FailureBudgetExceeded", error.stage) in expected.errors
        return
    reason = "timeout" if isinstance(error, StageTimeout) else type(error).__name__
    assert (reason, str(error)) in expected.errors, f"{error!r} should not have been raised"
    assert error.__notes__


def balanced(report: ps.Report) -> bool:
    """Law 1."""
    parts = (report.delivered, report.filtered, report.skipped, report.dead, report.released, report.in_flight)
    return report.issued == sum(parts) and min(parts) >= 0


# -- running it -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    outputs: list[Any]
    error: BaseException | None
    report: ps.Report


async def carry_out(built: Built, *, sink: str = "function", inline: bool = False) -> Outcome:
    """Run it into a function, into a Recorder, or by iterating; law 1 is checked again and again meanwhile."""
    outputs: list[Any] = []
    error: BaseException | None = None

    def look(calls: int) -> None:
        if calls % 3 == 0:
            assert balanced(run.report())

    built.on_call = look
    try:
        if sink == "iteration":
            outlet = Outlet(make_plan(built.flow, None), inline=inline)
            run = outlet.run
            try:
                await outlet.open()
                while tasks := await outlet.take(3):
                    outlet.deliver(tasks)
                    outputs += [task.value for task in tasks]
                    assert balanced(run.report())
            finally:
                await outlet.close()
        else:
            recorder = Recorder()
            job = built.flow.to(recorder if sink == "recorder" else outputs.append)
            run = job.start(inline=inline, progress=False)
            try:
                async with run:
                    await run.finish()
            finally:
                outputs += recorder.outputs
    except Exception as raised:
        error = raised
    assert built.active == 0, "a function is at work after the end"
    return Outcome(outputs, error, run.report())


def check(case: Case, built: Built, outcome: Outcome) -> None:
    """Outputs, errors, counts and ceilings of a run that wasn't disturbed."""
    expected = expect(case)
    report = outcome.report
    if expected.errors:
        assert outcome.error is not None
        check_error(expected, outcome.error)
    elif outcome.error is not None:
        raise outcome.error
    takes = [stage.size for stage in case.stages if stage.verb == "take"]
    check_outputs(expected, outcome.outputs, partly=bool(expected.errors))
    assert balanced(report)
    assert report.in_flight == 0
    if expected.exact:
        counts = (report.filtered, report.skipped, report.delivered, report.dead)
        assert counts == tuple(expected.count(name) for name in FATES)
        assert report.issued == case.count
        assert report.released == 0
    elif not expected.errors and not takes:
        assert report.issued == case.count == report.filtered + report.skipped + report.delivered + report.dead
    assert not built.wrong
    for watch in built.watches:
        assert watch.peak <= watch.stage.limit, watch.stage.name


# -- the strategy -----------------------------------------------------------------------------------------------------


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dead_letters: bool = False,
    errors: bool = True,
    takes: bool = True,
    threads: bool = True,
    sources: tuple[str, ...] = ("list", "generator", "async"),
    most_items: int = 40,
) -> Case:
    """A flow of up to five stages; ``errors``: whether it may be one that must raise."""
    stages: list[Stage] = []
    ordered = True
    expanded = streamed = False  # after a whole expansion; after one that isn't
    loose = False  # who is in a batch with whom can't be told, and so which position a Failed names
    take_allowed = takes
    for number in range(draw(st.integers(0, 5))):
        verbs = ["map", "map", "filter", "flat_map", "map_batches"]
        if not expanded:
            verbs += [*(["rebatch"] if ordered or not dead_letters else []), *(["batch"] if ordered else [])]
        if take_allowed and ordered:
            verbs.append("take")
        verb = draw(st.sampled_from(verbs))
        if verb in ("batch", "rebatch", "take"):
            size = draw(st.integers(1, 5))
            if verb == "take":
                stages.append(Stage("take", number, size=draw(st.integers(0, 20))))
                take_allowed = False
            else:
                stages.append(Stage("batch", number, size=size))
            if verb == "rebatch":
                wait = None if dead_letters else draw(st.sampled_from([None, 0.0, 0.3]))
                stages[-1] = replace(stages[-1], max_wait=wait)
                stages.append(Stage("unbatch", number))
                expanded = True
                loose = loose or not ordered or wait is not None
            continue
        place: Literal["loop", "thread"] = draw(st.sampled_from(["loop", "loop", "thread"] if threads else ["loop"]))
        keyed = verb != "map_batches" and draw(st.integers(0, 5)) == 0
        retries = draw(st.sampled_from([0, 0, 1, 3]))
        faulty = draw(st.integers(0, 2)) == 0
        policies = ["skip", *([] if loose else ["keep"]), *(["raise"] if errors else [])]
        if dead_letters:
            policies += ["dead_letter", "dead_letter"]
        on_error = draw(st.sampled_from(policies))
        batched = any(stage.verb == "batch" for stage in stages)
        whole = verb == "flat_map" and (expanded or streamed or batched or draw(st.booleans()))
        if verb == "flat_map":
            expanded, streamed = expanded or whole, streamed or not whole
        stages.append(
            Stage(
                verb,
                number,
                place=place,
                ceiling=draw(st.sampled_from([None, None, 1, 2, 4])),
                ordered=draw(st.integers(0, 3)) != 0,
                keys=draw(st.integers(1, 4)) if keyed else None,
                retries=retries,
                faults=draw(st.sampled_from([3, 15, 40])) if faulty else 0,
                shaky=draw(st.sampled_from([0, 20, 60])),
                hangs=place == "loop" and draw(st.integers(0, 3)) == 0,
                on_error=on_error,
                budget=draw(st.integers(0, 6)) if errors and draw(st.integers(0, 4)) == 0 else None,
                whole=whole,
                size=draw(st.integers(1, 6)),
                max_wait=draw(st.sampled_from([None, 0.0, 0.3])) if verb == "map_batches" else None,
                slow=place == "loop" and draw(st.booleans()),
            )
        )
        ordered = ordered and stages[-1].ordered and not keyed
    case = Case(
        draw(st.integers(0, most_items)),
        draw(st.sampled_from(sources)),
        tuple(stages),
    )
    if any(stage.verb == "take" for stage in stages):
        case = _tamed(case)
    return case


def _tamed(case: Case) -> Case:
    """With a take, what lies beyond it may be reached or not: nothing there may raise, and all stays in order."""
    stages = tuple(
        replace(
            stage,
            budget=None,
            on_error="skip" if stage.on_error in ("raise", "dead_letter") else stage.on_error,
            ordered=True,
            keys=None,
        )
        for stage in case.stages
    )
    return replace(case, stages=stages)
