"""Faults on purpose: a seeded plan that makes a function fail, stall, or kill its worker process."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

from penstock.errors import PenstockError, PlanError
from penstock.place.base import is_async

__all__ = ["Faults", "InjectedFault", "Kind"]

F = TypeVar("F", bound=Callable[..., Any])

Kind = Literal["fail", "stall", "kill"]


class InjectedFault(PenstockError, RuntimeError):
    """Raised on purpose by Faults, for ``item`` (its repr) at the given attempt, which counts from 1."""

    def __init__(self, item: str, attempt: int) -> None:
        super().__init__(item, attempt)
        self.item = item
        self.attempt = attempt

    def __str__(self) -> str:
        return f"injected on purpose for {self.item}, attempt {self.attempt}"


class Faults:
    """A plan of what goes wrong: wrap a stage's function with it, ``.map(faults(clean))``.

    ``fail``, ``stall`` and ``kill`` are shares of the items, 0 … 1. Which items they hit follows from ``seed`` and
    the item's ``repr`` alone, so it is the same in every run, thread and process; an object whose ``repr`` holds its
    address is hit at random. ``fail`` raises InjectedFault. ``stall`` waits ``seconds`` (default 1) before the
    function is called. ``kill`` ends the worker process at once, by SIGKILL or by exiting with code 70, for every
    other item: only with place="process", for it never kills anything else.

    An item goes wrong at its first ``attempts`` attempts (default 1; None: at every one, a poison item). Attempts are
    counted in memory, which a killed process loses: ``kill`` needs ``scratch``, a directory, where attempts are
    counted for all processes together and beyond the end of a run.

    The wrapped function is plain or async as the function is, keeps its name, and travels to processes.

    >>> faults = Faults(seed=7, fail=0.25)
    >>> [item for item in range(12) if faults.planned(item)]
    [1, 6]
    >>> def half(x: int) -> float:
    ...     return x / 2
    >>> shaky = faults(half)
    >>> shaky(6)
    Traceback (most recent call last):
        ...
    penstock.testing.faults.InjectedFault: injected on purpose for 6, attempt 1
    >>> shaky(6), shaky(7)
    (3.0, 3.5)
    """

    def __init__(
        self,
        seed: int,
        fail: float = 0.01,
        stall: float = 0.0,
        kill: float = 0.0,
        *,
        seconds: float = 1.0,
        attempts: int | None = 1,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        shares = {"kill": kill, "fail": fail, "stall": stall}
        if not all(0 <= share <= 1 for share in shares.values()) or sum(shares.values()) > 1:
            given = ", ".join(f"{name}={share:g}" for name, share in shares.items())
            raise PlanError(f"Faults got {given}", "Give shares of the items, from 0 to 1, at most 1 together")
        if kill and scratch is None:
            raise PlanError(
                "Faults(kill=) needs scratch=: a killed process forgets that it was killed before",
                "Name a directory in which attempts are counted",
            )
        self.seed = seed
        self.shares = shares
        self.seconds = seconds
        self.attempts = attempts
        self.scratch = None if scratch is None else Path(scratch)
        self._met: dict[str, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _rebuild, (self.seed, self.shares, self.seconds, self.attempts, self.scratch)

    def __call__(self, function: F) -> F:
        """The function with this plan's faults before it. Raises PlanError for what can't be called."""
        if not callable(function):
            raise PlanError(
                f"Faults wraps functions and was given a {type(function).__name__}",
                "Wrap the function, or the __call__ of the class that per_worker builds",
            )
        wrapper = _AsyncFaulty(self, function) if is_async(function) else _Faulty(self, function)
        return cast(F, functools.update_wrapper(wrapper, function))

    def planned(self, item: Any) -> Kind | None:
        """What the plan does to this item, at its first attempts; None if it is left in peace."""
        draw = int.from_bytes(self._digest(item)[:8], "big") / 2**64
        for kind, share in self.shares.items():
            if draw < share:
                return cast(Kind, kind)
            draw -= share
        return None

    def _digest(self, item: Any) -> bytes:
        return hashlib.blake2b(
            repr(item).encode("utf-8", "surrogatepass"), digest_size=16, key=str(self.seed).encode()[:64]
        ).digest()

    def _due(self, item: Any) -> tuple[Kind, int] | None:
        """What is to happen at this attempt, and the attempt's number."""
        kind = self.planned(item)
        if kind is None:
            return None
        attempt = self._attempt(self._digest(item).hex())
        return None if self.attempts is not None and attempt > self.attempts else (kind, attempt)

    def _attempt(self, name: str) -> int:
        if self.scratch is None:
            with self._lock:
                self._met[name] = self._met.get(name, 0) + 1
                return self._met[name]
        self.scratch.mkdir(parents=True, exist_ok=True)
        with open(self.scratch / name, "ab", buffering=0) as marks:  # appending is atomic between processes
            marks.write(b".")
            return marks.tell()

    def _strike(self, item: Any) -> float:
        """Do what is due; returns how many seconds to stall."""
        due = self._due(item)
        if due is None:
            return 0
        kind, attempt = due
        if kind == "fail":
            raise InjectedFault(repr(item), attempt)
        if kind == "kill":
            self._kill(item)
        return self.seconds

    def _kill(self, item: Any) -> NoReturn:
        if not _in_a_worker():
            raise PlanError(
                f"Faults(kill=) was to end the process of the run itself, for {item!r}",
                "Run the stage with place='process'",
            )
        if self._digest(item)[-1] % 2 and hasattr(signal, "SIGKILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(70)


def _rebuild(seed: int, shares: dict[str, float], seconds: float, attempts: int | None, scratch: Path | None) -> Faults:
    return Faults(seed, **shares, seconds=seconds, attempts=attempts, scratch=scratch)


def _in_a_worker() -> bool:
    """Whether this process was started as a worker of penstock."""
    arguments = sys.orig_argv
    return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["penstock.place.worker"]


class _Faulty:
    def __init__(self, faults: Faults, function: Callable[..., Any]) -> None:
        self.faults = faults
        self.function = function

    def __call__(self, item: Any) -> Any:
        stall = self.faults._strike(item)
        if stall:
            time.sleep(stall)
        return self.function(item)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Bound as a method is, so that the ``__call__`` of a class can be wrapped."""
        return self if instance is None else type(self)(self.faults, functools.partial(self.function, instance))

    def __reduce__(self) -> Any:
        return _wrap_again, (self.faults, self.function)


class _AsyncFaulty(_Faulty):
    async def __call__(self, item: Any) -> Any:
        stall = self.faults._strike(item)
        if stall:
            await asyncio.sleep(stall)
        result = self.function(item)
        return await result if inspect.isawaitable(result) else result


def _wrap_again(faults: Faults, function: Callable[..., Any]) -> Any:
    return faults(function)
