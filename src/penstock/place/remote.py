"""Exceptions between processes: as themselves, with the traceback they had there; else as the best likeness.

An exception is frozen where it was raised, with its name, message and traceback in words beside its pickle, so that
one whose pickle can't be made or read still arrives: as a ``RuntimeError`` of the same class name and message.
"""

from __future__ import annotations

import functools
import os
import pickle
from traceback import format_exception, format_exception_only
from types import TracebackType
from typing import Any

from penstock.errors import CannotSend
from penstock.place.pickling import dumps, received

__all__ = ["FrozenError", "freeze_error", "in_words", "refusal", "thaw_error"]

FrozenError = tuple[bytes | None, str, str, str]
"""Pickle or None, class name, message, traceback and where it was raised."""

_HERE = os.path.dirname(os.path.abspath(__file__))


def freeze_error(error: BaseException) -> FrozenError:
    """An exception in a form that always travels."""
    try:
        pickled = dumps(error, received)
    except Exception:
        pickled = None
    try:
        message = str(error)
    except Exception:  # a __str__ of the user's
        message = ""
    return pickled, type(error).__name__, message, f"In worker process {os.getpid()}:\n{_story(error)}"


def _story(error: BaseException) -> str:
    """The traceback from where the user's code begins."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames):
        frames = frames.tb_next
    try:
        lines = format_exception(type(error), error, frames) if frames else format_exception_only(error)
    except Exception:  # a __str__ of the user's
        lines = [type(error).__name__]
    return "".join(lines).rstrip()


def _is_ours(frames: TracebackType) -> bool:
    return frames.tb_frame.f_code.co_filename.startswith(_HERE)


def refusal(stage: str, value: Any, error: Exception, where: str = "") -> CannotSend:
    """What to report of a value whose pickling, or unpickling ``where``, raised ``error``.

    The error becomes its cause, without its frames: they would keep alive whatever they were at work on.
    """
    kind = type(value).__qualname__ if value is not None else "value"
    cannot = CannotSend(stage, kind, where + in_words(error))
    cannot.add_note(_story(error))
    cannot.__cause__ = error.with_traceback(None)
    return cannot


def thaw_error(frozen: FrozenError) -> BaseException:
    """The exception, with its remote traceback as a note."""
    pickled, name, message, text = frozen
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = pickle.loads(pickled)
        except Exception:
            pass
    if not isinstance(error, BaseException):
        error = _likeness(name)(message)
    error.add_note(text)
    return error


@functools.lru_cache(maxsize=256)
def _likeness(name: str) -> type[RuntimeError]:
    return type(name, (RuntimeError,), {"__doc__": "Stands for an exception that couldn't travel."})


def in_words(error: BaseException) -> str:
    """An exception on one line: its kind and message."""
    return "".join(format_exception_only(error)).strip()
