"""What stale gradients do to training, and what dividing the rate by the staleness does about it.

The scikit-learn digits (a fifth held out), a network 64-64-10 with tanh, batches of 16, 1,500 updates through the
parameter server. Each gradient is computed from the parameters of τ updates before; means of five seeds.
"""

from __future__ import annotations

import asyncio
from collections import deque

from harness import Figures, Outcome, Picture, Row, main, measure, need

DELAYS = (0, 4, 8, 16, 32)
SEEDS = 5
UPDATES = 1500
BATCH = 16
RULES = {"SGD, rate 0.2": (0.2, 0.0), "momentum 0.9, rate 0.05": (0.05, 0.9), "SGD, rate 0.05": (0.05, 0.0)}
AT, LEAST = 16, 92.0


def accuracy(rule: str, delay: int, scale: bool, seed: int) -> float:
    """Percent of the held-out digits that are told after training."""
    import numpy as np
    from sklearn.datasets import load_digits

    import penstock as ps

    images, digits = load_digits(return_X_y=True)
    dice = np.random.default_rng(seed)
    order = dice.permutation(len(images))
    images, digits = (images[order] / 16).astype(np.float32), digits[order]
    held = len(images) // 5
    params = {
        "hidden": {"w": dice.normal(0, 1 / 8, (64, 64)).astype(np.float32), "b": np.zeros(64, np.float32)},
        "out": {"w": dice.normal(0, 1 / 8, (64, 10)).astype(np.float32), "b": np.zeros(10, np.float32)},
    }

    def forward(params: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
        return hidden, hidden @ params["out"]["w"] + params["out"]["b"]

    def gradient(params: dict, x: np.ndarray, y: np.ndarray) -> dict:
        hidden, scores = forward(params, x)
        errors = np.exp(scores - scores.max(axis=1, keepdims=True))
        errors /= errors.sum(axis=1, keepdims=True)
        errors[np.arange(len(y)), y] -= 1
        errors /= len(y)
        back = (errors @ params["out"]["w"].T) * (1 - hidden * hidden)
        return {
            "hidden": {"w": x.T @ back, "b": back.sum(axis=0)},
            "out": {"w": hidden.T @ errors, "b": errors.sum(axis=0)},
        }

    async def train() -> dict:
        rate, momentum = RULES[rule]
        async with ps.ParameterServer(params, ps.SGD(rate, momentum=momentum), ps.ASP(scale=scale)) as server:
            seen = deque([await server.pull()], maxlen=delay + 1)
            for _ in range(UPDATES):
                chosen = dice.integers(held, len(images), BATCH)
                stale, version = seen[0]
                await server.push(gradient(stale, images[chosen], digits[chosen]), version=version)
                seen.append(await server.pull())
            return seen[-1][0]

    _, scores = forward(asyncio.run(train()), images[:held])
    return float(100 * (scores.argmax(axis=1) == digits[:held]).mean())


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
