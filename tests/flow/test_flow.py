"""Flow and Job as descriptions: nothing changes, nothing runs, and what can't be run is refused where it is said."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import PlanError
from penstock.flow.stage import Batch, FlatMap, Map, MapBatches, Options, Take, Unbatch, Work
from penstock.place.base import cores

CORES = cores()
PLACES = ("loop", "thread", "process")


def double(x: int) -> int:
    return 2 * x


async def ask(x: Any) -> Any:
    return x


async def letters(text: str) -> AsyncIterator[str]:
    for letter in text:
        yield letter


class Model:
    def __call__(self, x: Any) -> Any:
        return x


class Remote:
    async def __call__(self, x: Any) -> Any:
        return x


def options(flow: ps.Flow[Any]) -> Options:
    stage = flow.stages[-1]
    assert isinstance(stage, Work)
    return stage.options


VERBS: dict[str, Callable[[ps.Flow[Any]], ps.Flow[Any]]] = {
    "map": lambda flow: flow.map(double),
    "filter": lambda flow: flow.filter(double),
    "flat_map": lambda flow: flow.flat_map(str, whole=False),
    "map_batches": lambda flow: flow.map_batches(list, batch_size=3),
    "batch": lambda flow: flow.batch(2),
    "unbatch": lambda flow: flow.unbatch(),
    "take": lambda flow: flow.take(2),
}


# -- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_returns_a_new_flow_with_one_more_stage(verb: str) -> None:
    flow = ps.Flow([1, 2], name="numbers", id=str, retry=2)
    longer = VERBS[verb](flow.map(double))
    assert flow.stages == ()
    assert [stage.verb for stage in longer.stages] == ["map", verb]
    assert (longer.source, longer.name, longer.id, longer.defaults) == (flow.source, "numbers", str, {"retry": 2})


@given(st.lists(st.sampled_from(sorted(VERBS)), max_size=6), st.sampled_from(sorted(VERBS)))
def test_a_flow_stays_what_it_was_whatever_is_made_of_it(verbs: list[str], other: str) -> None:
    flow: ps.Flow[Any] = ps.Flow([1, 2])
    for verb in verbs:
        flow = VERBS[verb](flow)
    before = flow.stages
    assert [stage.verb for stage in before] == verbs
    one, another = VERBS[other](flow), VERBS[other](flow)
    assert flow.stages is before
    assert one is not another
    assert one.stages[:-1] == another.stages[:-1] == before


@pytest.mark.parametrize("name", ["source", "stages", "name", "id", "defaults", "colour"])
def test_a_flow_cant_be_changed(name: str) -> None:
    flow = ps.Flow([1])
    with pytest.raises(AttributeError, match=f"can't be changed: {name}"):
        setattr(flow, name, None)
    with pytest.raises(AttributeError, match=f"can't be changed: {name}"):
        delattr(flow, name)
    assert flow.collect_sync() == [1]


def test_stages_and_jobs_cant_be_changed() -> None:
    job = ps.Flow([1]).map(double).to(print)
    for owner, name in ((job.flow.stages[0], "name"), (job, "name")):
        with pytest.raises(AttributeError):
            setattr(owner, name, "other")


def test_a_flow_travels_and_is_copied() -> None:
    flow = ps.Flow([1, 2], name="numbers", retry=1).map(double, ordered=False)
    for other in (copy.copy(flow), copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert (other.stages, other.name, other.defaults) == (flow.stages, flow.name, flow.defaults)
        assert other.collect_sync() == [2, 4]


def test_a_description_runs_nothing() -> None:
    called: list[Any] = []

    def source() -> Any:
        called.append("source")
        yield 1

    flow = ps.Flow(source()).map(called.append).filter(called.append)
    flow.to(called.append).explain()
    flow.explain()
    aiter(flow)
    iter(flow)
    assert called == []


def test_one_flow_can_be_run_any_number_of_times() -> None:
    flow = ps.Flow(range(3)).map(double)
    assert [flow.collect_sync() for _ in range(3)] == [[0, 2, 4]] * 3
    assert flow.take(1).collect_sync() == [0]


def test_what_a_flow_and_a_job_look_like() -> None:
    flow = ps.Flow([1], name="numbers").map(double)
    assert repr(flow) == "Flow(memory:numbers, 1 stages)"
    assert repr(ps.Flow()) == "Flow(unbound, 0 stages)"
    assert repr(flow.to("out.jsonl")) == "Job(Flow(memory:numbers, 1 stages) to jsonl:out.jsonl)"


# -- defaults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        (ps.Flow().map(double), ("thread", CORES)),
        (ps.Flow().map(ask), ("loop", 32)),
        (ps.Flow().flat_map(letters), ("loop", 32)),
        (ps.Flow().map(partial(ask)), ("loop", 32)),
        (ps.Flow().map(Remote()), ("loop", 32)),
        (ps.Flow().map(Model()), ("thread", CORES)),
        (ps.Flow().map(ps.per_worker(Model)), ("thread", 1)),
        (ps.Flow().map(ps.per_worker(Remote)), ("loop", 32)),
        (ps.Flow().map_batches(list, batch_size=2), ("thread", 1)),
        (ps.Flow().map(double, place="process"), ("process", CORES)),
        (ps.Flow().map(double, place="loop"), ("loop", 32)),
    ],
)
def test_where_a_function_runs_by_default(flow: ps.Flow[Any], expected: tuple[str, int]) -> None:
    chosen = options(flow)
    assert (chosen.place, chosen.ceiling) == expected
    assert not chosen.named
    assert chosen.ordered
    assert (chosen.key, chosen.retry, chosen.timeout, chosen.max_failures) == (None, None, None, None)
    assert chosen.on_error == "raise"


def test_a_stage_that_names_its_ceiling_is_remembered_as_such() -> None:
    assert options(ps.Flow().map(ask, concurrency=4)).named
    assert options(ps.Flow().map(double, workers=4)).named
    assert not options(ps.Flow(workers=4).map(double)).named


def test_defaults_are_for_every_stage_they_fit_and_a_stage_overrides_them() -> None:
    flow: ps.Flow[Any] = ps.Flow(
        [1],
        place="process",
        concurrency=3,
        workers=2,
        ordered=False,
        retry=4,
        timeout=5,
        on_error="skip",
        max_failures=0.5,
    )
    shared = {"ordered": False, "retry": ps.Retry(4), "timeout": 5.0, "on_error": "skip", "max_failures": 0.5}
    assert options(flow.map(double)) == Options("process", 2, False, **shared)
    assert options(flow.map(ask)) == Options("loop", 3, False, **shared)
    own: dict[str, Any] = {"ordered": True, "retry": 1, "timeout": 9, "on_error": "raise", "max_failures": 7}
    assert options(flow.map(double, place="thread", workers=1, **own)) == Options(
        "thread", 1, True, retry=ps.Retry(1), timeout=9.0, max_failures=7
    )
    assert options(flow.map(ask, place="process")).place == "process"


@pytest.mark.parametrize("name", ["retry", "timeout", "max_failures"])
def test_a_stages_own_none_overrides_a_default(name: str) -> None:
    defaults: dict[str, Any] = {name: 2}
    own: dict[str, Any] = {name: None}
    flow = ps.Flow([1], **defaults)
    assert getattr(options(flow.map(double)), name) is not None
    assert getattr(options(flow.map(double, **own)), name) is None


def test_none_as_a_default_is_no_default() -> None:
    nothing: Any = dict.fromkeys(("place", "workers", "ordered", "on_error", "retry", "timeout"))
    flow = ps.Flow([3], **nothing)
    assert flow.defaults == {}
    assert flow.map(double).collect_sync() == [6]


def test_the_parameters_of_the_other_verbs() -> None:
    flow = ps.Flow().batch(3, max_wait=0).unbatch().take(0).map_batches(list, batch_size=5, max_wait=1)
    batch, unbatch, take, batches = flow.stages
    assert batch == Batch(3, 0.0)
    assert unbatch == Unbatch()
    assert take == Take(0)
    assert isinstance(batches, MapBatches)
    assert (batches.batch_size, batches.max_wait) == (5, 1.0)
    whole, streamed = ps.Flow().flat_map(str).flat_map(str, whole=False).stages
    assert isinstance(whole, FlatMap)
    assert isinstance(streamed, FlatMap)
    assert (whole.whole, streamed.whole) == (True, False)
    assert ps.Flow().map(double, key=str).stages == (Map(double, "double", Options("thread", CORES, False, key=str)),)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (double, "double"),
        (lambda x: x, "<lambda>"),
        (partial(partial(double)), "double"),
        (Model(), "Model"),
        (Model, "Model"),
        (ps.per_worker(Model), "Model"),
        (ps.per_worker(partial(Model)), "Model"),
        ("text".join, "join"),
        (MagicMock(), "MagicMock"),
    ],
)
def test_a_stage_is_called_by_its_functions_name(function: Any, name: str) -> None:
    assert ps.Flow().map(function).stages[0].name == name
    assert ps.Flow().map(function, name="other").stages[0].name == "other"


def test_the_jobs_name_is_its_own_or_the_sources_and_the_sinks() -> None:
    async def name(job: ps.Job) -> str:
        async with job.start(progress=False) as run:
            return (await run.finish()).name

    def name_of(job: ps.Job) -> str:
        return asyncio.run(name(job))

    assert name_of(ps.Flow([1], name="numbers").to(Recorder(), name="mine")) == "mine"
    assert name_of(ps.Flow([1], name="numbers").to(Recorder())) == "numbers -> memory:recorder"
    assert name_of(ps.Flow([1]).to(Recorder())) == "memory:list -> memory:recorder"
    assert name_of(ps.Flow(name="work").map(double).over([1]).to(Recorder())) == "work -> memory:recorder"


# -- over -------------------------------------------------------------------------------------------------------------


def test_an_unbound_flow_goes_over_a_source_and_stays_unbound() -> None:
    work = ps.Flow().map(double)
    assert work.over([1, 2]).collect_sync() == [2, 4]
    assert work.over(iter([3])).collect_sync() == [6]
    assert work.source is None


def test_the_defaults_of_a_flow_hold_for_what_is_put_over_it() -> None:
    def fails_at_two(x: int) -> int:
        if x == 2:
            raise ValueError
        return x

    work = ps.Flow().map(fails_at_two)
    assert work.over(ps.Flow([1, 2, 3], on_error="skip")).collect_sync() == [1, 3]
    own = ps.Flow(on_error="raise").map(fails_at_two)
    assert own.over(ps.Flow([1, 3], on_error="skip")).collect_sync() == [1, 3]
    with pytest.raises(ValueError):
        own.over(ps.Flow([2], on_error="skip")).collect_sync()
    with pytest.raises(ValueError):
        ps.Flow().map(fails_at_two, on_error="raise").over(ps.Flow([2], on_error="skip")).collect_sync()
    stated = ps.Flow().map_state(lambda state, x: (state, fails_at_two(x)))
    assert stated.over(ps.Flow([1, 2, 3], on_error="skip")).collect_sync() == [1, 3]


def test_over_a_flow_puts_its_stages_first() -> None:
    first = ps.Flow(range(5), name="numbers", id=str, retry=2, timeout=3).filter(lambda x: x % 2)
    bound = ps.Flow(timeout=9).map(double).over(first)
    assert bound.collect_sync() == [2, 6]
    assert [stage.verb for stage in bound.stages] == ["filter", "map"]
    assert (bound.name, bound.id, bound.defaults) == ("numbers", str, {"retry": 2, "timeout": 9})
    named = ps.Flow(name="work", id="key").map(double).over(first)
    assert (named.name, named.id) == ("work", "key")


def test_over_a_source_it_keeps_its_own_name_and_id() -> None:
    bound = ps.Flow(name="work", id="key").over([1])
    assert bound.source is not None
    assert (bound.source.identity, bound.name, bound.id) == ("memory:work", "work", "key")


def test_what_over_refuses() -> None:
    with pytest.raises(PlanError, match="has a source"):
        ps.Flow([1]).over([2])
    with pytest.raises(PlanError, match="given an unbound flow"):
        ps.Flow().over(ps.Flow().map(double))
    with pytest.raises(PlanError, match="can't be iterated"):
        ps.Flow().over(5)  # type: ignore[arg-type]


def test_an_unbound_flow_opens_and_a_bound_one_doesnt() -> None:
    async def main() -> int:
        async with ps.Flow().map(double).open() as call:
            return await call(4)

    assert asyncio.run(main()) == 8
    with pytest.raises(PlanError, match="needs a flow without a source"):
        asyncio.run(enter(ps.Flow([1]).map(double)))


async def enter(flow: ps.Flow[Any]) -> None:
    async with flow.open():
        pass


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_to_takes_a_path_a_sink_or_a_function(tmp_path: Path) -> None:
    flow, recorder = ps.Flow([1]), Recorder()
    assert flow.to(recorder).sink is recorder
    assert flow.to(print).sink.identity == "function:print"
    assert flow.to(tmp_path / "out.jsonl").sink.identity == flow.to(f"{tmp_path}/out.jsonl").sink.identity


def test_with_sink_is_the_same_job_elsewhere() -> None:
    job = ps.Flow([1]).to(print, name="mine", on_error="skip")
    other = job.with_sink(Recorder())
    assert (other.flow, other.name, other.on_error) == (job.flow, "mine", "skip")
    assert other.sink.identity == "memory:recorder"
    assert job.sink.identity == "function:print"


def test_what_the_sink_refuses_goes_by_the_default_of_the_flow() -> None:
    assert ps.Flow([1]).to(print).on_error == "raise"
    assert ps.Flow([1], on_error="skip").to(print).on_error == "skip"
    assert ps.Flow([1], on_error="skip").to(print, on_error="raise").on_error == "raise"


def test_keep_is_refused_for_a_sink_and_as_a_default_means_raise() -> None:
    with pytest.raises(PlanError, match=r"to\(on_error='keep'\), which a sink can't do"):
        ps.Flow([1]).to(print, on_error="keep")  # type: ignore[arg-type]
    job = ps.Flow([1, 2], on_error="keep").to(Recorder(refuse=lambda value: True))
    assert job.on_error == "raise"
    with pytest.raises(ValueError, match=r"refused \(1,\)"):
        job.run_sync(progress=False)


# -- refused ----------------------------------------------------------------------------------------------------------

flow: Any = ps.Flow([1])
unbound: Any = ps.Flow

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a number as source": (lambda: unbound(5), r"Flow\(5\) was given an int, which can't be iterated"),
    "a text as source": (lambda: unbound("in.txt"), "whose items are its characters"),
    "an id": (lambda: unbound([1], id=5), r"Flow\(id=5\)"),
    "a flow's name": (lambda: unbound([1], name=5), r"Flow\(name=5\)"),
    "a parameter of no flow": (lambda: unbound([1], wokers=2), "has no parameter 'wokers'. It takes name, id, "),
    "a key for every stage": (lambda: unbound([1], key=str), "has no parameter 'key'"),
    "a place": (lambda: unbound([1], place="cloud"), r"Flow\(\): place='cloud'. Give one of 'loop', 'thread', 'proc"),
    "no place": (lambda: flow.map(double, place=""), "stage 'double': place=''"),
    "no workers for every stage": (lambda: unbound([1], workers=0), r"Flow\(\): workers=0. Give a whole number"),
    "no workers beside a place": (lambda: unbound([1], place="loop", workers=0), r"Flow\(\): workers=0"),
    "no concurrency beside a place": (lambda: unbound([1], place="thread", concurrency=0), "concurrency=0"),
    "an on_error for every stage": (lambda: unbound([1], on_error="skp"), r"Flow\(\): on_error='skp'"),
    "a timeout for every stage": (lambda: unbound([1], timeout=0), r"Flow\(\): timeout=0"),
    "a function": (lambda: flow.map("upper"), r"map\('upper'\) was given a str, which isn't callable"),
    "no function": (lambda: flow.filter(None), r"filter\(None\)"),
    "a stage's name": (lambda: flow.map(double, name=5), r"map\(name=5\)"),
    "a parameter": (lambda: flow.flat_map(str, wokers=2), r"flat_map\(\) has no parameter 'wokers'"),
    "workers": (lambda: flow.map(double, workers=0), "stage 'double': workers=0"),
    "yes as workers": (lambda: flow.map(double, workers=True), "workers=True. Give a whole number of at least 1"),
    "half a worker": (lambda: flow.map(double, workers=1.5), "workers=1.5"),
    "concurrency": (lambda: flow.map(ask, concurrency=-1), "stage 'ask': concurrency=-1"),
    "workers of an async stage": (lambda: flow.map(ask, workers=2), "workers= is for threads and processes"),
    "concurrency of a thread": (lambda: flow.map(double, concurrency=2), "concurrency= is for async functions"),
    "an on_error": (lambda: flow.map(double, on_error="ignore"), "stage 'double': on_error='ignore'"),
    "a key": (lambda: flow.map(double, key="field"), "stage 'double': key='field' isn't callable"),
    "a retry": (lambda: flow.map(double, retry="often"), "retry='often'"),
    "a negative retry": (lambda: flow.map(double, retry=-1), r"attempts=-1"),
    "a key of batches": (lambda: flow.map_batches(list, batch_size=2, key=str), "map_batches takes no key="),
    "a batch_size": (lambda: flow.map_batches(list, batch_size=0), "stage 'list': batch_size=0"),
    "a size": (lambda: flow.batch(0), r"batch\(size\)=0"),
    "a count": (lambda: flow.take(-1), r"take\(count\)=-1. Give a whole number of at least 0"),
    "a suffix": (lambda: flow.to("out.doc"), "the suffix doesn't say what to write"),
    "a number as sink": (lambda: flow.to(5), r"to\(5\) was given a int, which is no sink"),
    "a sink's on_error": (lambda: flow.to(print, on_error="ignore"), r"to\(on_error='ignore'\)"),
    "a job's name": (lambda: flow.to(print, name=5), r"to\(name=5\)"),
}
for value in (0, -1, "1", True, math.nan, math.inf):
    REFUSED[f"timeout {value!r}"] = (partial(flow.map, double, timeout=value), "timeout=")
for value in (-1, "1", True, math.nan, math.inf):
    REFUSED[f"max_wait {value!r}"] = (partial(flow.batch, 2, max_wait=value), "max_wait=")
    REFUSED[f"max_failures {value!r}"] = (partial(flow.map, double, max_failures=value), "max_failures=")
    REFUSED[f"max_wait of batches {value!r}"] = (partial(flow.map_batches, list, batch_size=2, max_wait=value), "max_w")


@pytest.mark.parametrize("what", REFUSED)
def test_what_cant_be_run_is_refused_where_it_is_said(what: str) -> None:
    say, sentence = REFUSED[what]
    with pytest.raises(PlanError, match=sentence) as caught:
        say()
    assert caught.value.remedy


@given(st.sampled_from(PLACES), st.integers(-2, 40) | st.sampled_from([None, 2.0, "2", False]), st.booleans())
def test_a_ceiling_is_a_whole_number_from_1_by_its_own_name(place: Any, ceiling: Any, asynchronous: bool) -> None:
    function: Any = ask if asynchronous else double
    own, foreign = ("concurrency", "workers") if place == "loop" else ("workers", "concurrency")
    with pytest.raises(PlanError, match=f"{foreign}= is for"):
        flow.map(function, place=place, **{foreign: 2})
    if ceiling is None or (type(ceiling) is int and ceiling >= 1):
        chosen = options(flow.map(function, place=place, **{own: ceiling}))
        assert chosen.ceiling == (ceiling or (32 if place == "loop" else CORES))
    else:
        with pytest.raises(PlanError, match=f"{own}="):
            flow.map(function, place=place, **{own: ceiling})
