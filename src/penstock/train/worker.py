"""What a training worker does with a batch: pull the parameters, compute the gradient, check it, hand it on.

A *step* is the function of a flow's stage. It is taken into the worker with the user's gradient in it; where the worker
is another process it holds a ``Handle`` in place of the weights. Whatever is wrong with a gradient is said here, where
the batch is at hand: what is handed on can be applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from penstock.errors import GradientRejected, MissingDependency
from penstock.train.kernels import Array
from penstock.train.params import Layout, first_bad_plainly

__all__ = ["AsyncStep", "Gradient", "Readable", "Step", "one_thread"]


class Readable(Protocol):
    """Where a step pulls: ``Weights``, or the ``Handle`` of another process."""

    layout: Layout

    def copy(self) -> tuple[list[Array], int]:
        """A copy of the weights, and their version."""


@dataclass(slots=True)
class Gradient:
    """What came of a batch: a vector for each parameter, the version that they were computed from, and the loss, if the
    function gives one. ``ticket``: under which it was leased."""

    vectors: list[Array]
    version: int
    loss: float | None
    ticket: int = -1


class _Step:
    """``keeps``: the function may reuse its arrays, so they are copied. ``alone``: numeric libraries get one thread."""

    def __init__(
        self,
        weights: Readable,
        gradient: Callable[[Any, Any], Any],
        collate: Callable[[Any], Any] | None,
        *,
        keeps: bool,
        alone: bool,
    ) -> None:
        self._weights = weights
        self._gradient = gradient
        self._collate = collate
        self._keeps = keeps
        self._alone = alone

    def _begin(self, batch: Any) -> tuple[Any, Any, int]:
        if self._alone:
            self._alone = False
            one_thread()
        made = batch if self._collate is None else self._collate(batch)
        vectors, version = self._weights.copy()
        return self._weights.layout.tree(vectors), made, version

    def _end(self, result: Any, version: int) -> Gradient:
        layout = self._weights.layout
        loss, gradients = _taken_apart(result)
        vectors = layout.vectors(gradients)
        layout.check_finite(vectors, first_bad_plainly)
        mine = [np.array(one) if self._keeps or not one.flags.writeable else one for one in vectors]
        return Gradient(mine, version, loss)


class Step(_Step):
    """For a ``def``."""

    def __call__(self, batch: Any) -> Gradient:
        params, made, version = self._begin(batch)
        return self._end(self._gradient(params, made), version)


class AsyncStep(_Step):
    """For an ``async def``."""

    async def __call__(self, batch: Any) -> Gradient:
        params, made, version = self._begin(batch)
        return self._end(await self._gradient(params, made), version)


def _taken_apart(result: Any) -> tuple[float | None, Any]:
    """The loss, if one was returned, and the gradients. Raises GradientRejected if they can be told to be the other
    way round."""
    if not isinstance(result, tuple):
        return None, result
    if len(result) != 2:
        raise GradientRejected("", f"{len(result)} values were returned. Return gradients, or (loss, gradients)")
    loss, gradients = result
    number = _number(loss)
    if number is None:
        if _number(gradients) is not None:
            raise GradientRejected("", "(gradients, loss) was returned. Return (loss, gradients)")
        told = f"({type(loss).__name__}, {type(gradients).__name__}) was returned"
        raise GradientRejected("", f"{told}. Return (loss, gradients), the loss a number")
    return number, gradients


def _number(value: Any) -> float | None:
    """The number that it is, of whatever library; None if it is none."""
    if isinstance(value, (Mapping, str, bytes, bytearray)):
        return None
    if hasattr(value, "detach"):  # PyTorch warns where a number is made of what belongs to a graph
        value = value.detach()
    try:
        if getattr(value, "shape", ()) != ():
            return float(value.item())
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError, AttributeError):
        return None


def one_thread() -> AbstractContextManager[Any]:
    """Have numeric libraries use one thread from now on, or in a ``with`` block: with several, the order in which sums
    are added up isn't always the same."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise MissingDependency("threadpoolctl", "ps.BSP()", "train") from None
    limits: AbstractContextManager[Any] = threadpool_limits(1)
    return limits
