"""A small network that says which byte comes next: embeddings of the last bytes, one hidden layer (Bengio et al. 2003).

Everything is plain NumPy, the gradient too. ``python examples/byte_network.py URL OUTPUT`` trains it by a plain loop,
one batch after the other, on the files that ``read_python.py`` reads: what asynchronous training is compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

CONTEXT, EMBEDDING, HIDDEN = 8, 16, 128
PART = 2048  # bytes of a batch
Floats = NDArray[np.float32]
Params = dict[str, Any]


def learning_rate(version: int) -> float:
    return 0.005 / (1 + version / 3000)


def make_params(seed: int = 0) -> Params:
    dice = np.random.default_rng(seed)

    def normal(rows: int, columns: int, size: float) -> Floats:
        return dice.normal(0, size, (rows, columns)).astype(np.float32)

    return {
        "embedding": normal(256, EMBEDDING, 0.5),
        "hidden": {"w": normal(CONTEXT * EMBEDDING, HIDDEN, 0.09), "b": np.zeros(HIDDEN, np.float32)},
        "out": {"w": normal(HIDDEN, 256, 0.03), "b": np.zeros(256, np.float32)},
    }


def parts_of(raw: bytes) -> list[bytes]:
    """A file as batches, each with the bytes before it, from which its first ones are to be told."""
    padded = b"\n" * CONTEXT + raw
    return [padded[start : start + CONTEXT + PART] for start in range(0, len(raw), PART)]


def gradient(params: Params, part: bytes) -> tuple[float, Params]:
    """The loss of a batch in nats a byte, and its gradient."""
    before, following = _windows(part)
    inputs, hidden, chances = _forward(params, before)
    count = len(following)
    rows = np.arange(count)
    loss = -float(np.log(chances[rows, following]).mean())
    errors = chances  # from here on: how wrong each chance was
    errors[rows, following] -= 1
    errors /= count
    back = (errors @ params["out"]["w"].T) * (hidden > 0)
    embedded = (back @ params["hidden"]["w"].T).reshape(-1, EMBEDDING)
    return loss, {
        "embedding": _summed(before.reshape(-1), embedded),
        "hidden": {"w": inputs.T @ back, "b": back.sum(axis=0)},
        "out": {"w": hidden.T @ errors, "b": errors.sum(axis=0)},
    }


def bits(params: Params, raw: bytes) -> float:
    """How many bits the network needs for a file, having been told nothing of it."""
    total = 0.0
    for part in parts_of(raw):
        before, following = _windows(part)
        chances = _forward(params, before)[2]
        total -= float(np.log2(chances[np.arange(len(following)), following]).sum())
    return total


def write(params: Params, count: int, seed: int = 0, begin: bytes = b"\n\ndef ") -> str:
    """What the network writes: each byte is drawn by the chances it gives, the likelier ones somewhat more often."""
    dice = np.random.default_rng(seed)
    text = bytearray(b"\n" * CONTEXT + begin)
    for _ in range(count):
        chances = _forward(params, np.frombuffer(bytes(text[-CONTEXT:]), np.uint8)[None])[2][0].astype(float) ** 1.7
        text.append(int(dice.choice(256, p=chances / chances.sum())))
    return text[CONTEXT:].decode(errors="replace").strip("\n")


def _windows(part: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """For every byte of a batch, the bytes before it, and itself."""
    data = np.frombuffer(part, np.uint8)
    return np.lib.stride_tricks.sliding_window_view(data, CONTEXT)[:-1], data[CONTEXT:]


def _forward(params: Params, before: NDArray[np.uint8]) -> tuple[Floats, Floats, Floats]:
    """What goes into the hidden layer, what comes out of it, and the chances of each byte to follow."""
    inputs = params["embedding"][before].reshape(len(before), -1)
    hidden = inputs @ params["hidden"]["w"]
    hidden += params["hidden"]["b"]
    np.maximum(hidden, 0, out=hidden)
    scores = hidden @ params["out"]["w"]
    scores += params["out"]["b"]
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    np.maximum(scores, 1e-30, out=scores)
    return inputs, hidden, scores


def _summed(which: NDArray[np.uint8], rows: Floats) -> Floats:
    """The rows that belong to each byte, added up."""
    order = np.argsort(which, kind="stable")
    found, starts = np.unique(which[order], return_index=True)
    total = np.zeros((256, rows.shape[1]), np.float32)
    total[found] = np.add.reduceat(rows[order], starts, axis=0)
    return total


# -- the plain loop ----------------------------------------------------------------------------------------------------


def leaves(params: Params) -> Iterator[Floats]:
    for value in params.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def train_sequentially(files: list[bytes]) -> Params:
    """One batch after the other, once, by Adam."""
    params = make_params()
    means, squares = ([np.zeros_like(leaf) for leaf in leaves(params)] for _ in range(2))
    step = 0
    for raw in files:
        for part in parts_of(raw):
            rate, step = learning_rate(step), step + 1
            found = gradient(params, part)[1]
            for weight, mean, square, slope in zip(leaves(params), means, squares, leaves(found), strict=True):
                mean += 0.1 * (slope - mean)
                square += 0.001 * (slope * slope - square)
                weight -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return params


if __name__ == "__main__":
    url, output = sys.argv[1:3]

    def got(name: str) -> bytes:
        with urlopen(f"{url}/{quote(name)}") as answer:
            found: bytes = answer.read()
            return found

    names: dict[str, list[str]] = json.loads(got("index.json"))
    trained = train_sequentially([got(name) for name in names["read"]])
    held_out = [got(name) for name in names["held_out"]]
    needed = sum(bits(trained, raw) for raw in held_out) / sum(map(len, held_out))
    part = Path(f"{output}.part")
    part.write_text(json.dumps(needed), encoding="utf-8")
    part.replace(output)
