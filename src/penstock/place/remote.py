"""Exceptions between processes: as themselves, with the traceback they had there; else as the best likeness.

An exception is frozen where it was raised, with its name, message and traceback in words beside its pickle, so that
one whose pickle can't be made or read still arrives: as a ``RuntimeError`` of the same class name and message. What
plain values it had as attributes come along, and the status and headers of the response it may hold: an SDK's errors
seldom survive pickling, and a limit has to learn from them all the same.
"""

from __future__ import annotations

import functools
import os
import pickle
from contextlib import suppress
from traceback import format_exception, format_exception_only
from types import SimpleNamespace, TracebackType
from typing import Any

from penstock.errors import CannotSend
from penstock.place.base import annotate
from penstock.place.pickling import dumps, received

__all__ = ["FrozenError", "freeze_error", "in_words", "refusal", "thaw_error"]

FrozenError = tuple[bytes | None, str, str, str, dict[str, Any]]
"""Pickle or None, class name, message, traceback and where it was raised, plain attributes."""

_PLAIN = (str, int, float, bool)
_LONGEST = 4096

_HERE = os.path.dirname(os.path.abspath(__file__))


def freeze_error(error: BaseException, where: str = "worker process") -> FrozenError:
    """An exception in a form that always travels; ``where`` it was raised."""
    try:
        pickled = dumps(error, received)
    except Exception:
        pickled = None
    try:
        message = str(error)
    except Exception:  # a __str__ of the user's
        message = ""
    text = f"In {where} {os.getpid()}:\n{_story(error)}"
    return pickled, type(error).__name__, message, text, _attributes(error)


def _attributes(error: BaseException) -> dict[str, Any]:
    """What of an exception's attributes always travels."""
    found: dict[str, Any] = {}
    for name, value in getattr(error, "__dict__", {}).items():
        with suppress(ValueError):  # an int of thousands of digits has no text
            if name != "response" and type(value) in _PLAIN and len(str(value)) <= _LONGEST:
                found[name] = value
    try:
        response: Any = getattr(error, "response")  # noqa: B009  # by this name nearly every SDK has it
        headers = {str(name): str(value) for name, value in dict(response.headers).items()}
        status = getattr(response, "status_code", None) or response.status
        found["response"] = {"status_code": int(status), "headers": headers}
    except Exception:  # there is none, or it is of some other kind
        pass
    return found


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
    pickled, name, message, text, attributes = frozen
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = pickle.loads(pickled)
        except Exception:
            pass
    if not isinstance(error, BaseException):
        error = _likeness(name)(message)
    for attribute, value in attributes.items():
        with suppress(Exception):  # it may be a property, or there may be slots
            if not hasattr(error, attribute):
                setattr(error, attribute, SimpleNamespace(**value) if attribute == "response" else value)
    annotate(error, text)
    return error


@functools.lru_cache(maxsize=256)
def _likeness(name: str) -> type[RuntimeError]:
    return type(name, (RuntimeError,), {"__doc__": "Stands for an exception that couldn't travel."})


def in_words(error: BaseException) -> str:
    """An exception on one line: its kind and message."""
    return "".join(format_exception_only(error)).strip()
