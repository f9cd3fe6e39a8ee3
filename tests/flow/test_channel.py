"""The channel between two segments, against a plain list of when each task came."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.flow.channel import Channel
from penstock.place.base import Task

MOVES = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 5)),
    st.tuples(st.just("take"), st.integers(-3, 8)),
    st.tuples(st.just("withdraw"), st.integers(0, 30)),
    st.tuples(st.just("close"), st.just(0)),
)


class Side:
    """Counts how often it was told."""

    def __init__(self) -> None:
        self.told = 0

    def __call__(self) -> None:
        self.told += 1


def tasks(count: int) -> list[Task]:
    return [Task(value) for value in range(count)]


@settings(max_examples=400)
@given(moves=st.lists(MOVES, max_size=60), timed=st.booleans(), capacity=st.integers(1, 6))
@example(moves=[("put", 2), ("put", 1), ("withdraw", 2)], timed=True, capacity=4)
def test_a_channel_is_a_list_that_says_since_when_its_first_task_waits(
    moves: list[tuple[str, int]], timed: bool, capacity: int
) -> None:
    now = 0.0
    channel = Channel(capacity, (lambda: now) if timed else None)
    items, room = Side(), Side()
    channel.on_items, channel.on_room = items, room
    inside: list[tuple[Task, float]] = []
    everyone: list[Task] = []
    for verb, number in moves:
        now += 1.0
        told = (items.told, room.told)
        if verb == "put":
            new = tasks(number)
            channel.put(new)
            everyone += new
            inside += [(task, now) for task in new]
            assert (items.told, room.told) == (told[0] + bool(new), told[1])
        elif verb == "take":
            expected = [task for task, _ in inside[: max(0, number)]]
            del inside[: max(0, number)]
            taken = channel.take(number)
            assert list(map(id, taken)) == list(map(id, expected))
            assert (items.told, room.told) == (told[0], told[1] + bool(expected))
        elif verb == "withdraw":
            known = [*(task for task, _ in inside), *everyone, Task(0)]
            task = known[number % len(known)]
            there = [one for one in inside if one[0] is task]
            inside = [one for one in inside if one[0] is not task]
            assert channel.withdraw(task) is bool(there)
            assert (items.told, room.told) == (told[0], told[1] + bool(there))
        else:
            was = channel.closed
            channel.close()
            assert (items.told, room.told) == (told[0] + (not was), told[1])
        assert len(channel) == len(inside)
        assert channel.room == capacity - len(inside)
        assert channel.ended == (channel.closed and not inside)
        if timed and inside:
            assert channel.oldest == inside[0][1]
    for task, came in inside:
        assert not timed or channel.oldest == came
        assert channel.take(1) == [task]


def test_tasks_are_told_apart_by_what_they_are_and_not_by_their_values() -> None:
    channel = Channel(4)
    first, second = Task("same"), Task("same")
    channel.put([first])
    assert not channel.withdraw(second)
    assert channel.withdraw(first)


def test_one_put_stays_whole_beyond_the_bound() -> None:
    channel = Channel(2)
    channel.put(tasks(5))
    assert (len(channel), channel.room) == (5, -3)


def test_nobody_has_to_be_connected() -> None:
    channel = Channel(2)
    channel.put(tasks(1))
    assert [task.value for task in channel.take(1)] == [0]
    channel.close()
    assert channel.ended


@pytest.mark.parametrize("side", ["on_items", "on_room"])
def test_whoever_is_told_may_take_at_once(side: str) -> None:
    """A neighbour that is pumped in the middle of a put or a take finds the channel as it is after it."""
    channel = Channel(8, lambda: 0.0)
    seen: list[Any] = []

    def look() -> None:
        seen.append(len(channel))
        seen.extend(task.value for task in channel.take(1))

    channel.put(tasks(2))
    setattr(channel, side, look)
    if side == "on_items":
        channel.put([Task("last")])
        assert seen == [3, 0]
    else:
        assert [task.value for task in channel.take(1)] == [0]
        assert seen == [1, 0, 1]  # its own taking makes room too
