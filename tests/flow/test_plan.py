"""From description to plan: what is fused, what is promised and why, and every refusal before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import PlanError
from penstock.flow.plan import Plan, Segment, make_plan, plan_call, stage_takes
from penstock.flow.stage import FlatMap, MapBatches, Stage, Work
from penstock.place.base import KEEP, MAP, SPREAD, STREAM, cores

CORES = cores()
DEADLINE = 60


def plain(x: Any) -> Any:
    return x


async def ask(x: Any) -> Any:
    return x


def plan(flow: ps.Flow[Any]) -> Plan:
    return make_plan(flow, None)


def shape(flow: ps.Flow[Any]) -> list[list[str]]:
    return [list(segment.names) for segment in plan(flow).segments]


numbers = ps.Flow([1, 2])


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        (numbers, []),
        (numbers.map(ask).map(ask).filter(ask), [["ask", "ask#2", "ask#3"]]),
        (numbers.map(plain).filter(plain).flat_map(str), [["plain", "plain#2", "str"]]),
        (numbers.map(ask).map(plain).map(ask), [["ask"], ["plain"], ["ask#2"]]),
        (numbers.map(plain).map(plain, place="process"), [["plain"], ["plain#2"]]),
        (numbers.map(ask).map(ask, concurrency=32).map(ask), [["ask"], ["ask#2"], ["ask#3"]]),
        (ps.Flow([1], concurrency=2).map(ask).map(ask), [["ask", "ask#2"]]),
        (numbers.map(ask).map(ask, ordered=False).map(ask, ordered=False), [["ask"], ["ask#2", "ask#3"]]),
        (numbers.map(ask).map(ask, key=str).map(ask, key=str), [["ask"], ["ask#2"], ["ask#3"]]),
        (numbers.flat_map(ask).map(ask), [["ask"], ["ask#2"]]),
        (numbers.map(ask).flat_map(ask, whole=False).map(ask), [["ask"], ["ask#2"], ["ask#3"]]),
        (
            numbers.map_batches(list, batch_size=2).map_batches(list, batch_size=2).map(plain, name="list"),
            [["list"], ["list#2"], ["list#3"]],
        ),
        (numbers.map(ask).batch(2).unbatch().take(1).map(ask), [["ask"], ["batch"], ["unbatch"], ["take"], ["ask#2"]]),
    ],
)
def test_a_segment_ends_where_something_changes(flow: ps.Flow[Any], expected: list[list[str]]) -> None:
    assert shape(flow) == expected


VERBS: dict[str, Callable[[ps.Flow[Any]], ps.Flow[Any]]] = {
    "ask": lambda flow: flow.map(ask),
    "ask, its own ceiling": lambda flow: flow.map(ask, concurrency=32),
    "ask, unordered": lambda flow: flow.map(ask, ordered=False),
    "ask, keyed": lambda flow: flow.map(ask, key=str),
    "plain": lambda flow: flow.map(plain),
    "filter": lambda flow: flow.filter(ask),
    "built": lambda flow: flow.map(ps.per_worker(list)),
    "process": lambda flow: flow.map(plain, place="process"),
    "spread": lambda flow: flow.flat_map(ask),
    "batches": lambda flow: flow.map_batches(list, batch_size=2),
    "take": lambda flow: flow.take(2),
}


@given(st.lists(st.sampled_from(sorted(VERBS)), max_size=8))
def test_whatever_is_fused_could_have_been_one_stage(verbs: list[str]) -> None:
    """All stages are there once and in order; within a segment nothing but the function changes, and between two
    fusible neighbours there is no border."""
    flow: ps.Flow[Any] = numbers
    for verb in verbs:
        flow = VERBS[verb](flow)
    segments = plan(flow).segments
    assert [number for segment in segments for number in segment.numbers] == list(range(len(verbs)))
    assert tuple(stage for segment in segments for stage in segment.stages) == flow.stages
    names = [name for segment in segments for name in segment.names]
    assert len(set(names)) == len(names)
    borders = {segment.numbers[0] for segment in segments}
    for number in range(1, len(verbs)):
        before, stage = flow.stages[number - 1 : number + 1]
        assert (number not in borders) == fusible(before, stage)


def fusible(before: Stage, stage: Stage) -> bool:
    if not isinstance(before, Work) or not isinstance(stage, Work) or isinstance(before, FlatMap):
        return False
    if isinstance(before, MapBatches) or isinstance(stage, MapBatches):
        return False
    alike = {(one.options.place, one.options.ceiling, one.options.ordered) for one in (before, stage)}
    alone = any(one.options.named or one.options.key for one in (before, stage))
    return len(alike) == 1 and not alone


def only(flow: ps.Flow[Any]) -> Segment:
    (segment,) = plan(flow).segments
    return segment


def test_the_ceiling_of_a_segment_is_that_of_its_stages() -> None:
    assert only(numbers.map(ask).map(ask)).ceiling == 32
    assert only(numbers.map(plain, workers=3)).ceiling == 3
    assert only(numbers.map_batches(list, batch_size=9)).ceiling == 1
    assert only(numbers.batch(5)).ceiling == 1
    assert only(numbers.flat_map(ask, concurrency=7)).ceiling == 7


def test_an_ordered_expansion_one_by_one_has_one_at_a_time() -> None:
    assert only(numbers.flat_map(ask, whole=False, concurrency=7)).ceiling == 1
    assert only(numbers.flat_map(ask, whole=False, concurrency=7, ordered=False)).ceiling == 7
    assert only(numbers.flat_map(ask, whole=False, concurrency=7, key=str)).ceiling == 7


def test_what_a_pool_runs() -> None:
    chain = only(numbers.map(ask, timeout=3).filter(ask, name="keep").flat_map(ask)).chain()
    assert chain.name == "ask+keep+ask#2"
    assert [(step.name, step.verb, step.timeout) for step in chain.steps] == [
        ("ask", MAP, 3.0),
        ("keep", KEEP, None),
        ("ask#2", SPREAD, None),
    ]
    assert only(numbers.flat_map(ask, whole=False)).chain().steps[0].verb == STREAM


def test_order_and_place_of_a_segment() -> None:
    assert only(numbers.map(plain, place="process")).place == "process"
    assert only(numbers.batch(2)).place == "loop"
    assert only(numbers.batch(2)).ordered
    assert not only(numbers.map(ask, ordered=False)).ordered
    assert not only(numbers.map(ask, key=str)).ordered


def test_takes_are_known_by_their_number() -> None:
    assert stage_takes(plan(numbers.take(5).map(ask).take(3).batch(2))) == {0: 5, 2: 3}


def test_items_are_kept_only_for_dead_letters() -> None:
    assert not make_plan(numbers.map(ask), numbers.map(ask).to(Recorder())).keeps_items
    for flow, on_error in (
        (numbers.map(ask, on_error="dead_letter"), "raise"),
        (ps.Flow([1], on_error="dead_letter"), "raise"),
        (numbers.map(ask), "dead_letter"),
    ):
        assert make_plan(flow, flow.to(Recorder(), on_error=on_error)).keeps_items  # type: ignore[arg-type]


# -- the guarantee ----------------------------------------------------------------------------------------------------


async def stream() -> AsyncIterator[int]:
    yield 1


def test_the_guarantee_and_its_reason() -> None:
    flow = numbers.map(ask)
    once: list[tuple[ps.Flow[Any], Any, str]] = [
        (flow, Recorder(), "commits the source's progress together with the data; after a crash, what was in flight "),
        (flow, Recorder(), "about 0.03 s of work is done again"),
        (flow, Recorder(pace=2.5), "about 2.5 s of work is done again"),
        (ps.Flow(iter([1]), id=str), Recorder(), "commits the ids together with the data"),
    ]
    for given_flow, sink, reason in once:
        made = make_plan(given_flow, given_flow.to(sink))
        assert made.guarantee.startswith("exactly once: memory:recorder ")
        assert reason in made.guarantee
        assert made.exactly_once
        assert made.commits
    least: list[tuple[ps.Flow[Any], Any, str]] = [
        (flow, print, "a function can't commit progress together with its effect"),
        (ps.Flow(iter([1])), Recorder(), "memory:iterable can't be read again from where it was; give a list"),
        (ps.Flow(stream()), Recorder(), "memory:stream can't be read again"),
    ]
    for given_flow, sink, reason in least:
        made = make_plan(given_flow, given_flow.to(sink))
        assert made.guarantee.startswith("at least once: ")
        assert reason in made.guarantee
        assert not made.exactly_once
    assert plan(flow).guarantee.startswith("outputs are handed to the caller")
    assert plan(ps.Flow([1], id=str)).guarantee.endswith("; no ids are kept, so a repeated one isn't noticed")
    by_id = ps.Flow([1], id=str)
    assert make_plan(by_id, by_id.to(print)).guarantee.endswith("; no ids are kept, so a repeated one isn't noticed")
    assert not plan(flow).commits
    assert plan_call(ps.Flow().map(ask)).guarantee == "each call gets its own answer or its own error"


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_says_where_how_many_and_in_what_order() -> None:
    flow = (
        ps.Flow([1], name="texts")
        .map(ask, retry=ps.Retry(2, on=(OSError, KeyError)), timeout=60)
        .filter(plain, workers=1, on_error="skip", max_failures=0.1)
        .map(plain, place="process", workers=2, ordered=False)
        .map(ask, key=plain)
        .flat_map(str, whole=False, retry=ps.Retry(on=plain))
        .map_batches(ps.per_worker(list), batch_size=4, max_wait=0.5)
        .batch(2)
        .batch(3, max_wait=1)
        .map(len, place="loop")
        .take(9)
    )
    assert flow.to(print).explain() == (
        "memory:texts -> ask -> plain -> plain#2 -> ask#2 -> str -> list -> batch -> batch#2 -> len -> take "
        "-> function:print\n"
        "  segment 1: on the event loop, 32 at once, ordered\n"
        "    map(ask) retry=Retry(attempts=2, on=OSError|KeyError) timeout=60.0\n"
        "  segment 2: in threads, 1 worker, ordered\n"
        "    filter(plain) on_error=skip max_failures=0.1\n"
        "  segment 3: in processes, 2 workers, unordered\n"
        "    map(plain) ordered=False\n"
        "  segment 4: on the event loop, 32 at once, in order within a key\n"
        "    map(ask) key=plain\n"
        "  segment 5: in threads, 1 worker, ordered\n"
        "    flat_map(str) whole=False retry=Retry(on=plain)\n"
        "  segment 6: in threads, 1 worker, ordered\n"
        "    map_batches(list) batch_size=4 max_wait=0.5\n"
        "  segment 7: between workers\n"
        "    batch(2)\n"
        "  segment 8: between workers\n"
        "    batch(3) max_wait=1\n"
        "  segment 9: on the event loop, 32 at once, ordered\n"
        "    map(len)\n"
        "  segment 10: between workers\n"
        "    take(9)\n"
        "guarantee: at least once: a function can't commit progress together with its effect"
    )


def test_explain_without_a_sink_and_without_a_source() -> None:
    assert numbers.unbatch().explain().splitlines() == [
        "memory:list -> unbatch",
        "  segment 1: between workers",
        "    unbatch()",
        "guarantee: outputs are handed to the caller as they come; nothing is kept for another run",
    ]
    assert plan_call(ps.Flow().map(ask)).explain().splitlines()[:2] == [
        "unbound -> ask",
        "  segment 1: on the event loop, 32 at once, unordered",
    ]


# -- the fingerprint --------------------------------------------------------------------------------------------------


def fingerprint(flow: ps.Flow[Any]) -> str:
    return plan(flow).fingerprint


def test_the_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Whatever the addresses of its lambdas and the order of its sets."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "import penstock as ps\n"
        "from penstock.flow.plan import make_plan\n"
        "ballast = [object() for _ in range(int(sys.argv[1]))]\n"
        "class Model:\n"
        "    def __call__(self, x):\n"
        "        return [y for y in x if y in {'a', 'b', 'c', 'd', 'e'}]\n"
        "flow = (\n"
        "    ps.Flow([1])\n"
        "    .map(lambda x: (lambda y: y + 1)(x), retry=ps.Retry(on=lambda error: True), key=lambda x: x)\n"
        "    .filter(lambda x: x in {'a', 'b', 'c', 'd', 'e'}, retry=ps.Retry(on=(OSError, KeyError)))\n"
        "    .map(Model()).map(ps.per_worker(Model))\n"
        ")\n"
        "print(make_plan(flow, None).fingerprint)\n"
        "print(flow.explain())\n"
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
    assert " at 0x" not in said.pop()


def test_the_fingerprint_tells_plans_apart() -> None:
    class Adds:
        def __call__(self, x: int) -> int:
            return x + 1

    class Multiplies:
        def __call__(self, x: int) -> int:
            return 2 * x

    def constants(x: Any) -> Any:
        return x + 2

    different = [
        numbers,
        numbers.map(plain),
        numbers.filter(plain),
        numbers.map(plain).map(plain),
        numbers.map(plain, name="other"),
        numbers.map(plain, retry=2),
        numbers.map(plain, retry=ps.Retry(2, on=OSError)),
        numbers.map(plain, retry=ps.Retry(2, on=(OSError, KeyError))),
        numbers.map(plain, timeout=2),
        numbers.map(plain, on_error="skip"),
        numbers.map(plain, key=str),
        numbers.flat_map(plain),
        numbers.flat_map(plain, whole=False),
        numbers.map_batches(plain, batch_size=2),
        numbers.map_batches(plain, batch_size=3),
        numbers.map_batches(plain, batch_size=3, max_wait=1),
        numbers.batch(2),
        numbers.batch(2, max_wait=1),
        numbers.take(2),
        numbers.unbatch(),
        *(
            numbers.map(function, name="work")
            for function in (
                plain,
                constants,
                lambda x: x + 1,
                lambda x: x.upper(),
                lambda x: x.lower(),
                lambda x: [y + 3 for y in x],
                lambda x: [y + 4 for y in x],
                lambda x: x in {1, 2},
                lambda x: x in {1, 3},
                Adds(),
                Multiplies(),
                partial(pow, 2),
            )
        ),
    ]
    assert len({fingerprint(flow) for flow in different}) == len(different)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (numbers.map(plain), ps.Flow(["other"]).map(plain)),
        (numbers.map(plain), numbers.map(plain, workers=7)),
        (numbers.map(plain), numbers.map(plain, place="process")),
        (numbers.map(plain, retry=3), numbers.map(plain, retry=ps.Retry())),
        (numbers.map(plain), numbers.map(partial(plain))),
        (numbers.map(ps.per_worker(plain)), numbers.map(plain)),
        (numbers.map(len), numbers.map(len)),
    ],
)
def test_the_fingerprint_is_of_what_is_done_not_of_where(one: ps.Flow[Any], other: ps.Flow[Any]) -> None:
    assert fingerprint(one) == fingerprint(other)


# -- refused before anything runs -------------------------------------------------------------------------------------

whole = numbers.flat_map(str)

REFUSED: dict[str, tuple[ps.Flow[Any], str]] = {
    "unbound": (ps.Flow().map(plain), r"unbound.*flow.over\(source\)"),
    "a batch after a whole expansion": (whole.map(plain).batch(2), r"batch\(2\) comes after flat_map\(str\)"),
    "a batch after unbatch": (numbers.unbatch().batch(3), r"batch\(3\) comes after unbatch\(\)"),
    "streams after a whole expansion": (whole.flat_map(str, whole=False), r"whole=False\) comes after flat_map\(str\)"),
    "streams after streams": (
        numbers.flat_map(str, whole=False).flat_map(list, whole=False),
        r"flat_map\(list, whole=False\) comes after flat_map\(str, whole=False\)",
    ),
    "dead letters to the caller": (
        numbers.map(plain, on_error="dead_letter"),
        "stage 'plain' has on_error=\"dead_letter\", and the caller keeps no dead letters",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_stages_cant_do_together_is_refused_by_everything_that_would_run_it(what: str) -> None:
    flow, sentence = REFUSED[what]
    attempts: list[Callable[[], object]] = [
        flow.explain,
        flow.collect_sync,
        lambda: aiter(flow),
        lambda: iter(flow),
    ]
    if "caller" not in sentence:
        job = flow.to(Recorder())
        attempts += [job.explain, job.run_sync, job.start]
    for attempt in attempts:
        with pytest.raises(PlanError, match=sentence):
            attempt()


@pytest.mark.parametrize(
    ("job", "stage"),
    [
        (numbers.map(plain, on_error="dead_letter").to(print), "plain"),
        (ps.Flow([1], on_error="dead_letter").to(print), "read"),
        (numbers.to(print, on_error="dead_letter"), "to"),
    ],
)
def test_dead_letters_need_a_sink_that_keeps_them(job: ps.Job, stage: str) -> None:
    with pytest.raises(PlanError, match=f"stage '{stage}' .*, and function:print keeps no dead letters"):
        job.start()
    job.with_sink(Recorder()).explain()


def test_a_batch_after_an_expansion_one_by_one_is_fine() -> None:
    assert numbers.flat_map(lambda x: [x, x], whole=False).batch(3).collect_sync() == [[1, 1, 2], [2]]


@pytest.mark.parametrize(
    ("flow", "sentence"),
    [
        (numbers.map(plain), "needs a flow without a source"),
        (ps.Flow(), "a flow without stages"),
        (ps.Flow().filter(plain), r"filter\(plain\) isn't one to one"),
        (ps.Flow().map(plain).flat_map(str), r"flat_map\(str\) isn't one to one"),
        (ps.Flow().batch(2), r"batch\(2\) isn't one to one"),
        (ps.Flow().unbatch(), r"unbatch\(\) isn't one to one"),
        (ps.Flow().take(2), r"take\(2\) isn't one to one"),
        (ps.Flow().map(plain, on_error="skip"), "on_error='skip', and each call needs an answer"),
        (ps.Flow().map(plain, on_error="dead_letter"), "on_error='dead_letter'"),
    ],
)
def test_what_cant_serve_live_requests(flow: ps.Flow[Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        plan_call(flow)


def test_nothing_is_written_when_the_plan_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(PlanError):
        whole.batch(2).to(out).run_sync()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbatched", [False, True])
def test_an_expansion_one_by_one_of_a_batch_is_refused(unbatched: bool) -> None:
    """What is committed of it is kept by its first item, and another run may batch that with others."""
    flow: ps.Flow[Any] = ps.Flow(range(4)).batch(2)
    flow = flow.unbatch() if unbatched else flow
    with pytest.raises(PlanError, match=r"batch\(2\), and a later run may make other lists"):
        flow.flat_map(repr, whole=False).explain()
