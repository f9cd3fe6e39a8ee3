"""Topics as sources and sinks of flows: what is acknowledged, what is published, and what a kill leaves."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import penstock as ps
from penstock.errors import GroupInUse, OutputInUse, PlanError
from penstock.events.source import GroupSource
from penstock.flow.contract import Reading, Subscribed, is_subscribed
from penstock.flow.letters import tables_in
from penstock.testing import run_virtual

MakeLog = Callable[..., ps.EventLog]


async def double(x: int) -> int:
    return 2 * x


def test_a_job_ends_when_what_fills_its_topic_is_done_and_nothing_is_left(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            first, second, third = (log.topic(name) for name in ("first", "second", "third"))

            async def fill() -> None:
                for number in range(5):
                    await asyncio.sleep(10)  # far longer than anything else here
                    await first.publish(number)

            filling = asyncio.create_task(fill())
            doubling = asyncio.create_task(first.flow("g").map(double).to(second).run(until=filling))
            again = await second.flow("g").map(double).to(third).run(until=doubling)
            assert doubling.done()
            assert again.delivered == 5
            assert await values_of(third) == [0, 4, 8, 12, 16]
            assert (await first.flow("g").to(second).run(until=filling)).delivered == 0

    run_virtual(main())


def test_a_job_ends_when_what_fills_its_topic_has_failed(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:

            async def fill() -> None:
                await log.topic("first").publish(1)
                await asyncio.sleep(10)
                raise ZeroDivisionError

            filling = asyncio.create_task(fill())
            assert (await log.topic("first").flow("g").to(log.topic("second")).run(until=filling)).delivered == 1
            with pytest.raises(ZeroDivisionError):
                await filling
            for odd in ("later", 3):
                with pytest.raises(PlanError, match=f"until={odd!r}"):
                    await log.topic("first").flow("g").to(log.topic("second")).run(until=odd)  # type: ignore[arg-type]

    run_virtual(main())


async def values_of(topic: Any) -> list[Any]:
    return [event.value async for event in topic.read()]


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_topic_to_topic(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            await source.publish_many(range(1000))
            job = source.flow("g").map(double).to(sink)
            assert "exactly once" in job.explain()
            report = await job.run(until="drained")
            assert report.delivered == 1000
            assert report.issued == 1000
            assert await values_of(sink) == [2 * x for x in range(1000)]
            assert (await source.groups())[0].behind == 0
            assert (await job.run(until="drained")).delivered == 0
            await source.publish(7)
            assert (await job.run(until="drained")).delivered == 1
            assert (await values_of(sink))[-1] == 14

    run_virtual(main())


def test_until_it_is_stopped(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            async with source.flow("g").map(double).to(sink).start() as run:
                for number in range(5):
                    await asyncio.sleep(10)
                    await source.publish(number)
                await asyncio.sleep(10)
                assert await values_of(sink) == [0, 2, 4, 6, 8]
                run.drain()
                report = await run.finish()
            assert report.delivered == 5

    run_virtual(main())


def test_a_poison_event_stops_nothing_and_is_dead_after_its_attempts(make_log: MakeLog) -> None:
    async def main() -> None:
        tried: list[float] = []

        async def careful(x: int) -> int:
            if x == 3:
                tried.append(asyncio.get_running_loop().time())
                raise ValueError("not three")
            return x

        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            await source.publish_many(range(6))
            report = await source.flow("g", max_attempts=3).map(careful).to(sink).run(until="drained")
            assert (report.delivered, report.dead) == (5, 1)
            assert sorted(await values_of(sink)) == [0, 1, 2, 4, 5]
            assert [round(at - tried[0]) for at in tried] == [0, 0, 0]
            (letter,) = [letter async for letter in source.dead()]
            assert (letter.event.value, letter.attempts, letter.stage, letter.reason) == (3, 3, "careful", "ValueError")
            assert await source.requeue() == 1
            report = await source.flow("g").map(double).to(sink).run(until="drained")
            assert report.delivered == 1

    run_virtual(main())


def fussy(x: int) -> int:
    raise ValueError(f"never {x}")


@pytest.mark.parametrize("place", ["thread", "process"])
def test_a_dead_letter_has_the_traceback(place: Any, make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            source = log.topic("in")
            await source.publish_many([1, "two"])
            flow = log.topic("in", int).flow("g", max_attempts=1).map(fussy, place=place)
            assert (await flow.to(log.topic("out")).run(until="drained")).dead == 2
            letters = [letter async for letter in source.dead()]
            raised, unread = [letter.error for letter in sorted(letters, key=lambda letter: letter.event.position)]
            assert "Traceback (most recent call last)" in raised
            assert 'raise ValueError(f"never {x}")' in raised
            assert raised.endswith("ValueError: never 1")
            assert "penstock/flow" not in raised
            assert "Traceback" not in unread

    run_virtual(main())


def test_an_event_that_cant_be_read_is_dead(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            await log.topic("in").publish_many([1, "two", 3])
            report = await log.topic("in", type=int).flow("g").map(double).to(log.topic("out")).run(until="drained")
            assert (report.delivered, report.dead) == (2, 1)
            assert await values_of(log.topic("out")) == [2, 6]

    run_virtual(main())


def test_what_the_sink_refuses_is_dead(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            await log.topic("in").publish_many([1, 2])
            flow = log.topic("in").flow("g").map(lambda x: object() if x == 1 else x)
            report = await flow.to(log.topic("out")).run(until="drained")
            assert (report.delivered, report.dead) == (1, 1)
            assert [letter.reason async for letter in log.topic("in").dead()] == ["CannotEncode"]

    run_virtual(main())


def test_filters_and_expansions(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            await source.publish_many(range(10))
            flow = source.flow("g").filter(lambda x: x % 2).flat_map(lambda x: [x] * x)
            report = await flow.to(sink).run(until="drained")
            assert (report.delivered, report.filtered) == (5, 5)
            assert await values_of(sink) == [x for x in range(10) if x % 2 for _ in range(x)]
            assert (await source.groups())[0].held == 0

    run_virtual(main())


def test_outputs_that_are_published_before_their_event_is_done_are_promised_at_least_once(make_log: MakeLog) -> None:
    log = make_log()
    for whole, promise in ((True, "guarantee: exactly once"), (False, "guarantee: at least once: flat_map")):
        flow = log.topic("in").flow("g").flat_map(lambda x: [x] * x, whole=whole)
        assert promise in flow.to(log.topic("out")).explain()
    assert "exactly once" in flow.to("out.jsonl").explain()


def test_a_key_for_each_output(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            sink = log.topic("out")
            await ps.Flow([1, 2, 3]).to(sink.as_sink(key=lambda x: f"k{x % 2}")).run()
            assert [event.key async for event in sink.read()] == ["k1", "k0", "k1"]

    run_virtual(main())


def test_a_list_into_a_topic_once(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            sink = log.topic("out")
            job = ps.Flow(range(100)).map(double).to(sink)
            assert (await job.run()).delivered == 100
            assert "nothing to do" in str(await job.run())
            assert len(await values_of(sink)) == 100
            more = ps.Flow(range(150)).map(double).to(sink)
            assert (await more.run()).delivered == 50
            assert sorted(await values_of(sink)) == [2 * x for x in range(150)]
            other = ps.Flow([5], name="another").to(sink)
            assert (await other.run()).delivered == 1

    run_virtual(main())


def test_by_id_into_a_topic(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            sink = log.topic("out")
            rows = [{"id": x} for x in range(10)]
            await ps.Flow(rows, name="rows", id="id").to(sink).run()
            await ps.Flow([*reversed(rows), {"id": 10}], name="rows", id="id").to(sink).run()
            assert [row["id"] for row in await values_of(sink)] == list(range(11))

    run_virtual(main())


def test_dead_letters_of_a_job_into_a_topic_are_redone_there_once(tmp_path: Path) -> None:
    path = tmp_path / "events.db"

    def at_most(bound: int) -> Callable[[Any], int]:
        def work(x: Any) -> int:
            x = x.item if isinstance(x, ps.Failed) else x
            if x > bound:
                raise ValueError(f"{x} is too much")
            return int(x)

        return work

    async def main() -> None:
        async with ps.EventLog(path) as log:
            sink, other = log.topic("out"), log.topic("other")
            job = ps.Flow(range(6), name="six").map(at_most(2), on_error="dead_letter").to(sink)
            assert (await job.run()).dead == 3

            async def redo(bound: int, topic: Any) -> tuple[int, int]:
                flow = ps.read.dead(path, table=table).map(at_most(bound), on_error="dead_letter")
                with pytest.raises(PlanError, match="fresh=True"):
                    await flow.to(sink).run(fresh=True)
                report = await flow.to(topic).run()
                return report.delivered, report.dead

            (table,) = tables_in(str(path))
            assert await redo(4, sink) == (2, 1)
            assert await values_of(sink) == [0, 1, 2, 3, 4]
            assert await redo(9, other) == (1, 0), "in another topic it is a job of its own"
            assert await redo(9, sink) == (1, 0)
            assert await redo(9, sink) == (0, 0)
            assert await values_of(sink) == [0, 1, 2, 3, 4, 5]
            assert await values_of(other) == [5]
            assert "nothing to do" in str(await job.run())

    asyncio.run(main())


def test_a_job_opens_what_isnt_open(make_log: MakeLog, tmp_path: Path) -> None:
    log = ps.EventLog(tmp_path / "other.db")
    ps.Flow([1, 2]).to(log.topic("in")).run_sync()
    assert not log.is_open
    log.topic("in").flow("g").to(str(tmp_path / "out.jsonl")).run_sync(until="drained")
    assert not log.is_open
    assert rows_of(tmp_path / "out.jsonl") == [1, 2]


def test_into_a_file_the_group_is_read_alone(tmp_path: Path, make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            topic = log.topic("in")
            await topic.publish_many(range(3))
            job = topic.flow("g").to(str(tmp_path / "out.jsonl"))
            assert "exactly once" in job.explain()
            async with job.start():
                with pytest.raises(GroupInUse, match="exclusive=False"):
                    await topic.flow("g").to(str(tmp_path / "other.jsonl")).run()
                with pytest.raises(GroupInUse):
                    async with topic.subscribe("g"):
                        pass
            assert "at least once" in topic.flow("g", exclusive=False).to(str(tmp_path / "o.jsonl")).explain()
            async with topic.flow("g", exclusive=False).to(print).start(), topic.subscribe("g"):
                pass

    run_virtual(main())


def test_two_runs_of_one_job_into_a_topic(tmp_path: Path) -> None:
    async def main() -> None:
        async with ps.EventLog(tmp_path / "events.db") as log:
            job = ps.Flow([1]).map(lambda _: 1).to(log.topic("out"))
            async with job.start():
                with pytest.raises(OutputInUse):
                    await job.run()

    asyncio.run(main())


def test_what_a_flow_over_a_topic_needs(make_log: MakeLog) -> None:
    log = make_log()
    with pytest.raises(PlanError, match="needs an output"):
        log.topic("t").flow("g").collect_sync()
    with pytest.raises(PlanError, match="until"):
        log.topic("t").flow("g").to(print).run_sync(until="tomorrow")  # type: ignore[arg-type]
    for options in ({"lease": 0}, {"max_attempts": 0}, {"exclusive": 5}, {"start": -2}):
        with pytest.raises(PlanError):
            log.topic("t").flow("g", **options)  # type: ignore[arg-type]


def test_a_group_itself_is_not_read(make_log: MakeLog) -> None:
    topic = make_log().topic("t")
    assert isinstance(topic.flow("g").source, GroupSource)
    subscribed: Subscribed[Any] = GroupSource(topic, "g", lease=30, max_attempts=5, start=0, exclusive=None)
    assert is_subscribed(subscribed)
    assert not hasattr(subscribed, "read"), "each run reads by its own Reading"
    sink: Any = make_log().topic("out").as_sink()
    reading: Reading[Any] = subscribed.begin(sink, until="drained")[0]
    assert reading.identity == subscribed.identity


def test_law_cancellation_gives_back_what_was_taken(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            topic, sink = log.topic("in"), log.topic("out")
            await topic.publish_many(range(50))
            begun = asyncio.Event()

            async def slow(x: int) -> int:
                if x == 5:
                    begun.set()
                    await asyncio.sleep(100)
                return x

            running = asyncio.create_task(topic.flow("g").map(slow, concurrency=4).to(sink).run())
            await begun.wait()
            running.cancel()
            await asyncio.wait([running])
            (group,) = await topic.groups()
            assert (group.held, group.readers) == (0, 0)
            await topic.flow("g").map(double, ordered=False).to(sink).run(until="drained")
            values = await values_of(sink)
            assert len(values) == 50

    run_virtual(main())


def test_law_exactly_once_when_the_lease_was_lost(make_log: MakeLog) -> None:
    """What a run held that stood still is delivered again, here to itself; what it says of the old doesn't count."""

    async def main() -> None:
        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            await source.publish_many([1, 2], key=lambda _: "k")
            begun, go_on = asyncio.Event(), asyncio.Event()

            async def slow(total: int) -> int:
                begun.set()
                await go_on.wait()
                return total

            def sums(state: int | None, x: int) -> tuple[int, int]:
                return (state or 0) + x, (state or 0) + x

            async with source.flow("g").map_state(sums).map(slow).to(sink).start() as run:
                await begun.wait()
                await lose_the_lease(log, run, lambda: source.publish(3, key="k"))
                go_on.set()
                following = sink.read(follow=True)
                assert [(await anext(following)).value for _ in range(3)] == [1, 3, 6]
                await following.aclose()
                run.drain()
                report = await run.finish()
            assert await values_of(sink) == [1, 3, 6]
            assert (report.delivered, report.released, report.in_flight) == (3, 2, 0)

    run_virtual(main())


@pytest.mark.parametrize("end", ["delivered", "filtered", "dead"])
def test_law_accounting_when_the_lease_was_lost(end: str, make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            await source.publish_many([0])
            begun, go_on = asyncio.Event(), asyncio.Event()

            async def work(x: int) -> int:
                begun.set()
                await go_on.wait()
                if end == "dead":
                    raise TypeError("no")
                return x

            flow = source.flow("g").map(work, concurrency=4).filter(lambda _: end != "filtered")
            async with flow.to(sink).start() as run:
                await begun.wait()
                await lose_the_lease(log, run, lambda: source.publish(1))
                go_on.set()
                await until(lambda: run.report().issued - run.report().in_flight == 3)
                run.drain()
                report = await run.finish()
            assert (report.issued, report.released, getattr(report, end)) == (3, 1, 2)
            assert await values_of(sink) == ([0, 1] if end == "delivered" else [])
            assert len([letter async for letter in source.dead()]) == (2 if end == "dead" else 0)

    run_virtual(main())


def test_an_event_isnt_lost_with_a_batch_of_which_another_event_was(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            await source.publish_many([0])
            flow = source.flow("g").batch(2, max_wait=1000)
            async with flow.to(sink).start() as run:
                await asyncio.sleep(1)
                await lose_the_lease(log, run, lambda: source.publish(1))
                for x in (2, 3):
                    await asyncio.sleep(1)
                    await source.publish(x)
                await asyncio.sleep(10)
                run.drain()
                report = await run.finish()
            assert report.issued == report.delivered + report.released
            await source.flow("g").to(sink).run(until="drained")
            found = [x for some in await values_of(sink) for x in (some if isinstance(some, list) else [some])]
            assert sorted(found) == [0, 1, 2, 3]

    run_virtual(main())


async def lose_the_lease(log: ps.EventLog, run: Any, publish: Callable[[], Awaitable[Any]]) -> None:
    """Have a run lose what it holds, and notice that when it is woken."""
    await log.ask(lambda transaction: transaction.connection.execute("UPDATE owners SET expires = -1"))
    await publish()
    await until(lambda: len(run._reading_of._owners) == 2)


async def until(done: Callable[[], bool]) -> None:
    for _ in range(1000):
        if done():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it didn't come to that")


# -- states -----------------------------------------------------------------------------------------------------------


def add(total: int | None, x: int) -> tuple[int, list[int]]:
    return (total or 0) + x, [x, (total or 0) + x]


def test_a_state_for_each_key_of_the_events(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            source, sink = log.topic("in"), log.topic("out")
            for start in (0, 100):  # the second job goes on with the states of the first
                await source.publish_many(range(start, start + 100), key=lambda x: f"k{x % 7}")
                await source.flow("g").map_state(add).to(sink).run(until="drained")
            sums: dict[int, int] = {}
            for x, total in await values_of(sink):
                sums[x % 7] = sums.get(x % 7, 0) + x
                assert total == sums[x % 7]
            assert sums == {key: sum(range(key, 200, 7)) for key in range(7)}

    run_virtual(main())


def test_an_event_without_a_key_is_dead_where_states_are_by_key(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            await log.topic("in").publish(1)
            report = await log.topic("in").flow("g").map_state(add).to(log.topic("out")).run(until="drained")
            assert report.dead == 1
            assert ["Publish with key=" in letter.error async for letter in log.topic("in").dead()] == [True]

    run_virtual(main())


def test_another_key_needs_the_group_alone(make_log: MakeLog) -> None:
    log = make_log()
    flow = log.topic("in").flow("g").map_state(add, key=lambda x: x % 2)
    with pytest.raises(PlanError, match="exclusive=True"):
        flow.to(log.topic("out")).explain()
    alone = log.topic("in").flow("g", exclusive=True).map_state(add, key=lambda x: x % 2)
    assert "exactly once" in alone.to(log.topic("out")).explain()


def test_a_state_over_a_topic_into_a_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with ps.EventLog(tmp_path / "events.db") as log:
            topic = log.topic("in")
            job = topic.flow("g").map_state(add).to(str(tmp_path / "out.jsonl"))
            for _ in range(2):
                await topic.publish_many([1, 2, 3], key=lambda _: "k")
                await job.run(until="drained")
            assert [total for _, total in rows_of(tmp_path / "out.jsonl")] == [1, 3, 6, 7, 9, 12]

    asyncio.run(main())


# -- kills ------------------------------------------------------------------------------------------------------------

PROGRAM = """
    import asyncio, sys
    import penstock as ps

    async def work(x):
        await asyncio.sleep(0.0005)
        return {"x": x}

    log = ps.EventLog("events.db")
    out = log.topic("out") if sys.argv[1] == "topic" else sys.argv[1]
    flow = log.topic("in").flow("g", lease=600).map(work, concurrency=8, ordered=False)
    print(flow.to(out).run_sync(progress=False, until="drained").delivered)
    """


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.parametrize(("out", "processes"), [("topic", 1), ("topic", 3), ("out.jsonl", 1), ("out.db", 1)])
def test_law_exactly_once_over_a_topic(out: str, processes: int, kills: int, tmp_path: Path) -> None:
    count = 400 * kills
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    draw = random.Random(f"{out}{processes}")
    path = tmp_path / "events.db"

    async def publish() -> None:
        async with ps.EventLog(path) as log:
            await log.topic("in").publish_many(range(count), key=lambda x: f"k{x % 50}")

    asyncio.run(publish())

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "program.py", out], cwd=tmp_path, stdout=subprocess.DEVNULL)

    running = [start() for _ in range(processes)]
    for _ in range(kills):
        time.sleep(0.4 + draw.random() * 0.3)
        victim = draw.randrange(processes)
        running[victim].kill()
        running[victim].wait()
        running[victim] = start()
    for one in running:
        assert one.wait(120) == 0

    async def found() -> list[int]:
        if out == "topic":
            async with ps.EventLog(path) as log:
                return [value["x"] for value in await values_of(log.topic("out"))]
        if out == "out.jsonl":
            return [row["x"] for row in rows_of(tmp_path / out)]
        import apsw

        connection = apsw.Connection(str(tmp_path / out))
        rows = [x for (x,) in connection.execute("SELECT x FROM outputs")]
        connection.close()
        return rows

    assert sorted(asyncio.run(found())) == list(range(count))
    assert os.path.exists(path)

    async def letters() -> int:
        async with ps.EventLog(path) as log:
            return len([letter async for letter in log.topic("in").dead()])

    assert asyncio.run(letters()) == 0


SUMS = """
    import sys
    import penstock as ps

    def add(total, x):
        return (total or 0) + x, [x, (total or 0) + x]

    log = ps.EventLog("events.db")
    flow = log.topic("in").flow("g", lease=600).map_state(add)
    flow.to(log.topic("out")).run_sync(progress=False, until="drained")
    """


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("events", "keys", "kills"),
    [(4000, 50, 5), pytest.param(100_000, 1000, 60, marks=pytest.mark.soak)],
    ids=["short", "long"],
)
def test_law_exactly_once_sums_by_key_in_four_processes(events: int, keys: int, kills: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(SUMS))
    draw = random.Random(events)
    path = tmp_path / "events.db"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path)

    async def main() -> None:
        async with ps.EventLog(path) as log:
            numbers = iter(range(events))
            running = [start() for _ in range(4)]
            for _ in range(kills):
                some = list(itertools.islice(numbers, events // kills))
                await log.topic("in").publish_many(some, key=lambda x: f"k{x % keys}")
                await asyncio.sleep(1 if kills > 10 else 0.4)
                victim = draw.randrange(4)
                running[victim].kill()
                running[victim].wait()
                running[victim] = start()
            for one in running:
                await asyncio.to_thread(one.wait)
            last = [start()]
            assert await asyncio.to_thread(last[0].wait) == 0
            source = [event.value async for event in log.topic("in").read()]
            sums: dict[int, int] = {}
            found = await values_of(log.topic("out"))
            assert sorted(x for x, _ in found) == sorted(source)
            for x, total in found:
                sums[x % keys] = sums.get(x % keys, 0) + x
                assert total == sums[x % keys], "out of order within a key, or a sum that lost or doubled something"
            assert [letter async for letter in log.topic("in").dead()] == []

    asyncio.run(main())
