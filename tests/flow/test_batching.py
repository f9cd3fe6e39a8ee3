"""batch() and map_batches(): when a batch goes, and what becomes of one that fails. All on the virtual clock."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import BatchMismatch
from penstock.testing import run_virtual

Batches = list[tuple[float, list[int]]]
GAPS = st.lists(st.integers(0, 6), max_size=25)
WAITS = st.one_of(st.none(), st.integers(0, 9).map(lambda seconds: seconds + 0.5))


async def after(gaps: Sequence[int], pause: int = 0) -> AsyncIterator[int]:
    """Items 0, 1, 2 … with these seconds before each, and a pause before the end."""
    for item, gap in enumerate(gaps):
        await asyncio.sleep(gap)
        yield item
    await asyncio.sleep(pause)


def expected(gaps: Sequence[int], pause: int, size: int, max_wait: float | None) -> Batches:
    """When each batch goes: it is full, its oldest item has waited long enough, or the input has ended."""
    batches: Batches = []
    batch: list[int] = []
    now = due = 0.0
    for item, gap in [*enumerate(gaps), (-1, pause)]:
        now += gap
        if batch and due < now:
            batches.append((due, batch))
            batch = []
        if item < 0:
            break
        if not batch:
            due = float("inf") if max_wait is None else now + max_wait
        batch.append(item)
        if len(batch) == size:
            batches.append((now, batch))
            batch = []
    return [*batches, (now, batch)] if batch else batches


def record(
    flow: ps.Flow[int], verb: str, size: int, max_wait: float | None, **given_: Any
) -> tuple[Batches, list[int]]:
    """The batches that a stage makes, each with its time, and the outputs."""
    seen: Batches = []

    async def note(batch: list[int]) -> list[int]:
        seen.append((asyncio.get_running_loop().time(), list(batch)))
        return batch

    if verb == "batch":
        return seen, run_virtual(flow.batch(size, max_wait=max_wait).map(note, **given_).unbatch().collect())
    return seen, run_virtual(flow.map_batches(note, batch_size=size, max_wait=max_wait, **given_).collect())


@settings(max_examples=200)
@given(gaps=GAPS, pause=st.integers(0, 20), size=st.integers(1, 6), max_wait=WAITS, ordered=st.booleans())
@pytest.mark.parametrize("verb", ["batch", "map_batches"])
def test_a_batch_goes_when_it_is_full_or_its_oldest_item_has_waited_or_the_input_ends(
    verb: str, gaps: list[int], pause: int, size: int, max_wait: float | None, ordered: bool
) -> None:
    seen, outputs = record(ps.Flow(after(gaps, pause)), verb, size, max_wait, ordered=ordered, concurrency=50)
    assert seen == expected(gaps, pause, size, max_wait)
    assert outputs == list(range(len(gaps)))


@pytest.mark.parametrize("verb", ["batch", "map_batches"])
def test_the_wait_is_that_of_the_oldest_item_left(verb: str) -> None:
    """Items at 0, 1, 2 and 8; a full batch takes two, and the third counts from when it came itself."""
    seen, _ = record(ps.Flow(after([0, 1, 1, 6])), verb, 2, 5)
    assert seen == [(1, [0, 1]), (7, [2]), (8, [3])]


@pytest.mark.parametrize("verb", ["batch", "map_batches"])
def test_no_wait_at_all_takes_what_is_there(verb: str) -> None:
    seen, _ = record(ps.Flow(after([1, 1, 1])), verb, 8, 0)
    assert seen == [(1, [0]), (2, [1]), (3, [2])]


def test_a_batch_that_waits_for_a_free_worker_grows_meanwhile() -> None:
    seen: Batches = []

    async def slowly(batch: list[int]) -> list[int]:
        seen.append((asyncio.get_running_loop().time(), batch))
        await asyncio.sleep(10)
        return batch

    flow = ps.Flow(after([1] * 30)).map_batches(slowly, batch_size=100, max_wait=0.5, concurrency=1)
    assert run_virtual(flow.collect()) == list(range(30))
    assert seen == [(1.5, [0]), (11.5, list(range(1, 11))), (21.5, list(range(11, 21))), (31.5, list(range(21, 30)))]


def test_full_batches_are_handed_out_ahead_of_free_workers_within_the_window() -> None:
    started: list[int] = []

    async def work(batch: list[int]) -> list[int]:
        started.append(batch[0])
        await asyncio.sleep(100 if batch[0] == 0 else 1)
        return batch

    async def main() -> None:
        flow = ps.Flow(range(60)).map_batches(work, batch_size=3, concurrency=2)
        outputs = asyncio.ensure_future(flow.collect())
        await asyncio.sleep(99)
        assert started == [0, 3, 6, 9]
        assert await outputs == list(range(60))

    run_virtual(main())


def test_partial_batches_go_when_an_expansion_waits_for_room() -> None:
    """Otherwise the expansion would wait for the batch, and the batch for the expansion."""
    sizes: list[int] = []

    async def measure(batch: list[int]) -> list[None]:
        sizes.append(len(batch))
        return [None] * len(batch)

    flow = ps.Flow(range(4)).flat_map(lambda x: [x] * 60_000, place="loop", concurrency=1)
    outputs = run_virtual(flow.map_batches(measure, batch_size=150_000).collect())
    assert len(outputs) == sum(sizes) == 240_000
    assert sizes[0] == 120_000


@pytest.mark.parametrize("verb", ["batch", "map_batches"])
@pytest.mark.parametrize("how", ["stop", "drain"])
def test_stopping_a_run_ends_the_wait(verb: str, how: str) -> None:
    calls: list[list[int]] = []

    async def work(batch: list[int]) -> list[int]:
        calls.append(batch)
        return batch

    async def main() -> tuple[ps.Report, float]:
        flow: ps.Flow[int] = ps.Flow(after([0, 0, 0], pause=1_000_000))
        job: Any = flow.batch(8, max_wait=1000).map(work) if verb == "batch" else None
        job = job or flow.map_batches(work, batch_size=8, max_wait=1000)
        async with job.to(lambda x: None).start(progress=False) as run:
            await asyncio.sleep(1)
            if how == "drain":
                run.drain()
                await run.finish()
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(5000)
        return run.report(), now

    report, now = run_virtual(main())
    assert now < 2
    if how == "drain":
        assert (calls, report.delivered) == ([[0, 1, 2]], 3)
    else:
        assert (calls, report.released) == ([], 3)


# -- results that don't fit --------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "too few": (lambda xs: xs[1:], "3 results"),
    "too many": (lambda xs: [*xs, 0], "5 results"),
    "none": (lambda xs: None, "a NoneType"),
    "text": (lambda xs: "four", "a str"),
    "bytes": (lambda xs: b"four", "a bytes"),
    "a dict": (dict.fromkeys, "a dict"),
    "a set": (set, "a set"),
    "a generator": (lambda xs: (x for x in xs), "a generator"),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_result_of_another_length_is_the_functions_fault_and_isnt_halved(how: str, on_error: Any) -> None:
    answer, returned = WRONG[how]
    calls: list[list[int]] = []

    async def work(batch: list[int]) -> Any:
        calls.append(batch)
        return answer(batch) if 5 in batch else batch

    flow = ps.Flow(range(12)).map_batches(work, batch_size=4, retry=3, on_error=on_error, concurrency=1, name="m")
    if on_error == "skip":
        assert run_virtual(flow.collect()) == [0, 1, 2, 3, 8, 9, 10, 11]
        assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        return
    with pytest.raises(BatchMismatch) as raised:
        run_virtual(flow.collect())
    error = raised.value
    assert (error.stage, error.given, error.returned) == ("m", 4, returned)
    assert error.__notes__ == ["at stage 'm', item 4: 4"]


@pytest.mark.parametrize("answer", [tuple, lambda xs: dict.fromkeys(xs).keys()])
def test_any_sized_collection_is_a_result(answer: Any) -> None:
    assert run_virtual(ps.Flow(range(5)).map_batches(answer, batch_size=2, place="loop").collect()) == [*range(5)]


# -- bisection ---------------------------------------------------------------------------------------------------------


class Function:
    """Fails for a batch with a guilty item in it; ``pardons``: how many attempts alone those fail."""

    def __init__(self, guilty: set[int], pardons: int | None = None, hangs: bool = False) -> None:
        self.guilty = guilty
        self.pardons = pardons
        self.hangs = hangs
        self.calls: list[list[int]] = []
        self.alone: Counter[int] = Counter()

    async def __call__(self, batch: list[int]) -> list[int]:
        self.calls.append(batch)
        guilty = self.guilty & set(batch)
        if len(batch) == 1 and guilty:
            self.alone[batch[0]] += 1
            if self.pardons is not None and self.alone[batch[0]] > self.pardons:
                guilty = set()
        if guilty and self.hangs:
            await asyncio.sleep(1e9)
        if guilty:
            raise ValueError(f"guilty: {min(guilty)}")
        return [-x for x in batch]


@settings(max_examples=150)
@given(
    count=st.integers(0, 24),
    guilty=st.sets(st.integers(0, 23), max_size=6),
    size=st.integers(1, 9),
    retries=st.integers(0, 2),
    on_error=st.sampled_from(["skip", "keep", "dead_letter"]),
    hangs=st.booleans(),
    ordered=st.booleans(),
    concurrency=st.integers(1, 4),
)
def test_only_the_guilty_items_of_a_batch_fail(
    count: int, guilty: set[int], size: int, retries: int, on_error: Any, hangs: bool, ordered: bool, concurrency: int
) -> None:
    function = Function(guilty, hangs=hangs)
    flow = ps.Flow(range(count)).map_batches(
        function,
        batch_size=size,
        retry=ps.Retry(retries, backoff=1),
        timeout=7 if hangs else None,
        on_error=on_error,
        ordered=ordered,
        concurrency=concurrency,
        name="m",
    )
    recorder = Recorder()
    report = run_virtual(flow.to(recorder).run(progress=False))
    met = {x for x in guilty if x < count}
    reason = "timeout" if hangs else "ValueError"

    def failed(x: int, message: str) -> ps.Failed:
        return ps.Failed(x, ("", x), "m", reason, message, retries + 1)

    def say(x: int) -> str:
        return str(ps.errors.StageTimeout("m", 7)) if hangs else f"guilty: {x}"

    outputs = [failed(x, say(x)) if x in met else -x for x in range(count) if on_error == "keep" or x not in met]
    if ordered:
        assert recorder.outputs == outputs
    assert sorted(map(repr, recorder.outputs)) == sorted(map(repr, outputs))
    assert {x for _, x in recorder.letters} == (met if on_error == "dead_letter" else set())
    assert all(letter == failed(x, say(x)) for (_, x), letter in recorder.letters.items())
    assert function.alone == Counter(dict.fromkeys(met, retries + 1))
    assert report.retried == retries * len(met)
    fates = {"skip": report.skipped, "keep": 0, "dead_letter": report.dead}
    assert fates[on_error] == (0 if on_error == "keep" else len(met))
    assert report.in_flight == 0


def test_one_guilty_item_costs_two_calls_a_halving() -> None:
    function = Function({11})
    flow = ps.Flow(range(16)).map_batches(function, batch_size=16, on_error="skip", concurrency=1)
    assert run_virtual(flow.collect()) == [-x for x in range(16) if x != 11]
    assert list(map(len, function.calls)) == [16, 8, 8, 4, 4, 2, 2, 1, 1]
    assert function.calls[-2:] == [[10], [11]]


@given(pardons=st.integers(0, 3), ordered=st.booleans())
def test_an_item_that_passes_at_last_takes_its_place(pardons: int, ordered: bool) -> None:
    function = Function({2, 5}, pardons=pardons)
    flow = ps.Flow(range(8)).map_batches(function, batch_size=4, retry=3, ordered=ordered)
    outputs = run_virtual(flow.collect())
    assert (outputs if ordered else sorted(outputs, reverse=True)) == [-x for x in range(8)]
    assert function.alone == Counter({2: pardons + 1, 5: pardons + 1})


def test_attempts_within_a_batch_are_nobodys() -> None:
    """Only what an item does alone counts: here two batches and a half failed before it."""
    with pytest.raises(ValueError, match="guilty: 3") as raised:
        run_virtual(ps.Flow(range(4)).map_batches(Function({3}), batch_size=4, name="m").collect())
    assert raised.value.__notes__ == ["at stage 'm', item 3: 3"]


def test_a_failure_budget_counts_items_and_not_batches() -> None:
    for budget, stops in ((2, False), (1, True)):
        flow = ps.Flow(range(64)).map_batches(Function({3, 40}), batch_size=8, on_error="skip", max_failures=budget)
        if stops:
            with pytest.raises(ps.errors.FailureBudgetExceeded):
                run_virtual(flow.collect())
        else:
            assert len(run_virtual(flow.collect())) == 62


def test_of_callers_that_share_a_batch_only_the_guilty_gets_the_error() -> None:
    function = Function({2})

    async def main() -> list[Any]:
        async with ps.Flow().map_batches(function, batch_size=4, max_wait=1).open() as call:
            return await asyncio.gather(*(call(x) for x in range(5)), return_exceptions=True)

    zero, one, two, three, four = run_virtual(main())
    assert [zero, one, three, four] == [0, -1, -3, -4]
    assert repr(two) == "ValueError('guilty: 2')"
    assert function.calls[0] == [0, 1, 2, 3]


def test_callers_that_share_a_wrong_result_each_get_an_error_of_their_own() -> None:
    async def main() -> list[Any]:
        async with (
            ps.Flow().map_batches(lambda xs: [], batch_size=3, max_wait=1, place="loop", name="m").open() as call
        ):
            return await asyncio.gather(*(call(x) for x in "abc"), return_exceptions=True)

    errors = run_virtual(main())
    assert [str(error) for error in errors] == [str(BatchMismatch("m", 3, "0 results"))] * 3
    assert [error.__notes__ for error in errors] == [
        ["at stage 'm', item 0: 'a'"],
        ["at stage 'm', item 1: 'b'"],
        ["at stage 'm', item 2: 'c'"],
    ]


def test_an_item_alone_waits_between_its_attempts_and_the_others_dont() -> None:
    seen: Batches = []

    async def work(batch: list[int]) -> list[int]:
        seen.append((asyncio.get_running_loop().time(), batch))
        if 0 in batch:
            raise ValueError(batch)
        return batch

    flow = ps.Flow(range(4)).map_batches(
        work, batch_size=2, retry=ps.Retry(2, backoff=10, jitter=False), on_error="skip", concurrency=1
    )
    assert run_virtual(flow.collect()) == [1, 2, 3]
    assert sorted(seen) == [(0, [0]), (0, [0, 1]), (0, [1]), (0, [2, 3]), (10, [0]), (30, [0])]


def test_in_threads_too() -> None:
    def work(batch: list[int]) -> list[int]:
        if 5 in batch:
            raise ValueError("guilty")
        return batch

    flow = ps.Flow(range(20)).map_batches(work, batch_size=6, workers=2, on_error="keep")
    outputs = asyncio.run(flow.collect())
    assert [x for x in outputs if not isinstance(x, ps.Failed)] == [x for x in range(20) if x != 5]
    assert [x.item for x in outputs if isinstance(x, ps.Failed)] == [5]


def test_an_item_that_kills_its_process_is_found_among_the_others() -> None:
    def work(batch: list[int]) -> list[int]:
        if 2 in batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    flow = ps.Flow(range(8)).map_batches(work, batch_size=4, place="process", workers=1, on_error="keep")
    outputs = asyncio.run(flow.collect())
    assert [x for x in outputs if not isinstance(x, ps.Failed)] == [x for x in range(8) if x != 2]
    (failed,) = (x for x in outputs if isinstance(x, ps.Failed))
    assert (failed.item, failed.reason, failed.attempts) == (2, "worker died", 1)
