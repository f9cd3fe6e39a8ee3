"""Law 6: a ceiling of 4 never has 5 in progress: ordered or not, retrying or not, batched or not, fused or not."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.random_flows import dice

import penstock as ps
from penstock.testing import run_virtual


class Gauge:
    """Counts who is inside, on the loop or in threads."""

    def __init__(self) -> None:
        self.inside = self.peak = 0
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            self.peak = max(self.peak, self.inside)

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.inside -= 1


@settings(max_examples=100)
@given(
    ceiling=st.integers(1, 5),
    ordered=st.booleans(),
    keyed=st.booleans(),
    retry=st.sampled_from([0, 2]),
    verb=st.sampled_from(["map", "filter", "flat_map", "stream", "map_batches"]),
    timeout=st.booleans(),
    plain=st.booleans(),
)
def test_law_ceilings_on_the_loop(
    ceiling: int, ordered: bool, keyed: bool, retry: int, verb: str, timeout: bool, plain: bool
) -> None:
    gauge = Gauge()
    tried: set[Any] = set()

    async def work(x: Any) -> Any:
        with gauge:
            await asyncio.sleep(dice(x, "nap") % 5)
            if retry and dice(x, "fails") < 30 and repr(x) not in tried:
                tried.add(repr(x))
                raise ValueError(x)
            return [x, x] if verb in ("flat_map", "stream") else x

    options: dict[str, Any] = {"concurrency": ceiling, "ordered": ordered, "retry": retry}
    if timeout:
        options["timeout"] = 3.5  # some attempts are cut short, and the next begins
        options["on_error"] = "skip"
    if keyed and verb != "map_batches":
        options["key"] = lambda x: x % 7
    flow: ps.Flow[Any] = ps.Flow(range(60))
    if verb == "stream":
        flow = flow.flat_map(work, whole=False, **options)
    elif verb == "map_batches":
        flow = flow.map_batches(work, batch_size=3, **options)
    else:
        flow = getattr(flow, verb)(work, **options)
    if plain:
        flow = flow.map(slow_consumer)
    outputs = run_virtual(flow.collect())
    assert outputs or timeout
    assert gauge.peak <= ceiling
    assert gauge.inside == 0
    if not (keyed or timeout or (verb == "stream" and ordered)):
        assert gauge.peak == ceiling  # and it is used


async def slow_consumer(x: Any) -> Any:
    await asyncio.sleep(0.1)
    return x


def test_law_ceilings_fused_stages_share_one() -> None:
    gauge, gauges = Gauge(), [Gauge(), Gauge(), Gauge()]

    def stage(number: int) -> Any:
        async def work(x: int) -> int:
            with gauge, gauges[number]:
                await asyncio.sleep(dice(x, str(number)) % 3)
            return x

        return work

    flow = ps.Flow(range(200), concurrency=4).map(stage(0)).map(stage(1)).map(stage(2))
    assert run_virtual(flow.collect()) == list(range(200))
    assert gauge.peak == 4


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("retry", [0, 2])
@pytest.mark.parametrize("batched", [True, False])
def test_law_ceilings_in_threads(ordered: bool, retry: int, batched: bool) -> None:
    gauge = Gauge()
    full = threading.Barrier(3)  # three are inside at once, at least one time
    tried: set[Any] = set()

    def work(x: Any) -> Any:
        with gauge:
            if len(tried) < 3:
                tried.add(repr(x))
                full.wait(10)
                if retry:
                    raise ValueError(x)
            return x

    flow: ps.Flow[Any] = ps.Flow(range(500))
    again = ps.Retry(retry, backoff=0) if retry else None
    if batched:
        flow = flow.map_batches(work, batch_size=7, workers=3, ordered=ordered, retry=again)
    else:
        flow = flow.map(work, workers=3, ordered=ordered, retry=again)
    outputs = asyncio.run(flow.collect())
    assert sorted(outputs) == list(range(500))
    assert gauge.peak == 3


def test_law_ceilings_in_processes(tmp_path: Any) -> None:
    """Each call claims one of two slots by creating a file; a third at once would find none free."""
    slots = [str(tmp_path / name) for name in "ab"]

    def work(x: int) -> int:
        import os

        for slot in slots:
            try:
                os.close(os.open(slot, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.unlink(slot)
            return x
        raise AssertionError("three at once")

    assert asyncio.run(ps.Flow(range(400)).map(work, place="process", workers=2).collect()) == list(range(400))


def test_law_ceilings_of_live_calls() -> None:
    gauge = Gauge()

    async def work(x: int) -> int:
        with gauge:
            await asyncio.sleep(1)
        return x

    async def main() -> None:
        async with ps.Flow().map(work, concurrency=3).open() as call:
            assert await asyncio.gather(*(call(x) for x in range(50))) == list(range(50))

    run_virtual(main())
    assert gauge.peak == 3


def test_law_ceilings_a_timed_out_thread_is_counted_and_named_and_too_many_stop_the_flow() -> None:
    go = threading.Event()

    def hang(x: int) -> int:
        if x < 2:
            go.wait(30)
        return x

    async def main() -> tuple[list[int], ps.Report]:
        outputs: list[int] = []
        job = ps.Flow(range(10)).map(hang, workers=2, timeout=0.05, on_error="skip").to(outputs.append)
        async with job.start(progress=False) as run:
            while run.report().skipped < 2:  # noqa: ASYNC110  # real threads time out meanwhile
                await asyncio.sleep(0.01)
            assert any("hang past their timeout" in note for note in run.report().notes)
            go.set()
            return outputs, await run.finish()

    outputs, report = asyncio.run(main())
    assert outputs == list(range(2, 10))
    assert report.skipped == 2

    stuck = threading.Event()
    flow = ps.Flow(range(10)).map(lambda x: stuck.wait(30), workers=1, timeout=0.05, on_error="skip")
    with pytest.raises(ps.errors.AbandonedThreads):
        try:
            asyncio.run(main_of(flow, stuck))
        finally:
            stuck.set()


async def main_of(flow: ps.Flow[Any], stuck: threading.Event) -> None:
    async with flow.to(lambda x: None).start(progress=False) as run:
        try:
            while not run.ended:  # noqa: ASYNC110  # real threads time out meanwhile
                await asyncio.sleep(0.01)
        finally:
            stuck.set()
        await run.finish()
