"""Where deliveries go wrong at the edges: failed acknowledgements, lost leases, lost rings, what can't be read."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import penstock as ps
from penstock.errors import Closed, LeaseLost, WriteFailed
from penstock.events import groups
from penstock.testing import run_virtual

MakeLog = Callable[..., ps.EventLog]


class Full:
    """As long as it is entered, nothing can be committed to a log; ``once``: only the first commit fails."""

    def __init__(self, log: ps.EventLog, *, once: bool = False) -> None:
        self.store = log.store
        self.once = once
        self.tried = False

    def __enter__(self) -> None:
        self.tried = True
        self.end = self.store.end

        def end(transaction: Any, *, commit: bool) -> None:
            self.end(transaction, commit=False)
            if self.once:
                self.__exit__()
            raise WriteFailed(self.store.path, "disk full")

        self.store.end = end  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self.store.end = self.end  # type: ignore[method-assign]


def test_what_was_requeued_is_delivered_though_a_file_had_it_among_the_settled(tmp_path: Path) -> None:
    good = False

    async def work(x: int) -> int:
        await asyncio.sleep(x)
        if x == 9 and not good:
            raise ValueError("not yet")
        return x

    async def main() -> None:
        nonlocal good
        async with ps.EventLog(tmp_path / "events.db") as log:
            topic = log.topic("t")
            await topic.publish_many([0, 1, 2, 9])
            job = topic.flow("g", max_attempts=1).map(work).to(tmp_path / "out.jsonl")
            assert (await job.run(until="drained", progress=False)).dead == 1
            good = True
            assert await topic.requeue("g") == 1
            assert (await job.run(until="drained", progress=False)).delivered == 1

    run_virtual(main())
    assert (tmp_path / "out.jsonl").read_text().split() == ["0", "1", "2", "9"]


@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_tasks_on_one_subscription_work_at_once(make_log: MakeLog, tasks: int) -> None:
    async def main() -> float:
        async with make_log() as log:
            topic = log.topic("t")
            await topic.publish_many(range(8 * tasks))
            loop = asyncio.get_running_loop()
            async with topic.subscribe("g", until="drained") as deliveries:

                async def take() -> None:
                    async for delivery in deliveries:
                        async with delivery:
                            await asyncio.sleep(100)

                began = loop.time()
                await asyncio.gather(*(take() for _ in range(tasks)))
                return loop.time() - began

    assert run_virtual(main()) == pytest.approx(800, abs=60)


@pytest.mark.parametrize("said", ["ack", "retry", "dead"])
def test_what_couldnt_be_written_can_be_said_again(make_log: MakeLog, said: str) -> None:
    async def main() -> None:
        async with make_log() as log:
            topic = log.topic("t")
            await topic.publish_many([0, 1, 2], key=lambda _: "k")
            async with topic.subscribe("g", until="drained") as deliveries:
                first = await anext(deliveries)
                say = {"ack": first.ack, "retry": lambda: first.retry(0), "dead": lambda: first.dead("no")}[said]
                with Full(log), pytest.raises(WriteFailed):
                    await say()
                await say()
                left = [delivery.value async for delivery in deliveries if not await delivery.ack()]  # type: ignore[func-returns-value]
            assert left == ([0, 1, 2] if said == "retry" else [1, 2])

    run_virtual(main())


def test_giving_back_what_a_lost_lease_held_leaves_what_was_claimed_anew(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            topic = log.topic("t")
            await topic.publish_many([1, 2, 3], key=lambda _: "k")
            async with topic.subscribe("g", until="drained") as deliveries:
                old = await anext(deliveries)
                asking = asyncio.ensure_future(anext(deliveries))
                await asyncio.sleep(1)
                await log.ask(lambda transaction: transaction.connection.execute("UPDATE owners SET expires = -1").get)
                await topic.publish("wakes who waits, and finds the lease lost")
                assert (await asking).value == "wakes who waits, and finds the lease lost"
                await asyncio.sleep(1)
                with pytest.raises(LeaseLost):
                    await old.retry(0)
                seen = []
                for _ in range(3):
                    delivery = await anext(deliveries)
                    seen.append(delivery.value)
                    await delivery.ack()
            assert seen == [1, 2, 3]

    run_virtual(main())


def test_what_is_given_back_takes_along_what_is_being_claimed_behind_it(make_log: MakeLog) -> None:
    """A claim is under way while the first of a key is given back."""

    async def main() -> list[int]:
        async with make_log() as log:
            topic = log.topic("t")
            await topic.publish(1, key="k")
            seen = []
            async with topic.subscribe("g", until="drained") as deliveries:
                first = await anext(deliveries)
                asking = asyncio.ensure_future(anext(deliveries))
                await asyncio.gather(topic.publish(2, key="k"), topic.publish(3, key="k"), first.retry(0))
                delivery = await asking
                while True:
                    seen.append(delivery.value)
                    await delivery.ack()
                    if len(seen) == 3:
                        return seen
                    delivery = await anext(deliveries)

    assert run_virtual(main()) == [1, 2, 3]


def test_lanes_are_bounded(make_log: MakeLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.events.subscription.MOST_CLAIMED", 20)

    async def main() -> None:
        async with make_log() as log:
            topic = log.topic("t")
            await topic.publish_many(range(200), key=lambda _: "hot")
            async with topic.subscribe("g", until="drained") as deliveries:
                first = await anext(deliveries)
                others = [asyncio.ensure_future(anext(deliveries)) for _ in range(8)]
                for number in range(50):
                    await topic.publish(number, key="other" if number % 10 == 0 else "hot")
                    await asyncio.sleep(1)
                held = (await topic.groups())[0].held
                assert held <= 20 + 20 + 9  # the bound, the last claim, what is out
                await first.ack()
                for other in others:
                    other.cancel()
                await asyncio.wait(others)

    run_virtual(main())


def test_what_is_parked_is_bounded(make_log: MakeLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST_PARKED", 10)

    async def main() -> None:
        async with make_log() as log:
            topic = log.topic("t")
            await topic.publish_many(range(50), key=lambda _: "hot")
            async with topic.subscribe("g") as one, topic.subscribe("g") as two:
                first = await anext(one)
                other = asyncio.ensure_future(anext(two))
                for number in range(20):
                    await topic.publish(number, key="hot")
                    await asyncio.sleep(1)
                assert (await topic.groups())[0].waiting <= 11
                other.cancel()
                await first.ack()

    run_virtual(main())


def test_a_forced_trim_unblocks_the_key(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            topic = log.topic("t")
            await topic.publish_many([0, 1, 2, 3], key=lambda _: "k")
            async with topic.subscribe("g") as deliveries:
                await (await anext(deliveries)).retry(10_000)
                asking = asyncio.ensure_future(anext(deliveries))  # parks what is behind it
                await asyncio.sleep(1)
                asking.cancel()
            assert await topic.trim(keep=2, force=True) == 2
            async with topic.subscribe("g", until="drained") as deliveries:
                seen = [delivery.value async for delivery in deliveries if not await delivery.ack()]  # type: ignore[func-returns-value]
            assert seen == [2, 3]

    run_virtual(main())


def test_a_job_that_failed_before_its_commit_publishes_nothing_twice(tmp_path: Path) -> None:
    """The source's log is full when an event is to be buried, which comes before the sink's commit."""

    async def main() -> None:
        async with ps.EventLog(tmp_path / "a.db") as one, ps.EventLog(tmp_path / "b.db") as other:
            source, target = one.topic("t"), other.topic("t")
            await source.publish_many(range(6))
            full = Full(one, once=True)

            async def work(x: int) -> int:
                if x == 3:
                    if not full.tried:
                        full.__enter__()
                    raise ValueError("poison")
                return x

            job = source.flow("g", max_attempts=1).map(work).to(target)
            with pytest.raises(WriteFailed):
                await job.run(until="drained", progress=False)
            await job.run(until="drained", progress=False)
            assert sorted([event.value async for event in target.read()]) == [0, 1, 2, 4, 5]

    asyncio.run(main())


def test_a_ring_is_for_all_who_wait(tmp_path: Path) -> None:
    async def main() -> None:
        async with ps.EventLog(tmp_path / "events.db") as here, ps.EventLog(tmp_path / "events.db") as there:
            one, other = await here.number("a"), await here.number("b")
            seen = here.store.look(one)
            await there.topic("a").publish(1)
            here.store.look(other)  # empties the bell
            async with asyncio.timeout(60):
                await here.store.changed(one, seen, None)

    asyncio.run(main())


def test_closing_wakes_who_waits(make_log: MakeLog) -> None:
    async def main() -> None:
        log = make_log()
        await log.open()
        topic = log.topic("t")
        await topic.publish(0)

        async def follow() -> None:
            async for _ in topic.read(follow=True):
                pass

        async def loop() -> None:
            async with topic.subscribe("g") as deliveries:
                async for delivery in deliveries:
                    await delivery.ack()

        tasks = [asyncio.create_task(follow()), asyncio.create_task(loop())]
        await asyncio.sleep(1)
        await log.close()
        async with asyncio.timeout(60):
            await asyncio.wait(tasks)
        assert all(isinstance(task.exception(), Closed) for task in tasks)

    run_virtual(main())


class Strict(msgspec.Struct):
    x: int

    def __post_init__(self) -> None:
        {1: "one"}[self.x]


@pytest.mark.parametrize("body", [b"[" * 5000 + b"]" * 5000, b'{"x":2}'], ids=["deep", "refused"])
def test_what_cant_be_decoded_is_a_dead_letter_whatever_it_raises(make_log: MakeLog, body: bytes) -> None:
    async def main() -> None:
        async with make_log() as log:
            kind: Any = Strict if body.startswith(b"{") else None
            await log.topic("t", type=bytes).publish(body)
            raw, topic = log.topic("t", type=bytes), log.topic("t") if kind is None else log.topic("t", type=kind)
            await raw.publish(b'{"x":1}')
            async with topic.subscribe("g", until="drained") as deliveries:
                seen: list[Any] = [delivery.value async for delivery in deliveries if not await delivery.ack()]  # type: ignore[func-returns-value]
            assert seen == [{"x": 1} if kind is None else Strict(1)]
            (letter,) = [letter async for letter in topic.dead("g")]
            assert "event 0" in letter.error

    run_virtual(main())


LISTENING = """
import asyncio, os, resource, sys
import penstock as ps

resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]

async def main():
    async with ps.EventLog(sys.argv[1]) as log, log.topic("t").subscribe("g") as deliveries:
        asking = asyncio.ensure_future(anext(deliveries))
        await asyncio.sleep(0.5)
        print("waiting", flush=True)
        print((await asking).value, flush=True)

asyncio.run(main())
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000, reason="the system allows too few files")
def test_a_process_with_many_files_hears_the_bell(tmp_path: Path) -> None:
    path = str(tmp_path / "events.db")
    with subprocess.Popen(
        [sys.executable, "-c", LISTENING, path],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"

        async def publish() -> None:
            async with ps.EventLog(path) as log:
                await log.topic("t").publish("heard")

        asyncio.run(publish())
        assert process.stdout.readline() == "heard\n"
        assert process.wait(60) == 0


AFTER_BOOT = """
import asyncio, os, sys
import penstock as ps
from penstock.events import clock, groups, schema, source, store, subscription

path, boot, uptime = sys.argv[1], sys.argv[2], float(sys.argv[3])
began = clock.boot_time()
now = clock.boot_time
for module in (clock, groups, schema, source, store, subscription):
    module.boot_time = lambda: now() - began + uptime
schema.boot_id = lambda: boot

async def main():
    log = ps.EventLog(path)
    await log.open()
    topic = log.topic("t")
    if boot == "one":
        await topic.publish("x", key="k")
    async with topic.subscribe("g") as deliveries:
        delivery = await anext(deliveries)
        if boot == "one":
            await delivery.retry(0.01)
            delivery = await anext(deliveries)
        print(delivery.attempt, flush=True)
        os._exit(0)

asyncio.run(main())
"""


def test_a_retry_in_hand_at_a_power_cut_is_delivered_after_the_next_boot(tmp_path: Path) -> None:
    attempts = []
    for boot, uptime in (("one", 1_000_000), ("two", 100)):
        done = subprocess.run(
            [sys.executable, "-c", AFTER_BOOT, str(tmp_path / "events.db"), boot, str(uptime)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        attempts.append(json.loads(done.stdout))
    assert attempts == [2, 3]
