"""What every log promises, in memory and in a file: publishing, reading again, delivering to groups."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict

import msgspec
import pytest

import penstock as ps
from penstock.errors import (
    CannotEncode,
    Closed,
    DecodeError,
    LeaseLost,
    PayloadTooLarge,
    PlanError,
    Unsupported,
)
from penstock.testing import run_virtual

MakeLog = Callable[..., ps.EventLog]


def on_virtual_clock(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """The test as a coroutine on the virtual clock, with an open log."""

    def run(make_log: MakeLog) -> None:
        async def main() -> None:
            async with make_log() as log:
                await test(log)

        run_virtual(main())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


async def take(topic: Any, group: str, count: int, **options: Any) -> list[Any]:
    """The next values of a group, each acknowledged."""
    values: list[Any] = []
    async with topic.subscribe(group, **options) as deliveries:
        async for delivery in deliveries:
            async with delivery as value:
                values.append(value)
            if len(values) == count:
                break
    return values


async def values_of(topic: Any, **options: Any) -> list[Any]:
    return [event.value async for event in topic.read(**options)]


# -- publishing and reading again -----------------------------------------------------------------------------------


@on_virtual_clock
async def test_what_is_published_is_read_again(log: ps.EventLog) -> None:
    topic = log.topic("t")
    assert await values_of(topic) == []
    assert [await topic.publish(value) for value in (1, None, {"a": [2.5, "x"]}, "é")] == [0, 1, 2, 3]
    assert await values_of(topic) == [1, None, {"a": [2.5, "x"]}, "é"]
    assert await values_of(topic, start=1, stop=3) == [None, {"a": [2.5, "x"]}]
    assert await values_of(topic, start=9) == []


@on_virtual_clock
async def test_an_event_has_all_it_was_given(log: ps.EventLog) -> None:
    topic = log.topic("t")
    before = datetime.now(UTC)
    await topic.publish("v", key="k", id="i", headers={"trace": "7"})
    (event,) = [event async for event in topic.read()]
    assert (event.value, event.position, event.key, event.id, event.headers) == ("v", 0, "k", "i", {"trace": "7"})
    assert before - timedelta(milliseconds=1) <= event.time <= datetime.now(UTC)


@on_virtual_clock
async def test_topics_are_apart(log: ps.EventLog) -> None:
    one, other = log.topic("one"), log.topic("other")
    assert await asyncio.gather(one.publish("a"), other.publish("b"), one.publish("c")) == [0, 0, 1]
    assert await values_of(one) == ["a", "c"]
    assert await values_of(other) == ["b"]
    assert [(topic.name, topic.events) for topic in await log.topics()] == [("one", 2), ("other", 1)]


@on_virtual_clock
async def test_looking_creates_no_topic(log: ps.EventLog) -> None:
    topic = log.topic("mistyped")
    assert await values_of(topic) == []
    assert await topic.groups() == []
    assert await topic.trim(keep=0) == 0
    assert await topic.requeue() == 0
    assert not await topic.remove_group("g")
    assert [letter async for letter in topic.dead()] == []
    assert await log.topics() == []


@on_virtual_clock
async def test_limits_of_trim(log: ps.EventLog) -> None:
    await log.topic("t").publish(1)
    options: Any
    for options in ({"keep": -1}, {"max_bytes": -1}, {"keep": "all"}, {"before": -1}, {"before": 2**63}):
        with pytest.raises(PlanError):
            await log.topic("t").trim(**options)
    assert await values_of(log.topic("t")) == [1]


@on_virtual_clock
async def test_an_id_is_published_once(log: ps.EventLog) -> None:
    topic = log.topic("t")
    assert await topic.publish("a", id="1") == 0
    assert await topic.publish("b") == 1
    assert await topic.publish("a again", id="1") == 0
    assert await topic.publish_many(["c", "d", "c"], id=lambda value: value) == [2, 3, 2]
    assert await values_of(topic) == ["a", "b", "c", "d"]
    assert await log.topic("other").publish("a", id="1") == 0


@on_virtual_clock
async def test_an_id_is_free_again_once_it_is_trimmed(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish("a", id="1")
    assert await topic.trim(keep=0) == 1
    assert await topic.publish("a", id="1") == 1


@on_virtual_clock
async def test_many_are_published_together_or_not_at_all(log: ps.EventLog) -> None:
    topic = log.topic("t")
    assert await topic.publish_many(range(3), key=str) == [0, 1, 2]
    with pytest.raises(CannotEncode, match="topic 't'"):
        await topic.publish_many([3, object(), 5])
    assert [(event.value, event.key) async for event in topic.read()] == [(0, "0"), (1, "1"), (2, "2")]


@on_virtual_clock
async def test_it_is_read_again_by_time(log: ps.EventLog) -> None:
    topic = log.topic("t")
    times = []
    for number in range(5):
        await topic.publish(number)
        await asyncio.to_thread(lambda: None)  # so that a microsecond passes
        times.append(datetime.now(UTC))
    assert await values_of(topic, start=times[2]) == [3, 4]
    assert await values_of(topic, start=times[0], stop=times[3]) == [1, 2, 3]
    assert await values_of(topic, start=datetime(2000, 1, 1, tzinfo=UTC)) == [0, 1, 2, 3, 4]
    assert await values_of(topic, start=datetime(2100, 1, 1, tzinfo=UTC)) == []


@on_virtual_clock
async def test_reading_can_follow(log: ps.EventLog) -> None:
    topic = log.topic("t")
    seen: list[int] = []

    async def follow() -> None:
        async for event in topic.read(follow=True):
            seen.append(event.value)
            if event.value == 3:
                return

    following = asyncio.create_task(follow())
    for number in range(4):
        await asyncio.sleep(1)
        await topic.publish(number)
    await following
    assert seen == [0, 1, 2, 3]


# -- types ----------------------------------------------------------------------------------------------------------


class Payment(msgspec.Struct):
    amount: int
    currency: str = "EUR"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Row(TypedDict):
    a: int


@pytest.mark.parametrize(
    ("kind", "value"), [(Payment, Payment(3)), (Point, Point(1, 2)), (Row, {"a": 1}), (bytes, b"\0\xff"), (int, 5)]
)
def test_a_topic_may_have_a_type(make_log: MakeLog, kind: Any, value: Any) -> None:
    async def main() -> None:
        async with make_log() as log:
            topic = log.topic("t", type=kind)
            await topic.publish(value)
            assert await values_of(topic) == [value]
            assert await take(topic, "g", 1) == [value]
            with pytest.raises(CannotEncode):
                await topic.publish("not of this type")
            assert len(await values_of(topic)) == 1

    run_virtual(main())


@on_virtual_clock
async def test_a_new_field_with_a_default_reads_old_events(log: ps.EventLog) -> None:
    await log.topic("t").publish({"amount": 7})
    assert await values_of(log.topic("t", type=Payment)) == [Payment(7, "EUR")]


@on_virtual_clock
async def test_what_isnt_of_the_type_is_an_error_and_for_a_group_a_dead_letter(log: ps.EventLog) -> None:
    await log.topic("t").publish_many([{"amount": "much"}, {"amount": 7}])
    topic = log.topic("t", type=Payment)
    with pytest.raises(DecodeError, match="amount"):
        await values_of(topic)
    assert await take(topic, "g", 1) == [Payment(7)]
    (letter,) = [letter async for letter in topic.dead()]
    assert (letter.reason, letter.event.value, letter.event.position) == ("DecodeError", b'{"amount":"much"}', 0)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 201, 5])
def test_names_of_topics(make_log: MakeLog, name: Any) -> None:
    with pytest.raises(PlanError):
        make_log().topic(name)


def test_a_type_that_cant_be_decoded(make_log: MakeLog) -> None:
    with pytest.raises(PlanError, match="can't be decoded"):
        make_log().topic("t", type=list[int] | set[int])


@on_virtual_clock
async def test_what_cant_be_published_is_refused_before(log: ps.EventLog) -> None:
    topic: Any = log.topic("t")
    for options in ({"key": 5}, {"id": 5}, {"headers": {"a": 5}}, {"at": "tomorrow"}, {"key": "\ud800"}):
        with pytest.raises(PlanError):
            await topic.publish(1, **options)
    assert await values_of(topic) == []


def test_a_payload_over_the_limit(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log(max_bytes=10) as log:
            topic = log.topic("t", type=bytes)
            await topic.publish(b"x" * 10)
            with pytest.raises(PayloadTooLarge, match="11 bytes is over the limit of 10"):
                await topic.publish(b"x" * 11)
            assert await values_of(topic) == [b"x" * 10]

    run_virtual(main())


def test_a_closed_log(make_log: MakeLog) -> None:
    async def main() -> None:
        log = make_log()
        topic = log.topic("t")
        for _ in range(2):
            with pytest.raises(Closed):
                await topic.publish(1)
            with pytest.raises(Closed):
                await values_of(topic)
            with pytest.raises(Closed):
                await take(topic, "g", 1)
            async with log:
                pass
        await log.close()

    run_virtual(main())


def test_opened_twice_is_closed_twice(make_log: MakeLog) -> None:
    async def main() -> None:
        async with make_log() as log:
            async with log:
                await log.topic("t").publish(1)
            assert await values_of(log.topic("t")) == [1]

    run_virtual(main())


@pytest.mark.parametrize("address", ["nats://localhost", "redis://x", "", 5])
def test_addresses(address: Any) -> None:
    with pytest.raises((PlanError, TypeError)):
        ps.EventLog(address)


def test_memory_is_asked_for_no_durability() -> None:
    with pytest.raises(Unsupported, match="durability"):
        ps.EventLog(":memory:", durability="disk")
    assert ps.EventLog(":memory:").capabilities.durability == "none"
    assert not ps.EventLog(":memory:").capabilities.processes


@pytest.mark.parametrize(
    "options",
    [
        {"lease": 0},
        {"lease": "5"},
        {"max_attempts": 0},
        {"backoff": -1},
        {"in_flight": 0},
        {"start": "middle"},
        {"start": -1},
        {"until": "later"},
        {"group": ""},
    ],
)
def test_parameters_of_a_subscription(make_log: MakeLog, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        make_log().topic("t").subscribe(**{"group": "g", **options})


# -- groups -----------------------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_each_group_gets_each_event_in_order(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(300))
    assert await take(topic, "a", 300) == list(range(300))
    assert await take(topic, "b", 300) == list(range(300))
    await topic.publish(300)
    assert await take(topic, "a", 1) == [300]


@on_virtual_clock
async def test_a_new_group_begins_where_it_is_told(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(5))
    assert await take(topic, "from three", 2, start=3) == [3, 4]
    async with topic.subscribe("latest", start="latest") as deliveries:
        await topic.publish(5)
        async for delivery in deliveries:
            assert delivery.value == 5
            await delivery.ack()
            break


@on_virtual_clock
async def test_a_group_shares_the_events_among_its_readers(log: ps.EventLog) -> None:
    topic = log.topic("t")
    seen: list[int] = []

    async def read() -> None:
        async with topic.subscribe("g", until="drained") as deliveries:
            async for delivery in deliveries:
                async with delivery as value:
                    await asyncio.sleep(0.01)
                    seen.append(value)

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await topic.publish_many(range(100))
    await asyncio.gather(*readers)
    await asyncio.gather(*(read() for _ in range(1)))
    assert sorted(seen) == list(range(100))


@on_virtual_clock
async def test_it_ends_when_it_is_drained(log: ps.EventLog) -> None:
    topic = log.topic("t")
    assert await drain(topic, "g") == []
    await topic.publish_many(range(10))
    assert await drain(topic, "g") == list(range(10))
    await topic.publish(10, at=datetime.now(UTC) + timedelta(days=1))
    assert await drain(topic, "g") == []


async def drain(topic: Any, group: str, **options: Any) -> list[Any]:
    values = []
    async with topic.subscribe(group, until="drained", **options) as deliveries:
        async for delivery in deliveries:
            async with delivery as value:
                values.append(value)
    return values


@on_virtual_clock
async def test_what_isnt_acknowledged_comes_again_and_the_attempt_doesnt_count(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(3))
    async with topic.subscribe("g") as deliveries:
        first = await anext(deliveries)
        assert (first.value, first.attempt) == (0, 1)
    with pytest.raises(LeaseLost):
        await first.ack()
    async with topic.subscribe("g") as deliveries:
        again = await anext(deliveries)
        assert (again.value, again.attempt) == (0, 1)
        await again.ack()
    assert await drain(topic, "g") == [1, 2]


@on_virtual_clock
async def test_an_error_is_tried_again_after_a_while_then_dead(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(["bad", "good"])
    loop = asyncio.get_running_loop()
    tried: list[tuple[int, float]] = []
    good: list[str] = []
    async with topic.subscribe("g", max_attempts=3, backoff=1, until="drained") as deliveries:
        async for delivery in deliveries:
            async with delivery as value:
                if value == "bad":
                    tried.append((delivery.attempt, round(loop.time(), 1)))
                    raise ValueError("it is bad")
                good.append(value)
    assert good == ["good"]
    assert [attempt for attempt, _ in tried] == [1, 2, 3]
    began = tried[0][1]
    assert [round(time - began) for _, time in tried] == [0, 1, 3]
    (letter,) = [letter async for letter in topic.dead("g")]
    assert (letter.group, letter.event.value, letter.attempts, letter.reason) == ("g", "bad", 3, "ValueError")
    assert "it is bad" in letter.error
    assert "Traceback" in letter.error


@on_virtual_clock
async def test_dead_letters_are_requeued(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(4))
    async with topic.subscribe("g", until="drained") as deliveries:
        async for delivery in deliveries:
            await delivery.dead("no use")
    assert [letter.event.value async for letter in topic.dead()] == [0, 1, 2, 3]
    assert [letter.reason async for letter in topic.dead()] == ["no use"] * 4
    assert await topic.requeue("another") == 0
    assert await topic.requeue("g", [1, 7]) == 1
    assert await drain(topic, "g") == [1]
    assert await topic.requeue() == 3
    assert await drain(topic, "g") == [0, 2, 3]
    assert [letter async for letter in topic.dead()] == []


@on_virtual_clock
async def test_of_a_key_one_is_out_at_a_time_and_others_go_on(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many([f"{key}{number}" for number in range(3) for key in "ab"], key=lambda value: value[0])
    async with topic.subscribe("g") as deliveries:
        out = [await anext(deliveries), await anext(deliveries)]
        assert [delivery.value for delivery in out] == ["a0", "b0"]
        asking = asyncio.ensure_future(anext(deliveries))
        await asyncio.sleep(5)
        assert not asking.done()
        await out[1].ack()
        assert (await asking).value == "b1"
        await out[0].retry(delay=60)
        asking = asyncio.ensure_future(anext(deliveries))
        await asyncio.sleep(50)
        assert not asking.done(), "what is to be tried again holds back its key"
        assert (await asking).value == "a0"


@on_virtual_clock
async def test_a_key_holds_across_readers(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(6), key=lambda value: "even" if value % 2 == 0 else "odd")
    async with topic.subscribe("g") as one, topic.subscribe("g") as other:
        first = await anext(one)
        second = await anext(other)
        assert (first.value, second.value) == (0, 1)
        asking = asyncio.ensure_future(anext(other))
        await asyncio.sleep(1)
        assert not asking.done()
        await first.ack()
        assert (await asking).value == 2


@on_virtual_clock
async def test_dead_lets_its_key_go_on(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(3), key=lambda _: "k")
    async with topic.subscribe("g") as deliveries:
        first = await anext(deliveries)
        await first.dead("why not")
        assert (await anext(deliveries)).value == 1


@on_virtual_clock
async def test_delayed_events_come_at_their_time_and_hold_back_their_key(log: ps.EventLog) -> None:
    topic = log.topic("t")
    loop = asyncio.get_running_loop()
    await topic.publish("later", key="k", at=datetime.now(UTC) + timedelta(hours=1))
    await topic.publish("behind", key="k")
    await topic.publish("other")
    began = loop.time()
    seen = []
    async with topic.subscribe("g") as deliveries:
        async for delivery in deliveries:
            async with delivery as value:
                seen.append((value, round((loop.time() - began) / 3600)))
            if len(seen) == 3:
                break
    assert seen == [("other", 0), ("later", 1), ("behind", 1)]


@on_virtual_clock
async def test_a_delay_runs_by_the_loops_clock_whenever_it_began_and_is_looked_at(log: ps.EventLog) -> None:
    topic = log.topic("t")
    loop = asyncio.get_running_loop()
    for began in (0, 36_000):
        await asyncio.sleep(began - loop.time())
        await topic.publish("soon", at=datetime.now(UTC) + timedelta(hours=1))
        assert await drain(topic, "early") == []
        await asyncio.sleep(1800)
        async with topic.subscribe("late") as deliveries, await anext(deliveries) as value:
            assert (value, round(loop.time() - began)) == ("soon", 3600)
        assert await drain(topic, "early") == ["soon"]


@on_virtual_clock
async def test_in_flight_is_bounded(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(10))
    async with topic.subscribe("g", in_flight=2) as deliveries:
        out = [await anext(deliveries), await anext(deliveries)]
        asking = asyncio.ensure_future(anext(deliveries))
        await asyncio.sleep(5)
        assert not asking.done()
        await out[0].ack()
        assert (await asking).value == 2


@on_virtual_clock
async def test_law_cancellation_loses_nothing_while_asking(log: ps.EventLog) -> None:
    topic = log.topic("t")
    seen: list[int] = []
    async with topic.subscribe("g") as deliveries:
        for number in range(50):
            asking = asyncio.ensure_future(anext(deliveries))
            for _ in range(number % 4):
                await asyncio.sleep(0)
            if number % 2:
                await topic.publish(number)
            asking.cancel()
            await asyncio.wait([asking])
            if not asking.cancelled():
                async with asking.result() as value:
                    seen.append(value)
        while len(seen) < 25:
            async with await anext(deliveries) as value:
                seen.append(value)
    assert seen == list(range(1, 50, 2))


@on_virtual_clock
async def test_law_cancellation_in_the_block_gives_it_back(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish("a")

    async def handle() -> None:
        async with topic.subscribe("g") as deliveries:
            async for delivery in deliveries:
                async with delivery:
                    await asyncio.sleep(100)

    handling = asyncio.create_task(handle())
    await asyncio.sleep(1)
    handling.cancel()
    await asyncio.wait([handling])
    assert handling.cancelled()
    async with topic.subscribe("g") as deliveries:
        assert (await anext(deliveries)).attempt == 1


@on_virtual_clock
async def test_law_cancellation_doesnt_keep_an_event_from_being_acknowledged(log: ps.EventLog) -> None:
    topic = log.topic("t")
    for turns in range(5):
        await topic.publish_many(range(10))
        async with topic.subscribe("g") as deliveries:
            some = [await anext(deliveries) for _ in range(10)]
            acks = [asyncio.create_task(delivery.ack()) for delivery in some]
            for _ in range(turns):
                await asyncio.sleep(0)
            for ack in acks:
                ack.cancel()
            await asyncio.wait(acks)
        left = await drain(topic, "g")
        assert left == ([] if turns else list(range(10))), "a task that hasn't begun has asked nothing"


def test_law_cancellation_of_opening_and_joining_leaves_nothing(make_log: MakeLog) -> None:
    async def cancelled(coroutine: Coroutine[Any, Any, Any], turns: int) -> bool:
        task = asyncio.ensure_future(coroutine)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    async def main() -> None:
        for turns in range(8):
            log = make_log()
            if not await cancelled(log.open(), turns):
                await log.close()
            assert not log.is_open
        for turns in range(40):
            async with make_log() as log:
                await log.topic("t").publish(1)
                subscription = log.topic("t").subscribe("g")
                if not await cancelled(subscription.__aenter__(), turns):
                    await subscription.__aexit__()
                assert [group.readers for group in await log.topic("t").groups()] in ([], [0])

    run_virtual(main())


@on_virtual_clock
async def test_drain_ends_the_iteration(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(5))
    seen = []
    async with topic.subscribe("g") as deliveries:
        async for delivery in deliveries:
            async with delivery as value:
                seen.append(value)
            if value == 2:
                deliveries.drain()
    assert seen == [0, 1, 2]
    assert await drain(topic, "g") == [3, 4]


@on_virtual_clock
async def test_a_subscription_waits_and_is_woken(log: ps.EventLog) -> None:
    topic = log.topic("t")
    asking = asyncio.create_task(take(topic, "g", 3))
    for number in range(3):
        await asyncio.sleep(10)
        await topic.publish(number)
    assert await asking == [0, 1, 2]


# -- trimming -------------------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_trim_leaves_what_groups_need(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(10))
    await take(topic, "g", 4)
    assert await topic.trim(keep=0) == 4
    assert await values_of(topic) == [4, 5, 6, 7, 8, 9]
    assert await topic.trim(keep=3) == 0
    assert await drain(topic, "g") == [4, 5, 6, 7, 8, 9]
    assert await topic.trim(keep=2) == 4
    assert await values_of(topic) == [8, 9]
    assert await topic.publish(10) == 10
    await take(topic, "abandoned", 0 + 1)
    assert await topic.trim(keep=0, force=True) == 3
    assert await drain(topic, "abandoned") == []


@on_virtual_clock
async def test_trim_by_size_and_time(log: ps.EventLog) -> None:
    topic = log.topic("t", type=bytes)
    await topic.publish_many([b"x" * 100] * 10)
    assert await topic.trim(max_bytes=350) == 7
    (info,) = await log.topics()
    assert (info.events, info.first, info.next, info.bytes) == (3, 7, 10, 300)
    assert await topic.trim(before=datetime.now(UTC) + timedelta(days=1)) == 3
    assert await topic.trim(before=5) == 0


@on_virtual_clock
async def test_an_abandoned_group_is_removed(log: ps.EventLog) -> None:
    topic = log.topic("t")
    await topic.publish_many(range(3))
    await take(topic, "old", 1)
    assert [(group.name, group.behind) for group in await topic.groups()] == [("old", 2)]
    assert await topic.trim(keep=0) == 1
    assert await topic.remove_group("old")
    assert not await topic.remove_group("old")
    assert await topic.groups() == []
    assert await topic.trim(keep=0) == 2


def test_the_sync_twins(make_log: MakeLog) -> None:
    log = make_log().open_sync()
    try:
        assert log.topic("t").publish_sync("a") == 0
    finally:
        log.close_sync()
