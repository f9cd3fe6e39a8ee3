"""The process that torture kills: it runs the job it was handed, and says when it begins."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from typing import cast

from penstock.flow.job import Job
from penstock.flow.output import Output

__all__ = ["main"]


def main() -> None:
    """Run the job in ``payload`` with its output at ``output``; touch ``ready`` before. Ends with its parent."""
    payload, output, ready = sys.argv[2:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job: Job = pickle.loads(Path(payload).read_bytes())
    cast("Output", job.sink).path = output  # this process has a sink of its own
    Path(ready).touch()
    job.run_sync(progress=False)


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter ends
    os.killpg(os.getpgid(0), signal.SIGKILL)
