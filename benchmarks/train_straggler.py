"""What slow workers cost: the time until the digits' training loss is 0.10, beside rounds that wait for everybody.

Eight worker processes that sleep 20 ms for each batch of 16, then compute its gradient: nobody is slow; every tenth
step takes ten times as long (*transient*); one worker takes four times as long (*persistent*). The clock starts when
all workers run and the first batch is made. Every 20 ms the parameters are pulled, and the loss over all that is
trained with is computed from them in the server's process. Medians of three seeds, which make the parameters, the
order and the pauses.

Each gradient is an update at rate 0.15; a round's is the mean of eight gradients, at rate 1.4. Of the rates 0.1,
0.125, 0.15, 0.175 and 0.2, and of eight times those for rounds, these were the fastest where nobody is slow, in a
simulation with five other seeds.

*Fixed partitions*: each worker has an eighth of the data and a clock of its own, and waits while it is more than s
steps ahead of the slowest. There the slowest sets the pace; where batches are leased, it only takes fewer of them.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import digits
from digits import BATCH, Digits
from harness import Figures, Outcome, Picture, Row, main, measure, need, times

WORKERS = 8
STEP = 0.02
SEEDS = 3
EPOCHS = 100
LIMIT = 120
RATE, ROUND_RATE = 0.15, 1.4
LOSSES = (2.0, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.17, 0.15, 0.13, 0.12, 0.11, 0.1)
TO_REACH = str(LOSSES[-1])
SCENARIOS = {
    "none": "nobody is slow",
    "transient": "10% of the steps 10× slower",
    "persistent": "one worker 4× slower",
}
FIXED = "SSP(3) over fixed partitions, by hand"
CONSISTENCIES = ("BSP", "SSP(1)", "SSP(3)", "SSP(10)", "ASP")
LEAST = {("transient", "ASP"): 2.5, ("transient", "SSP(3)"): 1.5, ("persistent", "SSP(3)"): 2.0}


@dataclass
class Step:
    """A worker's gradient, after its pause."""

    scenario: str
    seed: int
    given: Digits
    dice: Any = None

    def __call__(self, params: dict, batch: list[int]) -> dict:
        time.sleep(self.pause())
        return digits.gradient(params, self.given.images[batch], self.given.digits[batch])

    def pause(self) -> float:
        import numpy as np

        import penstock as ps

        worker = ps.worker_index()
        self.dice = self.dice or np.random.default_rng([self.seed, worker])
        if self.scenario == "transient" and self.dice.random() < 0.1:
            return 10 * STEP
        return 4 * STEP if self.scenario == "persistent" and worker == 0 else STEP


class Watch:
    """When which loss was reached, in seconds since the first batch."""

    def __init__(self, given: Digits) -> None:
        self.given = given
        self.began = 0.0

    async def begin(self, batch: Any) -> Any:
        """A stage before the workers, which all run when it is first called."""
        self.began = self.began or time.perf_counter()
        return batch

    async def watch(self, server: Any) -> Figures:
        found: Figures = {}
        while TO_REACH not in found:
            await asyncio.sleep(STEP)
            params, _ = await server.pull()
            now = time.perf_counter() - self.began
            loss = await asyncio.to_thread(digits.loss, params, self.given.images, self.given.digits)
            found |= {str(level): now for level in LOSSES if loss <= level and str(level) not in found}
        return found

    async def during(self, training: Any, server: Any) -> Figures:
        """Watch until the loss is reached, then end the training."""
        tasks = [asyncio.ensure_future(each) for each in (self.watch(server), training)]
        try:
            done, _ = await asyncio.wait(tasks, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                if done:
                    tasks[1].result()
                raise TimeoutError(f"loss {TO_REACH} isn't reached")
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def leased(consistency: str, scenario: str, seed: int) -> Figures:
    """Through ``fit``."""
    import penstock as ps

    kinds = {"BSP": ps.BSP(), "SSP(1)": ps.SSP(1), "SSP(3)": ps.SSP(3), "SSP(10)": ps.SSP(10), "ASP": ps.ASP()}
    optimizer = ps.SGD(ROUND_RATE if consistency == "BSP" else RATE)
    given = digits.load(seed)
    watch = Watch(given)
    batches = ps.Flow(range(len(given.images))).batch(BATCH).map(watch.begin)
    async with ps.ParameterServer(given.params, optimizer, kinds[consistency], place="shared") as server:
        fit = server.fit(Step(scenario, seed, given), batches, workers=WORKERS, epochs=EPOCHS, shuffle=seed)
        return await watch.during(fit, server)


async def fixed(s: int, scenario: str, seed: int) -> Figures:
    """By hand: a loop in each worker over its own part, and a second server that holds the workers' clocks."""
    import numpy as np

    import penstock as ps

    given = digits.load(seed)
    watch = Watch(given)
    step = Step(scenario, seed, given)
    async with (
        ps.ParameterServer(given.params, ps.SGD(RATE), place="shared") as server,
        ps.ParameterServer(np.zeros(WORKERS), ps.SGD(1.0), place="shared") as clocks,
    ):

        def train(part: int) -> None:
            dice = np.random.default_rng([seed, part])
            tick = -np.eye(WORKERS)[part]
            while True:
                order = dice.permutation(np.arange(part, len(given.images), WORKERS))
                for at in range(0, len(order), BATCH):
                    while (told := clocks.pull_sync())[0][part] > told[0].min() + s:
                        time.sleep(STEP / 10)
                    params, version = server.pull_sync()
                    server.push_sync(step(params, order[at : at + BATCH]), version=version)
                    clocks.push_sync(tick, version=told[1])

        parts = ps.Flow(range(WORKERS)).map(watch.begin).map(train, place="process", workers=WORKERS)
        return await watch.during(parts.collect(), server)


def runs(scenario: str, seed: int) -> Figures:
    """All of a scenario, one after the other, each with workers of its own: the seconds to each loss."""
    found = {name: asyncio.run(leased(name, scenario, seed)) for name in CONSISTENCIES}
    if scenario == "persistent":
        found[FIXED] = asyncio.run(fixed(3, scenario, seed))
    return {f"{name}: {loss}": seconds for name, each in found.items() for loss, seconds in each.items()}


def run() -> Outcome:
    measured: dict[str, list[Figures]] = {scenario: [] for scenario in SCENARIOS}
    for seed in range(SEEDS):
        for scenario, each in measured.items():
            each.append(need(measure(__file__, "runs", scenario=scenario, seed=seed), SCENARIOS[scenario]))

    def seconds(scenario: str, name: str, loss: float = LOSSES[-1]) -> float:
        return median(each[f"{name}: {loss}"] for each in measured[scenario])

    rows = []
    for scenario, told in SCENARIOS.items():
        rounds = seconds(scenario, "BSP")
        for name in (*CONSISTENCIES[1:], *([FIXED] if scenario == "persistent" else [])):
            mine = seconds(scenario, name)
            row = Row(f"{told}: {name}", f"{mine:.2f} s", "BSP", f"{rounds:.2f} s", times(rounds / mine))
            least = LEAST.get((scenario, name))
            if least is not None:
                row.target, row.met = f"≥ {times(least)}", rounds / mine >= least
            rows.append(row)
    series = {name: [(seconds("transient", name, loss), loss) for loss in LOSSES] for name in CONSISTENCIES}
    title = "Training loss while 10% of the steps are 10× slower"
    return Outcome(rows, pictures=[Picture("train_straggler", title, "seconds", "loss", series, log_up=True)])


if __name__ == "__main__":
    main(run, runs)
