"""What these tests train: scikit-learn's digits, a fifth held out, and a network 64-64-10 with tanh, in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["BATCH", "Digits", "Params", "accuracy", "batches", "collate", "gradient", "load", "sequential"]

BATCH = 16

Params = dict[str, dict[str, np.ndarray]]
Sample = tuple[np.ndarray, int]


@dataclass(frozen=True)
class Digits:
    """What is trained with, what is held out, and the parameters to begin with."""

    samples: list[Sample]
    held: list[Sample]
    params: Params


@cache
def load() -> Digits:
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    dice = np.random.default_rng(0)
    order = dice.permutation(len(images))
    samples = list(zip((images[order] / 16).astype(np.float32), digits[order].tolist(), strict=True))
    params = {
        "hidden": {"w": dice.normal(0, 1 / 8, (64, 64)).astype(np.float32), "b": np.zeros(64, np.float32)},
        "out": {"w": dice.normal(0, 1 / 8, (64, 10)).astype(np.float32), "b": np.zeros(10, np.float32)},
    }
    held = len(samples) // 5
    return Digits(samples[held:], samples[:held], params)


def collate(batch: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Images and digits of a batch."""
    return np.stack([image for image, _ in batch]), np.array([digit for _, digit in batch])


def forward(params: Params, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden layer, and the probability of each digit."""
    hidden = np.tanh(images @ params["hidden"]["w"] + params["hidden"]["b"])
    scores = hidden @ params["out"]["w"] + params["out"]["b"]
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, chances / chances.sum(axis=1, keepdims=True)


def gradient(params: Params, batch: tuple[np.ndarray, np.ndarray]) -> tuple[float, Params]:
    """The mean cross-entropy, and its gradient."""
    images, digits = batch
    rows = np.arange(len(digits))
    hidden, chances = forward(params, images)
    loss = -np.log(chances[rows, digits]).mean()
    chances[rows, digits] -= 1
    errors = chances / np.float32(len(digits))
    back = (errors @ params["out"]["w"].T) * (1 - hidden * hidden)
    return float(loss), {
        "hidden": {"w": images.T @ back, "b": back.sum(axis=0)},
        "out": {"w": hidden.T @ errors, "b": errors.sum(axis=0)},
    }


def accuracy(params: Params) -> float:
    """Percent of the held-out digits that are told."""
    images, digits = collate(load().held)
    return float(100 * (forward(params, images)[1].argmax(axis=1) == digits).mean())


def batches(epochs: int) -> Iterator[Sequence[Sample]]:
    """All samples in batches, each epoch in another order."""
    samples = load().samples
    for epoch in range(epochs):
        order = np.random.default_rng([1, epoch]).permutation(len(samples))
        for first in range(0, len(order), BATCH):
            yield [samples[at] for at in order[first : first + BATCH]]


def sequential(rate: Callable[[int], float], epochs: int) -> Params:
    """What a plain loop makes of the parameters."""
    params = {layer: {name: value.copy() for name, value in within.items()} for layer, within in load().params.items()}
    for version, batch in enumerate(batches(epochs)):
        _, gradients = gradient(params, collate(batch))
        for layer, within in gradients.items():
            for name, value in within.items():
                params[layer][name] -= np.float32(rate(version)) * value
    return params
