"""One small frozen description for each kind of stage, and the parameters they share.

Nothing here runs. What can be wrong with a single stage is refused here, when the verb is called; what can be wrong
between stages is refused by the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import isfinite
from typing import Any, Literal, TypedDict

from penstock.errors import PlanError
from penstock.flow.host import host_of
from penstock.flow.limit import Limit
from penstock.flow.retry import Retry, as_retry
from penstock.place.base import PerWorker, Pool, cores, is_async

__all__ = [
    "Batch",
    "Defaults",
    "Filter",
    "FlatMap",
    "Map",
    "MapBatches",
    "MapState",
    "OnError",
    "Options",
    "SinkOnError",
    "Stage",
    "StageOptions",
    "Take",
    "Unbatch",
    "Work",
    "check_flow",
    "check_to",
    "check_wait",
    "code_digest",
    "describe",
    "function_name",
    "make_map_state",
    "make_options",
    "pacing",
    "positive",
    "with_defaults",
]

OnError = Literal["raise", "skip", "keep", "dead_letter"]
SinkOnError = Literal["raise", "skip", "dead_letter"]

_PLACES = ("loop", "thread", "process")
_ON_ERROR = ("raise", "skip", "keep", "dead_letter")
# How fast, which may change between runs; and what the rest was made of.
_NOT_DESCRIBED = ("place", "ceiling", "named", "auto", "limit", "site", "gate", "given")
_LOOP_CONCURRENCY = 32
_MOST = {"loop": 1024, "thread": 64}  # what concurrency="auto" may find; processes: as many as there are cores


class StageOptions(TypedDict, total=False):
    """The keyword parameters of every stage with a function, but ``on_error``."""

    name: str
    place: Literal["loop", "thread", "process"]
    concurrency: int | Literal["auto"]
    workers: int
    ordered: bool
    key: Callable[[Any], Any]
    limit: Limit | None
    retry: int | Retry | None
    timeout: float | None
    max_failures: float | None


class Defaults(TypedDict, total=False):
    """What ``Flow(source, ...)`` can set for every stage."""

    place: Literal["loop", "thread", "process"]
    concurrency: int | Literal["auto"]
    workers: int
    ordered: bool
    limit: Limit | None
    retry: int | Retry | None
    timeout: float | None
    on_error: OnError
    max_failures: float | None


@dataclass(frozen=True, slots=True)
class Options:
    """The resolved parameters of one stage with a function.

    ``ceiling``: items in progress at once (concurrency on the loop, workers elsewhere); ``named`` if the stage
    itself named it, so that it isn't shared with its neighbours; ``auto``: the most that may be found to be best.
    ``site``: a function that gives the host an item goes to, where rates and concurrency are kept by host. ``gate``:
    makes a pool around the stage's own (``inner=``), which starts items by a rule of its own. ``given``: what the stage
    itself said; the rest are defaults.
    """

    place: str
    ceiling: int
    named: bool
    ordered: bool = True
    key: Callable[[Any], Any] | None = None
    retry: Retry | None = None
    timeout: float | None = None
    on_error: str = "raise"
    max_failures: float | None = None
    auto: bool = False
    limit: Limit | None = None
    site: Callable[[Any], str] | None = None
    gate: Callable[..., Pool] | None = None
    given: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def gated(self) -> bool:
        """Whether items wait for more than a free worker before they start."""
        return self.auto or self.limit is not None or self.gate is not None


@dataclass(frozen=True, slots=True)
class Work:
    """A stage that calls a function."""

    function: Any
    name: str
    options: Options

    verb = "map"

    def unordered(self) -> Work:
        return replace(self, options=replace(self.options, ordered=False))


@dataclass(frozen=True, slots=True)
class Map(Work):
    """One output for each item."""


@dataclass(frozen=True, slots=True)
class Filter(Work):
    """Keeps the items for which the function says yes."""

    verb = "filter"


@dataclass(frozen=True, slots=True)
class FlatMap(Work):
    """Any number of outputs for each item; ``whole``: committed together."""

    whole: bool = True

    verb = "flat_map"


@dataclass(frozen=True, slots=True)
class MapBatches(Work):
    """The function takes a list of items and returns a list of as many results."""

    batch_size: int = 1
    max_wait: float | None = None

    verb = "map_batches"


@dataclass(frozen=True, slots=True)
class Batch:
    """Makes one list of ``size`` items; of those for which ``apart`` gives the same, by their partition."""

    size: int
    max_wait: float | None = None
    name: str = "batch"
    apart: Callable[[str], Any] | None = None

    verb = "batch"


@dataclass(frozen=True, slots=True)
class Unbatch:
    """Makes items of a list again."""

    name: str = "unbatch"

    verb = "unbatch"


@dataclass(frozen=True, slots=True)
class Take:
    """Lets the first ``count`` items pass and releases the rest."""

    count: int
    name: str = "take"

    verb = "take"


@dataclass(frozen=True, slots=True)
class MapState:
    """Calls ``function(state, item)``, which returns the new state of the item's key and an output.

    ``key``: a function of an item, or None: the event's key over a topic, elsewhere one state for all. ``said``: the
    ``on_error`` that the stage itself said, if it did.
    """

    function: Any
    name: str
    key: Callable[[Any], Any] | None
    initial: Any
    on_error: str
    said: str | None = None

    verb = "map_state"


Stage = Work | Batch | Unbatch | Take | MapState


def positive(value: Any, what: str, *, least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``least``; else a PlanError that says what ``what`` takes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{what}={value!r}", f"Give a whole number of at least {least}")
    return value


def _check_name(value: Any, what: str) -> None:
    """Refuse a name that is no text; None means that none was given."""
    if value is not None and not isinstance(value, str):
        raise PlanError(f"{what}={value!r})", "Give a name as text")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _seconds(value: Any, what: str) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise PlanError(f"{what}={value!r}", "Give seconds above 0, or None for no bound")
    return float(value)


def check_wait(value: Any) -> float | None:
    """``max_wait=`` in seconds, 0 or more, or None to wait for a full batch."""
    if value is None:
        return None
    if not _is_number(value) or value < 0:
        raise PlanError(f"max_wait={value!r}", "Give seconds, 0 or more, or None to wait for full batches")
    return float(value)


def function_name(function: Any) -> str:
    """What a stage is called when nobody named it."""
    function = _own(function)
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


def _own(function: Any) -> Any:
    """What the user wrote, behind ``per_worker`` and ``functools.partial``."""
    if isinstance(function, PerWorker):
        function = function.factory
    while isinstance(function, partial):
        function = function.func
    return function


def make_map_state(
    function: Any, key: Any, initial: Any, name: str | None, on_error: Any, defaults: dict[str, Any]
) -> MapState:
    """The stage of ``map_state``. Raises PlanError."""
    if not callable(function):
        raise PlanError(f"map_state({function!r})", "Give a function of a state and an item")
    if key is not None and not callable(key):
        raise PlanError(f"map_state(key={key!r})", "Give a function of an item")
    _check_name(name, "map_state(name")
    policy = on_error or defaults.get("on_error", "raise")
    if policy not in _ON_ERROR:
        raise PlanError(f"map_state(on_error={on_error!r})", f"Give one of {', '.join(map(repr, _ON_ERROR))}")
    return MapState(function, name or function_name(function), key, initial, policy, on_error)


def make_options(
    verb: str, function: Any, given: dict[str, Any], defaults: dict[str, Any], *, batches: bool = False
) -> tuple[str, Options]:
    """The stage's name and resolved options from what the verb was given and the flow's defaults.

    Raises PlanError for a function that isn't callable and for every value out of range.
    """
    if not callable(function) and not isinstance(function, PerWorker):
        raise PlanError(
            f"{verb}({function!r}) was given a {type(function).__name__}, which isn't callable",
            "Give a function of one item, or per_worker(Class, ...)",
        )
    known = {*StageOptions.__annotations__, "on_error"}
    for name in given:
        if name not in known and name not in ("site", "gate"):
            raise PlanError(f"{verb}() has no parameter {name!r}", f"It takes {', '.join(sorted(known))}")
    _check_name(given.get("name"), f"{verb}(name")
    name = given.get("name") or function_name(function)
    return name, _resolve(f"stage {name!r}:", function, given, defaults, batches)


def _resolve(where: str, function: Any, given: dict[str, Any], defaults: dict[str, Any], batches: bool) -> Options:
    asynchronous = is_async(function)
    place = _first(given, defaults, "place", None)
    if place is None or (asynchronous and given.get("place") is None):
        place = "loop" if asynchronous else "thread"
    if place not in _PLACES:
        raise PlanError(f"{where} place={place!r}", f"Give one of {', '.join(map(repr, _PLACES))}")
    if place == "loop":
        if given.get("workers") is not None:
            raise PlanError(
                f"{where} workers= is for threads and processes, and this stage runs on the event loop",
                "Give concurrency= instead, the number of items in progress at once",
            )
        concurrency = _first(given, defaults, "concurrency", _LOOP_CONCURRENCY)
        auto = concurrency == "auto"
        ceiling = _MOST["loop"] if auto else positive(concurrency, f"{where} concurrency")
        named = given.get("concurrency") is not None
    else:
        auto = given.get("concurrency") == "auto"
        if given.get("concurrency") is not None and not auto:
            raise PlanError(
                f"{where} concurrency= is for async functions, and this stage runs in a {place}",
                'Give workers= instead, the number of threads or processes, or concurrency="auto"',
            )
        one = batches or isinstance(function, PerWorker)
        usual = _MOST.get(place, cores()) if auto else 1 if one else cores()
        ceiling = positive(_first(given, defaults, "workers", usual), f"{where} workers")
        named = given.get("workers") is not None
    on_error = _first(given, defaults, "on_error", "raise")
    if on_error not in _ON_ERROR:
        raise PlanError(f"{where} on_error={on_error!r}", f"Give one of {', '.join(map(repr, _ON_ERROR))}")
    ordered = _first(given, defaults, "ordered", True)
    if not isinstance(ordered, bool):
        raise PlanError(f"{where} ordered={ordered!r}", "Give True for outputs in the order of the input, or False")
    key = given.get("key")
    if key is not None and not callable(key):
        raise PlanError(f"{where} key={key!r} isn't callable", "Give a function of an item")
    limit = _last(given, defaults, "limit")
    if limit is not None and not isinstance(limit, Limit):
        raise PlanError(f"{where} limit={limit!r}", "Give a Limit, for instance ps.Limit(per_minute=600)")
    if limit is not None and limit.per_host and batches:
        raise PlanError(f"{where} limit={limit!r}, and a batch has no one host", "Use map, or leave out per_host=True")
    budget = _last(given, defaults, "max_failures")
    if budget is not None and (not _is_number(budget) or budget < 0):
        raise PlanError(f"{where} max_failures={budget!r}", "Give a count, or a share between 0 and 1")
    return Options(
        place=place,
        ceiling=ceiling,
        named=named,
        ordered=ordered,
        key=key,
        retry=as_retry(_last(given, defaults, "retry")),
        timeout=_seconds(_last(given, defaults, "timeout"), f"{where} timeout"),
        on_error=on_error,
        max_failures=budget,
        auto=auto,
        limit=limit,
        site=_site(given.get("site"), limit),
        gate=given.get("gate"),
        given=given,
    )


def with_defaults(stage: Stage, defaults: dict[str, Any]) -> Stage:
    """The stage with other defaults; what it said itself stays. Raises PlanError."""
    if isinstance(stage, MapState):
        return replace(stage, on_error=stage.said or defaults.get("on_error", "raise"))
    if not isinstance(stage, Work):
        return stage
    batches = isinstance(stage, MapBatches)
    options = _resolve(f"stage {stage.name!r}:", stage.function, stage.options.given, defaults, batches)
    return replace(stage, options=options)


def _site(site: Callable[[Any], str] | None, limit: Limit | None) -> Callable[[Any], str] | None:
    """Whose host an item goes to: what the stage says, or what its URL says where the limit is kept by host."""
    if site is None and limit is not None and limit.per_host:
        return host_of
    return site


def check_flow(name: Any, id: Any, defaults: dict[str, Any]) -> None:
    """Refuse what is no name and no id, and a default that no stage has, or with a value that none takes."""
    _check_name(name, "Flow(name")
    if id is not None and not isinstance(id, str) and not callable(id):
        raise PlanError(f"Flow(id={id!r})", "Give the name of a field, or a function of an item")
    known = Defaults.__annotations__
    for name in defaults:
        if name not in known:
            raise PlanError(f"Flow() has no parameter {name!r}", f"It takes name, id, {', '.join(sorted(known))}")
    for given in ({}, {"place": "loop"}, {"place": "thread"}):  # each place has a ceiling of its own
        _resolve("Flow():", str, given, defaults, False)


def check_to(name: Any, given: Any, defaults: dict[str, Any]) -> str:
    """What becomes of outputs that the sink refuses. Nothing comes after it that a Failed could be handed to."""
    _check_name(name, "to(name")
    if given is not None and (given == "keep" or given not in _ON_ERROR):
        raise PlanError(
            f"to(on_error={given!r}), which a sink can't do",
            'Give "raise", "skip" or "dead_letter"; "keep" belongs to a stage, whose Failed goes on to the output',
        )
    policy: str = given or defaults.get("on_error", "raise")
    return "raise" if policy == "keep" else policy


def describe(stage: Stage) -> str:
    """One line for ``explain`` and the fingerprint: the verb, the name, and what isn't at its default."""
    if isinstance(stage, Work):
        parts = [f"{stage.verb}({stage.name})"]
        if isinstance(stage, MapBatches):
            parts.append(f"batch_size={stage.batch_size}")
            if stage.max_wait is not None:
                parts.append(f"max_wait={stage.max_wait:g}")
        if isinstance(stage, FlatMap) and not stage.whole:
            parts.append("whole=False")
        options = stage.options
        for one in fields(Options):
            value = getattr(options, one.name)
            if one.name in _NOT_DESCRIBED or value is None or value == one.default:
                continue
            parts.append(f"{one.name}={_words(value)}")
        return " ".join(parts)
    if isinstance(stage, Batch):
        return f"batch({stage.size})" + (f" max_wait={stage.max_wait:g}" if stage.max_wait is not None else "")
    if isinstance(stage, Take):
        return f"take({stage.count})"
    if isinstance(stage, MapState):
        key = "" if stage.key is None else f" key={_words(stage.key)}"
        return f"map_state({stage.name}){key}"
    return "unbatch()"


def pacing(options: Options) -> str:
    """How many at once and how fast, in words for ``explain``; empty where only the ceiling says."""
    parts = ["as many as are found best"] if options.auto else []
    if options.limit is not None:
        parts.append(repr(options.limit))
    return ", ".join(parts)


def code_digest(stage: Stage) -> str:
    """Changes when the stage's own function changes: its byte code, so far as it can be seen."""
    if not isinstance(stage, (Work, MapState)):
        return ""
    function = _own(stage.function)
    kind = function if inspect.isclass(function) else type(function)
    code = getattr(function, "__code__", None) or getattr(kind.__call__, "__code__", None)
    return "" if code is None else _digest(code)


def _digest(constant: Any) -> str:
    """Code and its constants as text, the same in every process: no addresses, no hash order."""
    if inspect.iscode(constant):
        parts = [_digest(value) for value in constant.co_consts]
        return f"{constant.co_code.hex()}{constant.co_names}{''.join(parts)}"
    if isinstance(constant, frozenset):
        return f"{sorted(map(repr, constant))}"
    return repr(constant)


def _words(value: Any) -> str:
    """A parameter in words, the same in every process: functions and classes by their names."""
    if isinstance(value, Retry):
        given = {one.name: getattr(value, one.name) for one in fields(Retry)}
        changed = [one.name for one in fields(Retry) if given[one.name] != one.default]
        return f"Retry({', '.join(f'{name}={_words(given[name])}' for name in changed)})"
    if isinstance(value, tuple):
        return "|".join(map(_words, value))
    return function_name(value) if callable(value) else str(value)


def _first(given: dict[str, Any], defaults: dict[str, Any], name: str, usual: Any) -> Any:
    for values in (given, defaults):
        if values.get(name) is not None:
            return values[name]
    return usual


def _last(given: dict[str, Any], defaults: dict[str, Any], name: str) -> Any:
    """The same for what None switches off: a stage's own None counts."""
    return given[name] if name in given else defaults.get(name)
