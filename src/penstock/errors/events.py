"""What goes wrong with event logs."""

from __future__ import annotations

from penstock.errors.base import PenstockError

__all__ = [
    "GroupInUse",
    "LeaseLost",
    "LogError",
    "PayloadTooLarge",
    "Unsupported",
]


class LogError(PenstockError, RuntimeError):
    """The event log at ``path`` can't be used: it is no log, is damaged, or a newer penstock wrote it.

    ``reason`` says what is wrong, ``remedy`` what to do.
    """

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path = path
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path} can't be used as an event log: {self.reason}. {self.remedy}"


class GroupInUse(PenstockError, RuntimeError):
    """A ``group`` is read by ``other``, and one of the two needs it alone."""

    def __init__(self, group: str, other: str) -> None:
        super().__init__(group, other)
        self.group = group
        self.other = other

    def __str__(self) -> str:
        return (
            f"the group {self.group!r} is read by {self.other}, and exactly once into a file needs a group alone. "
            "Stop the other, use another group, or give exclusive=False: at least once"
        )


class LeaseLost(PenstockError, RuntimeError):
    """A delivery of ``group`` is no longer this reader's own: its lease ended, and it may be with another by now."""

    def __init__(self, group: str) -> None:
        super().__init__(group)
        self.group = group

    def __str__(self) -> str:
        return (
            f"the delivery isn't this reader's own any more: its lease in the group {self.group!r} ended, and it is "
            "given to another. What was done for it may be done twice; a longer lease= outlasts longer standstills"
        )


class PayloadTooLarge(PenstockError, ValueError):
    """An event of ``size`` bytes is more than a log takes, ``limit``."""

    def __init__(self, topic: str, size: int, limit: int) -> None:
        super().__init__(topic, size, limit)
        self.topic = topic
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"topic {self.topic!r}: an event of {self.size:,} bytes is over the limit of {self.limit:,}. "
            "Publish where it lies instead, or open the log with a larger max_bytes"
        )


class Unsupported(PenstockError, NotImplementedError):
    """A log was asked for what it can't do: ``what``, of ``log``, and ``remedy``."""

    def __init__(self, log: str, what: str, remedy: str) -> None:
        super().__init__(log, what, remedy)
        self.log = log
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.log} has no {self.what}. {self.remedy}"
