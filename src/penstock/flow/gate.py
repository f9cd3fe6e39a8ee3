"""A pool behind a gate: its tasks start when a Limit, and a search for the best concurrency, let them.

A gate is itself a pool (``place/base.py``) around another one, so a segment knows nothing of it. Between ``submit``
and ``done`` a task is in one of two states:

- *waiting*: in the queue of its site (the host it goes to; one site for all where nothing is kept by host). It holds
  no worker and no timeout runs. It leaves by starting, by being withdrawn, or when the limit has been refused for so
  long that it is hopeless: then it fails as ``Throttled``.
- *started*: charged to the limit and given to the inner pool, which has a free worker for it. It leaves when it is
  done; or it was throttled, and waits again, at the front of its queue: that costs no attempt.

A site has at most one timer, for when the limit is to be asked again, and is in the *ring* when it may start
something now. Sites in the ring take turns, so that one with many tasks doesn't starve the others.

What is done and not taken from the segment yet counts: nothing starts while that and what is started come to twice of
what may be in progress, so that results don't pile up before a slow consumer.

Everything here is synchronous and runs on the loop that opened the pool. ``halt`` empties the queues; ``abort``
leaves the limit's queue, so that whoever shares it goes on, then aborts the inner pool.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from penstock.errors import Throttled
from penstock.flow.limit import PATIENCE, Limit, Pace
from penstock.flow.meter import SegmentMeter
from penstock.flow.search import Search
from penstock.flow.signals import OVERLOADED, THROTTLED, UNKNOWN, Signal
from penstock.place.base import FAILED, MAP, OK, PENDING, TIMED_OUT, Chain, Outer, Pool, Task
from penstock.place.loop import clock_of

__all__ = ["Gate"]

_FEWEST = 32  # at once, by which results are bounded where fewer may be in progress
_LONGEST_NAP = 60.0  # seconds until a limit is asked again, whatever it says: it may have become hopeless meanwhile
_NOTE_EVERY = 0.1  # seconds between two looks at how many may be in progress, for the report
_MOST_SITES = 4096  # beyond these, what was learned of hosts with nothing to do is forgotten
_AHEAD = 64  # tasks that wait beyond those that may start: enough to know what comes, and bounded
_AHEAD_BY_SITE = 1024  # more, so that the tasks of one slow host don't fill the room of all others


class _Site:
    """One host: what waits for it, what has started, and how fast it may be asked."""

    __slots__ = ("name", "pace", "queue", "refusal", "ringing", "search", "started", "timer")

    def __init__(self, name: str, pace: Pace, search: Search | None) -> None:
        self.name = name
        self.pace = pace
        self.search = search
        self.queue: deque[Task] = deque()
        self.started = 0
        self.timer: asyncio.TimerHandle | None = None
        self.ringing = False
        self.refusal: BaseException | None = None

    @property
    def full(self) -> bool:
        """Whether no more of its tasks may be in progress."""
        return self.search is not None and self.started >= self.search.limit

    @property
    def idle(self) -> bool:
        return not self.queue and not self.started

    @property
    def ceiling(self) -> int:
        """How many of its tasks may be in progress, as far as it has any."""
        return 0 if self.idle else self.search.limit if self.search is not None else self.started


class _Start:
    """A started task: where it goes, what it was given and charged, and when it began."""

    __slots__ = ("began", "given", "site", "tokens")

    def __init__(self, site: _Site, given: Any, tokens: float, began: float) -> None:
        self.site = site
        self.given = given
        self.tokens = tokens
        self.began = began


class Gate(Outer):
    """``inner`` makes the pool that does the work. ``auto``: search for the best concurrency, up to ``workers``.

    ``limit``: None means one without numbers, which learns from what is refused. ``site``: the host that an item
    goes to; without it there is one site. ``behind``: how many tasks are done and not taken yet.
    """

    def __init__(
        self,
        chain: Chain,
        workers: int,
        *,
        inner: type[Pool],
        limit: Limit | None,
        auto: bool,
        site: Callable[[Any], str] | None,
        meter: SegmentMeter,
        behind: Callable[[], int],
        done: Callable[[list[Task]], None],
        failed: Callable[[BaseException], None],
        part: Callable[[Task, list[Any]], None] | None = None,
    ) -> None:
        super().__init__(chain, workers, done=done, failed=failed, part=part)
        self._inner = inner(chain, workers, done=self._finished, failed=failed, part=part)
        self.workers = self._inner.workers
        meter.searched = auto
        self._limit = Limit() if limit is None else limit
        meter.learns = not self._limit.is_given
        self._auto = auto
        self._site_of = site
        self._meter = meter
        self._behind = behind
        self._most_at_once = workers if not auto else _FEWEST
        self._sites: dict[str, _Site] = {}
        self._ring: deque[_Site] = deque()
        self._starts: dict[int, _Start] = {}
        self._waiting = 0
        self._timers = 0
        self._noted = 0.0
        self._halted = False

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock_of(self._loop)
        if self._site_of is None:
            self._only = self._site("")
        await super().open()

    @property
    def backlog(self) -> int:
        return self._waiting

    @property
    def held_back(self) -> bool:
        return self._timers > 0 and len(self._starts) < self.workers

    def room(self) -> int:
        if self._site_of is not None:
            return max(0, min(self.workers, _AHEAD_BY_SITE) + _AHEAD_BY_SITE - self._waiting - len(self._starts))
        search = self._only.search
        most = self.workers if search is None else min(search.limit, self.workers)
        return max(0, most + min(most, _AHEAD) - self._waiting - len(self._starts))

    # -- waiting ----------------------------------------------------------------------------------------------------

    def submit(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            try:
                site = self._only if self._site_of is None else self._site(self._site_of(task.value))
            except Exception as error:  # the item itself is at fault: its stage's on_error deals with it
                self._fail(task, error)
                continue
            site.queue.append(task)
            self._waiting += 1
            self._may_start(site)
        self._start()

    def _site(self, name: str) -> _Site:
        site = self._sites.get(name)
        if site is None:
            search = Search(most=self.workers) if self._auto else None
            site = self._sites[name] = _Site(name, self._limit.pace(name), search)
        return site

    def _may_start(self, site: _Site) -> None:
        """Put a site into the ring, if it has something to start and nothing keeps it."""
        if site.queue and not site.ringing and site.timer is None and not site.full:
            site.ringing = True
            self._ring.append(site)

    def _start(self) -> None:
        """Start what may, each site in its turn."""
        ring, starting = self._ring, []
        if not ring:
            return
        now = self._clock()
        self._note_ceiling(now)
        most = min(self.workers, 2 * max(self._most_at_once, _FEWEST) - self._behind())
        while ring and len(self._starts) < most:
            site = ring.popleft()
            site.ringing = False
            task = self._admit(site, now)
            if task is not None:
                starting.append(task)
            self._may_start(site)
        if starting:
            self._inner.submit(starting)

    def resume(self) -> None:
        self._start()

    def _admit(self, site: _Site, now: float) -> Task | None:
        """The first task of a site, charged to its limit; None if it has to wait, or it failed."""
        if not site.queue:
            return None
        task = site.queue[0]
        try:
            tokens = self._limit.cost(task.value)
        except Exception as error:
            site.queue.popleft()
            self._waiting -= 1
            self._fail(task, error)
            return None
        wait = site.pace.ask(now, site, tokens)
        if wait > 0:
            site.timer = self._loop.call_later(min(wait, _LONGEST_NAP), self._due, site)
            self._timers += 1
            return None
        site.queue.popleft()
        self._waiting -= 1
        site.started += 1
        self._starts[id(task)] = _Start(site, task.value, tokens, now)
        return task

    def _due(self, site: _Site) -> None:
        """The limit may let a task of this site go now."""
        site.timer = None
        self._timers -= 1
        if site.pace.hopeless(self._clock()):
            self._give_up(site)
        self._may_start(site)
        self._start()

    def _give_up(self, site: _Site) -> None:
        """Nothing has been let through for too long: what waits now fails, and what comes later gets its own chance."""
        now = self._clock()
        site.pace.leave(site)
        site.pace.forgive(now)
        tasks = list(site.queue)
        site.queue.clear()
        self._waiting -= len(tasks)
        for task in tasks:
            self._throttled_for_good(task, site)
        if tasks:
            self.done(tasks)

    def _throttled_for_good(self, task: Task, site: _Site) -> None:
        task.outcome = FAILED
        task.error = Throttled(self.chain.name, PATIENCE)
        task.error.__cause__ = site.refusal

    def _fail(self, task: Task, error: Exception) -> None:
        """A task that can't be started fails at the next turn of the loop: nothing is called back from ``submit``."""
        task.outcome = FAILED
        task.error = error
        self._loop.call_soon(self._hand_over, task)

    def _hand_over(self, task: Task) -> None:
        if not self._halted:
            self.done([task])

    def _note_ceiling(self, now: float) -> None:
        if self._auto and now - self._noted >= _NOTE_EVERY:
            self._noted = now
            self._most_at_once = max(1, min(self.workers, sum(site.ceiling for site in self._sites.values())))
            self._meter.set_ceiling(self._most_at_once, now)

    # -- what came of it --------------------------------------------------------------------------------------------

    def _finished(self, tasks: list[Task]) -> None:
        now = self._clock()
        ended, again = [], []
        for task in tasks:
            start = self._starts.pop(id(task))
            site = start.site
            saturated = site.timer is None and (site.full or bool(site.queue))
            site.started -= 1
            signal = self._signal(task, start)
            site.pace.report(now, signal, start.tokens, start.began)
            if signal.tokens is not None:
                self._stop_timer(site)  # it may have used less than was charged
            if site.search is not None:
                site.search.ended(now, start.began, signal.kind, saturated)
            if signal.kind != THROTTLED or self.chain.streams:
                ended.append(task)
            else:
                again.append((task, start))
            self._may_start(site)
        for task, start in reversed(again):
            self._wait_again(task, start)
        if ended:
            self.done(ended)
        if not self._halted:
            self._start()
            self._forget_sites()

    def _signal(self, task: Task, start: _Start) -> Signal:
        """What the outcome says; if the limit's own ``throttled=`` raises, that is the item's failure."""
        try:
            return self._read(task)
        except Exception as error:
            error.add_note(
                f"raised by Limit(throttled=) of stage {self.chain.name!r}, which is asked about results too"
            )
            task.outcome, task.at, task.value, task.error = FAILED, 0, start.given, error
            return Signal(UNKNOWN)

    def _read(self, task: Task) -> Signal:
        """What the outcome says about the server."""
        if task.outcome == OK:
            return self._limit.signal(task.value) if self.chain.steps[0].verb == MAP else Signal()
        if task.outcome == TIMED_OUT:
            return Signal(OVERLOADED)
        return self._limit.signal(task.error) if isinstance(task.error, BaseException) else Signal(UNKNOWN)

    def _wait_again(self, task: Task, start: _Start) -> None:
        """The server wouldn't have it now: it waits at the front, as it was."""
        if isinstance(task.error, BaseException):
            start.site.refusal = task.error.with_traceback(None)  # its frames would keep alive what they worked on
        task.value = start.given
        task.outcome = PENDING
        task.error = None
        task.seconds = None
        start.site.queue.appendleft(task)
        self._waiting += 1
        self._meter.first.throttled += 1
        self._may_start(start.site)

    def _forget_sites(self) -> None:
        if len(self._sites) > _MOST_SITES:
            self._sites = {name: site for name, site in self._sites.items() if not site.idle}

    # -- the end ----------------------------------------------------------------------------------------------------

    def withdraw(self, task: Task) -> bool:
        start = self._starts.get(id(task))
        if start is not None:
            if not self._inner.withdraw(task):
                return False
            del self._starts[id(task)]
            start.site.started -= 1
            self._may_start(start.site)
            self._loop.call_soon(self._start)
            return True
        for site in self._sites.values():
            if task in site.queue:
                site.queue.remove(task)
                self._waiting -= 1
                if not site.queue:
                    self._leave(site)
                return True
        return False

    def _leave(self, site: _Site) -> None:
        """A site with nothing left to start stands in nobody's way."""
        site.pace.leave(site)
        self._stop_timer(site)

    def _stop_timer(self, site: _Site) -> None:
        if site.timer is not None:
            site.timer.cancel()
            site.timer = None
            self._timers -= 1

    def halt(self) -> None:
        self._halted = True
        for site in self._sites.values():
            site.queue.clear()
            self._leave(site)
        self._ring.clear()
        self._waiting = 0
        self._inner.halt()
