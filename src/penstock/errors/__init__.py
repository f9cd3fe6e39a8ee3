"""Every exception of penstock: one base, flat, each with its fields and its own message.

Each class stores what it was given as attributes and in ``args``, so that it survives pickling between
processes, and builds its sentence in ``__str__``: what was given, what was expected, what to do next.
What a user's own function raises is never wrapped: it arrives as itself, with notes.
"""

from __future__ import annotations

from penstock.errors.base import (
    PenstockError,
)
from penstock.errors.events import (
    GroupInUse,
    LeaseLost,
    LogError,
    PayloadTooLarge,
    Unsupported,
)
from penstock.errors.running import (
    AbandonedThreads,
    BatchMismatch,
    CannotSend,
    Closed,
    Deadlock,
    ExpansionTooLarge,
    FailureBudgetExceeded,
    MissingDependency,
    MissingInput,
    Overloaded,
    PlanError,
    SourceExhausted,
    StageTimeout,
    StrayException,
    Throttled,
    WorkerDied,
    WrongLoop,
)
from penstock.errors.storing import (
    CannotEncode,
    DecodeError,
    FetchError,
    ForeignOutput,
    IdError,
    JournalError,
    OutputInUse,
    OutputRejected,
    ResumeMismatch,
    WriteFailed,
)
from penstock.errors.training import (
    CheckpointRejected,
    GradientRejected,
)

__all__ = [
    "AbandonedThreads",
    "BatchMismatch",
    "CannotEncode",
    "CannotSend",
    "CheckpointRejected",
    "Closed",
    "Deadlock",
    "DecodeError",
    "ExpansionTooLarge",
    "FailureBudgetExceeded",
    "FetchError",
    "ForeignOutput",
    "GradientRejected",
    "GroupInUse",
    "IdError",
    "JournalError",
    "LeaseLost",
    "LogError",
    "MissingDependency",
    "MissingInput",
    "OutputInUse",
    "OutputRejected",
    "Overloaded",
    "PayloadTooLarge",
    "PenstockError",
    "PlanError",
    "ResumeMismatch",
    "SourceExhausted",
    "StageTimeout",
    "StrayException",
    "Throttled",
    "Unsupported",
    "WorkerDied",
    "WriteFailed",
    "WrongLoop",
]
