"""``penstock torture``: the user's own job, killed at random instants, against an undisturbed run."""

from __future__ import annotations

from penstock.cli.load import load_job
from penstock.cli.outcome import DONE, FAILED, outcome

__all__ = ["torture_target"]


def torture_target(target: str, *, kills: int, seed: int | None) -> int:
    """Torture the job that ``FILE[:NAME]`` names, print what was found, and return the exit code."""

    def work() -> int:
        from penstock.testing.killing import torture

        result = torture(load_job(target), kills=kills, seed=seed, say=print)
        print(result)
        return DONE if result.passed else FAILED

    return outcome(work)
