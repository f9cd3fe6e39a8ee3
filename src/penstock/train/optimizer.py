"""How a gradient becomes a change of the weights: SGD, Adam and AdamW, in place.

An optimizer is a frozen description. What it remembers from one update to the next (its *slots*: arrays of the
weights' sizes, zero at first) belongs to whoever calls ``update``, so that it can be stored with the weights. The same
weights, slots, gradients, version and factors give the same bits, those of a plain NumPy loop: ``kernels`` names the
order of every operation. (Only a clip's norm is added up in an order that depends on the processor.)

Three factors meet in an update, and act on different things:

1. ``scale`` multiplies the gradient: 1/W, for the mean of W gradients that were added up.
2. The clip multiplies the gradient further, where the norm of what ``scale`` made of it exceeds ``clip``. The norm is
   that of all gradients together, computed in float64. Both factors are multiplied in float64, and rounded once.
3. ``damping`` multiplies the rate, and so AdamW's decay too: 1/τ, for a gradient that is τ updates old. Momentum
   and means take in the gradient as it is.

An update checks its rate and its clip before it changes anything. It takes for granted that gradients are finite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from numbers import Real
from typing import Any

import numpy as np

from penstock.errors import PlanError
from penstock.train import kernels
from penstock.train.kernels import Array

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "Rate"]

Rate = float | Callable[[int], float]
"""A learning rate: a number, or a function of the version (the number of updates so far) that returns one."""

_SMALL = 2.0**-600  # times any float64, squared and added up a million million times, this is still a number
_BLOCK = 1 << 14
_LEAST_EPS = 1e-30


class Optimizer(ABC):
    """What the parameter server asks of ``SGD``, ``Adam`` and ``AdamW``."""

    lr: Rate
    clip: float | None

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """The names of the arrays that each parameter needs beside itself: of its size and type, zero at first."""

    def update(
        self,
        weights: Sequence[Array],
        states: Sequence[Sequence[Array]],
        gradients: Sequence[Array],
        version: int,
        scale: float = 1.0,
        damping: float = 1.0,
    ) -> None:
        """Apply one update in place.

        ``weights``, ``gradients``: a contiguous vector for each parameter, float32 or float64, of the same length and
        type in both. ``states``: for each of ``slots``, such vectors too. ``version``: the updates before this one.
        ``scale`` multiplies the gradients, before they are clipped; ``damping`` the learning rate. Nothing of the
        arrays' sizes is allocated.

        Raises ValueError for arrays that don't fit and for a schedule's value out of range, TypeError for one that is
        no number, MissingDependency without numba. Weights of a parameter are never changed in part.

        >>> w, g = np.array([1.0, 2.0]), np.array([3.0, 4.0])
        >>> SGD(lr=0.5, clip=1.0).update([w], [], [g], version=0)
        >>> w
        array([0.7, 1.6])
        """
        if len(weights) != len(gradients) or [len(state) for state in states] != [len(weights)] * len(self.slots):
            found = f"{len(weights)} weights, {len(gradients)} gradients, slots of {[len(state) for state in states]}"
            raise ValueError(f"{found}: give one of each for each parameter, with the slots {self.slots}")
        rate = self.rate(version) * damping
        if self.clip is not None:
            scale = _clipped(gradients, scale, self.clip)
        for w, g, *state in zip(weights, gradients, *states, strict=True):
            self._apply(w, state, g, rate, scale, version)

    @abstractmethod
    def _apply(self, w: Array, state: Sequence[Array], g: Array, rate: float, scale: float, version: int) -> None:
        """Update one parameter, by the gradient ``scale*g``."""

    def rate(self, version: int) -> float:
        """The learning rate after ``version`` updates.

        >>> Adam(lr=lambda version: 1e-3 / (version + 1)).rate(1)
        0.0005
        """
        if not callable(self.lr):
            return float(self.lr)
        found: Any = self.lr(version)
        told = f"lr={_name(self.lr)} returned {found!r:.200} for version {version}"
        if not _is_number(found):
            raise TypeError(f"{told}: return a learning rate, 0 or more")
        if not 0 <= found < inf:
            raise ValueError(f"{told}: return a learning rate, 0 or more")
        return float(found)

    def prepare(self, *dtypes: Any) -> None:
        """Compile what updates and pushes need, for arrays of these types: about a second, once on a machine.

        Without this the first ones do it. Raises MissingDependency without numba.
        """
        for dtype in dtypes:
            empty = np.empty(0, dtype)
            kernels.squares(empty)
            kernels.accumulate(empty, empty)
            self.update([empty], [[empty] for _ in self.slots], [empty], 0)

    def describe(self) -> str:
        """The optimizer in one line, the same in every process: what a run is recognised by. A schedule is its name.

        >>> AdamW(lr=1e-4).describe()
        'AdamW(lr=0.0001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, clip=None)'
        """
        given = ", ".join(f"{name}={_shown(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({given})"

    def __repr__(self) -> str:
        return self.describe()

    def _validate(self) -> None:
        if not callable(self.lr) and not (_is_number(self.lr) and 0 < self.lr < inf):
            self._refuse("lr", "Give a positive number, or a function of the version, the number of updates so far")
        if self.clip is not None and not (_is_number(self.clip) and 0 < self.clip < inf):
            self._refuse("clip", "Give the most that the norm of the gradient may be, or leave it out")

    def _refuse(self, name: str, remedy: str) -> None:
        raise PlanError(f"{type(self).__name__}({name}={getattr(self, name)!r:.200})", remedy)


@dataclass(frozen=True, repr=False)
class SGD(Optimizer):
    """Stochastic gradient descent: ``w -= lr*g``, or with momentum ``m = momentum*m + g; w -= lr*m``.

    ``lr``: the learning rate, or a function of the version (0 for the first update) that returns it. ``momentum``:
    what of the last step goes into the next one, from 0 to below 1 (Polyak 1964); with several workers, staleness
    acts like momentum already, and more of it diverges. ``clip``: the most that the L2 norm of the gradient of all
    parameters together may be; a longer one is shortened (Pascanu et al. 2013). Default: none of both.

    Raises PlanError for values out of range.

    >>> import numpy as np
    >>> w, m, g = np.zeros(2), np.zeros(2), np.array([1.0, -1.0])
    >>> for version in range(2):
    ...     SGD(lr=0.1, momentum=0.5).update([w], [[m]], [g], version)
    >>> w
    array([-0.25,  0.25])
    """

    lr: Rate
    momentum: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        self._validate()
        if not (_is_number(self.momentum) and 0 <= self.momentum < 1):
            self._refuse("momentum", "Give a number from 0 to below 1")

    @property
    def slots(self) -> tuple[str, ...]:
        """``momentum``, if there is any."""
        return ("momentum",) if self.momentum else ()

    def _apply(self, w: Array, state: Sequence[Array], g: Array, rate: float, scale: float, version: int) -> None:
        if self.momentum:
            kernels.momentum(w, state[0], g, rate, scale, self.momentum)
        else:
            kernels.sgd(w, g, rate, scale)


class _Moments(Optimizer):
    """What Adam and AdamW share."""

    betas: tuple[float, float]
    eps: float

    @property
    def _decay(self) -> float:
        return 0.0

    def _validate(self) -> None:
        super()._validate()
        pair: Any = self.betas
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in pair)
        ):
            self._refuse("betas", "Give a pair of numbers from 0 to below 1")
        if not (_is_number(self.eps) and _LEAST_EPS <= self.eps < inf):
            self._refuse("eps", f"Give a number from {_LEAST_EPS:g} (less is nothing in float32, and 0/0 is NaN)")

    @property
    def slots(self) -> tuple[str, ...]:
        """The means of gradients and of their squares."""
        return ("mean", "square")

    def _apply(self, w: Array, state: Sequence[Array], g: Array, rate: float, scale: float, version: int) -> None:
        mean, square = state
        kernels.adam(w, mean, square, g, rate, scale, self.betas, self.eps, self._decay, version + 1)


@dataclass(frozen=True, repr=False)
class Adam(_Moments):
    """Adam: steps of about ``lr`` in each coordinate, whatever the size of its gradients (Kingma & Ba 2015).

    ``lr``: the learning rate, or a function of the version (0 for the first update) that returns it. ``betas``: how
    long the means of gradients and of their squares remember, each from 0 to below 1. ``eps``: added to the root
    of the corrected square. ``clip``: the most that the L2 norm of the gradient of all parameters together may be;
    default: any.

    Raises PlanError for values out of range.

    >>> import numpy as np
    >>> w, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
    >>> Adam(lr=0.1).update([w], [[m], [v]], [np.array([5.0, -0.005])], version=0)
    >>> w.round(4)
    array([-0.1,  0.1])
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None

    def __post_init__(self) -> None:
        self._validate()


@dataclass(frozen=True, repr=False)
class AdamW(_Moments):
    """Adam with decoupled weight decay: each update first shrinks the weights by ``lr*weight_decay`` of themselves.

    (Loshchilov & Hutter 2019; as in PyTorch, the decay follows the learning rate and its schedule.) The other
    parameters are those of ``Adam``.

    Raises PlanError for values out of range.

    >>> import numpy as np
    >>> w, m, v = np.ones(1), np.zeros(1), np.zeros(1)
    >>> AdamW(lr=0.1, weight_decay=0.5).update([w], [[m], [v]], [np.zeros(1)], version=0)
    >>> w
    array([0.95])
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = None

    def __post_init__(self) -> None:
        self._validate()
        if not (_is_number(self.weight_decay) and 0 <= self.weight_decay < inf):
            self._refuse("weight_decay", "Give a number, 0 or more")

    @property
    def _decay(self) -> float:
        return self.weight_decay


def _clipped(gradients: Sequence[Array], scale: float, clip: float) -> float:
    """``scale``, or less of it, so that the norm of the scaled gradients is ``clip`` at the most."""
    total = sum(kernels.squares(g) for g in gradients)
    unit = 1.0
    if (
        total == inf
    ):  # no wonder in float64, where squares are larger than numbers may be: once more, on a smaller scale
        unit = _SMALL
        total = sum(_small_squares(g) for g in gradients)
    norm = abs(scale) * sqrt(total)
    return scale * (clip * unit / norm) if norm > clip * unit else scale


def _small_squares(g: Array) -> float:
    total = 0.0
    for start in range(0, g.size, _BLOCK):
        part = g[start : start + _BLOCK] * _SMALL
        total += float(part @ part)
    return total


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if callable(value):
        return _name(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(float(value)) if _is_number(value) else repr(value)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
