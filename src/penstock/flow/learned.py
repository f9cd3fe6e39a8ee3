"""What a server teaches about its rate: by what it refuses (``Learned``), and by what its headers tell (``Told``).

A server that counts sixty seconds at a time lets six hundred requests through in nine seconds and refuses the rest of
the minute. So what it allows can only be seen over a whole *cycle*, from the end of one pause to the end of the next:
what went through, over that time with its pause. States of a cycle:

1. *Going*: requests are sent at ``rate``, and what succeeds is counted.
2. *Refused*: one was refused that had been sent after the last cut. A pause begins.
3. *Resumed*: the pause is over and the first request is about to be sent: the rate is cut to that of the cycle. If it
   is refused too, the cycle goes on, with a longer pause; if it succeeds, a new cycle has begun with it.

A rate that has held for long is cut by little, since then the pause itself may be what was wrong (a server may ask for
more patience than it needs). Refusals are owed for: each one has to be earned back by 200 successes before the rate
creeps up again. It creeps in steps, doubled while nothing is refused, and only while it is the rate that holds back.
"""

from __future__ import annotations

from math import inf

from penstock.flow.signals import Quota

__all__ = ["Learned", "Told"]

_LEAST_RATE = 1 / 60
_FIRST_RATE = 1.0
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 60.0
_GAP = 120.0  # seconds in which nobody asked, after which a refusal begins another patience

_BELOW = 0.98  # of what went through
_TRUSTED_AFTER = 200  # so many have gone through at a rate: it has held
_BELIEVED = 3  # bursts of refusals at the start, after which a rate that was given isn't believed any more
_TRUSTED_CUT = 0.95  # at most so deep a cut for one that has held
_FEW = 5  # fewer than these say little about a rate
_FEW_CUT = 0.3
_HORIZON = 60.0  # a cycle is counted over one to two of these at most: a server counts in minutes
_QUIET = 5.0  # seconds without a request that don't count as time in which something could have gone through

_EARNED = 1 / 200  # of one refusal, by one success
_MOST_OWED = 5.0  # or a minute's successes, if they are more: a first burst isn't held against a server for ever
_STEP_SECONDS = 10.0
_STEP_COUNT = 10
_FIRST_STEP = 0.01
_RAISES = 3  # by each step, before it doubles
_LARGEST_STEP = 0.25
_PROVEN = 0.9  # up to so much of what had gone through before, a rate that was cut too deeply comes back at once
_CATCH_UP = 1.1
_EXPLORE = 1.5  # where nothing is known

_SPREAD_WITHIN = 90.0  # seconds; a quota for longer is used as it comes, until little of it is left
_LOW = 0.1


class Learned:
    """``rate``: requests a second, inf until something is refused.

    ``vouched``: the rate that was given by somebody who should know it. As long as too little has gone through to say
    otherwise, and most of it has, it is cut by little: what is refused at the start may have been sent evenly and come
    all at once.
    """

    def __init__(self, vouched: float = 0.0) -> None:
        self.rate = inf
        self._through = 0  # what was sent and not refused; a slow answer counts from when it was asked for
        self._cuts = 0
        self._last = -inf  # when something was sent or came back
        self._cut_at = -inf
        self._misses = 0
        self._resumed = True
        self._before = inf  # the rate at which it was refused
        self._trusted = False
        self._vouched = vouched
        self._proven = inf  # a rate that has held for long, or the lowest that was refused since
        self._since: float | None = None  # the first refusal since a success
        self._refused_at = self._until = -inf
        self._start = self._recent = self._older = (-inf, 0)  # marks: when, and how many had gone through
        self._mark = (-inf, 0)  # when the last pause was over, and how many had gone through
        self._owed = 0.0
        self._step = _FIRST_STEP
        self._raises = 0
        self._step_at = -inf
        self._step_sent = self._step_held = self._step_goods = 0

    def granted(self, now: float, held: bool) -> None:
        """A request is sent; ``held`` if it was the rate that it waited for."""
        if now - self._last > _QUIET and not self._misses:
            self._recent = self._older = self._start = (now, self._through)
        elif now - self._recent[0] > _HORIZON and not self._misses:
            self._older, self._recent = self._recent, (now, self._through)
        self._through += 1
        self._last = now
        self._step_sent += 1
        self._step_held += held

    def succeeded(self, now: float, began: float, most: float) -> None:
        """A request that was sent at ``began`` went through."""
        self._last = now
        self._since = None
        if self.rate == inf:
            return
        if began > self._cut_at and self._misses:
            self._misses = 0
            self._start = self._mark
            self._begin_step(now)
        self._owed = max(0.0, self._owed - _EARNED)
        self._step_goods += 1
        if self._step_goods >= _STEP_COUNT and now - self._step_at >= _STEP_SECONDS and not self._misses:
            if 2 * self._step_held >= self._step_sent:
                self._creep(most)
            self._begin_step(now)

    def _creep(self, most: float) -> None:
        """All has gone well for a step: a little more, if that is due."""
        if self.rate < self._proven:
            self.rate = min(self.rate * (_CATCH_UP if self._proven < inf else _EXPLORE), self._proven, most)
        elif not self._owed:
            self.rate = min(self.rate * (1 + self._step), most)
            self._raises += 1
            if self._raises % _RAISES == 0:
                self._step = min(_LARGEST_STEP, 2 * self._step)

    def refused(self, now: float, began: float, retry_after: float | None, rate: float) -> float:
        """A request was refused, while ``rate`` was the rate. Returns until when nothing may be sent."""
        if self._since is None or began - max(self._refused_at, self._until) > _GAP:
            self._since = now
        self._refused_at = now
        self._take_back(began)
        self._owed += 1
        if began <= self._cut_at:
            if retry_after is not None:
                self._until = max(self._until, now + retry_after)
            return self._until
        held = self._through - self._start[1] >= _TRUSTED_AFTER
        self._trusted = rate < inf and not self._misses and held
        if not self._misses and rate < inf:
            level = _PROVEN * min(rate, self._went(self._older, now)[1])
            self._proven = level if self._trusted else min(self._proven, level)
        self._before = rate
        self._cut_at = now
        self._cuts += 1
        self._misses = min(self._misses + 1, 20)
        self._resumed = False
        self._step, self._raises = _FIRST_STEP, 0
        backoff = _FIRST_BACKOFF * 2.0 ** (self._misses - 1)
        if retry_after is not None:  # heeded twice and refused again: it says too little
            backoff = max(retry_after, backoff / 4 if self._misses > 2 else 0.0)
        self._until = max(self._until, now + min(backoff, max(_LONGEST_BACKOFF, retry_after or 0.0)))
        return self._until

    def resumed(self, now: float) -> bool:
        """Whether the request about to be sent is the first after a pause: then the rate has been cut."""
        if self._resumed:
            return False
        self._resumed = True
        before = self._before
        passed, rate = self._went(self._older if self._older[0] > self._start[0] else self._start, now)
        if self._trusted:
            rate = max(rate, _TRUSTED_CUT * before)
        elif self._vouched and self._cuts <= _BELIEVED and self._through < _TRUSTED_AFTER:
            rate = max(rate, _TRUSTED_CUT * self._vouched)
        elif self._went(self._older, now)[0] <= 0:  # nothing has gone through at all: it may be any rate
            rate = _FIRST_RATE
            self._proven = inf
        elif passed < _FEW:
            rate = max(rate, _FEW_CUT * before if before < inf else _FIRST_RATE)
        self.rate = max(_LEAST_RATE, min(rate, _BELOW * before))
        self._owed = min(self._owed, max(_MOST_OWED, _EARNED * _HORIZON * self.rate))
        self._mark = (now, self._through)
        self._begin_step(now)
        return True

    def _take_back(self, began: float) -> None:
        """A request that was sent at ``began`` hasn't gone through after all."""
        self._through -= 1
        marks = (self._start, self._recent, self._older, self._mark)
        self._start, self._recent, self._older, self._mark = ((at, through - (began < at)) for at, through in marks)

    def _went(self, mark: tuple[float, int], now: float) -> tuple[int, float]:
        """How many have gone through since a mark, and the rate a little below that."""
        started, through = mark
        passed = self._through - through
        return passed, _BELOW * passed / max(now - started, 1e-3)

    def refused_for(self, now: float) -> float:
        """Seconds for which it has been refused, or told to wait, without one success."""
        if self._since is None:
            return 0.0
        return max(self._refused_at, min(now, self._until)) - self._since

    def forgive(self, now: float) -> None:
        """Begin another patience."""
        self._since = now if self._until > now else None

    def restart(self) -> None:
        """The clock starts anew: the rate stays, all that was stamped is forgotten."""
        self._last = self._cut_at = self._refused_at = self._until = self._step_at = -inf
        self._start = self._recent = self._older = self._mark = (-inf, self._through)
        self._misses = 0
        self._resumed = True
        self._since = None

    def _begin_step(self, now: float) -> None:
        self._step_at = now
        self._step_sent = self._step_held = self._step_goods = 0


class Told:
    """The rate that the headers of the latest answer leave, of requests or of tokens."""

    __slots__ = ("_least", "_most", "_spread", "_until")

    def __init__(self) -> None:
        self._most = inf  # what the limit comes to, for ever
        self._least = 0.0
        self._spread = inf  # what remains, until then
        self._until = -inf

    def rate(self, now: float) -> float:
        """Of requests or tokens a second, inf for no bound."""
        return min(self._most, max(self._spread, self._least)) if now < self._until else self._most

    def update(self, now: float, quota: Quota, amount: float) -> float:
        """An answer came with these headers. Returns until when nothing may be sent, for what ``amount`` needs."""
        limit, remaining, reset, window, refills = quota
        if refills and window and limit and reset and reset > window + 1 and remaining is not None:
            window = reset * limit / max(1.0, limit - remaining)  # it can't be a minute's: a day's
        if limit and window and window <= _SPREAD_WITHIN:
            self._most = _BELOW * limit / window
            self._least = _LOW * self._most if refills else 0.0
        else:
            self._most, self._least = inf, 0.0
        self._until = -inf
        if remaining is None or not reset:
            return -inf
        if remaining <= 0:
            return now + (reset * min(1.0, amount / limit) if refills and limit else reset)
        if reset <= _SPREAD_WITHIN or (limit and remaining < _LOW * limit):
            self._spread = remaining / reset
            self._until = now + reset
        return -inf
