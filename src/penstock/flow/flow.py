"""Flow: a frozen description of what is to be done. Each verb returns a new one; nothing runs here.

Running is a matter of ``penstock.flow.run``, which is imported when something is to run.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Unpack, cast, overload

from penstock.errors import PlanError
from penstock.flow.contract import Failed, Results, Sink, Source
from penstock.flow.job import Job
from penstock.flow.memory import as_source
from penstock.flow.sink import as_sink
from penstock.flow.stage import (
    Batch,
    Defaults,
    Filter,
    FlatMap,
    Map,
    MapBatches,
    OnError,
    SinkOnError,
    Stage,
    StageOptions,
    Take,
    Unbatch,
    check_flow,
    check_to,
    check_wait,
    make_map_state,
    make_options,
    positive,
    with_defaults,
)

if TYPE_CHECKING:
    from penstock.flow.call import Call

__all__ = ["Flow", "changed"]

T = TypeVar("T")
U = TypeVar("U")


def changed(flow: Flow[Any], **parts: Any) -> Flow[Any]:
    """A flow like this one but for these parts."""
    other: Flow[Any] = object.__new__(Flow)
    for name in Flow.__slots__:
        object.__setattr__(other, name, parts[name] if name in parts else getattr(flow, name))
    return other


class Flow(Generic[T]):
    """Work to be done over items: a source and the stages its items pass, in order.

    ``source``: anything iterable or async iterable, or one of ``ps.read``; without one the flow is unbound, for
    ``over`` to give it one or ``open`` to serve live calls. ``name``: names the source, and so the job, across runs.
    ``id``: a field's name or a function that gives each item an id; progress is kept by ids, so that a reordered input
    can be resumed. An item without one fails, a repeated one where the sink keeps ids. Others: later stages' defaults.

    A flow is immutable: each verb returns a new flow, and one flow can be run any number of times.

    The parameters of the verbs that take a function (``map``, ``filter``, ``flat_map``, ``map_batches``):

    - ``place``: ``"loop"``, ``"thread"`` or ``"process"``. Default: an ``async def`` on the loop, a ``def`` in threads.
    - ``concurrency``: items in progress at once on the loop (32). ``workers``: threads or processes (cores; 1 with
      ``per_worker`` or ``map_batches``). Never exceeded. ``concurrency="auto"``, also in threads, finds how many give
      the most: up to 1,024 on the loop, 64 threads (or ``workers``).
    - ``limit``: a ``Limit``, how many calls may start a second or a minute. With it or ``concurrency="auto"``, a call
      that is answered with "too many requests" (429, as an exception or a result, of any SDK) waits as long as it was
      told and starts again; that costs no ``retry``. After ten minutes without one success it fails as ``throttled``.
    - ``ordered``: outputs in the order of the input (True), or as they complete.
    - ``key``: a function of an item. Items of one key are worked on one after the other, in order; keys in parallel.
    - ``retry``: further attempts after a failure, or a ``Retry``. ``timeout``: seconds for one attempt.
    - ``on_error``: ``"raise"`` (default), ``"skip"``, ``"keep"`` (a ``Failed`` goes on in the item's place), or
      ``"dead_letter"`` (kept beside the output, to be read by ``ps.read.dead``).
    - ``max_failures``: stop the run when more than this many items of the stage failed for good; below 1, a share. A
      stage's own None overrides the default of the flow, as it does for ``retry`` and ``timeout``.
    - ``name``: what the stage is called in reports; by default the function's name.

    Raises PlanError for what can't be run.

    >>> import penstock as ps
    >>> async def double(x: int) -> int:
    ...     return 2 * x
    >>> ps.Flow([1, 2, 3]).map(double).collect_sync()
    [2, 4, 6]
    """

    __slots__ = ("defaults", "id", "name", "source", "stages")

    source: Source[Any] | None
    stages: tuple[Stage, ...]
    name: str | None
    id: str | Callable[[Any], Any] | None
    defaults: dict[str, Any]

    def __init__(
        self,
        source: Iterable[T] | AsyncIterable[T] | Source[T] | None = None,
        *,
        name: str | None = None,
        id: str | Callable[[Any], Any] | None = None,
        **defaults: Unpack[Defaults],
    ) -> None:
        check_flow(name, id, dict(defaults))
        set_ = object.__setattr__
        set_(self, "source", None if source is None else as_source(source, name))
        set_(self, "stages", ())
        set_(self, "name", name)
        set_(self, "id", id)
        set_(self, "defaults", {key: value for key, value in defaults.items() if value is not None})

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError(f"a Flow can't be changed: {name}. Its verbs return new flows")

    __delattr__ = __setattr__

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        for name, value in state[1].items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        source = self.source.identity if self.source is not None else "unbound"
        return f"Flow({source}, {len(self.stages)} stages)"

    def _then(self, stage: Stage) -> Flow[Any]:
        return changed(self, stages=(*self.stages, stage))

    @overload
    def map(
        self, function: Callable[[T], Awaitable[U]], *, on_error: Literal["keep"], **options: Unpack[StageOptions]
    ) -> Flow[U | Failed]: ...
    @overload
    def map(
        self, function: Callable[[T], U], *, on_error: Literal["keep"], **options: Unpack[StageOptions]
    ) -> Flow[U | Failed]: ...
    @overload
    def map(
        self, function: Callable[[T], Awaitable[U]], *, on_error: OnError = ..., **options: Unpack[StageOptions]
    ) -> Flow[U]: ...
    @overload
    def map(
        self, function: Callable[[T], U], *, on_error: OnError = ..., **options: Unpack[StageOptions]
    ) -> Flow[U]: ...
    def map(self, function: Callable[[T], Any], **given: Any) -> Flow[Any]:
        """Call ``function`` with each item; its result takes the item's place. ``None`` is a value like any other.

        Parameters: see ``Flow``. Raises PlanError for a function that isn't callable, or a parameter out of range.

        >>> import penstock as ps
        >>> ps.Flow(["a", "b"]).map(str.upper).collect_sync()
        ['A', 'B']
        """
        name, options = make_options("map", function, given, self.defaults)
        return self._then(Map(function, name, options))

    @overload
    def filter(
        self,
        function: Callable[[T], object] | Callable[[T], Awaitable[object]],
        *,
        on_error: Literal["keep"],
        **options: Unpack[StageOptions],
    ) -> Flow[T | Failed]: ...
    @overload
    def filter(
        self,
        function: Callable[[T], object] | Callable[[T], Awaitable[object]],
        *,
        on_error: OnError = ...,
        **options: Unpack[StageOptions],
    ) -> Flow[T]: ...
    def filter(self, function: Callable[[T], Any], **given: Any) -> Flow[Any]:
        """Keep the items for which ``function`` returns something true; the others count as filtered.

        Parameters and errors: see ``Flow`` and ``map``; PlanError for what can't be run.

        >>> import penstock as ps
        >>> ps.Flow(range(5)).filter(lambda x: x % 2).collect_sync()
        [1, 3]
        """
        name, options = make_options("filter", function, given, self.defaults)
        return self._then(Filter(function, name, options))

    @overload
    def flat_map(
        self,
        function: Callable[[T], Awaitable[Iterable[U]]],
        *,
        whole: bool = ...,
        on_error: Literal["keep"],
        **options: Unpack[StageOptions],
    ) -> Flow[U | Failed]: ...
    @overload
    def flat_map(
        self,
        function: Callable[[T], AsyncIterable[U]],
        *,
        whole: bool = ...,
        on_error: Literal["keep"],
        **options: Unpack[StageOptions],
    ) -> Flow[U | Failed]: ...
    @overload
    def flat_map(
        self,
        function: Callable[[T], Iterable[U]],
        *,
        whole: bool = ...,
        on_error: Literal["keep"],
        **options: Unpack[StageOptions],
    ) -> Flow[U | Failed]: ...
    @overload
    def flat_map(
        self,
        function: Callable[[T], Awaitable[Iterable[U]]],
        *,
        whole: bool = ...,
        on_error: OnError = ...,
        **options: Unpack[StageOptions],
    ) -> Flow[U]: ...
    @overload
    def flat_map(
        self,
        function: Callable[[T], AsyncIterable[U]],
        *,
        whole: bool = ...,
        on_error: OnError = ...,
        **options: Unpack[StageOptions],
    ) -> Flow[U]: ...
    @overload
    def flat_map(
        self,
        function: Callable[[T], Iterable[U]],
        *,
        whole: bool = ...,
        on_error: OnError = ...,
        **options: Unpack[StageOptions],
    ) -> Flow[U]: ...
    def flat_map(self, function: Callable[[T], Any], *, whole: bool = True, **given: Any) -> Flow[Any]:
        """Call ``function`` with each item and pass on every element of what it returns or yields.

        ``whole=True`` commits all outputs of an item together (at most 100,000 an item): after a crash an item is
        there with all its outputs or with none. ``whole=False`` commits them one by one, for items of any size; the
        expansion must then be the same each time, since after a crash it is repeated and what is committed dropped.
        An ordered ``whole=False`` stage expands one item at a time.

        Parameters and errors: see ``Flow`` and ``map``; PlanError for what can't be run.

        >>> import penstock as ps
        >>> ps.Flow(["a b", "c"]).flat_map(str.split).collect_sync()
        ['a', 'b', 'c']
        """
        name, options = make_options("flat_map", function, given, self.defaults)
        return self._then(FlatMap(function, name, options, whole))

    @overload
    def map_batches(
        self,
        function: Callable[[list[T]], Awaitable[Results[U]]],
        *,
        batch_size: int,
        max_wait: float | None = ...,
        on_error: Literal["keep"],
        **options: Unpack[StageOptions],
    ) -> Flow[U | Failed]: ...
    @overload
    def map_batches(
        self,
        function: Callable[[list[T]], Results[U]],
        *,
        batch_size: int,
        max_wait: float | None = ...,
        on_error: Literal["keep"],
        **options: Unpack[StageOptions],
    ) -> Flow[U | Failed]: ...
    @overload
    def map_batches(
        self,
        function: Callable[[list[T]], Awaitable[Results[U]]],
        *,
        batch_size: int,
        max_wait: float | None = ...,
        on_error: OnError = ...,
        **options: Unpack[StageOptions],
    ) -> Flow[U]: ...
    @overload
    def map_batches(
        self,
        function: Callable[[list[T]], Results[U]],
        *,
        batch_size: int,
        max_wait: float | None = ...,
        on_error: OnError = ...,
        **options: Unpack[StageOptions],
    ) -> Flow[U]: ...
    def map_batches(
        self, function: Callable[[list[T]], Any], *, batch_size: int, max_wait: float | None = None, **given: Any
    ) -> Flow[Any]:
        """Call ``function`` with lists of items; it returns as many results, in order: a list, an array, any sequence.

        Items stay single outside.

        ``batch_size``: the most items of one call. ``max_wait``: seconds after which a smaller batch goes, counted
        since its *oldest* item came; None waits for a full batch or the end. If the function raises, the batch is
        halved and tried again until only the guilty items fail. Ceilings count batches.

        Parameters: see ``Flow``. Raises PlanError as ``map`` does; a result of another length is BatchMismatch.

        >>> import penstock as ps
        >>> ps.Flow([1, 2, 3]).map_batches(lambda xs: [x / max(xs) for x in xs], batch_size=2).collect_sync()
        [0.5, 1.0, 1.0]
        """
        name, options = make_options("map_batches", function, given, self.defaults, batches=True)
        if options.key is not None:
            raise PlanError(f"stage {name!r}: map_batches takes no key=", "Give key= to a map stage before or after it")
        size = positive(batch_size, f"stage {name!r}: batch_size")
        return self._then(MapBatches(function, name, options, size, check_wait(max_wait)))

    def batch(self, size: int, *, max_wait: float | None = None) -> Flow[list[T]]:
        """Make lists of ``size`` items (1 … or PlanError); the last may be shorter, and any after ``max_wait`` s.

        >>> import penstock as ps
        >>> ps.Flow(range(5)).batch(2).collect_sync()
        [[0, 1], [2, 3], [4]]
        """
        return self._then(Batch(positive(size, "batch(size)"), check_wait(max_wait)))

    @overload
    def unbatch(self: Flow[list[U]]) -> Flow[U]: ...
    @overload
    def unbatch(self: Flow[Sequence[U]]) -> Flow[U]: ...
    def unbatch(self: Flow[Any]) -> Flow[Any]:
        """Make single items of lists again.

        >>> import penstock as ps
        >>> ps.Flow([[1, 2], [3]]).unbatch().collect_sync()
        [1, 2, 3]
        """
        return self._then(Unbatch())

    def map_state(
        self,
        function: Callable[[Any, T], tuple[Any, U]] | Callable[[Any, T], Awaitable[tuple[Any, U]]],
        *,
        key: Callable[[T], Any] | None = None,
        initial: Any = None,
        name: str | None = None,
        on_error: OnError | None = None,
    ) -> Flow[U]:
        """Call ``function(state, item)`` for one item after the other; it returns (the key's new state, an output).

        ``key``: of an item; by default the event's over a topic, elsewhere there is one state. ``initial``: a key's
        first state. States are JSON or can be pickled; they count with the output, in its journal or the log. An
        update stays if its item dies later. Raises PlanError.

        >>> import penstock as ps
        >>> ps.Flow(["a", "b", "a"]).map_state(lambda n, x: (n + 1, (x, n)), key=str, initial=0).collect_sync()
        [('a', 0), ('b', 0), ('a', 1)]
        """
        return self._then(make_map_state(function, key, initial, name, on_error, self.defaults))

    def take(self, count: int) -> Flow[T]:
        """Let the first ``count`` items pass; what was taken beyond them is released, and the run ends.

        A resumed job goes on counting where the earlier run was. Raises PlanError for what is no count.

        >>> import penstock as ps
        >>> ps.Flow(range(1_000_000)).take(3).collect_sync()
        [0, 1, 2]
        """
        return self._then(Take(positive(count, "take(count)", least=0)))

    def over(self, source: Flow[Any] | Iterable[Any] | AsyncIterable[Any] | Source[Any]) -> Flow[T]:
        """Bind an unbound flow to a source, or to a flow: its stages then come first, and its defaults hold here too.

        Raises PlanError if this flow has a source already, or the other one has none.

        >>> import penstock as ps
        >>> work = ps.Flow().map(str.upper)
        >>> work.over(["a", "b"]).collect_sync()
        ['A', 'B']
        """
        if self.source is not None:
            raise PlanError("over() was called on a flow that has a source", "Start it with Flow(), without a source")
        if isinstance(source, Flow):
            if source.source is None:
                raise PlanError("over() was given an unbound flow", "Give it a source, or a flow that has one")
            flow = source
        else:
            flow = Flow(source, name=self.name, id=self.id)
        defaults = {**flow.defaults, **self.defaults}
        mine = [with_defaults(stage, defaults) for stage in self.stages]
        parts = {"name": self.name or flow.name, "id": self.id or flow.id, "defaults": defaults}
        return changed(self, source=flow.source, stages=(*flow.stages, *mine), **parts)

    def to(
        self,
        sink: str | PathLike[str] | Sink[Any] | Callable[[T], Any],
        *,
        name: str | None = None,
        on_error: SinkOnError | None = None,
    ) -> Job:
        """Say where the outputs go: a path (by suffix), one of ``ps.write``, or a function of one output.

        Paths and ``ps.write`` commit the progress with the data: run the job again after a crash and it goes on. A
        function is called at least once for each output. ``name``: the job's name, under which progress is kept;
        by default the source's and the sink's. ``on_error``: for outputs that the sink refuses; not ``"keep"``, which
        as a default of the flow means ``"raise"`` here: nothing comes after a sink.

        Raises PlanError for a suffix that isn't known, an object that is no sink, or another ``on_error``.

        >>> import penstock as ps
        >>> seen = []
        >>> report = ps.Flow([1, 2]).to(seen.append).run_sync()
        >>> sorted(seen), report.delivered
        ([1, 2], 2)
        """
        target: Any = fspath(sink) if isinstance(sink, PathLike) else sink
        return Job(self, as_sink(target), name=name, on_error=check_to(name, on_error, self.defaults))

    def explain(self) -> str:
        """Say how the flow would run: segments, placements, ceilings, and the guarantee with its reason.

        Raises PlanError for a flow that can't run.

        >>> import penstock as ps
        >>> print(ps.Flow([1, 2]).map(str, workers=2).explain().splitlines()[0])
        memory:list -> str
        """
        from penstock.flow.plan import make_plan

        return make_plan(self, None).explain()

    async def collect(self, *, inline: bool = False) -> list[T]:
        """Run the flow and return its outputs as a list.

        Raises what a stage raised, with notes that name stage, item and position; PlanError for a flow that can't
        run, SourceExhausted for a second pass over an iterator. Cancelling it first ends all that runs.

        >>> import asyncio, penstock as ps
        >>> asyncio.run(ps.Flow([1, 2]).map(str).collect())
        ['1', '2']
        """
        from penstock.flow.iterate import collect

        return cast("list[T]", await collect(self, inline=inline))

    def collect_sync(self, *, inline: bool = False) -> list[T]:
        """``collect`` for code that isn't async, also while a loop runs (a notebook); WrongLoop on its own loop."""
        from penstock.flow.sync import run_blocking

        return run_blocking(lambda: self.collect(inline=inline))

    def __aiter__(self) -> AsyncIterator[T]:
        """Run the flow and yield its outputs as they come; raises as ``collect``. Leaving early stops the run."""
        from penstock.flow.iterate import iterate

        return iterate(self)

    def __iter__(self) -> Iterator[T]:
        """The same for a plain ``for``, raising as ``collect``: the flow runs on the background loop."""
        from penstock.flow.iterate import iterate_blocking

        return iterate_blocking(self)

    def open(self, *, max_waiting: int = 1024) -> AbstractAsyncContextManager[Call[Any, T]]:
        """Serve live requests with an unbound flow: ``async with work.open() as call: answer = await call(x)``.

        Requests of all callers share the stages, so batches form across them; ``max_wait=`` bounds what a request
        waits for its batch. Stages run unordered inside (keys are kept), so nobody waits for the slowest. At most
        ``max_waiting`` requests wait to be started; beyond it ``call`` raises Overloaded at once. Each caller gets
        its own result or its own error. Leaving the block answers what was accepted, then ends the workers.

        Raises PlanError for a flow with a source, one that isn't one to one (``filter``, ``flat_map``, ``batch``,
        ``unbatch``, ``take``), and for ``on_error="skip"`` and ``"dead_letter"``. See ``Call`` for cancelling.

        >>> import asyncio, penstock as ps
        >>> async def main() -> str:
        ...     async with ps.Flow().map(str.upper).open() as call:
        ...         return await call("hello")
        >>> asyncio.run(main())
        'HELLO'
        """
        from penstock.flow.call import open_call

        return open_call(self, max_waiting)

    def open_sync(self, *, max_waiting: int = 1024) -> AbstractContextManager[Callable[[Any], T]]:
        """``open`` for code that isn't async: ``with work.open_sync() as call: answer = call(x)``, from any thread."""
        from penstock.flow.call import open_call_blocking

        return open_call_blocking(self, max_waiting)
