"""A doomed run ends early: a host that refuses the credentials twenty times in a row will refuse the rest too."""

from __future__ import annotations

__all__ = ["ENOUGH", "REFUSED", "Refusals"]

REFUSED = frozenset({401, 403, 407})
"""Statuses that say who may not, and not what was wrong."""

ENOUGH = 20

_MOST_HOSTS = 4096
_SERVED = -1


class Refusals:
    """Counts, by host, the answers that refuse, until the host has served anything.

    A run over many hosts isn't doomed because one of them refuses (a crawl meets many): only if no other host has
    served anything since the first of the refusals. Bounded: the host that was first met is forgotten first.
    """

    def __init__(self) -> None:
        self._hosts: dict[str, int] = {}
        self._served = 0
        self._served_before: dict[str, int] = {}

    def served(self, host: str) -> None:
        """The host has answered a request with what was wanted."""
        self._served += 1
        if self._hosts.get(host) != _SERVED:
            self._enter(host, _SERVED)
            self._served_before.pop(host, None)

    def refused(self, host: str) -> int:
        """The host has refused: how often in a row by now, if the run is doomed; else 0."""
        count = self._hosts.get(host, 0)
        if count == _SERVED:
            return 0
        if self._served_before.get(host) != self._served:
            self._served_before[host] = self._served
            count = 0
        count += 1
        self._enter(host, count)
        return count if count >= ENOUGH else 0

    def _enter(self, host: str, count: int) -> None:
        if host not in self._hosts and len(self._hosts) >= _MOST_HOSTS:
            oldest = next(iter(self._hosts))
            del self._hosts[oldest]
            self._served_before.pop(oldest, None)
        self._hosts[host] = count
