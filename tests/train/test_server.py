"""The parameter server: nothing is lost, nothing torn, and what is wrong is named before anything changes."""

from __future__ import annotations

import asyncio
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock as ps
from penstock.errors import Closed, GradientRejected, PlanError
from penstock.testing import run_virtual

LARGE = 1 << 19  # elements: more than is worked on at once on the loop
PLACES = ["local", "shared"]


def seen_from(place: str, server: ps.ParameterServer) -> Any:
    """The server as its workers see it: in processes by a handle, which is what arrives there."""
    return server if place == "local" else pickle.loads(pickle.dumps(server))


@settings(max_examples=30, deadline=None)
@given(
    schedules=st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5),
    kind=st.sampled_from([np.float32, np.float64]),
    place=st.sampled_from(PLACES),
)
def test_no_gradient_is_lost_under_any_schedule(schedules: list[list[int]], kind: Any, place: Any) -> None:
    """Integer gradients at rate 1: the weights are exactly minus their sum, the version is their number."""

    async def main() -> None:
        params = {"a": np.zeros(3, kind), "b": np.zeros((2, 2), kind)}
        async with ps.ParameterServer(params, ps.SGD(lr=1), place=place) as server:

            async def worker(number: int, waits: list[int]) -> None:
                seen = seen_from(place, server)
                for wait in waits:
                    _, version = await seen.pull()
                    await asyncio.sleep(wait)
                    await seen.push({"a": np.full(3, number + 1, kind), "b": np.ones((2, 2), kind)}, version=version)

            await asyncio.gather(*(worker(number, waits) for number, waits in enumerate(schedules)))
            params, version = await server.pull()
            assert version == server.version == sum(map(len, schedules)) == sum(server.staleness.values())
            assert (params["a"] == -sum((number + 1) * len(waits) for number, waits in enumerate(schedules))).all()
            assert (params["b"] == -version).all()

    run_virtual(main())


@pytest.mark.parametrize("optimizer", [ps.SGD(lr=0.1), ps.SGD(lr=0.1, momentum=0.9), ps.Adam(1e-2), ps.AdamW(1e-2)])
@pytest.mark.parametrize("size", [5, LARGE])
@pytest.mark.parametrize("place", PLACES)
def test_one_worker_is_bitwise_a_plain_loop(optimizer: Any, size: int, place: Any) -> None:
    async def main() -> Any:
        async with ps.ParameterServer(np.linspace(-1, 1, size, dtype=np.float32), optimizer, place=place) as server:
            seen = seen_from(place, server)
            for _ in range(3):
                params, version = await seen.pull()
                await seen.push(np.sin(params), version=version)
            return (await server.pull())[0]

    weights = np.linspace(-1, 1, size, dtype=np.float32)
    states = [[np.zeros_like(weights)] for _ in optimizer.slots]
    for step in range(3):
        optimizer.update([weights], states, [np.sin(weights)], step)
    assert asyncio.run(main()).tobytes() == weights.tobytes()


@pytest.mark.parametrize("size", [1 << 17, LARGE])
def test_a_pull_never_mixes_versions(size: int) -> None:
    """Every push adds 1 everywhere: a pull in which two elements differ has mixed versions."""
    params = {"a": np.zeros(size, np.float32), "b": np.zeros(size, np.float32)}
    push = {name: np.full(size, -1, np.float32) for name in params}

    async def main() -> None:
        async with ps.ParameterServer(params, ps.SGD(lr=1)) as server:

            async def write() -> None:
                for _ in range(200):
                    await server.push(push, version=0)

            async def read() -> None:
                while server.version < 200:
                    found, version = await server.pull()
                    assert found["a"].min() == found["a"].max() == found["b"].min() == found["b"].max() == version

            await asyncio.gather(asyncio.to_thread(lambda: asyncio.run(write())), read())

    asyncio.run(main())


def test_several_loops_share_a_server() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(2), ps.SGD(lr=1)) as server:

            async def push() -> None:
                async with server:
                    for _ in range(50):
                        await server.push(np.ones(2), version=(await server.pull())[1])

            await asyncio.gather(*(asyncio.to_thread(lambda: asyncio.run(push())) for _ in range(3)))
            assert (await server.pull())[0].tolist() == [-150, -150]

    asyncio.run(main())


def test_a_dict_is_no_gradient_of_an_array() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1)) as server:
            with pytest.raises(GradientRejected, match="a dict was given, expected one array"):
                await server.push({"w": np.zeros(1)}, version=0)

    asyncio.run(main())


def test_staleness_is_counted() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1)) as server:
            for version in (0, 0, 2, 0):
                await server.push(np.ones(1), version=version)
            assert server.staleness == {0: 2, 1: 1, 3: 1}

    asyncio.run(main())


def test_what_is_too_stale_is_dropped_and_what_is_stale_is_scaled() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), ps.ASP(scale=True, drop=4)) as server:
            for version in (0, 0, 0, 0, 0):
                await server.push(np.ones(1), version=version)
            assert (await server.pull())[0][0] == pytest.approx(-(1 + 1 + 1 / 2 + 1 / 3 + 1 / 4), rel=1e-12)
            assert await server.push(np.ones(1), version=0) == server.version == 5
            assert server.dropped == 1
            assert server.staleness == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1}

    asyncio.run(main())


@pytest.mark.parametrize("given", [{"scale": 1}, {"drop": -1}, {"drop": True}, {"drop": 1.5}])
def test_a_policy_out_of_range_is_refused(given: Any) -> None:
    with pytest.raises(PlanError, match="ASP"):
        ps.ASP(**given)


@pytest.mark.parametrize("late", [1, 3, 7, 15])
@pytest.mark.parametrize("place", PLACES)
def test_the_critical_rate_at_a_delay_is_that_of_the_theory(late: int, place: Any) -> None:
    """On a quadratic, plain SGD with gradients that are τ late is stable up to rate × curvature = 2 sin(π / (4τ + 2)).

    Each parameter is a quadratic of its own: those 3 % below shrink, those 3 % above grow.
    """
    critical = 2 * np.sin(np.pi / (4 * late + 2))
    shares = np.array([0.80, 0.90, 0.95, 0.97, 1.03, 1.05, 1.10, 1.20])
    steps = 250 * (late + 1)

    async def main() -> None:
        async with ps.ParameterServer(np.ones(len(shares)), ps.SGD(lr=1), place=place) as server:
            worker = seen_from(place, server)
            seen = deque([await worker.pull()], maxlen=late + 1)
            sizes = []
            for _ in range(steps):
                params, version = seen[0]
                await worker.push(critical * shares * params, version=version)
                seen.append(await worker.pull())
                sizes.append(np.abs(seen[-1][0]))
            window = 8 * (late + 1)
            early, last = np.max(sizes[window : 2 * window], axis=0), np.max(sizes[-window:], axis=0)
            assert (last[:4] < early[:4]).all()
            assert (last[4:] > early[4:]).all()
            assert server.staleness[late] == steps - late

    asyncio.run(main())


def test_what_is_pulled_is_the_callers_and_what_is_given_isnt_changed() -> None:
    async def main() -> None:
        given = np.ones(3)
        async with ps.ParameterServer(given, ps.SGD(lr=1)) as server:
            (await server.pull())[0][:] = 7
            gradient = np.ones(3)
            gradient.flags.writeable = False
            await server.push(gradient, version=0)
            assert (await server.pull())[0].tolist() == [0, 0, 0]
        assert given.tolist() == [1, 1, 1]

    asyncio.run(main())


BAD = {
    "missing": (lambda p: {"b": p["b"]}, "'layer/w': it is missing"),
    "another": (lambda p: {**p, "c": p["b"]}, "'c': there is no parameter of that name. There are layer/w, b"),
    "shape": (lambda p: {**p, "b": p["b"][:1]}, r"'b': float32\[1\] was given, expected float32\[2\]"),
    "type": (lambda p: {**p, "b": p["b"].astype(float)}, r"'b': float64\[2\] was given, expected float32\[2\]"),
    "no array": (lambda p: {**p, "b": [1.0, 2.0]}, "'b': a list was given"),
    "nan": (lambda p: {**p, "layer": {"w": np.full((2, 3), np.nan, np.float32)}}, r"'layer/w': it is nan at \[0, 0\]"),
    "inf": (lambda p: {**p, "b": np.array([0, -np.inf], np.float32)}, r"'b': it is -inf at \[1\]"),
    "the loss too": (lambda p: (p, 0.5), "a tuple was given"),
    "flat": (lambda p: p["b"], "a ndarray was given, expected a dict of layer/w, b"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_that_cant_be_applied_is_named_and_changes_nothing(
    spoil: Callable[[Any], Any], words: str, place: Any
) -> None:
    async def main() -> None:
        params = {"layer": {"w": np.zeros((2, 3), np.float32)}, "b": np.zeros(2, np.float32)}
        good = {"layer": {"w": np.ones((2, 3), np.float32)}, "b": np.ones(2, np.float32)}
        async with ps.ParameterServer(params, ps.SGD(lr=1), place=place) as server:
            with pytest.raises(GradientRejected, match=words):
                await seen_from(place, server).push(spoil(good), version=0)
            found, version = await server.pull()
            assert version == 0
            assert not found["layer"]["w"].any()
            assert not found["b"].any()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (np.zeros(3, int), "'the only one' is an array of int64"),
        ({"w": {"x": [1.0]}}, "'w/x' is a list"),
        ({}, "no parameter"),
        ({"a/b": np.zeros(1)}, "'a/b'"),
        ({3: np.zeros(1)}, "3"),
    ],
)
def test_what_cant_be_trained_is_refused(params: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ps.ParameterServer(params)


@pytest.mark.parametrize("version", [-1, 1, 1 << 80, True, 0.0, None])
@pytest.mark.parametrize("place", PLACES)
def test_a_version_that_isnt_there_yet_is_refused(version: Any, place: Any) -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), place=place) as server:
            with pytest.raises(PlanError, match=f"push\\(version={version}\\)"):
                await seen_from(place, server).push(np.ones(1), version=version)
            assert server.version == 0

    asyncio.run(main())


def test_no_optimizer_is_refused() -> None:
    with pytest.raises(PlanError, match="ParameterServer"):
        ps.ParameterServer(np.zeros(1), optimizer=0.1)  # type: ignore[arg-type]


def test_no_consistency_is_refused() -> None:
    with pytest.raises(PlanError, match="consistency"):
        ps.ParameterServer(np.zeros(1), consistency="asp")  # type: ignore[arg-type]


def test_closed_it_says_so_and_it_opens_again() -> None:
    async def main() -> None:
        server = ps.ParameterServer(np.zeros(1), ps.SGD(lr=1))
        with pytest.raises(Closed):
            await server.pull()
        for _ in range(2):
            async with server:
                await server.push(np.ones(1), version=0)
        with pytest.raises(Closed):
            await server.push(np.ones(1), version=0)
        async with server:
            assert (await server.pull())[0].tolist() == [-2]

    asyncio.run(main())


def test_a_cancelled_push_is_applied_as_a_whole() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(LARGE), ps.SGD(lr=1)) as server:
            for _ in range(20):
                push = asyncio.create_task(server.push(np.ones(LARGE), version=0))
                await asyncio.sleep(0)
                push.cancel()
                await asyncio.gather(push, return_exceptions=True)
            params, version = await server.pull()  # behind all that was handed over
            assert params.min() == params.max() == -version

    asyncio.run(main())


def test_finite_gradients_whose_squares_overflow_are_applied() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(2), ps.SGD(lr=1)) as server:
            await server.push(np.array([1e200, -1e300]), version=0)
            assert (await server.pull())[0].tolist() == [-1e200, 1e300]

    asyncio.run(main())


def test_arrays_of_others_cross_by_dlpack() -> None:
    class Foreign:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __dlpack__(self, **given: Any) -> Any:
            return self.array.__dlpack__(**given)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    async def main() -> None:
        async with ps.ParameterServer({"w": Foreign(np.ones((2, 2)))}, ps.SGD(lr=1)) as server:
            await server.push({"w": Foreign(np.ones((2, 2)).T)}, version=0)
            assert (await server.pull())[0]["w"].tolist() == [[0, 0], [0, 0]]

    asyncio.run(main())
