"""``penstock run``: load the job, run it with signals handled, print its report."""

from __future__ import annotations

from penstock.cli.load import load_job
from penstock.cli.logfile import piped
from penstock.cli.outcome import DONE, outcome

__all__ = ["run_target"]


def run_target(target: str, *, to: str | None, fresh: bool, inline: bool, progress: bool | None) -> int:
    """Run the job that ``FILE[:NAME]`` names and return the exit code."""

    def work() -> int:
        report = load_job(target, to).run_sync(fresh=fresh, inline=inline, progress=progress)

        def tell() -> int:
            print(report)
            return DONE

        return piped(tell)

    return outcome(work)
