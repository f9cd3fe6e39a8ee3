"""What the commands on an event log have in common: its file, its topics, and positions and times as people write them.

A log is opened only where there is one: opening would make it, and naming a topic to it would make that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from penstock.cli.outcome import DONE
from penstock.errors import MissingInput, PenstockError, PlanError, WriteFailed

if TYPE_CHECKING:
    from penstock.events.log import EventLog
    from penstock.events.reading import TopicInfo

__all__ = ["check_log", "in_log", "json_value", "known_topic", "piped", "read_place", "shortened"]

T = TypeVar("T")

_MOST_NAMED = 10
_FAR = 1 << 40  # no topic holds so many


def check_log(path: str) -> None:
    """Raises MissingInput if there is no such file, PlanError if it is no event log."""
    from penstock.events.probe import is_log

    if not os.path.exists(path):
        raise MissingInput(path)
    if not is_log(path):
        if os.path.isfile(path) and not os.access(path, os.R_OK):
            raise PlanError(f"{path} can't be read: permission denied", "Give yourself permission to read and write it")
        raise PlanError(f"{path} is no event log", "Give the file that an EventLog writes to")


def in_log(path: str, work: Callable[[EventLog], Coroutine[Any, Any, T]]) -> T:
    """Open the log that is there and do some work with it. Raises MissingInput, PlanError, LogError and its own."""
    check_log(path)
    from penstock.events.log import EventLog
    from penstock.flow.sync import run_blocking

    async def whole() -> T:
        async with EventLog(path) as log:
            return await work(log)

    return run_blocking(whole)


async def known_topic(log: EventLog, name: str) -> TopicInfo:
    """A topic that the log has. Raises PlanError, which names those there are."""
    infos = await log.topics()
    for info in infos:
        if info.name == name:
            return info
    names = ", ".join(repr(info.name) for info in infos[:_MOST_NAMED]) + ", …" * (len(infos) > _MOST_NAMED)
    if not infos:
        raise PlanError(f"{log.address} has no topic {name!r}: it has none yet", "The first event makes a topic")
    raise PlanError(f"{log.address} has no topic {name!r}", f"Give one that it has: {names}")


def read_place(option: str, text: str) -> int | datetime:
    """The position or the time that somebody wrote. A time without a zone is this machine's. Raises PlanError.

    >>> read_place("--start", "120")
    120
    >>> read_place("--start", "2026-03-01T12:00:00Z").isoformat()
    '2026-03-01T12:00:00+00:00'
    """
    given = text.strip()
    if given.isascii() and given.isdigit():
        if len(given) < 15 and int(given) < _FAR:
            return int(given)
    else:
        try:
            time = datetime.fromisoformat(given)
            time = time if time.tzinfo is not None else time.astimezone()
            time.timestamp()
        except (ValueError, OverflowError, OSError):
            pass
        else:
            return time
    raise PlanError(
        f"{option} {text!r} is no position and no time", "Give a number from 0, or 2026-03-01T12:00:00+01:00"
    )


def json_value(body: bytes | None) -> dict[str, Any]:
    """A payload as a field of a JSON object: ``value``, or ``bytes`` (in base64) where it isn't JSON."""
    if body is None:
        return {"value": None}
    try:
        return {"value": msgspec.json.decode(body)}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {"bytes": body}


def shortened(text: str, most: int) -> str:
    """The beginning of a text, in one line that does nothing to a terminal."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return line if len(line) <= most else line[: most - 1] + "…"


def piped(work: Callable[[], int]) -> int:
    """Do some work that prints; when who reads it has had enough (``| head``), that is all that was asked.

    Raises WriteFailed if what it is printed to can't be written.
    """
    try:
        code = work()
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, PenstockError):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or Python would complain when it flushes at the end
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            return DONE
        raise WriteFailed("standard output", str(error)) from error
    return code
