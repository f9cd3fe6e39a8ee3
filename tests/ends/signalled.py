"""A job that is at work until somebody interrupts it: ``signalled.py PLACE ORDER HOW``.

Its first items pass; from HELD on each says "at work" and is held until the pipe at ``gate`` closes. How it then
ended, and what is left of it, is said in a line of JSON; then the job is run again, to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import json
import logging
import os
import sys
from typing import Any

from residue import Residue

import penstock as ps

DEADLINE = 20
COUNT = 1000
HELD = 40

released = os.environ.get("RELEASED") == "yes"


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def note(x: int) -> None:
    """Write down that x was started, in whatever process this is."""
    started = os.open("started", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(started, f"{x}\n".encode())
    os.close(started)


def wait_at_the_gate() -> None:
    """Until its writing end closes; when its name is gone, that is about to be, or was."""
    with contextlib.suppress(FileNotFoundError), open("gate", "rb") as gate:
        gate.read()


def hold(x: int) -> int:
    """In a thread or a process."""
    if x >= HELD and not released:
        note(x)
        say("at work")
        wait_at_the_gate()
    return x


async def hold_on_the_loop(x: int) -> int:
    if x >= HELD and not released:
        note(x)
        say("at work")
        loop = asyncio.get_running_loop()
        closed = loop.create_future()
        try:
            gate = os.open("gate", os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return x
        loop.add_reader(gate, lambda: closed.done() or closed.set_result(None))
        try:
            await closed
        finally:
            loop.remove_reader(gate)
            os.close(gate)
    return x


def hold_in_c(x: int) -> int:
    """Never leaves one call into C, and never lets go of the interpreter's lock."""
    if x >= HELD and not released:
        say("at work")
        max(itertools.repeat(0))
    return x


class Unbuilt:
    """Its constructor doesn't return until the gate closes."""

    def __init__(self) -> None:
        if not released:
            say("at work")
            wait_at_the_gate()

    def __call__(self, x: int) -> int:
        return x


def make_job(place: str, order: str, how: str) -> ps.Job:
    options: dict[str, Any] = {"place": place, ("concurrency" if place == "loop" else "workers"): 2}
    if order == "unordered":
        options["ordered"] = False
    if order == "keyed":
        options["key"] = lambda x: x % 3
    work = hold_on_the_loop if place == "loop" else hold
    if how == "in_c":
        work = hold_in_c
    if how == "opening":
        work = ps.per_worker(Unbuilt)
    return ps.Flow(range(COUNT), name="numbers").map(work, **options).to("out.jsonl")


class Tell(logging.Handler):
    """Says what penstock logs, so that who sends the signals knows when one was understood."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def main() -> None:
    global released
    place, order, how = sys.argv[1:4]
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    logging.getLogger("asyncio").addFilter(lambda record: not str(record.msg).startswith("Executing "))
    logging.getLogger("penstock").addHandler(Tell())
    job = make_job(place, order, how)
    ps.Flow([1]).collect_sync()
    before = Residue()
    ended: dict[str, Any] = {"raised": None}
    try:
        if how == "await":
            report = asyncio.run(job.run())
        elif how == "signals":
            report = asyncio.run(job.run(signals=True))
        else:
            report = job.run_sync(progress=False)
        ended["report"] = report.to_dict()
    except (KeyboardInterrupt, SystemExit) as error:
        ended["raised"] = repr(error)
    ended["left"] = before.left()
    say(json.dumps(ended))
    released = True
    os.environ["RELEASED"] = "yes"  # workers start afresh
    say(json.dumps(job.run_sync(progress=False).to_dict()))


if __name__ == "__main__":
    main()
