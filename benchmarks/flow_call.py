"""Live requests: an unbound flow that batches across concurrent callers, and refuses what is too much.

The model takes 5 ms a batch and 0.1 ms an item, for overload 20 ms and 0.1 ms: it sleeps, so that what is measured is
the waiting of the calls, and not how many calls the machine can make.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from harness import Figures, NotRun, Outcome, Picture, Row, alternate, main, need, times

BATCH = 32
MAX_WAIT = 0.005
A_BATCH, A_LONG_BATCH, AN_ITEM = 0.005, 0.020, 0.0001
SERVICE = A_BATCH + BATCH * AN_ITEM
LONG_SERVICE = A_LONG_BATCH + BATCH * AN_ITEM
CAPACITY = BATCH / LONG_SERVICE
WAITING = 2 * BATCH
CALLS = {16: 150, 64: 100, 256: 30, 1000: 12}
"""How many callers, and how often each calls."""

Caller = Callable[[int], Awaitable[int]]


class Model:
    """Sleeps, and remembers the sizes of its batches."""

    def __init__(self, a_batch: float = A_BATCH) -> None:
        self.sizes: list[int] = []
        self.a_batch = a_batch

    def __call__(self, items: list[int]) -> list[int]:
        self.sizes.append(len(items))
        time.sleep(self.a_batch + len(items) * AN_ITEM)
        return [-item for item in items]


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


async def in_turns(call: Caller, model: Model, callers: int) -> Figures:
    """Each caller calls again when it has its answer."""
    latencies: list[float] = []

    async def caller(number: int) -> None:
        for turn in range(CALLS[callers]):
            item = number * 1000 + turn
            began = time.perf_counter()
            assert await call(item) == -item
            latencies.append(time.perf_counter() - began)

    await call(0)
    model.sizes.clear()
    began = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    seconds = time.perf_counter() - began
    return {
        "batch": sum(model.sizes) / len(model.sizes),
        "p50": quantile(latencies, 0.5),
        "p99": quantile(latencies, 0.99),
        "rate": len(latencies) / seconds,
    }


def penstock(callers: int) -> Figures:
    import penstock as ps

    model = Model()

    async def work() -> Figures:
        flow = ps.Flow().map_batches(model, batch_size=BATCH, max_wait=MAX_WAIT, place="thread")
        async with flow.open() as call:
            return await in_turns(call, model, callers)

    return asyncio.run(work())


class Batcher:
    """What one writes by hand: a queue, a deadline since the oldest, one batch at a time in a thread."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.queue: asyncio.Queue[tuple[int, asyncio.Future[int]]] = asyncio.Queue()

    async def __call__(self, item: int) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((item, future))
        return await future

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            deadline = loop.time() + MAX_WAIT
            while len(batch) < BATCH:
                try:
                    async with asyncio.timeout_at(deadline):
                        batch.append(await self.queue.get())
                except TimeoutError:
                    break
            answers = await asyncio.to_thread(self.model, [item for item, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)


def by_hand(callers: int) -> Figures:
    model = Model()

    async def work() -> Figures:
        batcher = Batcher(model)
        serving = asyncio.create_task(batcher.serve())
        try:
            return await in_turns(batcher, model, callers)
        finally:
            serving.cancel()

    return asyncio.run(work())


def offered(load: float, seconds: float = 2.0) -> Figures:
    """Requests come at ``load`` times what the model can do, whether answered or not."""
    import penstock as ps

    model = Model(A_LONG_BATCH)
    answered: list[float] = []
    refused: list[float] = []

    async def one(call: Any, item: int) -> None:
        began = time.perf_counter()
        try:
            assert await call(item) == -item
        except ps.errors.Overloaded:
            refused.append(time.perf_counter() - began)
        else:
            answered.append(time.perf_counter() - began)

    async def work() -> None:
        flow = ps.Flow().map_batches(model, batch_size=BATCH, max_wait=MAX_WAIT, place="thread")
        async with flow.open(max_waiting=WAITING) as call, asyncio.TaskGroup() as group:
            began = time.perf_counter()
            sent = 0
            while (passed := time.perf_counter() - began) < seconds:
                due = int(passed * load * CAPACITY)
                for item in range(sent, due):
                    group.create_task(one(call, item))
                sent = max(sent, due)
                await asyncio.sleep(0.002)

    asyncio.run(work())
    return {
        "p50": quantile(answered, 0.5),
        "p99": quantile(answered, 0.99),
        "refused_p99": quantile(refused, 0.99),
        "refused": float(len(refused)),
        "rate": len(answered) / seconds,
    }


def told(figures: Figures) -> str:
    return (
        f"batches of {figures['batch']:.1f}, p50 {figures['p50'] * 1e3:.1f} ms, p99 {figures['p99'] * 1e3:.1f} ms, "
        f"{figures['rate']:,.0f}/s"
    )


def told_of(figures: Figures) -> str:
    return f"{figures['p50'] * 1e3:.1f} ms, p99 {figures['p99'] * 1e3:.1f} ms"


def run() -> Outcome:
    rows = []
    names = {"penstock": "penstock", "by_hand": "by hand"}
    lines: dict[str, list[tuple[float, float]]] = {
        f"{told}, {part}": [] for told in names.values() for part in ("p50", "p99")
    }
    for callers in CALLS:
        given = {"callers": callers}
        found = alternate(__file__, {"penstock": given, "by_hand": given}, rounds=3)
        for name, figures in found.items():
            if not isinstance(figures, NotRun):
                for part in ("p50", "p99"):
                    lines[f"{names[name]}, {part}"].append((callers, figures[part] * 1e3))
        ours, peer = need(found["penstock"], "penstock"), need(found["by_hand"], "the batcher by hand")
        ratio = ours["rate"] / peer["rate"]
        rows.append(Row(f"{callers:,} callers", told(ours), "a batcher by hand", told(peer), times(ratio)))
        if callers == 64:
            rows.append(Row("mean batch at 64", f"{ours['batch']:.1f}", target="≥ 20", met=ours["batch"] >= 20))
            most = MAX_WAIT + 2 * SERVICE
            target = f"≤ {most * 1e3:.1f} ms (max_wait + 2 services)"
            rows.append(Row("p50 at 64", f"{ours['p50'] * 1e3:.1f} ms", target=target, met=ours["p50"] <= most))

    loads = {f"{load}×": {"of": "offered", "load": load} for load in (0.8, 10)}
    calm, storm = (need(figures, "overload") for figures in alternate(__file__, loads, rounds=3).values())
    longest = WAITING / CAPACITY + 2 * LONG_SERVICE + MAX_WAIT
    rows += [
        Row("calls refused at 10× the capacity: p99 of the refusal", f"{storm['refused_p99'] * 1e3:.2f} ms",
            target="≤ 1 ms", met=storm["refused"] > 0 and storm["refused_p99"] <= 0.001),
        Row("calls accepted at 10×: p50", told_of(storm), "at 0.8×", told_of(calm),
            target=f"≤ {longest * 1e3:.1f} ms (all who may wait, 2 services, max_wait)", met=storm["p50"] <= longest),
        Row("answered at 10×", f"{storm['rate']:,.0f}/s", "the model's capacity", f"{CAPACITY:,.0f}/s",
            f"{storm['rate'] / CAPACITY:.0%}"),
    ]  # fmt: skip
    return Outcome(
        rows,
        [Picture("flow_call", "Latency of a call", "callers", "ms", lines, log_across=True, log_up=True)],
        ["LitServe batches behind an HTTP server of its own only, so the batcher by hand stands beside."],
    )


if __name__ == "__main__":
    main(run, penstock, by_hand, offered)
