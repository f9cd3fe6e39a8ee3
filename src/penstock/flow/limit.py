"""Rates: how many requests, and how many tokens, may be sent in a time; what is given, told and learned.

A ``Limit`` is what a user names; a ``Pace`` is what it comes to for one host (or for all). Neither does I/O, knows an
event loop or reads a clock: times are given, in seconds of a monotonic clock. One Pace may be asked by any number of
stages, loops and threads; a lock makes each call one step, and nothing waits inside.

A waiter is in one of three states:

- *queued*: it has asked and it isn't its turn, or there is no room. Only the first of the queue is ever granted, so a
  large request isn't overtaken by small ones. ``ask`` tells it when to ask again.
- *granted*: its turn came while somebody else asked. Its request is charged, and the grant stands until it asks.
  So a waiter that is slow to come back holds up nobody.
- *gone*: it was let go (``ask`` returned 0), or it left. Leaving gives a stored grant back.

A waiter that asks no more and never leaves keeps at most one grant.

What may be sent is the least of three rates:

1. *Given*: per second or per minute, a hundredth below it, since a server counts from another moment than we do.
   It is spread evenly: after a pause, and at the start, at most 20 ms of it (or one request) go at once.
2. *Told* by the headers of answers: what remains, spread over the time until it is whole again; nothing if nothing
   remains. A request quota so far off that spreading would only delay (an hour's, a day's) is used as it comes.
3. *Learned* from refusals. Answers of requests that were sent before the last cut don't cut again: they are the same
   burst. A refusal starts a pause: as long as the server says, else half a second, doubled while nothing succeeds.
   The pause over, the rate is cut to what really went through since the pause before, pauses included, and creeps up
   again (``learned``).

The clock may start anew between two runs: when it goes backwards by more than a second, what was stamped is forgotten.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from math import inf, isfinite
from numbers import Real
from typing import Any

from penstock.errors import PlanError
from penstock.flow.learned import Learned, Told
from penstock.flow.signals import OK, THROTTLED, Signal, read_signal

__all__ = ["PATIENCE", "Limit", "Pace"]

PATIENCE = 600.0
"""Seconds of refusals without one success, after which a Pace is hopeless."""

_MARGIN = 0.99
_BURST = 0.02  # seconds of a rate: enough for timers that are late, and little enough for a server that counts seconds
_MOST_PACES = 10_000
_LEAST_WAIT = 1e-4  # timers have no finer grain; a burst makes up for it

_EXPECTED = {
    "tokens": "of an item that returns how many tokens its request will use",
    "throttled": "of an exception or a result that returns True, the seconds to wait, or False",
}


class Limit:
    """How fast a stage may call out: rates that are given, told by the server, and learned from its refusals.

    ``per_second``, ``per_minute``: requests. ``tokens_per_minute``: tokens, of which ``tokens=`` (a function of the
    item, for ``map_batches`` of the list) says how many a request will use; what an answer's ``usage`` says it really
    used is put right afterwards. All of them hold at once, and are spread evenly: 600 a minute are ten a second.
    Without numbers nothing holds back until a server refuses. ``per_host``: each host has these rates for itself;
    default: all share them. A stage's items are then URLs, or have one as ``url``; ``map_batches``, whose calls have
    many, takes no such limit.
    ``throttled``: a function of an exception or a result that says whether the server refused it: True, or the seconds
    to wait; None or False leaves it to what penstock can read (429, 503, ``Retry-After``, ``x-ratelimit-*``, …).

    One Limit may be given to several stages, in several threads: together they keep to it. It holds within one process
    (a stage's worker processes included: their calls are started from there). Raises PlanError for rates
    that aren't positive numbers, and for ``tokens_per_minute`` without ``tokens`` or the other way round.

    >>> import penstock as ps
    >>> ps.Limit(per_minute=5000, tokens_per_minute=2_000_000, tokens=len)
    Limit(per_minute=5000, tokens_per_minute=2000000, tokens=len)
    """

    def __init__(
        self,
        per_second: float | None = None,
        per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        tokens: Callable[[Any], float] | None = None,
        per_host: bool = False,
        throttled: Callable[[Any], bool | float | None] | None = None,
    ) -> None:
        rates = {"per_second": per_second, "per_minute": per_minute, "tokens_per_minute": tokens_per_minute}
        for name, rate in rates.items():
            if rate is not None and not (_is_amount(rate) and rate > 0):
                raise PlanError(f"Limit({name}={rate!r})", "Give a positive number, or leave it out for no such bound")
        for name, function in (("tokens", tokens), ("throttled", throttled)):
            if function is not None and not callable(function):
                raise PlanError(f"Limit({name}={function!r})", f"Give a function {_EXPECTED[name]}")
        if tokens_per_minute is not None and tokens is None:
            raise PlanError(
                f"Limit(tokens_per_minute={tokens_per_minute!r}) without tokens=",
                "Give tokens=, a function of the item that returns how many tokens its request will use",
            )
        if tokens is not None and tokens_per_minute is None:
            raise PlanError(
                f"Limit(tokens={_name(tokens)}) without tokens_per_minute=", "Give the quota, or leave tokens= out"
            )
        if not isinstance(per_host, bool):
            raise PlanError(f"Limit(per_host={per_host!r})", "Give True or False")
        self.per_second = per_second
        self.per_minute = per_minute
        self.tokens_per_minute = tokens_per_minute
        self.tokens = tokens
        self.per_host = per_host
        self.throttled = throttled
        self._lock = threading.Lock()
        self._paces: OrderedDict[str, Pace] = OrderedDict()

    @property
    def is_given(self) -> bool:
        """Whether it names a quota, so that more than that is never asked for."""
        return any(rate is not None for rate in (self.per_second, self.per_minute, self.tokens_per_minute))

    def cost(self, item: Any) -> float:
        """The tokens that the request for this item will use, by ``tokens=``; 0 without it.

        Raises what ``tokens=`` raises, TypeError if it returns no number, and ValueError for one that can't be.
        """
        if self.tokens is None:
            return 0.0
        found: Any = self.tokens(item)
        if _is_amount(found):
            return float(found)
        kind = ValueError if _is_number(found) else TypeError
        raise kind(f"tokens={_name(self.tokens)} returned {found!r:.200}: return a number of tokens, 0 or more")

    def pace(self, host: str) -> Pace:
        """The pace of a host, or the one of all. Ask for it anew each time: one that was idle for long is forgotten."""
        if not self.per_host:
            host = ""
        with self._lock:
            pace = self._paces.get(host)
            if pace is None:
                if len(self._paces) >= _MOST_PACES:
                    self._forget()
                requests = min(self.per_second or inf, (self.per_minute or inf) / 60)
                pace = self._paces[host] = Pace(requests, (self.tokens_per_minute or inf) / 60)
            else:
                self._paces.move_to_end(host)
            return pace

    def _forget(self) -> None:
        """Drop the pace that nobody has asked for the longest; never one that somebody waits for."""
        for host, pace in self._paces.items():
            if pace.idle:
                del self._paces[host]
                return

    def signal(self, outcome: object) -> Signal:
        """What an outcome says about the server: an exception that an attempt raised, or its result.

        ``throttled=`` is asked first; what it raises is raised.
        """
        if self.throttled is not None:
            said = self.throttled(outcome)
            if said is True:
                found = self._read(outcome)
                return found if found.kind == THROTTLED else found._replace(kind=THROTTLED)
            if said is not None and said is not False:
                if not _is_amount(said):
                    problem = f"throttled={_name(self.throttled)} returned {said!r:.200}"
                    raise TypeError(f"{problem}: return True, the seconds to wait (0 or more), or False")
                return self._read(outcome)._replace(kind=THROTTLED, retry_after=float(said))
        return self._read(outcome)

    def _read(self, outcome: object) -> Signal:
        if isinstance(outcome, BaseException):
            return read_signal(outcome, None)
        return read_signal(None, outcome)

    def _given(self) -> dict[str, Any]:
        names = ("per_second", "per_minute", "tokens_per_minute", "tokens", "per_host", "throttled")
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}

    def __repr__(self) -> str:
        given = {name: _name(value) if callable(value) else repr(value) for name, value in self._given().items()}
        return f"Limit({', '.join(f'{name}={value}' for name, value in given.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._given(),)


class Pace:
    """The pace of one host: ``requests`` and ``tokens`` a second as given, ``inf`` for none."""

    def __init__(self, requests: float = inf, tokens: float = inf) -> None:
        self._given = requests * _MARGIN
        self._requests = _Bucket(self._given, 1.0)
        self._tokens = _Bucket(tokens * _MARGIN, 0.0)
        self._learned = Learned(vouched=self._given if requests < inf else 0.0)
        self._told_requests = Told()
        self._told_tokens = Told()
        self._usage = 0.0  # tokens of a request, the mean of late, where answers tell
        self._queue: OrderedDict[int, _Waiter] = OrderedDict()
        self._granted: dict[int, _Waiter] = {}
        self._queued_tokens = 0.0
        self._asked = 0
        self._now = -inf
        self._lock = threading.Lock()

    @property
    def idle(self) -> bool:
        """Whether nobody waits."""
        return not self._queue and not self._granted

    @property
    def rate(self) -> float:
        """Requests a second that may be sent now, ``inf`` for any number."""
        return self._requests.rate

    def ask(self, now: float, waiter: object, tokens: float = 0.0) -> float:
        """0 if ``waiter`` may start now: its request is charged. Else the seconds after which to ask again.

        A waiter is itself, whatever it equals. It may change its mind about ``tokens`` while it waits.
        """
        with self._lock:
            now = self._at(now)
            key = id(waiter)
            granted = self._granted.pop(key, None)
            if granted is not None:
                self._tokens.take(tokens - granted.tokens)
                return 0.0
            self._set_rates(now)
            mine = self._queue.get(key)
            if mine is None:
                if not self._queue and self._wait(now, tokens) <= 0.0:
                    self._charge(now, tokens, self._requests.drained)
                    return 0.0
                self._asked += 1
                mine = self._queue[key] = _Waiter(waiter, tokens, self._asked)
            else:
                self._queued_tokens -= mine.tokens
                mine.tokens = tokens
            self._queued_tokens += tokens
            while self._queue:
                first_key, first = next(iter(self._queue.items()))
                wait = self._wait(now, first.tokens)
                if wait > 0.0:
                    break
                self._charge(now, first.tokens, first.told or self._requests.drained)
                self._remove(first_key)
                if first is mine:
                    return 0.0
                self._granted[first_key] = first
            first.told = mine.told = True
            before = min(mine.number - first.number, len(self._queue) - 1)
            if before:
                share = before / (len(self._queue) - 1)
                wait += self._time_of(before, share * (self._queued_tokens - mine.tokens))
            return max(wait, _LEAST_WAIT)

    def leave(self, waiter: object) -> None:
        """``waiter`` no longer wants to start. A grant that it hasn't taken is given back."""
        with self._lock:
            key = id(waiter)
            granted = self._granted.pop(key, None)
            if granted is not None:
                self._requests.give_back(1.0)
                self._tokens.give_back(granted.tokens)
            elif key in self._queue:
                self._remove(key)

    def report(self, now: float, signal: Signal, tokens: float, began: float) -> None:
        """An attempt that began at ``began``, and was charged ``tokens``, ended with this signal."""
        with self._lock:
            before = self._now
            now = self._at(now)
            if self._now < before:
                began = now
            if signal.tokens is not None:
                self._tokens.settle(now)
                self._tokens.give_back(tokens - signal.tokens)
                self._usage += (signal.tokens - self._usage) * (0.1 if self._usage else 1.0)
            if signal.rates is not None:
                if signal.rates.requests is not None:
                    self._pause(self._told_requests.update(now, signal.rates.requests, 1.0))
                if signal.rates.tokens is not None:
                    self._pause(self._told_tokens.update(now, signal.rates.tokens, tokens or self._usage or 1.0))
            if signal.kind == OK:
                self._learned.succeeded(now, began, self._given)
            elif signal.kind == THROTTLED:
                self._pause(self._learned.refused(now, began, signal.retry_after, self._requests.rate))

    def hopeless(self, now: float) -> bool:
        """Whether it has been refused for PATIENCE seconds without one success."""
        with self._lock:
            return self._learned.refused_for(self._at(now)) >= PATIENCE

    def forgive(self, now: float) -> None:
        """Give what comes next PATIENCE seconds of its own."""
        with self._lock:
            self._learned.forgive(self._at(now))

    def _at(self, now: float) -> float:
        """``now`` by a clock that doesn't go backwards. Threads may report a little out of order."""
        if now < self._now - 1.0:
            self._queue.clear()
            self._granted.clear()
            self._queued_tokens = 0.0
            for bucket in (self._requests, self._tokens):
                bucket.restart(now)
            self._learned.restart()
            self._told_requests = Told()
            self._told_tokens = Told()
        elif now < self._now:
            return self._now
        self._now = now
        return now

    def _pause(self, until: float) -> None:
        """Nothing before then, and no burst after it: the buckets stand still until then, with one request inside."""
        self._requests.stand_still(until)
        self._tokens.stand_still(until)

    def _set_rates(self, now: float) -> None:
        told = self._told_requests.rate(now)
        told_tokens = self._told_tokens.rate(now)
        if told_tokens < inf and self._usage and self._tokens.given == inf:
            told = min(told, told_tokens / self._usage)
        self._requests.change(now, min(self._given, told, self._learned.rate))
        self._tokens.change(now, min(self._tokens.given, told_tokens) if self._tokens.given < inf else inf)

    def _wait(self, now: float, tokens: float) -> float:
        wait = max(self._requests.wait(now, 1.0), self._tokens.wait(now, tokens))
        if wait <= 0.0 and self._learned.resumed(now):
            self._set_rates(now)
        return wait

    def _charge(self, now: float, tokens: float, held: bool) -> None:
        self._requests.take(1.0)
        self._tokens.take(tokens)
        self._learned.granted(now, held)

    def _remove(self, key: int) -> None:
        self._queued_tokens -= self._queue.pop(key).tokens
        if not self._queue:
            self._queued_tokens = 0.0  # sums of floats drift

    def _time_of(self, requests: int, tokens: float) -> float:
        """About how long so much takes at the present rates."""
        return max(requests / self._requests.rate, tokens / self._tokens.rate)


class _Waiter:
    """Somebody who has asked. It is kept, so that its id stays its own."""

    __slots__ = ("number", "tokens", "told", "waiter")

    def __init__(self, waiter: object, tokens: float, number: int) -> None:
        self.waiter = waiter
        self.tokens = tokens
        self.number = number
        self.told = False


class _Bucket:
    """Fills at ``rate`` a second up to a burst. More than a burst is let go when it is full, and leaves a debt."""

    __slots__ = ("at", "burst", "given", "least", "level", "rate")

    def __init__(self, rate: float, least: float) -> None:
        self.given = self.rate = rate
        self.least = least  # of the burst
        self.burst = self.level = max(least, _BURST * rate)
        self.at = -inf

    @property
    def drained(self) -> bool:
        return self.level < 0.95 * self.burst

    def settle(self, now: float) -> None:
        if now > self.at:
            if self.rate < inf:
                self.level = min(self.burst, self.level + self.rate * (now - self.at)) if self.at > -inf else self.burst
            self.at = now

    def wait(self, now: float, amount: float) -> float:
        self.settle(now)
        pause = self.at - now if self.at > now else 0.0
        if self.rate == inf or amount <= 0:
            return pause
        missing = min(amount, self.burst) - self.level
        return pause + missing / self.rate if missing > 1e-6 * self.burst else pause

    def take(self, amount: float) -> None:
        if self.rate < inf:
            self.level -= amount

    def give_back(self, amount: float) -> None:
        if self.rate < inf:
            self.level = min(self.burst, self.level + amount)

    def change(self, now: float, rate: float) -> None:
        if rate != self.rate:
            self.settle(now)
            if self.rate == inf:
                self.level = self.least
            self.rate = rate
            self.burst = max(self.least, _BURST * rate)
            self.level = min(self.level, self.burst)

    def stand_still(self, until: float) -> None:
        if until > self.at:
            self.settle(until)
            self.level = min(self.level, self.least)

    def restart(self, now: float) -> None:
        self.at = now
        self.level = self.burst


def _is_number(value: Any) -> bool:
    """Whether it can be reckoned with; numpy's numbers can, True isn't meant to be."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and isfinite(value) and value >= 0


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _rebuild(given: dict[str, Any]) -> Limit:
    return Limit(**given)
