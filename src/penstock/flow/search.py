"""How many at once: a search for the smallest concurrency with the greatest goodput.

Goodput is measured, never latency: a language model's answers differ in length by a factor of a hundred, and a method
that reads slow answers as queueing starves it. What is measured is an *epoch*: how many of so many outcomes in a row
were good, and how long that took. It is a whole number of *waves* (as many outcomes as may be in progress), for
requests that began together also end together; and it begins only when the requests of the limit before have gone.

States:

1. *Climbing*: the limit doubles as long as that brings a quarter more. When it doesn't, the base becomes the limit
   that would have been enough for what was measured.
2. *Resting* at a base for some epochs, more after every round that changed nothing. If the goodput there moves by a
   fifth, the search goes on at once.
3. *Looking up*, and every other time *looking down*, by 30 %. Up is taken if it brings more, and then it climbs; down,
   if it brings no less: of equals the smaller, where requests wait less. A look ends early when it is clearly worse.
4. *Recovering*, after a server couldn't cope and the limit was cut: it doubles with each wave that goes well, up to
   half of where it was, and then climbs, but no more to where the trouble was: that far it only looks.

A server can't cope when a quarter of the outcomes of late say so: a stray reset or timeout is no reason to slow down.

An outcome counts only if the limit was what held back when it came. Where the source is slow, or a pace is slower, an
epoch is thrown away and the limit stays.
"""

from __future__ import annotations

from math import ceil, inf, sqrt

from penstock.flow.signals import OK, OVERLOADED

__all__ = ["Search"]

_START = 16
_GROWTH = 1.25
_LOOK = 1.3
_MORE = 1.1
_NO_LESS = 0.95
_MOVED = 0.2
_SATURATED = 0.8  # of an epoch's outcomes

_CLIMB_WAVES = 2
_CLIMB_LEAST = 16
_CLIMB_ERROR = 0.2  # relative, of the difference of two epochs' goodputs
_LOOK_WAVES = 3
_LOOK_LEAST = 64
_LOOK_ERROR = 0.08
_LONGEST = 512  # outcomes
_MOST_WAVES = 12
_GLANCE_LEAST = 16
_SETTLE = 1.0  # mean service times, and one wave: after a change of the limit, before anything is measured
_GAIN = 1 / 32
_MOST_RESTS = 8
_MOST_RESTS_TROUBLED = 16  # where a look up was answered with errors, which cost more than time
_LOOK_DOWN_EVERY = 2  # rounds, while nothing changes: a look down always costs

_CUT = 0.7
_OVERLOADED_SHARE = 0.25
_SHARE_GAIN = 1 / 16

_CLIMBING, _RESTING, _UP, _DOWN, _RECOVERING = range(5)


class Search:
    """The items that may be in progress at once: ``limit``, between 1 and ``most``.

    >>> search = Search(most=128)
    >>> search.limit
    16
    """

    __slots__ = (
        "_averaged",
        "_base",
        "_began",
        "_count",
        "_cut_at",
        "_from",
        "_fruitless",
        "_glance",
        "_goods",
        "_last",
        "_mean",
        "_rate",
        "_rests",
        "_rests_left",
        "_saturated",
        "_settled_at",
        "_share",
        "_skip",
        "_state",
        "_stride",
        "_target",
        "_trouble",
        "_variance",
        "_wanted",
        "limit",
        "most",
    )

    def __init__(self, *, most: int, start: int = _START) -> None:
        self.most = most
        self.limit = max(1, min(start, most))
        self._base = self.limit
        self._rate = 0.0  # goodput at the base
        self._mean = self._variance = 0.0  # of service times of late
        self._averaged = 0  # epochs in the goodput at the base
        self._fruitless = 0  # rounds since something changed
        self._share = 0.0  # of outcomes of late that the server couldn't cope with
        self._cut_at = -inf
        self._trouble = inf  # a limit with which it couldn't cope
        self._stride = 1  # how many looks down at once: two after one that was taken
        self._target = 0  # how far to recover without looking at the goodput
        self._rests = self._rests_left = 1
        self._enter(_CLIMBING, self.limit, -inf)
        self._skip = self.limit  # the first to end are the short ones

    def _enter(self, state: int, limit: int, now: float) -> None:
        self._state = state
        changed = limit != self.limit
        self.limit = limit
        self._from = now
        self._settled_at = now + _SETTLE * self._mean if changed else now
        self._skip = limit if changed else 0
        self._glance = max(limit, _GLANCE_LEAST)
        self._began = inf
        self._last = -inf
        self._count = self._goods = self._saturated = 0
        if state == _CLIMBING:
            self._wanted = self._enough(_CLIMB_WAVES, _CLIMB_LEAST, _CLIMB_ERROR)
        elif state == _RECOVERING:
            self._wanted = limit
        else:
            self._wanted = self._enough(_LOOK_WAVES, _LOOK_LEAST, _LOOK_ERROR)

    def _enough(self, waves: int, least: int, error: float) -> int:
        """How many outcomes tell two epochs apart: more, the more the service times differ."""
        needed = max(least, min(_LONGEST, 2 * self._spread / error**2))
        return self.limit * min(max(waves, ceil(needed / self.limit)), max(_MOST_WAVES, ceil(least / self.limit)))

    def ended(self, now: float, began: float, kind: int, saturated: bool) -> None:
        """An item that was started at ``began`` is done. ``saturated``: as many were in progress as may be."""
        took = now - began
        if took < 0.0 or now < self._from:  # the clock has started anew
            self._cut_at = -inf
            self._enter(self._state, self.limit, now)
            return
        if self._mean:
            off = took - self._mean
            self._mean += off * _GAIN
            self._variance += (off * off - self._variance) * _GAIN
        else:
            self._mean = took
        bad = kind == OVERLOADED
        self._share += (bad - self._share) * _SHARE_GAIN
        if bad and began > self._cut_at and self._share > _OVERLOADED_SHARE:
            self._cut(now)
            return
        if now < self._settled_at or self._skip > 0:
            self._skip -= 1
            return
        if now > self._last:
            # What ends at one moment belongs together: a wave counts as a whole or not at all.
            if self._count >= self._wanted or (self._count >= self._glance and self._hopeless()):
                self._judge(now)
                return
            self._last = now
            if self._began == inf:
                self._began = now
        if now > self._began:
            self._count += 1
            self._goods += kind == OK
            self._saturated += saturated

    def _hopeless(self) -> bool:
        """Whether a look has seen enough, before its end: it is worse by more than chance makes it."""
        self._glance = self._count + self.limit
        rate = self._goods / (self._last - self._began)
        chance = 2 * sqrt(2 * self._spread / self._count)
        if self._state == _CLIMBING:
            return self.limit > self._base and rate < self._rate * (_MORE - chance)
        return self._state in (_UP, _DOWN) and rate < self._rate * (_NO_LESS - chance)

    @property
    def _spread(self) -> float:
        """How much service times differ: their variance, in means squared."""
        return self._variance / self._mean**2 if self._mean else 0.0

    def _cut(self, now: float) -> None:
        """Once for each burst: what began before the cut doesn't cut again."""
        self._cut_at = now
        self._share = 0.0
        if self._state == _UP:
            self._rest(now, found_nothing=True, most=_MOST_RESTS_TROUBLED)
            return
        if self._state != _RECOVERING:
            self._target = self.limit // 2
            self._trouble = self.limit
        self._enter(_RECOVERING, max(1, int(self.limit * _CUT)), now)

    def _judge(self, now: float) -> None:
        """An epoch is over."""
        nothing = not self._goods and not self._rate and self._state != _RECOVERING
        if nothing or self._saturated < _SATURATED * self._count:
            if self._state in (_UP, _DOWN):
                self._enter(_RESTING, self._base, now)
            else:
                self._enter(self._state, self.limit, now)
            return
        rate = self._goods / (self._last - self._began)
        if self._state == _CLIMBING:
            self._climbed(now, rate)
        elif self._state == _RECOVERING:
            self._recovered(now)
        elif self._state == _RESTING:
            self._rested(now, rate)
        elif self._state == _UP:
            if rate >= _MORE * self._rate:
                self._rate = rate
                self._base = self.limit
                if self.limit >= self._trouble:
                    self._trouble = inf
                self._climb(now)
            elif self._fruitless % _LOOK_DOWN_EVERY == 0:
                self._look_down(now)
            else:
                self._rest(now, found_nothing=True)
        elif rate >= _NO_LESS * self._rate:
            self._base = self.limit  # and the goodput to hold stays, or a series of looks would lose a little each time
            self._fruitless = 0
            self._stride = 2
            self._look_down(now)
        else:
            found = self._stride > 1
            self._rest(now, found_nothing=not found)

    def _climbed(self, now: float, rate: float) -> None:
        base, before = self._base, self._rate
        if rate >= _GROWTH * before or self.limit == base:
            self._base = self.limit
            self._rate = rate
            self._climb(now)
            return
        reached = base * max(1.0, rate / before)  # below the knee, goodput grows as the limit does
        self._base = min(self.limit, ceil(reached))
        self._rate = max(rate, before)
        if rate < _MORE * before:
            self._look_down(now)  # it may be far too many already
        else:
            self._rest(now, found_nothing=False)

    def _climb(self, now: float) -> None:
        doubled = int(min(self.most, 2 * self._base, _CUT * self._trouble))
        if doubled > self._base:
            self._enter(_CLIMBING, doubled, now)
        else:
            self._rest(now, found_nothing=False)

    def _recovered(self, now: float) -> None:
        if self.limit < self._target:
            self._enter(_RECOVERING, min(self._target, 2 * self.limit), now)
        else:
            self._base = self.limit
            self._rate = 0.0
            self._enter(_CLIMBING, self.limit, now)

    def _look_down(self, now: float) -> None:
        if self._base > 1:
            self._enter(_DOWN, max(1, int(self._base / _LOOK**self._stride)), now)
        else:
            self._rest(now, found_nothing=True)

    def _rest(self, now: float, *, found_nothing: bool, most: int = _MOST_RESTS) -> None:
        if found_nothing:
            self._rests = min(most, 2 * self._rests)
            self._fruitless += 1
        else:
            self._rests = 1
            self._fruitless = 0
            self._averaged = 1
        self._stride = 1
        self._rests_left = self._rests
        self._enter(_RESTING, self._base, now)

    def _rested(self, now: float, rate: float) -> None:
        before = self._rate
        if not before or abs(rate - before) > _MOVED * before:
            self._rate = rate
            self._averaged = 1
            self._rests, self._fruitless = 1, 0
            if rate < before:  # so many fewer are enough for it
                self._enter(_DOWN, max(1, ceil(self._base * rate / before)), now)
                return
            self._rests_left = 0
        self._averaged += 1
        self._rate += (rate - self._rate) / min(self._averaged, _MOST_RESTS)
        self._rests_left -= 1
        if self._rests_left > 0:
            self._enter(_RESTING, self._base, now)
        elif self._base < self.most:
            self._enter(_UP, min(self.most, ceil(self._base * _LOOK)), now)
        else:
            self._look_down(now)
