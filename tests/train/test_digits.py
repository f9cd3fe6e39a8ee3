"""Training digits: as good as a plain loop, however it is spread; and with JAX as with NumPy."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.train import digits
from tests.train.with_jax import PLACES, SAMPLES

import penstock as ps

pytest.importorskip("numba")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 120
EPOCHS = 16
RATE = 0.2
WORKERS = 4


def updates(together: int = 1) -> int:
    """How many there are, if each is the mean of so many gradients."""
    return -(-EPOCHS * -(-len(digits.load().samples) // digits.BATCH) // together)


def falling(together: int = 1) -> Callable[[int], float]:
    """A rate that falls to nothing by the end, so that the last updates, in whatever order, hardly matter."""
    total = updates(together)
    return lambda version: together * RATE * (1 - version / total)


def training_loss(params: digits.Params) -> float:
    return digits.gradient(params, digits.collate(digits.load().samples))[0]


@cache
def plain() -> digits.Params:
    return digits.sequential(falling(), EPOCHS)


@pytest.mark.parametrize(
    ("consistency", "place"),
    [(ps.ASP(), "shared"), (ps.SSP(3), "shared"), (ps.BSP(), "shared"), (ps.ASP(), "local")],
    ids=["ASP-shared", "SSP-shared", "BSP-shared", "ASP-local"],
)
def test_four_workers_are_as_good_as_a_plain_loop(consistency: Any, place: Any) -> None:
    """Within one point of held-out accuracy, after the same samples as often.

    Accuracy says little about updates that are missing, so the training loss is looked at too: 0.079, and 0.13 after
    half of them. Under BSP an update is the mean of four gradients: a quarter as many, at four times the rate.
    """
    together = WORKERS if consistency.in_rounds else 1
    given = digits.load()

    async def main() -> tuple[Any, Any]:
        async with ps.ParameterServer(given.params, ps.SGD(falling(together)), consistency, place) as server:
            flow = ps.Flow(given.samples).batch(digits.BATCH)
            report = await server.fit(
                digits.gradient,
                flow,
                workers=WORKERS,
                epochs=EPOCHS,
                shuffle=1,
                collate=digits.collate,
                evaluate=digits.accuracy,
            )
            return (await server.pull())[0], report

    found, report = asyncio.run(main())
    assert report.samples == EPOCHS * len(given.samples)
    assert report.version == updates(together)
    assert len(report.scores) == EPOCHS
    assert report.scores[-1] == digits.accuracy(found)
    assert digits.accuracy(plain()) > 96
    assert abs(report.scores[-1] - digits.accuracy(plain())) <= 1
    assert training_loss(found) == pytest.approx(training_loss(plain()), rel=0.1)


# -- JAX ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def jax() -> Path:
    """The interpreter of ``.venv-jax``: what ``.venv`` has, and JAX. ``make test`` builds it."""
    if not (ROOT / ".venv-jax" / "ready").exists():
        pytest.skip("JAX has an environment of its own, which isn't built: make .venv-jax/ready")
    return ROOT / ".venv-jax" / "bin" / "python"


def run_with_jax(python: Path, *arguments: Any) -> None:
    done = subprocess.run(
        [python, "-W", "error", "-m", "tests.train.with_jax", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("consistency", "workers"),
    [
        pytest.param(ps.ASP(), 1, id="alone"),
        pytest.param(ps.BSP(), 2, id="rounds"),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_training_with_jax_is_training_with_numpy(jax: Path, consistency: Any, workers: int, tmp_path: Path) -> None:
    """In threads and in processes; JAX's gradients are arrays that can't be written to."""
    run_with_jax(jax, "train", tmp_path / "found.npz", type(consistency).__name__, workers)
    given = digits.load()

    async def main() -> tuple[Any, Any]:
        async with ps.ParameterServer(given.params, ps.SGD(0.1, momentum=0.9), consistency) as server:
            flow = ps.Flow(given.samples[:SAMPLES]).batch(digits.BATCH)
            report = await server.fit(digits.gradient, flow, workers=workers, collate=digits.collate)
            return (await server.pull())[0], report

    expected, report = asyncio.run(main())
    with np.load(tmp_path / "found.npz") as saved:
        for place in PLACES:
            assert saved[f"{place}/loss"] == pytest.approx(report.loss, rel=1e-5)
            for layer, within in expected.items():
                for name, value in within.items():
                    found = saved[f"{place}/{layer}/{name}"]
                    assert found.dtype == np.float32
                    assert np.abs(value - given.params[layer][name]).max() > 0.01
                    np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unmeasured")
def test_arrays_of_jax_are_taken_or_refused_by_name(jax: Path) -> None:
    run_with_jax(jax, "arrays")


WATCHED = """
import asyncio, sys

class Watch:
    names = set()

    def find_spec(self, name, path=None, target=None):
        self.names.add(name.partition(".")[0])

sys.meta_path.insert(0, Watch())

import numpy as np
import penstock as ps

def gradient(params, batch):
    assert not {"jax", "jaxlib", "torch"} & {*sys.modules}
    return 0.0, params

async def main(place):
    checkpoint = ps.Checkpoint(f"run-{place}", seconds=0)
    async with ps.ParameterServer(np.ones(3), ps.Adam(), ps.BSP(), place, checkpoint) as server:
        await server.fit(gradient, ps.Flow(range(4)).batch(2), workers=2, evaluate=lambda params: 0.0)

asyncio.run(main("local"))
asyncio.run(main("shared"))
assert "numba" in Watch.names
print(sorted({"jax", "jaxlib", "torch"} & Watch.names))
"""


def test_training_doesnt_look_for_jax_or_torch(tmp_path: Path) -> None:
    """Not even to see whether they are there."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
