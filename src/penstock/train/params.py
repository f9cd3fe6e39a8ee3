"""Parameters as users hold them, an array or nested dicts of arrays, and as they are worked on: a vector for each.

A *layout* knows the names, shapes and types of the parameters. It makes vectors of a tree and refuses one that doesn't
fit, by the name of the parameter at fault (``"layer/weight"``), before anything is changed. Arrays of other libraries
cross by DLPack, without a copy where the memory is the processor's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite, prod
from operator import index
from typing import Any

import numpy as np

from penstock.errors import GradientRejected, PlanError
from penstock.flow.text import with_article
from penstock.train import kernels
from penstock.train.kernels import Array

__all__ = ["Layout", "as_version", "first_bad_plainly"]

_ONLY = "the only one"  # the name of a parameter that is all there is, in messages
_KINDS = ("float32", "float64")
_BLOCK = 1 << 15
_RESERVED = "__metadata__"


class Layout:
    """The names, shapes and types of ``params``. Raises PlanError for what can't be trained.

    >>> layout = Layout({"w": np.zeros((2, 3), np.float32), "b": {"hidden": np.zeros(3), "out": np.zeros(1)}})
    >>> layout.names
    ('w', 'b/hidden', 'b/out')
    """

    def __init__(self, params: Any) -> None:
        _check_keys(params, "")
        found = dict(_leaves(params, ""))
        if not found:
            raise PlanError("ParameterServer({}) was given no parameter", "Give an array, or a dict of arrays")
        arrays = {name: _as_array(value) for name, value in found.items()}
        for name, array in arrays.items():
            if array is None or str(array.dtype) not in _KINDS:
                raise PlanError(
                    f"ParameterServer: the parameter {name or _ONLY!r} is {_told(found[name])}",
                    "Give arrays of float32 or float64 in main memory, for instance value.astype(np.float32); "
                    "of PyTorch's, value.detach()",
                )
        self.names = tuple(arrays)
        self._known = frozenset(arrays)
        self.shapes = tuple(array.shape for array in arrays.values() if array is not None)
        self.kinds = tuple(array.dtype for array in arrays.values() if array is not None)
        self._tree = _named(params, "")

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each parameter has."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """What one set of the parameters takes."""
        return sum(size * kind.itemsize for size, kind in zip(self.sizes, self.kinds, strict=True))

    def tree(self, vectors: Sequence[Array]) -> Any:
        """The parameters as they were given, on the memory of these vectors."""
        by_name = {
            name: vector.reshape(shape) for name, vector, shape in zip(self.names, vectors, self.shapes, strict=True)
        }
        return _filled(self._tree, by_name)

    def vectors(self, gradients: Any) -> list[Array]:
        """A contiguous vector for each parameter. Raises GradientRejected for a tree, shape or type that differs."""
        if isinstance(gradients, tuple):
            raise GradientRejected("", "a tuple was given. Give the gradients alone, in the form of the parameters")
        if isinstance(gradients, Mapping) != isinstance(self._tree, dict):
            wanted = f"a dict of {', '.join(self.names)}" if isinstance(self._tree, dict) else "one array"
            raise GradientRejected("", f"a {type(gradients).__name__} was given, expected {wanted}")
        given = dict(_leaves(gradients, ""))
        missing = [name for name in self.names if name not in given]
        further = [name for name in given if name not in self._known]
        if missing:
            also = f"; {further[0]!r} was given, which is no parameter" if further else ""
            raise GradientRejected(missing[0], f"it is missing{also}. Give one for each of {', '.join(self.names)}")
        if further:
            raise GradientRejected(further[0], f"there is no parameter of that name. There are {', '.join(self.names)}")
        found = []
        for name, shape, kind in zip(self.names, self.shapes, self.kinds, strict=True):
            value = given[name]
            array = _as_array(value)
            if array is None:
                told = f"{_told(value)} was given, expected {kind}{list(shape)} in main memory, free of a graph"
                raise GradientRejected(name or _ONLY, told)
            if array.shape != shape or array.dtype != kind:
                given_as, wanted = f"{array.dtype}{list(array.shape)}", f"{kind}{list(shape)}"
                told = f"{given_as} was given, expected {wanted}, as the parameter is"
                if array.shape == shape:
                    told += f". Convert it, for instance by .astype({str(kind)!r})"
                raise GradientRejected(name or _ONLY, told)
            found.append(np.ascontiguousarray(array).reshape(-1))
        return found

    def check_finite(self, vectors: Sequence[Array], first_bad: Callable[[Array], int] | None = None) -> None:
        """Raise GradientRejected for the first parameter with a gradient that is NaN or infinite.

        ``first_bad``: finds the first such element of a vector, or -1; by default with compiled loops.
        """
        find = _first_bad if first_bad is None else first_bad
        for name, shape, vector in zip(self.names, self.shapes, vectors, strict=True):
            at = find(vector)
            if at >= 0:
                place = [int(index) for index in np.unravel_index(at, shape)] if shape else []
                raise GradientRejected(
                    name or _ONLY,
                    f"it is {vector[at]} at {place}. Lower the learning rate, or give the optimizer a clip=",
                )


def as_version(version: Any, most: int, told: str = "") -> int:
    """The version that was given with gradients, from 0 to ``most``. Raises PlanError; ``told``: what else it says."""
    try:
        number = -1 if isinstance(version, bool) else index(version)
    except TypeError:
        number = -1
    if not 0 <= number <= most:
        raise PlanError(f"push(version={version!r}){told}", "Give the version that pull returned with the parameters")
    return number


def first_bad_plainly(vector: Array) -> int:
    """The index of the first element that is NaN or infinite, or -1, for processes that compile nothing."""
    for start in range(0, vector.size, _BLOCK):
        block = np.isfinite(vector[start : start + _BLOCK])
        if not block.all():
            return start + int(block.argmin())
    return -1


def _first_bad(vector: Array) -> int:
    return -1 if isfinite(kernels.squares(vector)) else kernels.first_bad(vector)


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{name}/{key}" if name else str(key))


def _check_keys(tree: Any, name: str) -> None:
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise PlanError(f"the parameters have the key {key!r} in {name or 'their dict'}", "Give text without '/'")
        if key == _RESERVED and not name:
            raise PlanError(f"a parameter is named {key!r}, a name that safetensors keeps to itself", "Give it another")
        _check_keys(value, f"{name}/{key}" if name else key)


def _named(tree: Any, name: str) -> Any:
    """The same dicts, with names in place of arrays."""
    if not isinstance(tree, Mapping):
        return name
    return {key: _named(value, f"{name}/{key}" if name else key) for key, value in tree.items()}


def _filled(names: Any, by_name: Mapping[str, Any]) -> Any:
    if not isinstance(names, dict):
        return by_name[names]
    return {key: _filled(value, by_name) for key, value in names.items()}


def _told(value: Any) -> str:
    """What it is, in words."""
    name, kind = type(value).__name__, getattr(value, "dtype", None)
    name = "array" if isinstance(value, np.ndarray) else name
    return f"{with_article(name)}{'' if kind is None else f' of {kind}'}"


def _as_array(value: Any) -> Array | None:
    """The value as a NumPy array, on its own memory where it has some; None if it is none."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    if not hasattr(value, "__dlpack__"):
        return None
    try:
        array: Array = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError):  # on a device, or part of a graph
        return None
    return array
