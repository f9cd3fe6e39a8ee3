"""Checkpoint: where a parameter server keeps its weights, how often, and how many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import isfinite
from typing import Any

from penstock.errors import PlanError

__all__ = ["Checkpoint", "as_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """The directory in which weights, the optimizer's arrays and the progress of ``fit`` are kept, all as of one
    moment.

    ``path``: made if it isn't there. The weights are in ``model-….safetensors`` under their names (``"layer/weight"``;
    ``"params"`` where they are one array), as others read them; what the optimizer remembers is in
    ``optimizer-….safetensors``, and which of them count, with the progress, in ``checkpoint.db`` (SQLite).

    ``seconds``: the least time between two of them, 1 by default; in any case they take at most 5 % of the time.
    ``updates``: also after so many updates, if that is sooner. One is made at the end in any case. ``keep``: how many
    of the last ones stay, 2 by default. Raises PlanError for values out of range.

    >>> Checkpoint("run", seconds=60, keep=3)
    Checkpoint(path='run', seconds=60, updates=None, keep=3)
    """

    path: str
    seconds: float = 1.0
    updates: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        path: Any = self.path
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise PlanError(f"Checkpoint({path!r})", "Give the path of a directory, which is made if it isn't there")
        object.__setattr__(self, "path", os.fspath(path))
        seconds: Any = self.seconds
        if (
            not isinstance(seconds, (int, float))
            or isinstance(seconds, bool)
            or not (seconds >= 0 and isfinite(seconds))
        ):
            raise PlanError(f"Checkpoint(seconds={seconds!r})", "Give the least seconds between two, 0 or more")
        for name, value in (("updates", self.updates), ("keep", self.keep)):
            if value is None and name == "updates":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"Checkpoint({name}={value!r})", "Give a whole number of at least 1")


def as_checkpoint(value: Any) -> Checkpoint | None:
    """What ``checkpoint=`` means: a path, a Checkpoint, or None for none. Raises PlanError for anything else."""
    if value is None or isinstance(value, Checkpoint):
        return value
    if isinstance(value, (str, os.PathLike)):
        return Checkpoint(os.fspath(value))
    raise PlanError(
        f"ParameterServer(checkpoint={value!r:.60})",
        "Give the path of a directory, or ps.Checkpoint('run', seconds=60)",
    )
