"""What a source and a sink must do, and what passes between them and a run.

The rules of exactly once stand in the design; these are their types. A sink commits the source's progress in the
same atomic act as its data: everything about crash-safety follows from ``Sink.commit`` being all or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import msgspec

from penstock.flow.progress import Intervals, Position, Positions, Progress

__all__ = [
    "SUFFIXES",
    "Delta",
    "Failed",
    "GivenUp",
    "Input",
    "JobId",
    "Origin",
    "Reading",
    "Results",
    "Sink",
    "Source",
    "Subscribed",
    "Unreadable",
    "Until",
    "is_subscribed",
]

T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)

Origin = tuple[Position, ...]
"""The source positions an output came of: one after ``map``, several after ``batch``."""

Until: TypeAlias = "Literal['drained'] | asyncio.Future[Any] | None"
"""When a run over a subscription ends: when nothing is left; the same, once a task is done; or never by itself."""

SUFFIXES: dict[str, str] = {
    ".jsonl": "penstock.files.write:jsonl",
    ".jsonl.gz": "penstock.files.write:jsonl",
    ".jsonl.zst": "penstock.files.write:jsonl",
    ".csv": "penstock.files.write:csv",
    ".csv.gz": "penstock.files.write:csv",
    ".csv.zst": "penstock.files.write:csv",
    ".parquet": "penstock.files.write:parquet",
    ".sqlite": "penstock.files.write:sqlite",
    ".db": "penstock.files.write:sqlite",
}
"""What ``.to("name.suffix")`` opens: 'module:function', imported on use. The one reference upward."""


class Failed(msgspec.Struct, frozen=True):
    """An item that failed for good, as ``on_error="keep"`` passes it on and ``read.dead`` reads it back.

    ``item`` is the source's item (for ``keep``: what the failed stage was given), ``position`` where it stands in
    the source, ``stage`` the stage that gave up, ``reason`` the kind of error (``ValueError``, ``timeout`` …),
    ``error`` its message, ``attempts`` how often it was tried.

    >>> import penstock as ps
    >>> def half(x: int) -> float:
    ...     return 1 / x
    >>> one, zero = ps.Flow([1, 0]).map(half, on_error="keep").collect_sync()
    >>> zero.reason, zero.item, zero.stage
    ('ZeroDivisionError', 0, 'half')
    """

    item: Any
    position: Position
    stage: str
    reason: str
    error: str
    attempts: int = 1


class GivenUp(Failed, frozen=True):
    """A Failed on its way to the dead letters. ``traceback``: from where the user's code begins; empty if the error
    wasn't raised there. A journal keeps only the message, a log both."""

    traceback: str = ""


class Results(Protocol[T_co]):
    """What the function of ``map_batches`` returns: a list, a tuple, an array; anything with a length and an order."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Yielded by a source in place of an item it can't decode: the run applies the source's ``on_error`` to it.

    ``raw`` is what stands there (for the dead letters), ``error`` what is wrong with it.
    """

    raw: Any
    error: Exception


@dataclass(frozen=True, slots=True)
class JobId:
    """Which job opens a sink.

    ``name``: the key under which its progress is kept. ``source``: the source's identity. ``fresh``: discard what
    is there. ``by_id``: progress is a set of ids. ``replayable``: False if an earlier run's progress can't be used.
    ``settles``: the source is told what is committed and remembers it, so that only the last commit is to be kept.
    """

    name: str
    source: str
    fresh: bool = False
    by_id: bool = False
    replayable: bool = True
    settles: bool = False


@dataclass(slots=True)
class Delta:
    """What one commit adds to a job's progress, besides the outputs written since the last commit.

    ``settled``: source positions now done with. ``children``: outputs of still unfinished ``flat_map(whole=False)``
    items (an item that is in ``settled`` has its record removed), with the best fate among them in ``fates`` (replacing
    what was stored; a number to be given back as it is). ``keys``: under ``id=``, the key of each position
    in ``settled`` and ``children``; ``digests`` that of the rows in ``children``, by key. ``taken`` and
    ``counts`` are amounts to add. ``dead``: letters to keep, one a source item (a later one replaces an earlier
    one at the same position or key); that of an unfinished item comes with the fate, and not again when it
    settles. ``states``: of each (stage, partition, key) of a ``map_state``, the state after the last item that left.
    ``snapshot``, ``plan``, ``report``: to be stored if not None. ``finished``: the source ended and everything is
    settled.
    """

    settled: Positions = field(default_factory=Positions)
    children: dict[Position, Intervals] = field(default_factory=dict)
    fates: dict[Position, int] = field(default_factory=dict)
    keys: dict[Position, str] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    dead: list[Failed] = field(default_factory=list)
    states: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    snapshot: Any = None
    plan: str | None = None
    report: dict[str, Any] | None = None
    finished: bool = False


class Input(Protocol):
    """What is known of an input before any of it is read."""

    @property
    def identity(self) -> str:
        """Names it, the same in every run over the same input: ``jsonl:texts/*.jsonl.gz``."""

    @property
    def replayable(self) -> bool:
        """Whether reading again gives the same items at the same positions."""

    @property
    def total(self) -> int | None:
        """How many items there are; None where that isn't known before all are read."""

    async def snapshot(self) -> Any:
        """What the input looks like now, as JSON-able data: sizes, digests. None where there is nothing to compare."""

    async def changed(self, before: Any) -> str | None:
        """How the input differs from an earlier snapshot, in words, beyond having grown; None if it doesn't."""


class Source(Input, Protocol[T_co]):
    """Where items come from. Methods but ``read`` may do nothing where they mean nothing."""

    def read(self, after: Progress) -> AsyncIterator[Sequence[tuple[Position, T_co]]]:
        """Yield the items that aren't settled in ``after``, in batches, each position once.

        Closing the iterator (``aclose``) frees what reading holds. Cancelling a read loses no item: what wasn't
        yielded is read again by a later run.
        """

    async def settle(self, positions: Positions) -> None:
        """The sink has committed these: a queue acknowledges here."""

    async def give_back(self, positions: Positions, delay: float = 0, reason: str | None = None) -> None:
        """These were taken and not finished: they may be read again after ``delay`` seconds."""

    def joins(self, sink: Any) -> bool:
        """Whether this source and that sink share a transaction, so that ``Sink.commit`` settles too."""


class Reading(Source[T_co], Protocol[T_co]):
    """What one run reads of a ``Subscribed``. Its items are taken, and then settled, given back or dead."""

    async def dead(self, letters: Sequence[Failed]) -> None:
        """These failed for good: they are kept among the dead letters. Called before their positions are settled."""

    async def close(self) -> None:
        """Give back what is left. Comes last; safe to call twice."""


class Subscribed(Input, Protocol[T_co]):
    """An input that doesn't end, of which each run has a ``Reading`` of its own. It keeps the dead letters itself."""

    def guarantee(self, sink: Sink[Any], *, one_by_one: bool) -> tuple[bool, str]:
        """Whether outputs in that sink are exactly once, and why. ``one_by_one``: some may be committed while others of
        their item are still to come."""

    def is_alone(self, sink: Sink[Any] | None) -> bool:
        """Whether a job into that sink reads it alone."""

    def begin(self, sink: Sink[Any], *, until: Until) -> tuple[Reading[T_co], Sink[Any]]:
        """A reading for one run, and the sink as that run uses it."""


def is_subscribed(source: Any) -> bool:
    """Whether a source is a ``Subscribed``."""
    return hasattr(source, "begin")


class Sink(Protocol[T_contra]):
    """Where outputs go. ``write`` is never called during ``commit``, and neither twice at once.

    A sink that is ``exactly_once`` keeps all of a ``Delta``, and gives it back as ``Progress`` when it is opened again:
    ``ids`` where the job keeps them, ``states`` for ``map_state``, ``children`` for ``flat_map(whole=False)``.
    (``Journal`` does that.) Two more are asked for where they are there: ``weakness``, why it is at least once, and
    ``status()``, a few words for the display.
    """

    @property
    def identity(self) -> str:
        """Names the output: its path, say."""

    @property
    def exactly_once(self) -> bool:
        """Whether ``commit`` makes data and progress durable in one act."""

    @property
    def keeps_dead(self) -> bool:
        """Whether ``commit`` stores dead letters."""

    @property
    def pace(self) -> float:
        """The least seconds between two commits, beyond the run's own pacing; 0 for none. Asked again and again."""

    async def open(self, job: JobId) -> Progress:
        """Take the output for this job alone; return what earlier runs committed; undo what doesn't count.

        Raises OutputInUse, ForeignOutput, ResumeMismatch (the output belongs to another job), JournalError.
        Writes nothing of the new run yet.
        """

    async def write(self, outputs: Sequence[tuple[Origin, Sequence[T_contra]]]) -> None:
        """Take these outputs; they count at the next commit. Raises OutputRejected, having taken none."""

    async def commit(self, delta: Delta) -> Positions:
        """Make all outputs written so far, and ``delta``, durable and counted: all or none.

        Returns the positions that were fenced: not settled because they belong to another reader by now.
        Shielded by the run: never cancelled half way.
        """

    async def close(self) -> None:
        """Release the output. What was written after the last commit doesn't count. Safe to call twice."""
