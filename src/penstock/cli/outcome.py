"""What a command ends with: an exit code, and one sentence where a traceback would say less."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from types import TracebackType

from penstock.errors import MissingDependency, MissingInput, PenstockError, PlanError, SourceExhausted

__all__ = ["DONE", "FAILED", "INTERRUPTED", "outcome", "say"]

DONE = 0
FAILED = 1
_BAD_DESCRIPTION = 2
INTERRUPTED = 130

_BAD = (PlanError, MissingInput, MissingDependency, SourceExhausted)


def outcome(work: Callable[[], int]) -> int:
    """Do a command's work and return its exit code, having said on stderr what went wrong.

    What penstock raises is one sentence (and its notes); what the user's own code raises keeps its traceback, from
    where that code begins.
    What can't be run at all is one line, with the place in the file if that is known. A drained SIGINT or SIGTERM
    counts as interrupted.
    """
    try:
        return work()
    except KeyboardInterrupt:
        say("interrupted: what was finished is committed; run it again to go on")
        return INTERRUPTED
    except SystemExit as exit_:
        if exit_.code == 143:  # 128 + SIGTERM, as a drained run raises it
            say("terminated: what was finished is committed; run it again to go on")
            return INTERRUPTED
        raise
    except _BAD as error:
        say(_with_notes(error))
        return _BAD_DESCRIPTION
    except PenstockError as error:
        _say_error(error)
        return FAILED
    except Exception as error:
        traceback.print_exception(type(error), error, _from_user_code(error))
        return FAILED


def _from_user_code(error: Exception) -> TracebackType | None:
    """The traceback without what called the user's code; all of it if there is none: the fault is penstock's."""
    folders = (os.path.dirname(os.path.dirname(__file__)), sysconfig.get_path("stdlib"))
    ours = (*(os.path.join(folder, "") for folder in folders), "<frozen")
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename.startswith(ours):
        found = found.tb_next
    is_outside = found is not None or isinstance(error, SyntaxError)  # which names its place by itself
    return found if is_outside else error.__traceback__


def say(text: str) -> None:
    """One line on stderr."""
    print(f"penstock: {text}", file=sys.stderr)


def _with_notes(error: BaseException) -> str:
    """The sentence with its notes (where it came up) in brackets before its full stop."""
    sentence = str(error)
    notes = "; ".join(getattr(error, "__notes__", ()))
    if notes:
        sentence = f"{sentence.removesuffix('.')} ({notes})"
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def _say_error(error: PenstockError) -> None:
    """A penstock error without its traceback: the sentence, then the notes that name stage, item and position."""
    sentence = str(error)
    say(sentence if sentence.endswith((".", "?", "!")) else f"{sentence}.")
    for note in getattr(error, "__notes__", ()):
        print(f"  {note}", file=sys.stderr)
