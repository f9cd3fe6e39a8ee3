"""Loops over arrays, compiled by numba: they run at the speed of memory, in place, without the interpreter's lock.

Every function here takes one-dimensional contiguous arrays of one length and one type, float32 or float64, and raises
ValueError for others: behind that wall nothing looks at bounds. None of them allocates anything of an array's size.

Arithmetic is that of plain NumPy, bit for bit, in the order that each function gives: all of it in the arrays' own
type, to which the factors are rounded first, as NumPy rounds Python's numbers. So the updates are compiled strictly.
Fused multiply-add and reassociation gain nothing there, for memory is what is waited for. The sum of squares alone
may be added up in any order: it isn't vectorised otherwise.

A loop is compiled when it is first called with a type of arrays, in a tenth of a second or two, and numba keeps it on
the disk: beside this file, or where that can't be written, in the user's cache directory. It writes the index before
the code that the index names, so of two processes that start at once one could load what the other has compiled for
another type, or for an earlier version of this file. So it compiles and loads under a lock, a file beside that cache.
Where nothing can be written, each process compiles for itself.

With ``NUMBA_DISABLE_JIT=1`` the loops run as plain Python; sums of squares differ from compiled ones in the last bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import MissingDependency

__all__ = ["Array", "accumulate", "adam", "first_bad", "momentum", "sgd", "squares"]

Array = NDArray[Any]
"""A contiguous vector of float32 or float64."""

_KINDS = (np.dtype(np.float32), np.dtype(np.float64))
_compiling = threading.RLock()


# -- what others call --------------------------------------------------------------------------------------------------


def squares(g: Array) -> float:
    """The sum of squares, added up in float64. NaN or infinite if any element is, and for float32 only then.

    Squares of finite float64 numbers beyond 1e154 overflow: ``first_bad`` tells.

    >>> squares(np.array([3.0, 4.0], np.float32))
    25.0
    """
    return float(_squares(g))


def first_bad(g: Array) -> int:
    """The index of the first element that is NaN or infinite; -1 if there is none.

    >>> first_bad(np.array([1.0, np.nan, np.inf]))
    1
    """
    return int(_first_bad(g))


def accumulate(total: Array, g: Array) -> None:
    """``total += g``."""
    _accumulate(g, total)


def sgd(w: Array, g: Array, rate: float, scale: float = 1.0) -> None:
    """``w -= rate*(scale*g)``."""
    _sgd(g, w, factors=(rate, scale))


def momentum(w: Array, m: Array, g: Array, rate: float, scale: float = 1.0, momentum: float = 0.9) -> None:
    """``m = momentum*m + scale*g; w -= rate*m``, as PyTorch has it, without dampening: while the rate is the same, the
    heavy ball of Polyak (1964)."""
    _momentum(g, w, m, factors=(rate, scale, momentum))


def adam(
    w: Array,
    m: Array,
    v: Array,
    g: Array,
    rate: float,
    scale: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
    step: int = 1,
) -> None:
    """Update number ``step`` (from 1) of Adam (Kingma & Ba 2015, algorithm 1), with decoupled decay.

    In this order, where ``b1, b2 = betas`` and ``1 - …`` is computed in float64 first::

        g = scale*g
        m = b1*m + (1 - b1)*g
        v = b2*v + (1 - b2)*(g*g)
        w = (1 - rate*decay)*w - rate*((m/(1 - b1**step)) / (sqrt(v/(1 - b2**step)) + eps))
    """
    b1, b2 = betas
    factors = (rate, scale, b1, 1 - b1, b2, 1 - b2, 1 - b1**step, 1 - b2**step, eps, 1 - rate * decay)
    _adam(g, w, m, v, factors=factors)


# -- compiling ---------------------------------------------------------------------------------------------------------


class _Loop:
    """A function ``(g, *targets, *factors)`` that is compiled when it is first called with a type of arrays."""

    def __init__(self, function: Callable[..., Any], reorder: bool = False) -> None:
        self._function = function
        self._fastmath: Any = {"reassoc", "nsz"} if reorder else False
        self._compiled: Any = None
        self._ready: dict[tuple[Any, bool], Callable[..., Any]] = {}

    def __call__(self, g: Array, *targets: Array, factors: tuple[float, ...] = ()) -> Any:
        dtype, shape, flags = g.dtype, g.shape, g.flags
        if len(shape) != 1 or not flags.c_contiguous:
            raise ValueError(f"{_told(g)}: give a contiguous vector")
        for target in targets:
            if target.dtype != dtype or target.shape != shape or not target.flags.carray:
                raise ValueError(f"{_told(target)} beside {_told(g)}: give a writeable vector of that length and type")
        key = dtype, flags.writeable
        run = self._ready.get(key)
        if run is None:
            run = self._ready[key] = self._prepared(g, *targets, *map(float, factors))
        return run(g, *targets, *map(float, factors))

    def _prepared(self, g: Array, *others: Any) -> Callable[..., Any]:
        """The function, compiled for these types: numba compiles for others when it meets them, without the lock."""
        if g.dtype not in _KINDS:
            raise ValueError(f"{_told(g)}: give float32 or float64")
        try:
            import numba
        except ImportError:
            raise MissingDependency("numba", "Training", "train") from None
        compiler: Any = numba  # it declares the types of some of its names only
        with _compiling:
            if self._compiled is None:
                options = {"nogil": True, "error_model": "numpy", "fastmath": self._fastmath}
                try:
                    self._compiled = compiler.njit(self._function, cache=True, **options)
                except RuntimeError:  # there is no directory to write to
                    self._compiled = compiler.njit(self._function, **options)
            if not compiler.config.DISABLE_JIT:
                with _alone(self._compiled.stats.cache_path):
                    self._compiled.compile(tuple(compiler.typeof(value) for value in (g, *others)))
            run: Callable[..., Any] = self._compiled
            return run


def _told(array: Array) -> str:
    order = "" if array.flags.c_contiguous else ", not contiguous"
    return f"an array {array.dtype}{list(array.shape)}{order}{'' if array.flags.writeable else ', read-only'}"


@contextmanager
def _alone(directory: str | None) -> Iterator[None]:
    """One process at a time; where no file can be locked, as many as come."""
    descriptor = _lock(directory) if directory else None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(directory: str) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = None
    try:
        descriptor = os.open(os.path.join(directory, "penstock.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


# -- the loops ---------------------------------------------------------------------------------------------------------


def _sum_squares(g: Array) -> float:
    # The processor fetches ahead within a page of memory only: four places at once are read 1.5 times as fast as one.
    n = g.size // 4
    a, b, c, d = g[:n], g[n : 2 * n], g[2 * n : 3 * n], g[3 * n :]
    first = second = third = fourth = 0.0
    for i in range(n):
        x, y, z, u = np.float64(a[i]), np.float64(b[i]), np.float64(c[i]), np.float64(d[i])
        first += x * x
        second += y * y
        third += z * z
        fourth += u * u
    for i in range(n, d.size):
        x = np.float64(d[i])
        first += x * x
    return first + second + third + fourth


def _find_bad(g: Array) -> int:
    for i in range(g.size):
        if not np.isfinite(g[i]):
            return i
    return -1


def _add(g: Array, total: Array) -> None:
    for i in range(g.size):
        total[i] += g[i]


def _step_sgd(g: Array, w: Array, rate: float, scale: float) -> None:
    kind = g.dtype.type
    rate, scale = kind(rate), kind(scale)
    for i in range(g.size):
        w[i] -= rate * (scale * g[i])


def _step_momentum(g: Array, w: Array, m: Array, rate: float, scale: float, keep: float) -> None:
    kind = g.dtype.type
    rate, scale, keep = kind(rate), kind(scale), kind(keep)
    for i in range(g.size):
        mean = keep * m[i] + scale * g[i]
        m[i] = mean
        w[i] -= rate * mean


def _step_adam(
    g: Array,
    w: Array,
    m: Array,
    v: Array,
    rate: float,
    scale: float,
    keep_mean: float,
    take_mean: float,
    keep_square: float,
    take_square: float,
    whole_mean: float,
    whole_square: float,
    eps: float,
    keep: float,
) -> None:
    kind = g.dtype.type
    rate, scale, eps, keep = kind(rate), kind(scale), kind(eps), kind(keep)
    keep_mean, take_mean, whole_mean = kind(keep_mean), kind(take_mean), kind(whole_mean)
    keep_square, take_square, whole_square = kind(keep_square), kind(take_square), kind(whole_square)
    for i in range(g.size):
        x = scale * g[i]
        mean = keep_mean * m[i] + take_mean * x
        square = keep_square * v[i] + take_square * (x * x)
        m[i] = mean
        v[i] = square
        w[i] = keep * w[i] - rate * ((mean / whole_mean) / (np.sqrt(square / whole_square) + eps))


_squares = _Loop(_sum_squares, reorder=True)
_first_bad = _Loop(_find_bad)
_accumulate = _Loop(_add)
_sgd = _Loop(_step_sgd)
_momentum = _Loop(_step_momentum)
_adam = _Loop(_step_adam)
