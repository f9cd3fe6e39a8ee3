"""Runs the benchmarks and writes RESULTS.md and its pictures: all of them, or those named.

Everything is measured in an environment of its own, ``.venv-bench``, which is built when it is missing: penstock's
dependencies, and the peers it stands beside (``peers.txt``). A peer that can't be installed is reported as not run.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import tomllib
import venv
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import ENVIRONMENT, HERE, HOUSE, Outcome, Picture, Row, environment, python, table

BENCHMARKS = (
    "images",
    "flow_overhead",
    "flow_growth",
    "flow_sleepers",
    "flow_uneven",
    "flow_threads",
    "flow_processes",
    "flow_call",
    "flow_report",
    "flow_resume",
    "start",
    "enrich_kills",
    "fetch_overhead",
    "limit_adaptive",
    "events_publish",
    "events_consume",
    "events_idle",
    "train_kernels",
    "train_latency",
    "train_straggler",
    "train_staleness",
    "train_torch",
)
STORE = HERE / "results.json"
SHOWN = HERE / "RESULTS.md"
QUIET = 0.05
"""The share of the machine that others may use before the figures say little."""
PICTURES = HERE / "pictures"
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def build_environment() -> None:
    """Make ``.venv-bench``, once, and again when what belongs there changes. A peer that fails is left out."""
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["parquet"], *extras["train"]]
    peers = [line for line in (HERE / "peers.txt").read_text().split("\n") if line and not line.startswith("#")]
    state = hashlib.sha256("\n".join([sys.version, *needed, *peers]).encode()).hexdigest()
    ready = ENVIRONMENT / "ready"
    if ready.exists() and ready.read_text() == state:
        return
    print(f"building {ENVIRONMENT.name}", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=ENVIRONMENT.exists())
    install = [python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--constraint", str(HOUSE / "constraints.txt"), *needed], check=True)
    for peer in peers:
        if subprocess.run([*install, peer], check=False).returncode:
            print(f"{peer} can't be installed: reported as not run", flush=True)
    ready.write_text(state)


def machine() -> dict[str, str]:
    """What it was measured on."""
    processor = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        names = [line.split(":", 1)[1].strip() for line in described.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": versions(),
    }


def busy() -> float | None:
    """CPU seconds that the whole machine has worked since it started; None where it doesn't say."""
    told = Path("/proc/stat")
    if not told.exists():
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, told.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def adopt() -> None:
    """Become the parent of what a killed benchmark leaves: daemons of Ray."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def ours() -> float:
    """CPU seconds of this process and of all that came from it, which has ended by then."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while left := children.read_text().split() if children.exists() else []:
        for child in map(int, left):  # what they leave is adopted in turn
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def versions() -> str:
    script = (
        "import platform, importlib.metadata as m\n"
        "names = 'numpy scipy numba uvloop aiohttp httpx apsw redis nats-py ray spdl-core aiostream pypeln'.split()\n"
        "names += 'joblib pillow torch'.split()\n"
        "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(', '.join(['Python ' + platform.python_version()] + [f'{n} {have[n]}' for n in names if n in have]))"
    )
    done = subprocess.run([python(), "-c", script], capture_output=True, text=True, check=True, env=environment())
    return done.stdout.strip()


def draw(picture: Picture) -> str | None:
    """The picture's file, relative to RESULTS.md; None if it can't be drawn."""
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / f"{picture.name}.svg"
    command = [python(), str(HERE / "picture.py"), str(path)]
    done = subprocess.run(
        command, input=json.dumps(asdict(picture)), capture_output=True, text=True, check=False, env=environment()
    )
    if done.returncode:
        print(f"the picture {picture.name} can't be drawn: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return f"pictures/{path.name}"


def entry(name: str) -> dict[str, Any]:
    """Run one benchmark; what RESULTS.md needs of it."""
    module = importlib.import_module(name)
    all_before, ours_before = busy(), ours()
    began = time.perf_counter()
    outcome: Outcome = module.run()
    seconds = time.perf_counter() - began
    all_after = busy()
    others = None
    if all_before is not None and all_after is not None:
        others = max(0.0, all_after - all_before - (ours() - ours_before)) / (seconds * (os.cpu_count() or 1))
    return {
        "about": (module.__doc__ or "").strip(),
        "rows": [asdict(row) for row in outcome.rows],
        "remarks": outcome.remarks,
        "pictures": [path for path in map(draw, outcome.pictures) if path],
        "seconds": round(seconds),
        "date": datetime.now(UTC).date().isoformat(),
        "others": others,
        **machine(),
    }


def show(results: dict[str, dict[str, Any]]) -> str:
    """RESULTS.md: what was missed first, then a table a benchmark."""
    rows = {name: [Row(**row) for row in result["rows"]] for name, result in results.items()}
    judged = [(name, row) for name in rows for row in rows[name] if row.met is not None]
    missed = [(name, row) for name, row in judged if not row.met]
    lines = ["# Results", "", "Written by `make bench`. Medians of alternating runs, each in a process of its own.", ""]
    lines.append(f"{len(judged) - len(missed)} of {len(judged)} figures are reached.")
    absent = [name for name in BENCHMARKS if name not in results]
    if absent:
        lines += ["", f"Not measured: {', '.join(absent)}."]
    undecided = [(name, row) for name in rows for row in rows[name] if row.undecided]
    loud = [name for name, result in results.items() if (result["others"] or 0) > QUIET]
    if loud:
        told = f"**The machine wasn't idle during {', '.join(loud)}: where it doesn't say who else worked, its figures"
        lines += ["", f"{told} say little.**"]
    if undecided:
        lines += ["", "Too noisy to decide:", ""]
        lines += [f"- [{name}](#{name}): {row.claim}: {row.ratio}, to reach: {row.target}" for name, row in undecided]
    if missed:
        lines += ["", "Missed:", ""]
        lines += [
            f"- [{name}](#{name}): {row.claim}: {row.ratio or row.figure}, to reach: {row.target}"
            for name, row in missed
        ]
    for name, result in results.items():
        lines += ["", f"## {name}", "", *result["about"].splitlines(), "", *table(rows[name])]
        for remark in result["remarks"]:
            lines += ["", remark]
        for picture in result["pictures"]:
            lines += ["", f"![{Path(picture).stem}]({picture})"]
        measured = (f"`python benchmarks/bench.py {name}`", result["date"], f"{result['seconds']} s", result["machine"])
        others = result["others"]
        if others is not None and others > QUIET:
            lines += ["", f"**Measured while other processes used {others:.0%} of the machine.**"]
        lines += ["", " · ".join([*measured, result["versions"]])]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"there is no benchmark {unknown[0]!r}. There are: {' '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    adopt()
    build_environment()
    results: dict[str, dict[str, Any]] = json.loads(STORE.read_text()) if STORE.exists() else {}
    failed = 0
    for name in names or BENCHMARKS:
        print(f"\n## {name}", flush=True)
        try:
            result = entry(name)
        except SystemExit as error:
            print(error, flush=True)
            failed += 1
            continue
        print("\n".join(table([Row(**row) for row in result["rows"]])), flush=True)
        results[name] = result
        results = {known: results[known] for known in BENCHMARKS if known in results}
        STORE.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        SHOWN.write_text(show(results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
