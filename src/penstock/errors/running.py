"""What goes wrong with flows and their running."""

from __future__ import annotations

from penstock.errors.base import PenstockError

__all__ = [
    "AbandonedThreads",
    "BatchMismatch",
    "CannotSend",
    "Closed",
    "Deadlock",
    "ExpansionTooLarge",
    "FailureBudgetExceeded",
    "MissingDependency",
    "MissingInput",
    "Overloaded",
    "PlanError",
    "SourceExhausted",
    "StageTimeout",
    "StrayException",
    "Throttled",
    "WorkerDied",
    "WrongLoop",
]


class PlanError(PenstockError, ValueError):
    """A description that can't be run: refused before anything starts or is written.

    ``problem`` says what was given and expected, ``remedy`` what to do instead.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}" if self.remedy else self.problem


class MissingDependency(PenstockError, ImportError):
    """An optional package is needed: ``package``, for ``purpose``, installed by ``extra``."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(package, purpose, extra)
        self.package = package
        self.purpose = purpose
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.purpose} needs {self.package}. Install it, or penstock with its extra: penstock[{self.extra}]"


class MissingInput(PenstockError, FileNotFoundError):
    """A file to read isn't there, or a pattern matches none. ``path`` is what was asked for."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        if any(mark in self.path for mark in "*?["):
            return f"no file matches {self.path!r}. Check the pattern and the current directory"
        return f"there is no file {self.path!r}. Check the path and the current directory"


class SourceExhausted(PenstockError, RuntimeError):
    """A one-shot iterator (a generator, say) was iterated a second time. ``source`` names it."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source = source

    def __str__(self) -> str:
        return (
            f"{self.source} was already read by an earlier run, and an iterator can be read only once. "
            "Give Flow a list, a file, or a new generator for each run"
        )


class StageTimeout(PenstockError, TimeoutError):
    """One attempt at ``stage`` took longer than its ``timeout=`` of ``seconds``."""

    def __init__(self, stage: str, seconds: float) -> None:
        super().__init__(stage, seconds)
        self.stage = stage
        self.seconds = seconds

    def __str__(self) -> str:
        return f"stage {self.stage!r}: an attempt took longer than its timeout of {self.seconds:g} s"


class StrayException(PenstockError, RuntimeError):
    """``stage`` let out an exception that Python itself steers by (``kind``); it is the cause of this one.

    A ``CancelledError`` while nobody cancelled the run, a ``StopIteration`` of a bare ``next()``: raised as itself it
    would cancel or end, without a word, whatever code it comes to.
    """

    def __init__(self, stage: str, kind: str) -> None:
        super().__init__(stage, kind)
        self.stage = stage
        self.kind = kind

    def __str__(self) -> str:
        meaning = "a cancellation" if self.kind == "CancelledError" else "the end of an iteration"
        return (
            f"stage {self.stage!r} raised {self.kind} by itself, which would be taken for {meaning} outside of it. "
            "Catch it in the function, and return a value or raise another exception"
        )


class Throttled(PenstockError, RuntimeError):
    """What ``stage`` calls answered "too many requests" for ``seconds``, without one success between."""

    def __init__(self, stage: str, seconds: float) -> None:
        super().__init__(stage, seconds)
        self.stage = stage
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"stage {self.stage!r}: for {self.seconds / 60:g} minutes every call was refused as too many. "
            "Look whether the quota is used up, and run the job again when there is some: what is done stays done"
        )


class AbandonedThreads(PenstockError, RuntimeError):
    """More threads of ``stage`` hang past their timeout (``count``) than it has workers, or for batches twice that."""

    def __init__(self, stage: str, count: int) -> None:
        super().__init__(stage, count)
        self.stage = stage
        self.count = count

    def __str__(self) -> str:
        return (
            f"stage {self.stage!r}: {self.count} threads timed out and still run. A thread can't be killed: "
            "give the function a timeout of its own, or run the stage with place='process'"
        )


class WorkerDied(PenstockError, RuntimeError):
    """A worker process of ``stage`` ended (``exit_code``; negative: a signal) while it worked on ``item``."""

    def __init__(self, stage: str, exit_code: int | None, item: str) -> None:
        super().__init__(stage, exit_code, item)
        self.stage = stage
        self.exit_code = exit_code
        self.item = item

    def __str__(self) -> str:
        code = self.exit_code
        how = "ended"
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        memory = "Signal 9 is often the system running out of memory; " if code == -9 else ""
        return (
            f"stage {self.stage!r}: its worker process {how} while it worked on {self.item}. "
            f"{memory}retry= gives the item another worker"
        )


class CannotSend(PenstockError, TypeError):
    """A value of type ``type_name`` can't travel to or from the worker processes of ``stage``."""

    def __init__(self, stage: str, type_name: str, reason: str) -> None:
        super().__init__(stage, type_name, reason)
        self.stage = stage
        self.type_name = type_name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"stage {self.stage!r}: a {self.type_name} can't be sent between processes ({self.reason}). "
            "Send plain data and build such objects in the worker with per_worker(), or use place='thread'"
        )


class BatchMismatch(PenstockError, ValueError):
    """The function of a ``map_batches`` stage returned ``returned`` for ``given`` items."""

    def __init__(self, stage: str, given: int, returned: str) -> None:
        super().__init__(stage, given, returned)
        self.stage = stage
        self.given = given
        self.returned = returned

    def __str__(self) -> str:
        return (
            f"stage {self.stage!r}: was given a list of {self.given} items and returned {self.returned}. "
            f"Return a list of {self.given} results, in the order of the items"
        )


class ExpansionTooLarge(PenstockError, ValueError):
    """One item of a ``flat_map`` gave more than ``bound`` outputs, which are held to be committed together."""

    def __init__(self, stage: str, bound: int) -> None:
        super().__init__(stage, bound)
        self.stage = stage
        self.bound = bound

    def __str__(self) -> str:
        return (
            f"stage {self.stage!r}: one item gave more than {self.bound:,} outputs, which flat_map holds to "
            "commit them together. Use flat_map(..., whole=False), which commits them one by one"
        )


class FailureBudgetExceeded(PenstockError, RuntimeError):
    """``failed`` of ``tried`` items failed at ``stage``: more than ``max_failures=`` allows (``budget``)."""

    def __init__(self, stage: str, failed: int, tried: int, budget: float, example: str) -> None:
        super().__init__(stage, failed, tried, budget, example)
        self.stage = stage
        self.failed = failed
        self.tried = tried
        self.budget = budget
        self.example = example

    def __str__(self) -> str:
        allowed = f"{self.budget:.0%}" if self.budget < 1 else f"{self.budget:g}"
        return (
            f"stage {self.stage!r}: {self.failed} of {self.tried} items failed, more than max_failures="
            f"{self.budget:g} allows ({allowed}); the last: {self.example}. "
            "Mend the cause and run the job again: what is done stays done"
        )


class Overloaded(PenstockError, RuntimeError):
    """``call`` refused a request at once: ``waiting`` already wait, and ``bound`` is the most that may."""

    def __init__(self, waiting: int, bound: int) -> None:
        super().__init__(waiting, bound)
        self.waiting = waiting
        self.bound = bound

    def __str__(self) -> str:
        return (
            f"{self.waiting} requests wait already and the bound is {self.bound}. "
            "Answer 503 and let the client come back, or raise open(max_waiting=)"
        )


class WrongLoop(PenstockError, RuntimeError):
    """``call`` was awaited on another event loop than the one that opened it, or a ``_sync`` call made on its own.

    ``problem`` says what was done, ``remedy`` what to do instead.
    """

    def __init__(
        self,
        problem: str = "call() belongs to the event loop that opened it",
        remedy: str = "Await it there, or open one on this loop",
    ) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}"


class Closed(PenstockError, RuntimeError):
    """``what`` was used before it was opened, or after it was closed or shut down."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} is closed: use it inside its 'async with' block, and no longer once that was shut down"


class Deadlock(PenstockError, RuntimeError):
    """On the virtual clock: ``tasks`` wait, and nothing can ever wake them."""

    def __init__(self, tasks: list[str]) -> None:
        super().__init__(tasks)
        self.tasks = tasks

    def __str__(self) -> str:
        waiting = "; ".join(sorted(self.tasks))
        return (
            f"nothing can ever happen again: no timer, thread, process or socket is left to wake {waiting}. "
            "Look for a future that nobody sets, a lock that nobody releases or a queue that nobody fills"
        )
