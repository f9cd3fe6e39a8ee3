"""Programs that need JAX, run by ``test_digits.py`` in an environment of their own: ``python -m tests.train.with_jax``.

What is wrong ends them with a traceback.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from tests.train import digits

import penstock as ps
from penstock.errors import GradientRejected, PlanError

__all__ = ["PLACES", "SAMPLES", "arrays", "train"]

PLACES: tuple[Any, ...] = ("local", "shared")
SAMPLES = 50 * digits.BATCH


def loss(params: Any, batch: Any) -> Any:
    """What ``digits.gradient`` has as its loss. JAX finds the gradient."""
    import jax

    images, labels = batch
    hidden = jax.numpy.tanh(images @ params["hidden"]["w"] + params["hidden"]["b"])
    chances = jax.nn.log_softmax(hidden @ params["out"]["w"] + params["out"]["b"])
    return -jax.numpy.take_along_axis(chances, labels[:, None], axis=1).mean()


async def train(path: str, rounds: str, workers: str) -> None:
    """From JAX's arrays, by JAX's gradient, in both places; saves what became of the parameters, and the loss."""
    import jax

    given = digits.load()
    params = jax.tree.map(jax.numpy.asarray, given.params)
    consistency = ps.BSP() if rounds == "BSP" else ps.ASP()
    flow = ps.Flow(given.samples[:SAMPLES]).batch(digits.BATCH)
    gradient = jax.jit(jax.value_and_grad(loss))
    saved: dict[str, Any] = {}
    for place in PLACES:
        async with ps.ParameterServer(params, ps.SGD(0.1, momentum=0.9), consistency, place) as server:
            report = await server.fit(gradient, flow, workers=int(workers), collate=digits.collate)
            found, _ = await server.pull()
        saved[f"{place}/loss"] = report.loss
        for layer, within in found.items():
            saved |= {f"{place}/{layer}/{name}": value for name, value in within.items()}
    np.savez(path, **saved)


async def arrays() -> None:
    """What a server takes of JAX's arrays, and what it refuses."""
    import jax
    import jax.numpy as jnp

    params = {"layer": {"w": jnp.ones((2, 3))}, "b": jnp.zeros(2)}
    async with ps.ParameterServer(params, ps.SGD(lr=1)) as server:
        pulled, version = await server.pull()
        for value, given in ((pulled["layer"]["w"], params["layer"]["w"]), (pulled["b"], params["b"])):
            assert type(value) is np.ndarray
            assert value.dtype == np.float32
            assert value.shape == given.shape
            value[:] = 7
        assert (params["layer"]["w"] == 1).all()

        gradients = {"layer": {"w": jnp.arange(6.0).reshape(3, 2).T}, "b": jnp.float32(2) * jnp.ones(2)}
        await server.push(gradients, version=version)
        pulled, _ = await server.pull()
        assert pulled["layer"]["w"].tolist() == [[1, -1, -3], [0, -2, -4]]
        assert pulled["b"].tolist() == [-2, -2]
        assert gradients["b"].tolist() == [2, 2]

        traced = jax.jit(lambda b: refused(server, gradients | {"b": b}, "b") or b)
        refused(server, gradients | {"b": jnp.ones(2, jnp.bfloat16)}, "b", "of bfloat16 was given")
        refused(server, gradients | {"b": jnp.ones(2, jnp.float16)}, "b", "float16[2] was given, expected float32[2]")
        refused(server, gradients | {"b": jnp.ones(2, int)}, "b", "int32[2] was given")
        refused(server, gradients | {"b": np.asarray(jnp.ones(2, jnp.bfloat16))}, "b", "bfloat16[2] was given")
        refused(server, gradients | {"layer": {"w": jnp.full((2, 3), jnp.nan)}}, "layer/w", "it is nan at [0, 0]")
        traced(jnp.ones(2))
        assert server.version == 1
        assert (await server.pull())[0]["b"].tolist() == [-2, -2]

    for unfit in (jnp.ones(2, jnp.bfloat16), jnp.ones(2, int)):
        try:
            ps.ParameterServer(params | {"b": unfit})
        except PlanError as error:
            assert "the parameter 'b'" in str(error), error
        else:
            raise AssertionError(f"{unfit.dtype} was taken")

    async with ps.ParameterServer(np.zeros(2)) as server:  # JAX makes float32 of float64
        refused(server, jnp.ones(2), "the only one", "float32[2] was given, expected float64[2]")


def refused(server: ps.ParameterServer, gradients: Any, parameter: str, words: str = "") -> None:
    try:
        server.push_sync(gradients, version=1 if server.version else 0)
    except GradientRejected as error:
        assert error.parameter == parameter, error
        assert words in str(error), error
    else:
        raise AssertionError(f"{gradients} were taken")


if __name__ == "__main__":
    programs: dict[str, Callable[..., Any]] = {"train": train, "arrays": arrays}
    asyncio.run(programs[sys.argv[1]](*sys.argv[2:]))
