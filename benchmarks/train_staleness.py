"""What stale gradients do to training, and what dividing the rate by the staleness does about it.

The scikit-learn digits (a fifth held out), a network 64-64-10 with tanh, batches of 16, 1,500 updates through the
parameter server. Each gradient is computed from the parameters of τ updates before; means of five seeds.
"""

from __future__ import annotations

import asyncio
from collections import deque

import digits
from digits import BATCH
from harness import Figures, Outcome, Picture, Row, main, measure, need

DELAYS = (0, 4, 8, 16, 32)
SEEDS = 5
UPDATES = 1500
RULES = {"SGD, rate 0.2": (0.2, 0.0), "momentum 0.9, rate 0.05": (0.05, 0.9), "SGD, rate 0.05": (0.05, 0.0)}
AT, LEAST = 16, 92.0


def accuracy(rule: str, delay: int, scale: bool, seed: int) -> float:
    """Percent of the held-out digits that are told after training."""
    import penstock as ps

    given = digits.load(seed)

    async def train() -> dict:
        rate, momentum = RULES[rule]
        async with ps.ParameterServer(given.params, ps.SGD(rate, momentum=momentum), ps.ASP(scale=scale)) as server:
            seen = deque([await server.pull()], maxlen=delay + 1)
            for _ in range(UPDATES):
                chosen = given.dice.integers(0, len(given.images), BATCH)
                stale, version = seen[0]
                gradient = digits.gradient(stale, given.images[chosen], given.digits[chosen])
                await server.push(gradient, version=version)
                seen.append(await server.pull())
            return seen[-1][0]

    _, chances = digits.forward(asyncio.run(train()), given.held_images)
    return float(100 * (chances.argmax(axis=1) == given.held_digits).mean())


def train(rule: str, scale: bool) -> Figures:
    return {str(delay): sum(accuracy(rule, delay, scale, seed) for seed in range(SEEDS)) / SEEDS for delay in DELAYS}


def run() -> Outcome:
    rows, series = [], {}
    for rule in RULES:
        plain = need(measure(__file__, "train", rule=rule, scale=False), rule)
        scaled = need(measure(__file__, "train", rule=rule, scale=True), rule)
        for delay in DELAYS:
            row = Row(
                f"{rule}, {delay} late: rate/τ", f"{scaled[str(delay)]:.1f}%", "plain", f"{plain[str(delay)]:.1f}%"
            )
            if delay == AT and rule == "SGD, rate 0.2":
                row.target, row.met = f"≥ {LEAST:.0f}%", scaled[str(delay)] >= LEAST
            rows.append(row)
        series[rule] = [(delay, plain[str(delay)]) for delay in DELAYS]
        series[f"{rule}, rate/τ"] = [(delay, scaled[str(delay)]) for delay in DELAYS]
    picture = Picture("train_staleness", "Held-out accuracy after 1,500 updates", "updates late", "%", series)
    return Outcome(rows, pictures=[picture])


if __name__ == "__main__":
    main(run, train)
