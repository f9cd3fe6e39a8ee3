"""Gradients from PyTorch, whose tensors are handed over as they are, by DLPack.

The digits in batches of 16, one worker in a thread, 16 epochs at rate 0.2: with PyTorch as with NumPy, from the same
parameters, in the same order. Beside each the same loop by hand, without a server: ``torch.optim.SGD``, and ``-=`` on
NumPy's arrays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import digits
from digits import BATCH
from harness import Figures, NotRun, Outcome, Row, alternate, main, measure, need

EPOCHS = 16
RATE = 0.2
ROUNDS = 5
PUSHES = 20_000
MOST_APART = 1e-4
HOW = (
    "PyTorch isn't among the peers: with what it brings for graphics processors it takes gigabytes. "
    "To have it measured: `.venv-bench/bin/python -m pip install torch`."
)


def with_numpy(params: dict, batch: tuple) -> dict:
    return digits.gradient(params, *batch)


def with_torch(params: dict, batch: tuple) -> dict:
    import torch

    tensors = {
        layer: {name: torch.from_numpy(w).requires_grad_() for name, w in params[layer].items()} for layer in params
    }
    found = iter(torch.autograd.grad(torch_loss(tensors, batch), leaves(tensors)))
    return {layer: {name: next(found) for name in tensors[layer]} for layer in tensors}


def torch_loss(params: dict, batch: tuple) -> Any:
    import torch

    images, labels = map(torch.from_numpy, batch)
    hidden = torch.tanh(images @ params["hidden"]["w"] + params["hidden"]["b"])
    return torch.nn.functional.cross_entropy(hidden @ params["out"]["w"] + params["out"]["b"], labels)


def leaves(params: dict) -> list[Any]:
    return [value for within in params.values() for value in within.values()]


def collated(batch: list[tuple]) -> tuple:
    import numpy as np

    return np.stack([image for image, _ in batch]), np.array([digit for _, digit in batch])


def samples(given: digits.Digits) -> list[tuple]:
    return list(zip(given.images, given.digits.tolist(), strict=True))


def accuracy(params: dict, given: digits.Digits) -> float:
    """Percent of the held-out digits that are told."""
    _, chances = digits.forward(params, given.held_images)
    return float(100 * (chances.argmax(axis=1) == given.held_digits).mean())


def trained(library: str, epochs: int = EPOCHS) -> tuple[dict, float]:
    """The parameters, and the seconds an update."""
    import penstock as ps

    given = digits.load(0)
    gradient = {"NumPy": with_numpy, "PyTorch": with_torch}[library]

    async def train() -> tuple[dict, float]:
        async with ps.ParameterServer(given.params, ps.SGD(RATE)) as server:
            flow = ps.Flow(samples(given)).batch(BATCH)
            began = time.perf_counter()
            await server.fit(gradient, flow, workers=1, epochs=epochs, shuffle=1, collate=collated)
            seconds = time.perf_counter() - began
            params, version = await server.pull()
            return params, seconds / version

    return asyncio.run(train())


def fitted(library: str) -> Figures:
    trained(library, epochs=1)
    params, seconds = trained(library)
    return {"seconds": seconds, "accuracy": accuracy(params, digits.load(0))}


def batches(given: digits.Digits, epochs: int) -> Iterator[tuple]:
    import numpy as np

    known = samples(given)
    for epoch in range(epochs):
        order = np.random.default_rng([1, epoch]).permutation(len(known))
        for first in range(0, len(order), BATCH):
            yield collated([known[at] for at in order[first : first + BATCH]])


def numpy_by_hand(epochs: int) -> None:
    given = digits.load(0)
    for batch in batches(given, epochs):
        for w, g in zip(leaves(given.params), leaves(with_numpy(given.params, batch)), strict=True):
            w -= RATE * g


def torch_by_hand(epochs: int) -> None:
    import torch

    given = digits.load(0)
    params = {
        layer: {name: torch.from_numpy(w).requires_grad_() for name, w in within.items()}
        for layer, within in given.params.items()
    }
    optimizer = torch.optim.SGD(leaves(params), lr=RATE)
    for batch in batches(given, epochs):
        optimizer.zero_grad()
        torch_loss(params, batch).backward()
        optimizer.step()


def by_hand(library: str) -> Figures:
    loop = {"NumPy": numpy_by_hand, "PyTorch": torch_by_hand}[library]
    loop(1)
    began = time.perf_counter()
    loop(EPOCHS)
    updates = EPOCHS * -(-len(digits.load(0).images) // BATCH)
    return {"seconds": (time.perf_counter() - began) / updates}


def pushed(library: str) -> Figures:
    """Seconds a push of one gradient, again and again."""
    import penstock as ps

    given = digits.load(0)
    gradient = {"NumPy": with_numpy, "PyTorch": with_torch}[library]

    async def push() -> float:
        async with ps.ParameterServer(given.params, ps.SGD(1e-9)) as server:
            gradients = gradient(given.params, collated(samples(given)[:BATCH]))
            server.push_sync(gradients, version=0)
            began = time.perf_counter()
            for version in range(PUSHES):
                server.push_sync(gradients, version=version)
            return (time.perf_counter() - began) / PUSHES

    return {"seconds": asyncio.run(push())}


def apart() -> Figures:
    """By how much the parameters differ in the end, at most."""
    import torch  # noqa: F401  # said here, and not by a worker, if it is missing

    ours, theirs = (leaves(trained(library)[0]) for library in ("PyTorch", "NumPy"))
    return {"most": max(float(abs(one - other).max()) for one, other in zip(ours, theirs, strict=True))}


def run() -> Outcome:
    found = measure(__file__, "apart")
    if isinstance(found, NotRun):
        claim = "the digits, with gradients from PyTorch"
        return Outcome([Row(claim, f"not run: {found.reason}")], remarks=[HOW])
    variants = {
        f"{variant.__name__} {library}": {"of": variant.__name__, "library": library}
        for variant in (fitted, by_hand, pushed)
        for library in ("PyTorch", "NumPy")
    }
    measured = {label: need(figures, label) for label, figures in alternate(__file__, variants, ROUNDS).items()}

    def told(seconds: float) -> str:
        return f"{seconds * 1e6:.0f} µs"

    row = Row("held-out digits told, gradients from PyTorch", f"{measured['fitted PyTorch']['accuracy']:.1f}%", "NumPy")
    row.beside = f"{measured['fitted NumPy']['accuracy']:.1f}%"
    row.ratio = f"parameters {found['most']:.0e} apart"
    row.target, row.met = f"≤ {MOST_APART:.0e}", found["most"] <= MOST_APART
    rows = [row]
    for library in ("PyTorch", "NumPy"):
        ours, theirs = (measured[f"{of} {library}"]["seconds"] for of in ("fitted", "by_hand"))
        more = told(ours - theirs)
        rows.append(
            Row(f"an update in fit, gradients from {library}", told(ours), "by hand", told(theirs), f"+ {more}")
        )
    ours, theirs = (measured[f"pushed {library}"]["seconds"] for library in ("PyTorch", "NumPy"))
    rows.append(
        Row("a push of PyTorch's tensors", told(ours), "of NumPy's arrays", told(theirs), f"+ {told(ours - theirs)}")
    )
    return Outcome(rows)


if __name__ == "__main__":
    main(run, fitted, by_hand, pushed, apart)
