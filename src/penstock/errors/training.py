"""What goes wrong while a model is trained."""

from __future__ import annotations

from penstock.errors.base import PenstockError

__all__ = ["CheckpointRejected", "GradientRejected"]


class GradientRejected(PenstockError, ValueError):
    """Gradients that can't be applied: nothing of them was. ``parameter`` is the one at fault ("" for all of them),
    ``problem`` says what was given and expected."""

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(parameter, problem)
        self.parameter = parameter
        self.problem = problem

    def __str__(self) -> str:
        where = f"the gradient of {self.parameter!r}" if self.parameter else "the gradients"
        return f"{where}: {self.problem}"


class CheckpointRejected(PenstockError, RuntimeError):
    """The checkpoint at ``path`` can't be gone on from: ``problem``. It is left as it is."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path = path
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"the checkpoint {self.path} {self.problem}. {self.remedy}"
