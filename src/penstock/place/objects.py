"""What a chain's steps call, in the worker that calls it: objects of ``per_worker`` are built and closed there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from penstock.place.base import Chain, PerWorker, annotate, as_failure

__all__ = ["Bound", "bind", "close_all", "close_all_async"]


class Bound(NamedTuple):
    """``calls``: what each step calls. ``closers``: the ``close`` methods of the built objects, last built first.
    ``failure``: what a constructor raised, if one did; what was built before it is to be closed all the same."""

    calls: list[Any]
    closers: list[Callable[[], Any]]
    failure: BaseException | None = None


def bind(chain: Chain) -> Bound:
    """Build what each step calls. Raises nothing."""
    calls: list[Any] = []
    closers: list[Callable[[], Any]] = []
    try:
        for step in chain.steps:
            if isinstance(step.call, PerWorker):
                built = step.call.build()
                if not callable(built):
                    raise TypeError(
                        f"stage {step.name!r}: per_worker built a {type(built).__name__}, which isn't callable. "
                        "Give the class a __call__ method that takes an item"
                    )
                closer = getattr(built, "close", None)
                if callable(closer):
                    closers.insert(0, closer)
                calls.append(built)
            else:
                calls.append(step.call)
    except BaseException as error:
        failure = as_failure(chain.name, error)
        if failure is not error:
            failure.__cause__ = error
        return Bound(calls, closers, failure)
    return Bound(calls, closers)


def close_all(closers: Sequence[Callable[[], Any]], chain: str, settle: Callable[[Any], Any]) -> BaseException | None:
    """Call every closer, whatever the others raise; returns what the first one raised that did.

    ``settle`` awaits what a closer returned, if that is to be awaited. A cancellation or an exit comes before an error.
    """
    failure: BaseException | None = None
    for closer in closers:
        try:
            settle(closer())
        except BaseException as error:
            failure = _graver(failure, error, chain)
    return failure


async def close_all_async(closers: Sequence[Callable[[], Any]], chain: str) -> BaseException | None:
    """The same on an event loop. Cancelling ends the closer that is awaited; the others are called all the same."""
    failure: BaseException | None = None
    for closer in closers:
        try:
            result = closer()
            if inspect.isawaitable(result):
                await result
        except BaseException as error:
            failure = _graver(failure, error, chain)
    return failure


def _graver(failure: BaseException | None, error: BaseException, chain: str) -> BaseException:
    annotate(error, f"in close() of an object that a worker of stage {chain!r} had")
    if failure is None or (isinstance(failure, Exception) and not isinstance(error, Exception)):
        return error
    return failure
