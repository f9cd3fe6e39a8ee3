"""``inline=True``: no thread and no process works on an item, and the results are the same."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import balanced, dice
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.testing import run_virtual


def where(x: Any) -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


class Where:
    def __init__(self) -> None:
        self.built = where(None)

    def __call__(self, x: Any) -> tuple[int, int]:
        assert self.built == where(x)
        return where(x)


async def ask(x: Any) -> Any:
    await asyncio.sleep(0)
    return x


async def letters(x: Any) -> AsyncIterator[Any]:
    for letter in repr(x):
        yield letter


EVERYWHERE = (
    ps.Flow(range(20))
    .map(ask)
    .map(lambda x: (x, where(x)))
    .filter(lambda pair: (pair[0], where(pair)) == pair, workers=3)
    .map(lambda pair: (*pair, where(pair)), place="process", workers=2)
    .flat_map(lambda seen: [(*seen, where(seen))] * 2, place="process", workers=2)
    .map_batches(lambda batch: [(*seen, where(seen)) for seen in batch], batch_size=4)
)


def test_every_function_runs_on_the_thread_of_the_loop() -> None:
    before = set(threading.enumerate())

    async def main() -> list[Any]:
        loop_thread = threading.get_ident()
        for seen in (outputs := await EVERYWHERE.collect(inline=True)):
            assert set(seen[1:]) == {(os.getpid(), loop_thread)}
        assert set(threading.enumerate()) == before
        return outputs

    assert [seen[0] for seen in asyncio.run(main())] == [x for x in range(20) for _ in "ab"]


def test_no_thread_and_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever starts either is told to refuse; the source is a list, which needs no thread."""
    from penstock.place import process, thread

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("inline, and yet a pool was made")

    monkeypatch.setattr(process.ProcessPool, "__init__", refuse)
    monkeypatch.setattr(thread.ThreadPool, "__init__", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)

    async def main() -> ps.Report:
        recorder = Recorder()
        report = await EVERYWHERE.to(recorder).run(inline=True, progress=False)
        assert len(recorder.outputs) == 40
        return report

    assert asyncio.run(main()).delivered == 20


def test_objects_are_built_once_there_whatever_workers_says() -> None:
    flow = ps.Flow(range(5)).map(ps.per_worker(Where), place="process", workers=4)
    assert len(set(flow.collect_sync(inline=True))) == 1
    indexes = ps.Flow(range(5)).map(lambda x: ps.worker_index(), workers=4)
    assert indexes.collect_sync(inline=True) == [0] * 5


@settings(max_examples=60)
@given(
    count=st.integers(0, 60),
    stages=st.lists(
        st.tuples(
            st.sampled_from(["map", "filter", "flat_map", "map_batches", "batch", "take"]),
            st.booleans(),
            st.sampled_from(["raise", "skip", "keep"]),
            st.integers(0, 2),
        ),
        max_size=4,
    ),
)
def test_the_results_are_the_same(count: int, stages: list[tuple[str, bool, Any, int]]) -> None:
    """Outputs, or the error and its notes, and the counts."""

    def outcome(inline: bool) -> Any:
        recorder = Recorder()
        tried: set[Any] = set()
        flow: ps.Flow[Any] = ps.Flow(range(count))
        for number, (verb, ordered, on_error, retry) in enumerate(stages):
            work = worker(number, tried, fails=on_error != "raise", shaky=retry > 0)
            options: dict[str, Any] = {"on_error": on_error, "retry": ps.Retry(retry, backoff=0), "workers": 2}
            if verb == "map":
                flow = flow.map(work, **options)
            elif verb == "filter":
                flow = flow.filter(lambda x, work=work: dice(work(x), "keep") < 70, **options)
            elif verb == "flat_map":
                flow = flow.flat_map(lambda x, work=work: [work(x)] * (dice(x, "many") % 3), **options)
            elif verb == "map_batches":
                flow = flow.map_batches(lambda xs, work=work: [work(x) for x in xs], batch_size=3, **options)
            elif verb == "batch":
                if any(before[0] == "flat_map" for before in stages[:number]):
                    continue
                flow = flow.batch(3)
            else:
                flow = flow.take(20)
            if not ordered:
                flow = flow.map(lambda x: x, ordered=False)
        report = asyncio.run(flow.to(recorder).run(inline=inline, progress=False))
        assert balanced(report)
        order = all(ordered for _, ordered, _, _ in stages) or None
        counts = (report.delivered, report.filtered, report.skipped)
        if order is None and any(verb in ("batch", "take") for verb, *_ in stages):
            return report.in_flight  # which items share a batch, or pass, follows from the order
        if any(verb == "take" for verb, *_ in stages):
            counts = (report.delivered, 0, 0)  # how many were read beyond it isn't fixed
        return counts, [repr(one) for one in recorder.outputs] if order else sorted(map(repr, recorder.outputs))

    assert outcome(True) == outcome(False)


def worker(number: int, tried: set[Any], *, fails: bool, shaky: bool) -> Any:
    def work(x: Any) -> Any:
        if fails and dice(x, f"fails{number}") < 20:
            raise LookupError(repr(x))
        if shaky and dice(x, f"shaky{number}") < 30 and (number, repr(x)) not in tried:
            tried.add((number, repr(x)))
            raise ValueError(repr(x))
        return (number, x)

    return work


@pytest.mark.parametrize("place", ["thread", "process"])
def test_errors_are_the_same(place: Any) -> None:
    def half(x: int) -> float:
        return 1 / x

    flow = ps.Flow([2, 0]).map(half, place=place, workers=1, retry=ps.Retry(2, backoff=0))
    raised = []
    for inline in (True, False):
        with pytest.raises(ZeroDivisionError) as caught:
            flow.collect_sync(inline=inline)
        raised.append((caught.value.args, [note for note in caught.value.__notes__ if note.startswith("at stage")]))
    assert raised[0] == raised[1]
    assert raised[0][1] == ["at stage 'half', item 1, tried 3 times: 0"]


def test_the_frames_of_an_inline_call_are_in_the_traceback() -> None:
    """What makes a debugger useful: one stack from the function to whoever ran the loop."""
    frames: list[str] = []

    def work(x: int) -> int:
        import sys

        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            frames.append(frame.f_code.co_name)
        return x

    async def main() -> list[int]:
        return await ps.Flow([1]).map(work, place="process").collect(inline=True)

    assert asyncio.run(main()) == [1]
    assert "test_the_frames_of_an_inline_call_are_in_the_traceback" in frames


def test_one_item_at_a_time() -> None:
    inside: list[int] = []

    def work(x: int) -> int:
        inside.append(x)
        assert len(inside) == 1
        inside.remove(x)
        return x

    flow = ps.Flow(range(50)).map(work, workers=8).map(work, place="process", workers=8, ordered=False)
    assert sorted(flow.collect_sync(inline=True)) == list(range(50))


def test_one_item_at_a_time_also_where_a_plain_function_returns_what_is_awaited() -> None:
    inside: list[int] = []

    async def wait(x: int) -> int:
        inside.append(x)
        await asyncio.sleep(1)
        assert inside == [x]
        inside.remove(x)
        return x

    flow = ps.Flow(range(20)).map(lambda x: wait(x), workers=8)  # noqa: PLW0108  # a def, not the coroutine function
    assert run_virtual(flow.collect(inline=True)) == list(range(20))


def test_stages_on_the_loop_are_as_concurrent_as_ever() -> None:
    async def wait(x: int) -> int:
        await asyncio.sleep(1)
        return x

    async def main() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await ps.Flow(range(32)).map(wait).map(lambda x: x).collect(inline=True) == list(range(32))
        return loop.time() - began

    assert run_virtual(main()) == 1


def test_every_way_to_run_takes_it() -> None:
    flow = ps.Flow(range(3)).map(where)
    recorder = Recorder()

    async def main() -> int:
        async with flow.to(recorder).start(inline=True, progress=False) as run:
            await run.finish()
        return threading.get_ident()

    thread = asyncio.run(main())
    assert recorder.outputs == [(os.getpid(), thread)] * 3
    assert flow.to(Recorder()).run_sync(inline=True, progress=False).delivered == 3
    assert len(set(flow.collect_sync(inline=True))) == 1


def test_a_source_that_blocks_still_has_its_thread() -> None:
    """It isn't a stage: reading it on the loop would starve the rest."""

    def source() -> Iterator[str]:
        yield threading.current_thread().name

    (name,) = ps.Flow(source()).map(str).collect_sync(inline=True)
    assert name == "penstock-source-source"
