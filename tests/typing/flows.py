"""The types that follow through a flow, proved by ``mypy --strict``: this file is checked, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

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


def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def pairs(texts: list[str]) -> tuple[int, ...]:
    return tuple(map(len, texts))


def embed(texts: list[str]) -> NDArray[np.float32]:
    return np.zeros((len(texts), 3), np.float32)


async def embed_async(texts: list[str]) -> NDArray[np.float32]:
    return embed(texts)


def counts(texts: list[str]) -> dict[str, int]:
    return {text: len(text) for text in texts}


def words_of(texts: list[str]) -> Iterator[str]:
    yield from texts


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
assert_type(texts.map_batches(lengths, batch_size=8), ps.Flow[int])
assert_type(texts.map_batches(pairs, batch_size=8), ps.Flow[int])
assert_type(texts.map_batches(embed, batch_size=8), ps.Flow[Any])
assert_type(texts.map_batches(embed_async, batch_size=8, max_wait=0.1), ps.Flow[Any])
assert_type(texts.map_batches(lambda xs: [len(x) for x in xs], batch_size=8), ps.Flow[int])
assert_type(texts.batch(2), ps.Flow[list[str]])
assert_type(texts.batch(2).unbatch(), ps.Flow[str])
assert_type(texts.take(3).map(length).filter(bool), ps.Flow[int])


async def outputs() -> None:
    assert_type(await texts.map(length).collect(), list[int])
    async for number in texts.map(length):
        assert_type(number, int)


for number in texts.map(length):
    assert_type(number, int)

# on_error="keep" passes on a Failed wherever an item can fail.
assert_type(texts.filter(str.isalpha, on_error="keep"), ps.Flow[str | ps.Failed])
assert_type(texts.filter(str.isalpha, on_error="skip", workers=2), ps.Flow[str])
assert_type(texts.flat_map(words, on_error="keep"), ps.Flow[str | ps.Failed])
assert_type(texts.flat_map(letters, whole=False, on_error="keep"), ps.Flow[str | ps.Failed])
assert_type(texts.flat_map(pair, on_error="keep"), ps.Flow[bytes | ps.Failed])
assert_type(texts.flat_map(words, on_error="dead_letter"), ps.Flow[str])
assert_type(texts.map_batches(lengths, batch_size=8, on_error="keep"), ps.Flow[int | ps.Failed])
assert_type(texts.map_batches(ps.per_worker(Embedder, "x"), batch_size=8, on_error="keep"), ps.Flow[bytes | ps.Failed])

# A job has no verbs, and runs to a report.
job = texts.map(length).to("lengths.jsonl")
assert_type(job, ps.Job)
assert_type(job.run_sync(), ps.Report)
job.map(length)  # type: ignore[attr-defined]

# What doesn't fit is refused: the ignores are needed, or mypy says so.
texts.map(ps.per_worker(Scale, 10))  # type: ignore[arg-type]
ps.per_worker(Scale, "ten")  # type: ignore[arg-type]
ps.per_worker(Scale)  # type: ignore[call-arg]
texts.map_batches(counts, batch_size=8)  # type: ignore[arg-type]  # a dict has no order of results
texts.map_batches(words_of, batch_size=8)  # type: ignore[arg-type]  # nobody knows how many an iterator gives
texts.map(length, place="cloud")  # type: ignore[call-overload]
texts.map(length, wokers=2)  # type: ignore[call-overload]
