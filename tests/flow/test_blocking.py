from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.errors import Closed
from penstock.flow.blocking import Desk, chunks, feed, feed_each
from penstock.place.base import outside

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread, and nothing counted as outside."""
    threads = threading.enumerate()
    yield
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if thread not in threads] == []
    assert outside.count == 0


def test_a_desk_calls_in_order_in_one_thread_of_its_name() -> None:
    async def main() -> None:
        desk = Desk("clerk")
        seen: list[tuple[int, str]] = []
        await asyncio.gather(
            *(desk.call(lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(50))
        )
        assert seen == [(i, "clerk") for i in range(50)]
        await desk.close()

    asyncio.run(main())


def test_a_desk_starts_no_thread_before_it_is_asked() -> None:
    before = threading.active_count()

    async def main() -> None:
        desk = Desk("clerk")
        assert threading.active_count() == before
        await desk.close()
        await desk.close()
        with pytest.raises(Closed, match="clerk is closed"):
            await desk.call(int)

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()])
def test_a_desk_raises_what_the_call_raised(error: BaseException) -> None:
    async def main() -> None:
        desk = Desk("clerk")

        def fail() -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            await desk.call(fail)
        assert caught.value is error
        assert await desk.call(len, "four") == 4
        await desk.close()

    asyncio.run(main())


def test_a_cancelled_call_finishes_in_the_background() -> None:
    async def main() -> None:
        desk = Desk("clerk")
        go = threading.Event()
        done: list[str] = []

        def slow() -> None:
            go.wait(10)
            done.append("slow")

        asked = asyncio.create_task(desk.call(slow))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert outside.count == 1
        go.set()
        await desk.call(done.append, "next")
        assert done == ["slow", "next"]
        await desk.close()

    asyncio.run(main())


def test_closing_waits_for_what_was_called_also_twice_at_once() -> None:
    async def main() -> None:
        desk = Desk("clerk")
        go = threading.Event()
        done: list[int] = []
        calls = [asyncio.create_task(desk.call(go.wait, 10)), asyncio.create_task(desk.call(done.append, 1))]
        await asyncio.sleep(0)
        closing = [asyncio.create_task(desk.close()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(close.done() for close in closing)
        go.set()
        await asyncio.gather(*closing)
        assert done == [1]
        await asyncio.gather(*calls)

    asyncio.run(main())


def test_a_desk_answers_on_the_loop_that_asked_even_if_it_is_gone() -> None:
    desk = Desk("clerk")
    go = threading.Event()

    async def ask_and_leave() -> None:
        asyncio.create_task(desk.call(go.wait, 10))  # noqa: RUF006  # cancelled when this loop ends
        await asyncio.sleep(0)

    async def other() -> str:
        go.set()
        colour.set("red")
        answer = await desk.call(colour.get)
        await desk.close()
        return answer

    asyncio.run(ask_and_leave())
    assert asyncio.run(other()) == "red"


def test_feed_hands_over_every_batch_in_a_thread_of_its_name() -> None:
    names: set[str] = set()

    def make() -> Iterator[list[int]]:
        for i in range(1000):
            names.add(threading.current_thread().name)
            yield [i]

    async def main() -> None:
        got = [item async for batch in feed(make, "reader") for item in batch]
        assert got == list(range(1000))
        assert names == {"reader"}

    asyncio.run(main())


def test_feed_stays_two_batches_ahead_and_counts_outside_only_while_it_reads() -> None:
    made: list[int] = []
    third = threading.Event()

    def make() -> Iterator[list[int]]:
        for i in range(10):
            made.append(i)
            if i == 2:
                third.set()
            yield [i]

    async def main() -> None:
        batches = feed(make, "reader")
        assert await anext(batches) == [0]
        for _ in iter(lambda: outside.count, 0):  # until its thread rests, which nothing tells
            await asyncio.sleep(0)
        assert made == [0, 1, 2]
        assert await anext(batches) == [1]
        assert [batch async for batch in batches] == [[i] for i in range(2, 10)]

    asyncio.run(main())


def test_feed_raises_what_the_iterator_raised_after_what_came_before() -> None:
    error = ValueError("line 3")

    def make() -> Iterator[list[int]]:
        yield [1]
        yield [2]
        raise error

    async def main() -> None:
        got: list[Any] = []
        with pytest.raises(ValueError, match="line 3") as caught:
            async for batch in feed(make, "reader"):
                got += [batch]
        assert got == [[1], [2]]
        assert caught.value is error

        def fail() -> Iterator[list[int]]:
            raise OSError("no such file")

        with pytest.raises(OSError, match="no such file"):
            await anext(feed(fail, "reader"))

    asyncio.run(main())


@pytest.mark.parametrize("way", ["aclose", "break", "cancel", "raise"])
@pytest.mark.parametrize("each", [False, True])
def test_feed_left_early_closes_the_generator_in_its_thread_and_ends_it(way: str, each: bool) -> None:
    closed_in: list[str] = []

    def produce() -> Iterator[list[int]]:
        try:
            while True:
                yield [1]
        finally:
            closed_in.append(threading.current_thread().name)

    kept = produce()  # not closed for want of a reference

    def make() -> Iterator[list[int]]:
        return kept

    async def main() -> None:
        batches = feed_each(make, "reader") if each else feed(make, "reader")
        if way == "aclose":
            await anext(batches)
            await batches.aclose()
        elif way == "break":
            async for _ in batches:
                break
            del batches  # the loop closes it when it ends
        elif way == "raise":
            with pytest.raises(RuntimeError):
                await anext(batches)
                await batches.athrow(RuntimeError())
        else:

            async def consume() -> None:
                async for _ in batches:
                    await asyncio.sleep(0)

            consumer = asyncio.create_task(consume())
            for _ in range(5):
                await asyncio.sleep(0)
            consumer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await consumer
            await batches.aclose()

    asyncio.run(main())
    assert closed_in == ["reader"]


def test_a_feed_cancelled_while_it_waits_for_its_thread_ends_it() -> None:
    go = threading.Event()
    reading = threading.Event()

    def make() -> Iterator[list[int]]:
        reading.set()
        go.wait(10)
        yield [1]
        raise AssertionError("went on after it was stopped")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(anext(feed(make, "reader")))  # type: ignore[arg-type]
        await loop.run_in_executor(None, reading.wait)
        waiting.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())


def test_a_feed_whose_thread_hangs_is_left_behind_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("penstock.flow.blocking.GRACE", 0.01)
    go = threading.Event()
    threads: list[threading.Thread] = []

    def make() -> Iterator[list[int]]:
        threads.append(threading.current_thread())
        yield [1]
        go.wait(10)

    async def main() -> None:
        batches = feed(make, "reader")
        await anext(batches)
        await batches.aclose()
        assert outside.count == 0

    asyncio.run(main())
    assert "reader is left behind" in caplog.text
    go.set()
    threads[0].join(10)


def test_feed_each_never_holds_an_item_back_for_a_slow_one() -> None:
    go = threading.Event()

    def make() -> Iterator[int]:
        yield from range(5)
        go.wait(10)
        yield 5

    async def main() -> None:
        batches = feed_each(make, "reader")
        got: list[int] = []
        while len(got) < 5:
            got += await anext(batches)
        assert got == [0, 1, 2, 3, 4]
        go.set()
        assert [item async for batch in batches for item in batch] == [5]

    asyncio.run(main())


def test_feed_each_is_bounded_and_complete() -> None:
    ahead: list[int] = []
    taken = 0

    def make() -> Iterator[int]:
        for i in range(20_000):
            ahead.append(i - taken)
            yield i

    async def main() -> None:
        nonlocal taken
        got: list[int] = []
        async for batch in feed_each(make, "reader", most=64):
            assert 1 <= len(batch) <= 64
            got += batch
            taken = len(got)
        assert got == list(range(20_000))
        assert max(ahead) <= 64 + 64

    asyncio.run(main())


def test_chunks_keeps_every_item_and_the_bound() -> None:
    sizes = [len(chunk) for chunk in chunks(iter(range(5000)), most=100)]
    assert sum(sizes) == 5000
    assert max(sizes) <= 100
    assert sizes[0] == 1


def test_chunks_hands_over_at_once_what_was_slow_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def source() -> Iterator[int]:
        nonlocal now
        for i in range(20):
            now += 1.0 if i >= 10 else 1e-6
            yield i

    got = list(chunks(source()))
    assert got[:3] == [[0], [1, 2], [3, 4, 5, 6]]
    assert got[3] == [7, 8, 9, 10]  # came together with the slow one
    assert got[4:] == [[i] for i in range(11, 20)]
