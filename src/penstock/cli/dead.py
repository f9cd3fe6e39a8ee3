"""``penstock dead``: what failed for good, as a table for people and as JSON lines for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from penstock.cli.outcome import DONE, outcome
from penstock.errors import PlanError
from penstock.flow.contract import Failed

__all__ = ["show_dead"]

_LONGEST = 60


def show_dead(output: Path, *, requeue: bool) -> int:
    """Print the dead letters beside ``output`` and return the exit code."""

    def work() -> int:
        from penstock.files import read

        if requeue:
            raise PlanError(
                f"--requeue puts the events of a log back on their topic, and {output} is the output of a job",
                f"Mend the cause, then run ps.read.dead({str(output)!r}) into the same output: what succeeds is "
                "appended and its letter removed",
            )
        letters = read.dead(output)
        if sys.stdout.isatty():
            _table(letters)
        else:
            for letter in letters:
                sys.stdout.buffer.write(msgspec.json.encode(letter, enc_hook=repr) + b"\n")
            sys.stdout.flush()
        return DONE

    return outcome(work)


def _table(letters: Iterable[Failed]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("position", "stage", "reason", "error", "attempts", "item", box=None, pad_edge=False)
    count = 0
    for letter in letters:
        partition, index = letter.position
        row = (f"{partition}:{index}", letter.stage, letter.reason, letter.error, letter.attempts, repr(letter.item))
        table.add_row(*(Text(_short(str(cell))) for cell in row))  # Text: an error may hold what looks like markup
        count += 1
    console = Console(highlight=False)
    if count:
        console.print(table)
    console.print(f"{count} dead letter{'s' * (count != 1)}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
