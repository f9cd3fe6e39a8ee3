"""One small frozen description for each kind of stage, and the parameters they share.

Nothing here runs. What can be wrong with a single stage is refused here, when the verb is called; what can be wrong
between stages is refused by the plan.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

from penstock.errors import PlanError
from penstock.flow.retry import Retry, as_retry
from penstock.place.base import PerWorker, is_async

__all__ = [
    "Batch",
    "Defaults",
    "Filter",
    "FlatMap",
    "Map",
    "MapBatches",
    "OnError",
    "Options",
    "Stage",
    "StageOptions",
    "Take",
    "Unbatch",
    "Work",
    "check_defaults",
    "check_wait",
    "code_digest",
    "describe",
    "function_name",
    "make_options",
    "positive",
]

OnError = Literal["raise", "skip", "keep", "dead_letter"]

_PLACES = ("loop", "thread", "process")
_ON_ERROR = ("raise", "skip", "keep", "dead_letter")
_LOOP_CONCURRENCY = 32


class StageOptions(TypedDict, total=False):
    """The keyword parameters of every stage with a function, but ``on_error``."""

    name: str
    place: Literal["loop", "thread", "process"]
    concurrency: int
    workers: int
    ordered: bool
    key: Callable[[Any], Any]
    retry: int | Retry | None
    timeout: float | None
    max_failures: float | None


class Defaults(TypedDict, total=False):
    """What ``Flow(source, ...)`` can set for every stage."""

    place: Literal["loop", "thread", "process"]
    concurrency: int
    workers: int
    ordered: bool
    retry: int | Retry | None
    timeout: float | None
    on_error: OnError
    max_failures: float | None


@dataclass(frozen=True, slots=True)
class Options:
    """The resolved parameters of one stage with a function.

    ``ceiling``: items in progress at once (concurrency on the loop, workers elsewhere); ``named`` if the stage
    itself named it, so that it isn't shared with its neighbours.
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
    """Makes one list of ``size`` items."""

    size: int
    max_wait: float | None = None
    name: str = "batch"

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


Stage = Work | Batch | Unbatch | Take


def positive(value: Any, what: str, *, least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``least``; else a PlanError that says what ``what`` takes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{what}={value!r}", f"Give a whole number of at least {least}")
    return value


def _seconds(value: Any, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise PlanError(f"{what}={value!r}", "Give seconds above 0, or None for no bound")
    return float(value)


def check_wait(value: Any) -> float | None:
    """``max_wait=`` in seconds, 0 or more, or None to wait for a full batch."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise PlanError(f"max_wait={value!r}", "Give seconds, 0 or more, or None to wait for full batches")
    return float(value)


def function_name(function: Any) -> str:
    """What a stage is called when nobody named it."""
    if isinstance(function, PerWorker):
        function = function.factory
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


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
        if name not in known:
            raise PlanError(f"{verb}() has no parameter {name!r}", f"It takes {', '.join(sorted(known))}")
    name = given.get("name") or function_name(function)
    asynchronous = is_async(function)
    place = given.get("place") or defaults.get("place")
    if place is None or (asynchronous and "place" not in given):
        place = "loop" if asynchronous else "thread"
    if place not in _PLACES:
        raise PlanError(f"stage {name!r}: place={place!r}", f"Give one of {', '.join(map(repr, _PLACES))}")
    if place == "loop":
        if given.get("workers") is not None:
            raise PlanError(
                f"stage {name!r}: workers= is for threads and processes, and this stage runs on the event loop",
                "Give concurrency= instead, the number of items in progress at once",
            )
        ceiling = positive(_first(given, defaults, "concurrency", _LOOP_CONCURRENCY), f"stage {name!r}: concurrency")
        named = given.get("concurrency") is not None
    else:
        if given.get("concurrency") is not None:
            raise PlanError(
                f"stage {name!r}: concurrency= is for async functions, and this stage runs in a {place}",
                "Give workers= instead, the number of threads or processes",
            )
        usual = 1 if batches or isinstance(function, PerWorker) else os.cpu_count() or 1
        ceiling = positive(_first(given, defaults, "workers", usual), f"stage {name!r}: workers")
        named = given.get("workers") is not None
    on_error = _first(given, defaults, "on_error", "raise")
    if on_error not in _ON_ERROR:
        raise PlanError(f"stage {name!r}: on_error={on_error!r}", f"Give one of {', '.join(map(repr, _ON_ERROR))}")
    key = given.get("key")
    if key is not None and not callable(key):
        raise PlanError(f"stage {name!r}: key={key!r} isn't callable", "Give a function of an item")
    budget = _first(given, defaults, "max_failures", None)
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or budget < 0):
        raise PlanError(f"stage {name!r}: max_failures={budget!r}", "Give a count, or a share between 0 and 1")
    return name, Options(
        place=place,
        ceiling=ceiling,
        named=named,
        ordered=bool(_first(given, defaults, "ordered", True)),
        key=key,
        retry=as_retry(_first(given, defaults, "retry", None)),
        timeout=_seconds(_first(given, defaults, "timeout", None), f"stage {name!r}: timeout"),
        on_error=on_error,
        max_failures=budget,
    )


def check_defaults(defaults: dict[str, Any]) -> None:
    """Refuse a default that no stage has, or with a value that none takes."""
    known = Defaults.__annotations__
    for name in defaults:
        if name not in known:
            raise PlanError(f"Flow() has no parameter {name!r}", f"It takes name, id, {', '.join(sorted(known))}")
    make_options("Flow", _noop, {}, defaults)
    make_options("Flow", _async_noop, {}, defaults)


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
        for field in fields(Options):
            value = getattr(options, field.name)
            if field.name in ("place", "ceiling", "named") or value is None or value == field.default:
                continue
            parts.append(f"{field.name}={function_name(value) if field.name == 'key' else value}")
        return " ".join(parts)
    if isinstance(stage, Batch):
        return f"batch({stage.size})" + (f" max_wait={stage.max_wait:g}" if stage.max_wait is not None else "")
    if isinstance(stage, Take):
        return f"take({stage.count})"
    return "unbatch()"


def code_digest(stage: Stage) -> str:
    """Changes when the stage's own function changes: its byte code, so far as it can be seen."""
    if not isinstance(stage, Work):
        return ""
    function = stage.function.factory if isinstance(stage.function, PerWorker) else stage.function
    if inspect.isclass(function):
        function = function.__call__
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    constants = [repr(value) for value in code.co_consts if not inspect.iscode(value)]
    return f"{code.co_code.hex()}{''.join(constants)}"


def _first(given: dict[str, Any], defaults: dict[str, Any], name: str, usual: Any) -> Any:
    for values in (given, defaults):
        if values.get(name) is not None:
            return values[name]
    return usual


def _noop(item: Any) -> Any:
    return item


async def _async_noop(item: Any) -> Any:
    return item
