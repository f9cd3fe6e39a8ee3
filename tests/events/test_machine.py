"""The same operations, drawn at random, on every kind of log and on a model in plain Python."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import penstock as ps
from penstock.events.subscription import Delivery, Subscription
from penstock.testing.clock import _VirtualLoop

T = TypeVar("T")
READERS = 3


@dataclass
class Item:
    """An event as one group sees it."""

    key: str | None
    due: float = 0.0
    attempt: int = 0
    out: bool = False
    over: bool = False
    dead: bool = False


@dataclass
class Model:
    """What a topic with one group holds."""

    values: list[tuple[int, str | None, str | None]] = field(default_factory=list)
    items: dict[int, Item] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    first: int = 0

    def publish(self, value: int, key: str | None, id: str | None) -> int:
        if id is not None and self.ids.get(id, -1) >= self.first:
            return self.ids[id]
        seq = len(self.values)
        self.values.append((value, key, id))
        self.items[seq] = Item(key)
        if id is not None:
            self.ids[id] = seq
        return seq

    def open(self, seq: int) -> bool:
        item = self.items[seq]
        return seq >= self.first and not item.over and not item.dead

    def deliverable(self, seq: int, now: float) -> bool:
        item = self.items[seq]
        if not self.open(seq) or item.out or item.due > now:
            return False
        return item.key is None or not any(
            self.open(before) for before in range(seq) if self.items[before].key == item.key
        )

    def trim(self, keep: int) -> int:
        needed = [seq for seq in self.items if seq >= self.first and not self.items[seq].over]
        goal = max(self.first, min([len(self.values) - keep, *needed]))
        gone, self.first = goal - self.first, goal
        return gone


class Side:
    """One log, its readers, and its model."""

    def __init__(self, address: str) -> None:
        self.log = ps.EventLog(address)
        self.model = Model()
        self.readers: list[Subscription[Any]] = []
        self.out: list[tuple[int, Delivery[Any]]] = []

    async def open(self) -> None:
        await self.log.open()
        self.topic = self.log.topic("t")
        for _ in range(READERS):
            self.readers.append(await self.reader())

    async def reader(self) -> Subscription[Any]:
        return await self.topic.subscribe("g", in_flight=1, max_attempts=1000).__aenter__()

    async def close(self) -> None:
        for reader in self.readers:
            await reader.__aexit__()
        await self.log.close()

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def in_hand(self) -> set[int]:
        """What readers have claimed and nobody asked for yet."""
        ready = {row.seq for reader in self.readers for row, _, _ in reader._ready}
        return ready | {row.seq for reader in self.readers for lane in reader._lanes.values() for row, _, _ in lane}

    async def publish(self, value: int, key: str | None, id: str | None) -> None:
        expected = self.model.publish(value, key, id)
        assert await self.topic.publish(value, key=key, id=id) == expected

    async def take(self, number: int) -> None:
        reader = self.readers[number]
        if any(which == number for which, _ in self.out):
            return
        try:
            async with asyncio.timeout(2):  # of the virtual clock, which waits for what is being written
                delivery = await anext(reader)
        except TimeoutError:
            left = [seq for seq in self.model.items if self.model.deliverable(seq, self.now - 2.5)]
            assert set(left) <= self.in_hand(), f"{left} could be delivered"
            return
        seq = delivery.position
        item = self.model.items[seq]
        assert self.model.deliverable(seq, self.now + 0.2), f"{seq} was delivered"
        assert (delivery.value, delivery.key, delivery.id) == self.model.values[seq]
        item.attempt += 1
        assert delivery.attempt == item.attempt
        item.out = True
        self.out.append((number, delivery))

    async def settle(self, index: int, how: str) -> None:
        if not self.out:
            return
        _, delivery = self.out.pop(index % len(self.out))
        item = self.model.items[delivery.position]
        item.out = False
        if how == "ack":
            await delivery.ack()
            item.over = True
        elif how == "dead":
            await delivery.dead("so it was drawn")
            item.dead = True
        elif how == "release":
            await delivery.release()
            item.attempt -= 1
        else:
            delay = float(how)
            await delivery.retry(delay)
            item.due = self.now + delay

    async def renew(self, number: int) -> None:
        """A reader leaves, with what it has out, and another comes."""
        await self.readers[number].__aexit__()
        for which, delivery in self.out:
            if which == number:
                item = self.model.items[delivery.position]
                item.out = False
                item.attempt -= 1
        self.out = [(which, delivery) for which, delivery in self.out if which != number]
        self.readers[number] = await self.reader()

    async def requeue(self) -> None:
        dead = [seq for seq, item in self.model.items.items() if item.dead]
        assert [letter.event.position async for letter in self.topic.dead()] == sorted(
            dead, key=[letter.event.position async for letter in self.topic.dead()].index
        )
        assert await self.topic.requeue() == len(dead)
        for seq in dead:
            self.model.items[seq] = Item(None)

    async def trim(self, keep: int) -> None:
        assert await self.topic.trim(keep=keep) == self.model.trim(keep)

    async def check(self) -> None:
        found = [(event.position, event.value, event.key, event.id) async for event in self.topic.read()]
        first = self.model.first
        assert found == [(seq, *value) for seq, value in enumerate(self.model.values) if seq >= first]


class Machine(RuleBasedStateMachine):
    """Every rule does the same to all sides."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=_VirtualLoop)
        self.directory = tempfile.mkdtemp()
        self.sides = [Side(":memory:"), Side(f"{self.directory}/events.db")]
        self.count = 0
        for side in self.sides:
            self.run(side.open())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        for side in self.sides:
            self.run(side.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    @rule(
        key=st.sampled_from([None, "a", "b"]),
        id=st.sampled_from([None, None, "1", "2"]),
    )
    def publish(self, key: str | None, id: str | None) -> None:
        self.count += 1
        for side in self.sides:
            self.run(side.publish(self.count, key, id))

    @rule(reader=st.integers(0, READERS - 1))
    def take(self, reader: int) -> None:
        for side in self.sides:
            self.run(side.take(reader))

    @rule(index=st.integers(0, READERS - 1), how=st.sampled_from(["ack", "ack", "dead", "release", "0", "7"]))
    def settle(self, index: int, how: str) -> None:
        for side in self.sides:
            self.run(side.settle(index, how))

    @rule(seconds=st.sampled_from([1.0, 8.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(reader=st.integers(0, READERS - 1))
    def renew(self, reader: int) -> None:
        for side in self.sides:
            self.run(side.renew(reader))

    @rule()
    def requeue(self) -> None:
        for side in self.sides:
            self.run(side.requeue())

    @rule(keep=st.integers(0, 3))
    def trim(self, keep: int) -> None:
        for side in self.sides:
            self.run(side.trim(keep))

    @invariant()
    def what_is_stored_is_what_was_published(self) -> None:
        for side in self.sides:
            self.run(side.check())


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
TestMachine = Machine.TestCase
