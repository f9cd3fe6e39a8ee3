"""What all files written by a flow share: one job at a time, a journal, and one thread that touches the disk.

An output is closed, or open for one job. All that blocks runs on the output's desk, a thread that takes one call after
the other; what a cancelled caller left there still runs to its end, so ``close`` queued behind it finds the output
as that call left it. In order:

1. ``open`` takes the lock, refuses what is foreign, opens the journal, has it refuse another job's progress, and only
   then undoes what the journal doesn't count. If any of this fails or is cancelled, the output is closed again.
2. ``write`` takes its outputs before its first await: cancelled or not, they count at the next commit.
3. ``commit`` makes the data durable, then the journal. If either fails, the output is broken: what was taken may be
   lost to it, so nothing is committed any more, and nothing is undone, since the journal alone knows what
   counts. The next ``open`` undoes the rest.
4. ``close`` undoes what isn't committed, tells the journal so, and gives the lock back.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from penstock.errors import Closed, OutputInUse, PlanError
from penstock.flow.blocking import Desk
from penstock.flow.contract import Delta, JobId, Origin
from penstock.flow.disk import make_directory, sync_directory, writing
from penstock.flow.journal import Journal, journal_path, letters_identity
from penstock.flow.lock import OutputLock
from penstock.flow.progress import Known, Positions, Progress
from penstock.flow.text import printable

__all__ = ["ELSEWHERE", "START_OVER", "OnDesk", "Output"]

ELSEWHERE = "Write to another output"
"""What to do about an output that can't be one."""

START_OVER = "Restore it, or run with fresh=True (--fresh) to start over"
"""What to do about an output that has lost what its journal counts."""


class Output(ABC):
    """A Sink with a journal. Subclasses say how data is encoded, made durable, undone and removed."""

    exactly_once = True
    keeps_dead = True
    pace = 0.0
    kind = ""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._check_name(self.path)
        self._desk: Desk | None = None
        self._lock: OutputLock | None = None
        self._broken: BaseException | None = None

    def _check_name(self, path: str) -> None:
        if path != printable(path):
            problem = f"write.{self.kind}({printable(path)!r}): the name isn't Unicode"
            raise PlanError(problem, "Give one that is: SQLite, which keeps the journal, can't open others")

    def __repr__(self) -> str:
        return f"write.{self.kind}({self.path!r})"

    @property
    def identity(self) -> str:
        return f"{self.kind}:{self.path}"

    @property
    def letters(self) -> str:
        """The identity of the source that reads this output's dead letters: a job over it redoes them here."""
        return letters_identity(self.path)

    async def open(self, job: JobId) -> Progress:
        """Take the output for this job. Cancelling leaves it closed.

        Raises OutputInUse, ForeignOutput, ResumeMismatch, JournalError, WriteFailed; PlanError for ``fresh`` in a
        job that redoes this output's own dead letters.
        """
        if self._desk is not None:
            raise OutputInUse(self.path)
        desk = self._desk = Desk(f"penstock-{self.identity}")
        self._broken = None
        try:
            progress: Progress = await desk.call(self._open, job)
        except BaseException:
            await self.close()
            raise
        journal = OnDesk(desk, self._journal)
        progress.states = journal
        if job.by_id and job.source != self.letters:
            progress.ids = journal
        return progress

    @abstractmethod
    async def write(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> None:
        """Take these outputs; they count at the next commit, also if this call is cancelled."""

    async def commit(self, delta: Delta) -> Positions:
        """Make what was written, and ``delta``, durable and counted. Not to be cancelled: the run shields it.

        Raises WriteFailed; nothing is committed then, and nothing can be until the output is opened again.
        """
        await self._opened().call(self._guarded, self._commit, delta)
        return Positions()

    async def close(self) -> None:
        """Undo what isn't committed and give the output back. Safe to call twice; cancelling leaves it to finish."""
        desk, self._desk = self._desk, None
        if desk is not None:
            try:
                await desk.call(self._close)
            finally:
                await desk.close()

    def _opened(self) -> Desk:
        if self._desk is None:
            raise Closed(repr(self))
        return self._desk

    # On the desk.

    def _open(self, job: JobId) -> Progress:
        if job.fresh and job.source == self.letters:
            raise PlanError(
                f"fresh=True would discard {self.path} together with the dead letters that are to be redone",
                "Run it without fresh=True: what is redone is added to the output",
            )
        self.real = os.path.realpath(self.path)
        self._check_name(self.real)
        with writing(self.path):
            make_directory(os.path.dirname(self.real))
            self._lock = OutputLock(self.real)
            self._prepare(fresh=job.fresh)
            is_new = not os.path.exists(self.journal)
            self._journal = self._make_journal()
            if is_new:
                sync_directory(os.path.dirname(self.journal))
            progress = self._journal.load(job)
            self._recover(self._journal)
        return progress

    def _make_journal(self) -> Journal:
        return Journal(self.journal, output=self.path, letters=self.letters)

    @property
    def journal(self) -> str:
        """Where this output's journal stands."""
        return journal_path(self.path)

    def _guarded(self, function: Any, *args: Any) -> Any:
        """Call what changes the output; after it has failed once, refuse."""
        if self._broken is not None:
            raise self._broken
        try:
            with writing(self.path):
                return function(*args)
        except BaseException as error:
            self._broken = error
            raise

    def _close(self) -> None:
        if self._lock is None:
            return
        try:
            journal = self.__dict__.pop("_journal", None)
            if journal is not None:
                clean = False
                try:
                    clean = self._undo() if self._broken is None else False
                finally:
                    try:
                        self._free()
                    finally:
                        journal.close(clean=clean)
        finally:
            lock, self._lock = self._lock, None
            lock.release()

    @abstractmethod
    def _prepare(self, *, fresh: bool) -> None:
        """Before the journal is opened: discard everything if ``fresh``; otherwise raise ForeignOutput for an
        output that has no journal and isn't empty."""

    @abstractmethod
    def _recover(self, journal: Journal) -> None:
        """Bring the output to what the journal counts; raise ForeignOutput for what isn't this job's."""

    @abstractmethod
    def _commit(self, delta: Delta) -> None:
        """Make the data durable, then the journal."""

    @abstractmethod
    def _undo(self) -> bool:
        """Take back what isn't committed; whether nothing of it is left."""

    @abstractmethod
    def _free(self) -> None:
        """Close what is open; safe to call when opening failed half way."""


class OnDesk:
    """What the journal knows of ids and states, asked on the desk."""

    def __init__(self, desk: Desk, journal: Journal) -> None:
        self._desk = desk
        self._journal = journal

    async def look_up(self, keys: list[str]) -> list[Known]:
        known: list[Known] = await self._desk.call(self._journal.look_up, keys)
        return known

    async def load_states(self, stage: str, keys: list[str]) -> dict[str, bytes]:
        states: dict[str, bytes] = await self._desk.call(self._journal.load_states, stage, keys)
        return states
