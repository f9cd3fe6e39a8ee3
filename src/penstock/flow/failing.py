"""What becomes of a failed attempt: another one, or one of the four ends that ``on_error`` names."""

from __future__ import annotations

import os
from traceback import format_exception, format_exception_only
from typing import Any, NamedTuple

from penstock.errors import (
    FailureBudgetExceeded,
    FetchError,
    PenstockError,
    StageTimeout,
    StrayException,
    Throttled,
    WorkerDied,
)
from penstock.flow.contract import Failed, GivenUp
from penstock.flow.memory import position_of
from penstock.flow.meter import StageMeter
from penstock.flow.origin import positions_of
from penstock.flow.redact import redact
from penstock.flow.report import ErrorLog
from penstock.flow.retry import Retry
from penstock.place.base import DIED, TIMED_OUT, Task, annotate, as_failure

__all__ = [
    "DEAD_LETTER",
    "KEEP_IT",
    "RAISE",
    "RETRY",
    "SKIP",
    "Policy",
    "Tries",
    "Verdict",
    "reason_of",
    "short",
    "story_of",
]

RETRY, RAISE, SKIP, KEEP_IT, DEAD_LETTER = range(5)

_ENDS = {"raise": RAISE, "skip": SKIP, "keep": KEEP_IT, "dead_letter": DEAD_LETTER}
_HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LONGEST = 8192  # characters of a traceback
_FEWEST_TRIED = 20  # a share is judged only after so many items


Tries = dict[int, tuple[str, int]]
"""By the id() of a task that failed and isn't through yet: the stage it failed at, and how often."""


class Verdict(NamedTuple):
    """``kind``, and with it the exception to raise, the seconds to wait, or the Failed to keep."""

    kind: int
    error: BaseException
    delay: float = 0.0
    failed: Failed | None = None


def short(value: Any) -> str:
    """A value in at most 200 characters, whatever its repr does, and without a URL's credentials."""
    try:
        text = redact(repr(value))
    except Exception as error:
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _message_of(error: BaseException) -> str:
    """What an error says, whatever its ``__str__`` does."""
    try:
        return str(error)
    except Exception as raised:
        return f"<{type(error).__name__} whose str raised {type(raised).__name__}>"


def reason_of(error: BaseException) -> str:
    """The kind of an error in a word."""
    if isinstance(error, StageTimeout):
        return "timeout"
    if isinstance(error, WorkerDied):
        return "worker died"
    if isinstance(error, Throttled):
        return "throttled"
    if isinstance(error, FetchError):
        return error.reason
    if isinstance(error, StrayException):
        return error.kind
    return type(error).__name__


def story_of(error: BaseException) -> str:
    """The traceback from where the user's code begins, and that of another process; empty if there is neither."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_HOUSE):
        frames = frames.tb_next
    if frames is None and not getattr(error, "__notes__", ()):
        return ""
    try:
        lines = format_exception(type(error), error, frames) if frames else format_exception_only(error)
    except Exception:  # a __str__ of the user's
        return ""
    text: str = redact("".join(lines).rstrip())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}\n…\n{text[-_LONGEST // 2 :]}"


def _stops_run(error: BaseException) -> bool:
    return isinstance(error, PenstockError) and error.stops_run


class Policy:
    """How one stage deals with failures; ``tries``, shared by a segment, remembers how often a task was tried.

    Where there is a ``budget``, the segment counts in ``tried`` the items that the stage has tried, whatever came of
    them.
    """

    def __init__(
        self,
        stage: str,
        meter: StageMeter,
        errors: ErrorLog,
        *,
        retry: Retry | None = None,
        timeout: float | None = None,
        on_error: str = "raise",
        max_failures: float | None = None,
        tries: Tries | None = None,
    ) -> None:
        self.stage = stage
        self.meter = meter
        self.errors = errors
        self.retry = retry
        self.timeout = timeout
        self.end = _ENDS[on_error]
        self.budget = max_failures
        self.judges_share = max_failures is not None and 0 < max_failures < 1
        self.tried = 0
        self._tries: Tries = {} if tries is None else tries

    def judge(self, task: Task) -> Verdict:
        """Decide on a task that FAILED, TIMED_OUT or DIED at this stage."""
        error: Any = task.error if task.outcome == DIED else as_failure(self.stage, task.error)
        task.error = None  # tasks are hidden from the garbage collector: a cycle through one would never be freed
        if task.outcome == TIMED_OUT and not isinstance(error, StageTimeout):
            error = StageTimeout(self.stage, self.timeout or 0.0)
        elif task.outcome == DIED:
            error = WorkerDied(self.stage, error, short(task.value))
        stage, attempts = self._tries.pop(id(task), (self.stage, 0))
        attempts = attempts + 1 if stage == self.stage else 1
        repeats = False
        if self.retry is not None and not _stops_run(error):
            try:
                repeats = self.retry.repeats(error, attempts)
            except Exception as raised:  # by the function of on=: the item fails with that, as its key= would fail it
                raised.__cause__ = error
                annotate(raised, f"raised by Retry(on=) of stage {self.stage!r}, when it was asked about its cause")
                error = raised
        if self.retry is not None and repeats:
            self._tries[id(task)] = (self.stage, attempts)
            self.meter.retried += 1
            return Verdict(RETRY, error, self.retry.delay(attempts))
        return self.give_up(task.value, task.origin, error, attempts)

    def give_up(self, value: Any, origin: Any, error: BaseException, attempts: int) -> Verdict:
        """No further attempt: log it and say what ``on_error`` makes of it."""
        error = as_failure(self.stage, error)
        position = positions_of(origin)[0]
        reason = reason_of(error)
        self.meter.failed += 1
        message = _message_of(error)
        self.errors.add(self.stage, reason, message, position)
        if self.end == RAISE or not isinstance(error, Exception) or _stops_run(error):
            tried = f", tried {attempts} times" if attempts > 1 else ""
            annotate(error, f"at stage {self.stage!r}, {position_of(position)}{tried}: {short(value)}")
            return Verdict(RAISE, error)
        exceeded = self._over_budget(f"{reason}: {message}")
        if exceeded is not None:
            exceeded.__cause__ = error
            return Verdict(RAISE, exceeded)
        if self.end == DEAD_LETTER:
            failed: Failed = GivenUp(value, position, self.stage, reason, message, attempts, story_of(error))
        else:
            failed = Failed(value, position, self.stage, reason, message, attempts)
        return Verdict(self.end, error, failed=failed)

    def _over_budget(self, example: str) -> FailureBudgetExceeded | None:
        budget, failed, tried = self.budget, self.meter.failed, self.tried
        if budget is None:
            return None
        if self.judges_share:
            over = tried >= _FEWEST_TRIED and failed > budget * tried
        else:
            over = failed > budget
        return FailureBudgetExceeded(self.stage, failed, tried, budget, example[:200]) if over else None
