"""What the training benchmarks train: scikit-learn's digits, a fifth held out, and a network 64-64-10 with tanh.

Processes that compute gradients find this file by its name; what it imports, they import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BATCH = 16


@dataclass
class Digits:
    """What is trained with, what is held out, and the parameters to begin with, all by one seed.

    ``dice``: that seed's generator, which has made them.
    """

    images: Any
    digits: Any
    held_images: Any
    held_digits: Any
    params: dict[str, dict[str, Any]]
    dice: Any


def load(seed: int) -> Digits:
    import numpy as np
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    dice = np.random.default_rng(seed)
    order = dice.permutation(len(images))
    images, digits = (images[order] / 16).astype(np.float32), digits[order]
    held = len(images) // 5
    params = {
        "hidden": {"w": dice.normal(0, 1 / 8, (64, 64)).astype(np.float32), "b": np.zeros(64, np.float32)},
        "out": {"w": dice.normal(0, 1 / 8, (64, 10)).astype(np.float32), "b": np.zeros(10, np.float32)},
    }
    return Digits(images[held:], digits[held:], images[:held], digits[:held], params, dice)


def forward(params: dict, images: Any) -> tuple[Any, Any]:
    """The hidden layer, and the probability of each digit."""
    import numpy as np

    hidden = np.tanh(images @ params["hidden"]["w"] + params["hidden"]["b"])
    scores = hidden @ params["out"]["w"] + params["out"]["b"]
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return hidden, chances


def loss(params: dict, images: Any, digits: Any) -> float:
    """The mean cross-entropy."""
    import numpy as np

    _, chances = forward(params, images)
    return float(-np.log(chances[np.arange(len(digits)), digits]).mean())


def gradient(params: dict, images: Any, digits: Any) -> dict:
    """The loss's gradient."""
    import numpy as np

    hidden, errors = forward(params, images)
    errors[np.arange(len(digits)), digits] -= 1
    errors /= len(digits)
    back = (errors @ params["out"]["w"].T) * (1 - hidden * hidden)
    return {
        "hidden": {"w": images.T @ back, "b": back.sum(axis=0)},
        "out": {"w": hidden.T @ errors, "b": errors.sum(axis=0)},
    }
