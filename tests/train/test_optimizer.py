"""The optimizers beside the obvious NumPy loops, clipping, schedules, and what is refused."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from penstock.errors import PlanError
from penstock.train.optimizer import SGD, Adam, AdamW, Optimizer

Array = NDArray[Any]
Loop = Callable[[Array, list[Array], Array, float, int], None]
"""One update as anybody would write it: of the weights, the slots, the gradient, the rate and the version."""


def plain_sgd(w: Array, slots: list[Array], g: Array, rate: float, version: int) -> None:
    w -= rate * g


def plain_momentum(w: Array, slots: list[Array], g: Array, rate: float, version: int) -> None:
    slots[0][:] = 0.9 * slots[0] + g
    w -= rate * slots[0]


def plain_adam(w: Array, slots: list[Array], g: Array, rate: float, version: int, decay: float = 0.0) -> None:
    m, v = slots
    t = version + 1
    m[:] = 0.9 * m + (1 - 0.9) * g
    v[:] = 0.999 * v + (1 - 0.999) * (g * g)
    w[:] = (1 - rate * decay) * w - rate * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))


def plain_adamw(w: Array, slots: list[Array], g: Array, rate: float, version: int) -> None:
    plain_adam(w, slots, g, rate, version, decay=0.1)


def falling(version: int) -> float:
    return 0.1 / (version + 1)


PAIRS: list[tuple[Optimizer, Loop]] = [
    (SGD(lr=falling), plain_sgd),
    (SGD(lr=falling, momentum=0.9), plain_momentum),
    (Adam(lr=falling), plain_adam),
    (AdamW(lr=falling, weight_decay=0.1), plain_adamw),
]
every_type = pytest.mark.parametrize("dtype", [np.float32, np.float64])
every_optimizer = pytest.mark.parametrize(("optimizer", "loop"), PAIRS, ids=["sgd", "momentum", "adam", "adamw"])


def leaves(dtype: type, seed: int, sizes: Sequence[int] = (1000, 3, 0, 1)) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(size).astype(dtype) for size in sizes]


def slots_of(optimizer: Optimizer, weights: Sequence[Array]) -> list[list[Array]]:
    return [[np.zeros_like(w) for w in weights] for _ in optimizer.slots]


def same(found: Sequence[Array], expected: Sequence[Array]) -> bool:
    """Bit for bit."""
    return all(one.tobytes() == other.tobytes() for one, other in zip(found, expected, strict=True))


@every_type
@every_optimizer
def test_updates_are_those_of_a_plain_loop(optimizer: Optimizer, loop: Loop, dtype: type) -> None:
    weights = leaves(dtype, 0)
    states = slots_of(optimizer, weights)
    expected, slots = [w.copy() for w in weights], slots_of(optimizer, weights)
    for version in range(5):
        gradients = leaves(dtype, version + 1)
        optimizer.update(weights, states, gradients, version, scale=0.25, damping=0.5)
        for at, (w, g) in enumerate(zip(expected, gradients, strict=True)):
            loop(w, [slot[at] for slot in slots], 0.25 * g, falling(version) * 0.5, version)
    assert same(weights, expected)
    for found, slot in zip(states, slots, strict=True):
        assert same(found, slot)


@every_optimizer
def test_without_factors_an_update_is_the_plain_one(optimizer: Optimizer, loop: Loop) -> None:
    weights, gradients = leaves(np.float32, 0), leaves(np.float32, 1)
    states = slots_of(optimizer, weights)
    expected, slots = [w.copy() for w in weights], slots_of(optimizer, weights)
    optimizer.update(weights, states, gradients, 7)
    for at, (w, g) in enumerate(zip(expected, gradients, strict=True)):
        loop(w, [slot[at] for slot in slots], g, falling(7), 7)
    assert same(weights, expected)


def test_adam_in_float32_is_near_the_papers_loop_in_float64() -> None:
    optimizer = Adam(lr=0.01)
    weights = leaves(np.float32, 0, [500])
    states = slots_of(optimizer, weights)
    w = weights[0].astype(np.float64)
    slots = [np.zeros_like(w), np.zeros_like(w)]
    for version in range(100):
        gradients = leaves(np.float32, version + 1, [500])
        optimizer.update(weights, states, gradients, version)
        plain_adam(w, slots, gradients[0].astype(np.float64), 0.01, version)
    np.testing.assert_allclose(weights[0], w, rtol=1e-5, atol=1e-5)


def test_adams_first_step_is_the_rate_whatever_the_gradient() -> None:
    w = np.zeros(4)
    Adam(lr=0.1).update([w], [[np.zeros(4)], [np.zeros(4)]], [np.array([1e-3, -1.0, 1e3, 0.0])], 0)
    assert w == pytest.approx([-0.1, 0.1, -0.1, 0.0], rel=1e-4)


def test_a_quadratic_is_minimised_as_the_textbook_says() -> None:
    """Rate × curvature: at 1 it is there in one step, beyond 2 it leaves for good."""
    for rate, factor in ((1.0, 0.0), (0.5, 0.5), (2.5, -1.5)):
        w = np.array([8.0])
        for version in range(6):
            SGD(lr=rate).update([w], [], [w.copy()], version)
        assert w[0] == 8.0 * factor**6


# -- clipping ----------------------------------------------------------------------------------------------------------


def applied(clip: float | None, gradients: Sequence[Array], scale: float = 1.0) -> list[Array]:
    """What is taken from the weights, at a rate of one."""
    weights = [np.zeros_like(g) for g in gradients]
    SGD(lr=1.0, clip=clip).update(weights, [], gradients, 0, scale=scale)
    return [-w for w in weights]


def norm(arrays: Sequence[Array]) -> float:
    return math.hypot(*(float(x) for array in arrays for x in array))


LEAVES = st.lists(npst.arrays(np.float64, st.integers(0, 6), elements=st.floats(-1e300, 1e300)), min_size=1, max_size=3)


@given(gradients=LEAVES, clip=st.floats(1e-6, 1e6), scale=st.floats(0.01, 100))
def test_a_gradient_longer_than_the_clip_keeps_its_direction_and_gets_that_length(
    gradients: list[Array], clip: float, scale: float
) -> None:
    """Of all parameters together, after the scale; also where the squares are beyond what float64 holds."""
    length = norm([g * scale for g in gradients])
    found = applied(clip, gradients, scale)
    if length <= clip * (1 - 1e-9):
        assert all(np.array_equal(one, scale * g) for one, g in zip(found, gradients, strict=True))
    elif length >= clip * (1 + 1e-9):
        assert norm(found) == pytest.approx(clip, rel=1e-9)
        for one, g in zip(found, gradients, strict=True):
            np.testing.assert_allclose(one, g * scale * (clip / length), rtol=1e-9, atol=1e-300)


@every_type
def test_clipping_multiplies_the_gradient_once(dtype: type) -> None:
    gradients = [np.array([3.0, 0.0], dtype), np.array([4.0], dtype)]
    assert same(applied(5.0, gradients), applied(None, gradients))
    assert same(applied(2.5, gradients), applied(None, gradients, scale=0.5))
    assert same(applied(2.5, gradients, scale=4.0), applied(None, gradients, scale=0.5))
    assert same(applied(2.5, gradients, scale=-4.0), applied(None, gradients, scale=-0.5))


@every_optimizer
def test_each_optimizer_clips(optimizer: Optimizer, loop: Loop) -> None:
    made: dict[str, Any] = {**vars(optimizer), "clip": 1.0}
    clipping = type(optimizer)(**made)
    gradients = [np.full(4, 32.0), np.full(12, 32.0)]  # of length 128
    results = []
    for one, scale in ((clipping, 1.0), (optimizer, 1 / 128)):
        weights = [np.ones(4), np.ones(12)]
        one.update(weights, slots_of(one, weights), gradients, 0, scale=scale)
        results.append(weights)
    assert same(*results)


def test_nothing_to_clip_in_zeros() -> None:
    assert not applied(1.0, [np.zeros(3)])[0].any()


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_a_schedule_is_asked_with_the_version_and_may_pause() -> None:
    asked: list[int] = []

    def schedule(version: int) -> float:
        asked.append(version)
        return 0.5 if version % 2 else 0

    w = np.ones(1)
    for version in range(4):
        SGD(lr=schedule).update([w], [], [np.ones(1)], version)
    assert asked == [0, 1, 2, 3]
    assert w[0] == 0.0


@pytest.mark.parametrize(
    ("value", "kind"),
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (None, TypeError), ("1", TypeError)],
)
def test_a_schedule_that_returns_no_rate_changes_nothing(value: Any, kind: type[Exception]) -> None:
    w = np.ones(2)
    with pytest.raises(kind, match=r"lr=.*<lambda> returned .* for version 3: return a learning rate, 0 or more"):
        SGD(lr=lambda version: value).update([w], [], [np.ones(2)], 3)
    assert w.tolist() == [1.0, 1.0]


# -- what is refused, and what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SGD(lr=0), r"SGD\(lr=0\). Give a positive number, or a function of the version"),
        (lambda: SGD(lr=-1.0), r"SGD\(lr=-1.0\)"),
        (lambda: SGD(lr=math.nan), r"SGD\(lr=nan\)"),
        (lambda: Adam(lr=True), r"Adam\(lr=True\)"),
        (lambda: Adam(lr="fast"), r"Adam\(lr='fast'\)"),  # type: ignore[arg-type]
        (lambda: SGD(lr=0.1, momentum=1.0), r"SGD\(momentum=1.0\). Give a number from 0 to below 1"),
        (lambda: SGD(lr=0.1, momentum=None), r"SGD\(momentum=None\)"),  # type: ignore[arg-type]
        (lambda: SGD(lr=0.1, clip=0), r"SGD\(clip=0\). Give the most that the norm"),
        (lambda: AdamW(clip=math.inf), r"AdamW\(clip=inf\)"),
        (lambda: Adam(betas=(0.9, 1.0)), r"Adam\(betas=\(0.9, 1.0\)\). Give a pair of numbers from 0 to below 1"),
        (lambda: Adam(betas=0.9), r"Adam\(betas=0.9\)"),  # type: ignore[arg-type]
        (lambda: AdamW(betas=(0.9,)), r"AdamW\(betas=\(0.9,\)\)"),  # type: ignore[arg-type]
        (lambda: Adam(eps=0), r"Adam\(eps=0\). Give a number from 1e-30"),
        (lambda: AdamW(weight_decay=-0.1), r"AdamW\(weight_decay=-0.1\). Give a number, 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], Optimizer], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        make()


@pytest.mark.parametrize(
    ("weights", "states", "gradients"),
    [(2, (2, 2), 1), (1, (1, 1), 2), (2, (2,), 2), (2, (2, 1), 2), (2, (2, 2, 2), 2), (1, (), 1)],
)
def test_lists_that_do_not_fit_are_refused(weights: int, states: tuple[int, ...], gradients: int) -> None:
    zeros, ones = [np.zeros(2)] * 3, [np.ones(2)] * 3
    with pytest.raises(ValueError, match=r"weights, .* with the slots \('mean', 'square'\)"):
        Adam().update(zeros[:weights], [zeros[:count] for count in states], ones[:gradients], 0)
    assert not zeros[0].any()


def test_slots_are_named() -> None:
    assert SGD(lr=0.1).slots == ()
    assert SGD(lr=0.1, momentum=0.9).slots == ("momentum",)
    assert Adam().slots == AdamW().slots == ("mean", "square")


def test_a_description_is_the_same_in_every_process() -> None:
    assert repr(SGD(1)) == SGD(np.float64(1.0)).describe() == "SGD(lr=1.0, momentum=0.0, clip=None)"
    assert Adam(lr=falling, clip=5).describe() == "Adam(lr=falling, betas=(0.9, 0.999), eps=1e-08, clip=5.0)"
    assert SGD(0.1) == SGD(0.1) != SGD(0.2)


@every_optimizer
def test_what_is_prepared_can_update(optimizer: Optimizer, loop: Loop) -> None:
    optimizer.prepare(np.float32, np.dtype(np.float64))


@pytest.mark.parametrize("optimizer", [SGD(0.1, clip=1.0), SGD(0.1, 0.9, clip=1.0), AdamW(clip=1.0)])
def test_an_update_allocates_nothing_of_the_models_size(optimizer: Optimizer) -> None:
    weights, gradients = leaves(np.float32, 0, [100_000] * 3), leaves(np.float32, 1, [100_000] * 3)
    states = slots_of(optimizer, weights)
    optimizer.update(weights, states, gradients, 0)
    tracemalloc.start()
    try:
        optimizer.update(weights, states, gradients, 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000
