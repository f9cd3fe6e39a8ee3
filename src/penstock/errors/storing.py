"""What goes wrong with inputs, outputs, what is between them, and fetching."""

from __future__ import annotations

from typing import Any

from penstock.errors.base import PenstockError

__all__ = [
    "CannotEncode",
    "DecodeError",
    "FetchError",
    "ForeignOutput",
    "IdError",
    "JournalError",
    "OutputInUse",
    "OutputRejected",
    "ResumeMismatch",
    "WriteFailed",
]


class ResumeMismatch(PenstockError, RuntimeError):
    """The output holds the progress of another input or job: going on would lose or double items."""

    def __init__(self, output: str, reason: str) -> None:
        super().__init__(output, reason)
        self.output = output
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.reason}. Run with fresh=True (--fresh) to start over and overwrite the "
            "output, or write to another output"
        )


class OutputInUse(PenstockError, RuntimeError):
    """Another job writes ``path`` right now, in this process or another."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} is being written by another job. Wait for it to end, or write to another output"


class ForeignOutput(PenstockError, RuntimeError):
    """The output at ``path`` isn't what its journal, or the lack of one, says; it is left untouched."""

    def __init__(
        self,
        path: str,
        reason: str,
        remedy: str = "What it didn't write penstock never cuts: move it away (with its journal, if it has one), write "
        "to another output, or run with fresh=True (--fresh) to overwrite it",
    ) -> None:
        super().__init__(path, reason, remedy)
        self.path = path
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path} {self.reason}. {self.remedy}"


class JournalError(PenstockError, RuntimeError):
    """The journal at ``path`` can't be used: corrupt, unreadable, from a newer version, or no journal at all."""

    def __init__(
        self,
        path: str,
        reason: str,
        remedy: str = "Restore it from a copy, or run with fresh=True (--fresh) to start over",
    ) -> None:
        super().__init__(path, reason, remedy)
        self.path = path
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"the journal {self.path} can't be used: {self.reason}. {self.remedy}"


class DecodeError(PenstockError, ValueError):
    """What stands at ``path``, ``line`` (from 1) can't be read: ``reason``. In a topic, ``line`` is a position."""

    def __init__(self, path: str, line: int, reason: str, what: str = "line") -> None:
        super().__init__(path, line, reason, what)
        self.path = path
        self.line = line
        self.reason = reason
        self.what = what

    def __str__(self) -> str:
        return f"{self.path}, {self.what} {self.line}: {self.reason}"


class CannotEncode(PenstockError, TypeError):
    """A value of type ``type_name`` can't be written to ``target``: ``reason``."""

    def __init__(self, target: str, type_name: str, reason: str) -> None:
        super().__init__(target, type_name, reason)
        self.target = target
        self.type_name = type_name
        self.reason = reason

    def __str__(self) -> str:
        article = "an" if self.type_name[:1].lower() in "aeiou" else "a"
        return f"{article} {self.type_name} can't be written to {self.target}: {self.reason}"


class IdError(PenstockError, ValueError):
    """An item's ``id=`` is missing, null or repeated: ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}. With id= every item needs an id of its own"


class WriteFailed(PenstockError, OSError):
    """Writing ``path`` failed (a full disk, no permission). What was committed before is safe."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        remedy = "Make space, give permission, or whatever it needs, and run again: it goes on"
        return f"{self.path} can't be written: {self.reason}. {remedy}"


class OutputRejected(PenstockError, ValueError):
    """A sink refuses some outputs of one ``write`` and has written none of that call.

    ``rejected`` pairs the index in the sequence given to ``write`` with the error of that item. The run
    applies ``on_error`` to those items and writes the others again.
    """

    def __init__(self, rejected: list[tuple[int, Exception]]) -> None:
        super().__init__(rejected)
        self.rejected = rejected

    def __str__(self) -> str:
        first: Any = self.rejected[0][1] if self.rejected else "none"
        return f"{len(self.rejected)} outputs were refused; the first: {first}"


class FetchError(PenstockError, OSError):
    """A fetch of ``url`` failed: ``reason`` is the kind, a word of a closed set, and ``detail`` what happened.

    ``reason``: ``dns connect tls timeout throttled status decode too_big blocked``. ``url`` shows no credentials.
    ``status`` (also ``status_code``) and ``headers`` are the answer's, if there was one. ``retryable``: another attempt
    may succeed and does no harm. ``stops_run``: every other item would fail the same way.
    """

    def __init__(
        self,
        url: str,
        reason: str,
        detail: str = "",
        status: int | None = None,
        headers: dict[str, str] | None = None,
        retryable: bool = False,
        stops_run: bool = False,
    ) -> None:
        super().__init__(url, reason, detail, status, headers, retryable, stops_run)
        self.url = url
        self.reason = reason
        self.detail = detail
        self.status = status
        self.headers = headers or {}
        self.retryable = retryable
        self.stops_run = stops_run

    @property
    def status_code(self) -> int | None:
        """The status, under the name that most clients give it."""
        return self.status

    def __str__(self) -> str:
        return f"{self.reason}: {self.url}: {self.detail}"
