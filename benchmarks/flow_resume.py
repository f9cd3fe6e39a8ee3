"""What exactly once costs: the same flow to ``write.jsonl``, and to a bare file that is fsynced at the end."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Figures, Outcome, Row, judged, main, measure, need, paired

ITEMS = 60_000
PAIRS = 20
TURNS = 220
"""Turns of a loop that takes about 20 µs."""


async def work(x: int) -> dict[str, Any]:
    total = 0
    for turn in range(TURNS):
        total += turn & x
    return {"id": x, "total": total, "text": "the quick brown fox jumps over the lazy dog"}


def exactly_once() -> float:
    """Every item committed with its progress, each 30 ms or so, durably."""
    import penstock as ps

    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        output = Path(folder) / "out.jsonl"
        began = time.perf_counter()
        report = asyncio.run(ps.Flow(range(ITEMS)).map(work).to(output).run(progress=False))
        seconds = time.perf_counter() - began
        assert report.delivered == ITEMS
        assert output.read_bytes().count(b"\n") == ITEMS
        return seconds


def bare() -> float:
    """The same flow, its results written to a file by a loop of our own."""
    import msgspec

    import penstock as ps

    encode = msgspec.json.Encoder().encode

    async def write(path: Path) -> None:
        with path.open("wb") as file:  # a hand-written loop would do no better in a thread
            async for item in ps.Flow(range(ITEMS)).map(work):
                file.write(encode(item) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        output = Path(folder) / "out.jsonl"
        began = time.perf_counter()
        asyncio.run(write(output))
        seconds = time.perf_counter() - began
        assert output.read_bytes().count(b"\n") == ITEMS
        return seconds


def resume() -> Figures:
    exactly_once()
    return paired(exactly_once, bare, PAIRS)


def run() -> Outcome:
    found = need(measure(__file__, "resume"), "write.jsonl")
    claim = f"{ITEMS:,} items of {found['others'] / ITEMS * 1e6:.0f} µs to write.jsonl, exactly once"
    row = Row(claim, f"{found['some']:.2f} s", "a bare file, fsynced at the end", f"{found['others']:.2f} s")
    remark = f"The median of {PAIRS} pairs, and between which bounds it lies 19 times of 20."
    return Outcome([judged(row, found, 0.10)], remarks=[remark])


if __name__ == "__main__":
    main(run, resume)
