"""How long it takes to begin: ``import penstock`` and ``penstock --help``, beside an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import time

from harness import Figures, Outcome, Row, alternate, environment, main, need, python

COMMANDS = {
    "nothing": ["-c", "pass"],
    "imported": ["-c", "import penstock"],
    "helped": ["-m", "penstock.cli", "--help"],
}


def started(command: str) -> Figures:
    begun = time.perf_counter()
    subprocess.run([python(), *COMMANDS[command]], check=True, stdout=subprocess.DEVNULL, env=environment())
    return {"milliseconds": (time.perf_counter() - begun) * 1e3}


def run() -> Outcome:
    found = alternate(__file__, {name: {"of": "started", "command": name} for name in COMMANDS}, rounds=15)
    least = need(found["nothing"], "python")["milliseconds"]
    rows = []
    for name, claim, allowed in (("imported", "import penstock", 100), ("helped", "penstock --help", 300)):
        took = need(found[name], claim)["milliseconds"]
        more = took - least
        beside = f"{least:.0f} ms"
        rows.append(
            Row(
                claim,
                f"{took:.0f} ms",
                "python -c pass",
                beside,
                f"+ {more:.0f} ms",
                f"+ {allowed} ms",
                more <= allowed,
            )
        )
    return Outcome(rows)


if __name__ == "__main__":
    main(run, started)
