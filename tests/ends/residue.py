"""What a run may leave behind, and mustn't: looked for from inside the process that ran it."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter

import psutil

__all__ = ["Residue"]

HEAVY = {"Run", "Ledger", "LoopPool", "ThreadPool", "ProcessPool", "Link", "Desk"}
"""Objects that hold much, and are nobody's after a run."""


class Residue:
    """Descriptors and shared memory as they stand now; ``left`` compares with what stands later."""

    def __init__(self) -> None:
        self.before = self._state()

    @staticmethod
    def _state() -> Counter[str]:
        gc.collect()
        found: Counter[str] = Counter()
        for number in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{number}")
            except FileNotFoundError:  # the descriptor of this very listing
                continue
            found[f"descriptor {target.partition(':')[0]}"] += 1  # sockets and pipes differ by their number alone
        with open("/proc/self/maps") as maps:
            for line in maps:
                path = line.split(maxsplit=5)[5].strip() if line.count(" ") > 5 and len(line.split()) > 5 else ""
                if path.startswith(("/memfd:", "/dev/shm")) or path.endswith("(deleted)"):
                    found[f"memory {path}"] += 1
        for name in os.listdir("/dev/shm"):
            if "penstock" in name:
                found[f"shared memory {name}"] += 1
        for thing in gc.get_objects():
            if type(thing).__name__ in HEAVY and str(type(thing).__module__).startswith("penstock."):
                found[f"object {type(thing).__name__}"] += 1
        return found

    def left(self) -> list[str]:
        """What is there now and wasn't before: descriptors, memory, child processes, threads."""
        found = [f"{count} more: {name}" for name, count in (self._state() - self.before).items()]
        found += [f"child process: {' '.join(_command(child))}" for child in psutil.Process().children(recursive=True)]
        found += [
            f"thread: {thread.name}"
            for thread in threading.enumerate()
            if thread is not threading.main_thread() and thread.name != "penstock-loop"
        ]
        return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return [str(process.pid)]
