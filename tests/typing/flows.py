"""The types that follow through a flow, proved by ``mypy --strict``: this file is checked, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

import penstock as ps


def length(text: str) -> int:
    return len(text)


async def ask(text: str) -> float:
    return float(text)


def words(text: str) -> Iterator[str]:
    yield from text.split()


async def letters(text: str) -> AsyncIterator[str]:
    for letter in text:
        yield letter


async def pair(text: str) -> list[bytes]:
    return [text.encode()] * 2


class Scale:
    def __init__(self, factor: int, *, offset: float = 0.0) -> None:
        self.factor = factor
        self.offset = offset

    def __call__(self, x: int) -> float:
        return self.factor * x + self.offset


class Embedder:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, texts: list[str]) -> list[bytes]:
        return [text.encode() for text in texts]


class Remote:
    async def __call__(self, x: int) -> str:
        return str(x)


texts = ps.Flow(["a", "b"])
assert_type(texts, ps.Flow[str])

# map: of a def, of an async def, of what per_worker builds.
assert_type(texts.map(length), ps.Flow[int])
assert_type(texts.map(ask), ps.Flow[float])
assert_type(texts.map(length).map(ps.per_worker(Scale, 10)), ps.Flow[float])
assert_type(texts.map(length).map(ps.per_worker(Scale, 10, offset=1.5), workers=2), ps.Flow[float])
assert_type(texts.map(length).map(ps.per_worker(Remote)), ps.Flow[str])
assert_type(texts.map(length, on_error="keep"), ps.Flow[int | ps.Failed])
assert_type(texts.map(ask, on_error="keep"), ps.Flow[float | ps.Failed])
assert_type(texts.map(length, on_error="skip", retry=3, timeout=1.5), ps.Flow[int])

# The rest of the verbs.
assert_type(texts.filter(str.isalpha), ps.Flow[str])
assert_type(texts.flat_map(words), ps.Flow[str])
assert_type(texts.flat_map(letters, whole=False), ps.Flow[str])
assert_type(texts.flat_map(pair), ps.Flow[bytes])
assert_type(texts.map_batches(ps.per_worker(Embedder, "small"), batch_size=8), ps.Flow[bytes])
assert_type(texts.batch(2), ps.Flow[list[str]])
assert_type(texts.batch(2).unbatch(), ps.Flow[str])
assert_type(texts.take(3).map(length).filter(bool), ps.Flow[int])


async def outputs() -> None:
    assert_type(await texts.map(length).collect(), list[int])
    async for number in texts.map(length):
        assert_type(number, int)


for number in texts.map(length):
    assert_type(number, int)

# A job has no verbs, and runs to a report.
job = texts.map(length).to("lengths.jsonl")
assert_type(job, ps.Job)
assert_type(job.run_sync(), ps.Report)
job.map(length)  # type: ignore[attr-defined]

# What doesn't fit is refused: the ignores are needed, or mypy says so.
texts.map(ps.per_worker(Scale, 10))  # type: ignore[arg-type]
ps.per_worker(Scale, "ten")  # type: ignore[arg-type]
ps.per_worker(Scale)  # type: ignore[call-arg]
texts.map(length, place="cloud")  # type: ignore[call-overload]
texts.map(length, wokers=2)  # type: ignore[call-overload]
