"""How a benchmark is measured: each measurement in a process of its own, the variants alternating, medians quoted.

A benchmark is a file with a function for each variant (penstock, and each peer) that does the work once and returns
figures, and ``run()`` that measures them and returns rows. Run alone, the file prints its rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
HOUSE = HERE.parent
ENVIRONMENT = HOUSE / ".venv-bench"
DEADLINE = 300

Figures = dict[str, float]
Variant = Callable[..., Figures]


@dataclass
class Row:
    """One claim: ``figure`` is penstock's, ``beside`` the peer's.

    ``met`` is None where nothing is to be reached, and where the measurement is too coarse to say (``undecided``).
    """

    claim: str
    figure: str
    peer: str = ""
    beside: str = ""
    ratio: str = ""
    target: str = ""
    met: bool | None = None
    undecided: bool = False


@dataclass
class Picture:
    """A line for each of ``series``: a name, and its points."""

    name: str
    title: str
    across: str
    up: str
    series: dict[str, list[tuple[float, float]]]
    log_across: bool = False
    log_up: bool = False


@dataclass
class NotRun:
    """A variant that couldn't be measured, and why."""

    reason: str


@dataclass
class Outcome:
    """What ``run()`` returns."""

    rows: list[Row] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def python() -> str:
    """The interpreter of the environment in which everything is measured, peers and penstock alike."""
    inside = ENVIRONMENT / "bin" / "python"
    return str(inside) if inside.exists() else sys.executable


def environment() -> dict[str, str]:
    """One thread for each library that would start its own, so that cores are counted once."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **single, "PYTHONPATH": str(HOUSE / "src"), "PYTHONHASHSEED": "0"}


def measure(file: str, variant: str, **parameters: Any) -> Figures | NotRun:
    """Run one variant of a benchmark once, in a new process."""
    command = [python(), file, "--one", variant, json.dumps(parameters)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE, env=environment(), cwd=HERE, check=False
        )
    except subprocess.TimeoutExpired:
        return NotRun(f"no end within {DEADLINE} s")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return NotRun(said[-1][:200] if said else f"exit code {done.returncode}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def alternate(file: str, variants: Mapping[str, Mapping[str, Any]], rounds: int = 5) -> dict[str, Figures | NotRun]:
    """Measure each of ``variants`` (a label: the variant's name under "of", and its parameters) ``rounds`` times.

    Alternating, so that whatever else the machine does falls on all alike. Returns the median of each figure. A
    variant that fails once isn't tried again.
    """
    found: dict[str, list[Figures]] = {label: [] for label in variants}
    failed: dict[str, NotRun] = {}
    for _ in range(rounds):
        for label, given in variants.items():
            if label in failed:
                continue
            parameters = dict(given)
            figures = measure(file, str(parameters.pop("of", label)), **parameters)
            if isinstance(figures, NotRun):
                failed[label] = figures
            else:
                found[label].append(figures)
    return {label: failed.get(label) or _medians(found[label]) for label in variants}


def _medians(runs: Sequence[Figures]) -> Figures:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def need(figures: Figures | NotRun, what: str) -> Figures:
    """The figures of what a benchmark can't do without."""
    if isinstance(figures, NotRun):
        raise SystemExit(f"{what} could not be measured: {figures.reason}")
    return figures


def peak_memory() -> float:
    """The most memory this process has held, in MB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):  # since exec, where getrusage counts the parent's too
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def paired(some: Callable[[], float], others: Callable[[], float], pairs: int) -> Figures:
    """By how much ``some`` exceeds ``others``, as a share: the median of pairs run next to each other, in one process.

    For differences of a few per cent, which runs in different processes can't show. ``low`` and ``high`` hold the
    true median 19 times of 20, whatever the noise is like (by the order of the pairs, as a sign test does).
    """
    ratios, firsts, seconds = [], [], []
    for turn in range(pairs):
        if turn % 2:  # in turns, so that what drifts falls on both
            second, first = others(), some()
        else:
            first, second = some(), others()
        ratios.append(first / second - 1)
        firsts.append(first)
        seconds.append(second)
    ratios.sort()
    away = round(0.98 * sqrt(pairs))
    return {
        "cost": median(ratios),
        "low": ratios[max(0, pairs // 2 - away)],
        "high": ratios[min(pairs - 1, pairs // 2 + away)],
        "some": median(firsts),
        "others": median(seconds),
    }


def judged(row: Row, found: Figures, most: float) -> Row:
    """``row`` with what ``paired`` found: undecided where the bound lies within the uncertainty."""
    row.ratio = f"{found['cost']:+.1%} ({found['low']:+.1%} … {found['high']:+.1%})"
    row.target = f"≤ {most:.0%}"
    if found["high"] <= most:
        row.met = True
    elif found["low"] > most:
        row.met = False
    else:
        row.undecided = True
    return row


def versus(claim: str, figure: str, peer: str, beside: Figures | NotRun, told: Callable[[Figures], str]) -> Row:
    """A row beside a peer, without a target."""
    if isinstance(beside, NotRun):
        return Row(claim, figure, peer, f"not run: {beside.reason}")
    return Row(claim, figure, peer, told(beside))


def times(ratio: float) -> str:
    """A ratio in words.

    >>> times(8.93), times(0.5), times(250)
    ('8.9×', '0.50×', '250×')
    """
    if ratio >= 100:
        return f"{ratio:.0f}×"
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def table(rows: Sequence[Row]) -> list[str]:
    """The rows in Markdown."""
    lines = ["| claim | penstock | beside | its figure | ratio | to reach | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        verdict = "undecided" if row.undecided else "" if row.met is None else "met" if row.met else "**missed**"
        cells = (row.claim, row.figure, row.peer, row.beside, row.ratio, row.target, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def main(run: Callable[[], Outcome], *variants: Variant) -> None:
    """What a benchmark's file does when it is run: one variant for ``--one``, else all, printed."""
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        _, _, name, parameters = sys.argv
        variant = next(variant for variant in variants if variant.__name__ == name)
        print(json.dumps(variant(**json.loads(parameters))))
    elif len(sys.argv) > 1 and sys.argv[1] == "--json":
        print(json.dumps(asdict(run())))
    else:
        outcome = run()
        print("\n".join([*table(outcome.rows), *outcome.remarks]))
