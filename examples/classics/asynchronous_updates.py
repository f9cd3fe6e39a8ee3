"""Three workers that change the same parameters, the fourth thing that everybody writes with asyncio.

    python examples/classics/asynchronous_updates.py

Each worker pulls the parameters, computes for up to a second, and pushes a gradient, ten times. In lock step, each
round takes as long as its slowest worker; with a parameter server nobody waits, and the parameters are exactly what all
gradients together make of them.

The same as a flow: its thirty steps go to whichever worker is free, in this process or in others, and nobody gets
further ahead than one round. Given a checkpoint, it can be killed and run again: each step counts once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import penstock as ps

SIZE, WORKERS, ITERATIONS, RATE = 5, 3, 10, 0.01
Vector = NDArray[np.float64]


class Work:
    """What the workers do: how long each gradient takes, and the gradient itself, the same in each form."""

    def __init__(self, seed: int = 0, longest: float = 1.0) -> None:
        dice = np.random.default_rng(seed)
        self.seconds = longest * dice.uniform(0, 1, (WORKERS, ITERATIONS))
        self.gradients = dice.standard_normal((WORKERS, ITERATIONS, SIZE))

    @property
    def expected(self) -> Vector:
        """The parameters at the end, whatever the order of the updates."""
        total: Vector = -RATE * self.gradients.sum(axis=(0, 1))
        return total

    async def gradient(self, params: Vector, worker: int, iteration: int) -> Vector:
        await asyncio.sleep(self.seconds[worker, iteration])
        found: Vector = self.gradients[worker, iteration]
        return found

    async def step(self, params: Vector, number: int) -> Vector:
        """The same, where the worker is whoever is free."""
        return await self.gradient(params, number % WORKERS, number // WORKERS)


async def in_lock_step(work: Work) -> Vector:
    """Rounds: all workers compute, then all gradients are applied."""
    params = np.zeros(SIZE)
    for iteration in range(ITERATIONS):
        for gradient in await asyncio.gather(*(work.gradient(params, one, iteration) for one in range(WORKERS))):
            params -= RATE * gradient
    return params


async def with_penstock(work: Work) -> Vector:
    """Each worker at its own pace."""
    async with ps.ParameterServer(np.zeros(SIZE), ps.SGD(lr=RATE)) as server:

        async def worker(number: int) -> None:
            for iteration in range(ITERATIONS):
                params, version = await server.pull()
                gradient = await work.gradient(params, number, iteration)
                await server.push(gradient, version=version)

        await asyncio.gather(*map(worker, range(WORKERS)))
        params, version = await server.pull()
        assert version == WORKERS * ITERATIONS
        found: Vector = params
        return found


async def as_a_flow(
    work: Work, place: Literal["local", "shared"] = "local", checkpoint: str | ps.Checkpoint | None = None
) -> Vector:
    """Steps, leased to workers one by one: on this event loop, or in processes of their own (``"shared"``)."""
    async with ps.ParameterServer(np.zeros(SIZE), ps.SGD(lr=RATE), ps.SSP(1), place, checkpoint) as server:
        await server.fit(work.step, ps.Flow(range(WORKERS * ITERATIONS), name="steps"), workers=WORKERS)
        params, version = await server.pull()
        assert version == WORKERS * ITERATIONS
        found: Vector = params
        return found


async def in_processes(work: Work) -> Vector:
    """The same flow, its workers in processes."""
    return await as_a_flow(work, "shared")


def main() -> None:
    work = Work()
    for form in (in_lock_step, with_penstock, as_a_flow, in_processes):
        began = time.perf_counter()
        params = asyncio.run(form(work))
        print(f"{form.__name__:14} {time.perf_counter() - began:.1f} s  {params.round(4)}")
    print(f"{'expected':14}        {work.expected.round(4)}")


if __name__ == "__main__":
    main()
