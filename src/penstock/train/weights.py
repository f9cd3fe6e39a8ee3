"""The weights, what the optimizer remembers, and the version: one thing, behind one lock.

Whoever holds the lock reads or changes all three, and nothing in between is ever seen. What is applied has been checked
before: nothing here fails half way. There is one writer at a time and it never waits for a reader that could die with
the lock: other processes get copies.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.errors import GradientRejected, PlanError
from penstock.train import kernels
from penstock.train.consistency import Consistency
from penstock.train.kernels import Array
from penstock.train.optimizer import Optimizer
from penstock.train.params import Layout, as_version, first_bad_plainly

__all__ = ["Snapshot", "Weights"]

_STALEST = 1000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Weights, the optimizer's arrays (for each slot one for each parameter), and their version."""

    weights: list[Array]
    states: list[list[Array]]
    version: int


class Weights:
    """The parameters of one model, on vectors."""

    def __init__(self, params: Any, optimizer: Optimizer, consistency: Consistency) -> None:
        self.layout = Layout(params)
        self.optimizer = optimizer
        self.consistency = consistency
        self.version = 0
        self.dropped = 0
        self.counts: Counter[int] = Counter()
        self._weights = [vector.copy() for vector in self.layout.vectors(params)]
        try:
            self.layout.check_finite(self._weights, first_bad_plainly)
        except GradientRejected as error:
            told = f"ParameterServer: the parameter {error.parameter!r} has a NaN or an infinity"
            raise PlanError(told, "Give finite numbers to begin with") from None
        self._states = [[np.zeros_like(vector) for vector in self._weights] for _ in optimizer.slots]
        self._lock = threading.Lock()
        self._first: Snapshot | None = None
        self._begun = 0  # the version at which this server began

    @property
    def staleness(self) -> dict[int, int]:
        """How many gradients that were applied were how many updates late."""
        with self._lock:
            return dict(sorted(self.counts.items()))

    def copy(self) -> tuple[list[Array], int]:
        """A copy of the weights, all of one version."""
        with self._lock:
            return [vector.copy() for vector in self._weights], self.version

    def copy_into(self, targets: Sequence[Array]) -> int:
        """Copy the weights to where they are wanted; returns their version."""
        with self._lock:
            for target, vector in zip(targets, self._weights, strict=True):
                np.copyto(target, vector)
            return self.version

    def snapshot(self) -> Snapshot:
        """A copy of everything, between two updates."""
        with self._lock:
            states = [[vector.copy() for vector in state] for state in self._states]
            return Snapshot([vector.copy() for vector in self._weights], states, self.version)

    def restore(self, found: Snapshot) -> None:
        """Go on from here: when the server opens, or, after updates that weren't saved, from what was saved last.

        Where nothing was applied yet, what there was is kept for ``reset``.
        """
        with self._lock:
            if self.version == self._begun:
                self._first = self._first or Snapshot(self._weights, self._states, self.version)
                self._begun = found.version
            self._take(found)

    def reset(self) -> None:
        """Take back what was restored. Raises PlanError if there were updates since: nothing remembers from where."""
        with self._lock:
            if self.version != self._begun:
                raise PlanError(
                    f"fresh=True, and this server has applied {self.version - self._begun} updates since it was made",
                    "Make a new ParameterServer with the parameters to begin with",
                )
            first, self._first = self._first, None
            if first is not None:
                self._take(first)
                self._begun = first.version

    def _take(self, found: Snapshot) -> None:
        self._weights, self._states, self.version = found.weights, found.states, found.version

    def checked_version(self, version: Any) -> int:
        """A version that the weights have had. Raises PlanError for anything else."""
        return as_version(version, self.version, f", and the server is at version {self.version}")

    def push(self, gradients: Sequence[Array], version: int) -> int:
        """Check gradients, then apply them; returns the version afterwards. Raises GradientRejected; nothing has
        changed then."""
        self.layout.check_finite(gradients)
        with self._lock:
            self._update(gradients, version)
            return self.version

    def apply(self, gradients: Sequence[Array], version: int) -> bool:
        """Apply gradients computed from this version, which are finite; False if they were too stale for that."""
        with self._lock:
            return self._update(gradients, version)

    def _update(self, gradients: Sequence[Array], version: int) -> bool:
        stale = self.version - version
        if self.consistency.drops(stale):
            self.dropped += 1
            return False
        damping = self.consistency.damping(stale)
        self.optimizer.update(self._weights, self._states, gradients, self.version, damping=damping)
        self.counts[min(stale, _STALEST)] += 1
        self.version += 1
        return True

    def apply_mean(self, several: Sequence[tuple[Sequence[Array], int]]) -> int:
        """Apply the mean of several gradients, added up in this order, as one update. The first are overwritten.

        Raises GradientRejected where their sum is beyond what the type holds; nothing has changed then.
        """
        (total, _), *others = several
        for gradients, _ in others:
            for into, vector in zip(total, gradients, strict=True):
                kernels.accumulate(into, vector)
        if others:
            self.layout.check_finite(total)
        with self._lock:
            self.optimizer.update(self._weights, self._states, total, self.version, scale=1 / len(several))
            for _, version in several:
                self.counts[min(self.version - version, _STALEST)] += 1
            self.version += 1
            return self.version
