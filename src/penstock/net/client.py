"""Attempts under watch: their timeouts, and what their failures mean to the user.

A watch cancels its attempt's task at a bound; that, a cancellation from outside and any error end alike: the attempt
has let go of everything by the time it is known here why it ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from penstock.errors import FetchError
from penstock.flow.redact import redact_url
from penstock.net.attempt import Attempt
from penstock.net.fetched import Fetched
from penstock.net.request import Request
from penstock.net.saving import Sink
from penstock.net.timing import Timeout, Watch
from penstock.net.transport import Broken, Transport

__all__ = ["Client"]

_MOST_KNOWN = 10_000


class Client:
    """Makes attempts over one transport, on the loop that it is made on."""

    def __init__(self, transport: Transport, timeout: Timeout, max_bytes: int, clock: Callable[[], float]) -> None:
        self._transport = transport
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._watches: list[Watch] = []  # free ones
        self._known: dict[str, None] = {}  # hosts that have answered: they were public, or allowed

    async def fetch(self, source: Any, request: Request | str, make_sink: Callable[[], Sink] | None = None) -> Fetched:
        """Make one attempt at a request, or at the GET of a URL. ``make_sink`` is called when a body comes.

        Raises FetchError. Cancelling closes the connection and leaves nothing.
        """
        began = self._clock()
        attempt = Attempt(request, self._max_bytes, make_sink)
        watch = self._watches.pop() if self._watches else Watch(self._loop, self._timeout)
        watch.begin()
        try:
            await attempt.run(self._transport, watch)
        except BaseException as error:
            if watch.absorb():
                raise self._expired(attempt, watch) from None
            if isinstance(error, Broken):
                raise self._failure(attempt, error) from None
            raise
        finally:
            watch.end()
            self._watches.append(watch)
            if attempt.status and attempt.host not in self._known:
                self._note_known(attempt.host)
        elapsed = self._clock() - began
        return Fetched(
            source, attempt.shown_url, attempt.status, attempt.headers, attempt.body, elapsed, 1, attempt.path
        )

    def close(self) -> None:
        """Stop the timers of watches; no attempt may be under way."""
        for watch in self._watches:
            watch.close()
        self._watches.clear()

    def _note_known(self, host: str) -> None:
        if len(self._known) >= _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[host] = None

    def _failure(self, attempt: Attempt, broken: Broken) -> FetchError:
        url = redact_url(str(attempt.url))
        if broken.refused is None:
            harmless = attempt.idempotent or not broken.sent
            return FetchError(url, broken.reason, broken.detail, retryable=broken.retryable and harmless)
        if attempt.url.raw_host == broken.refused:
            detail = f"{broken.refused} isn't a public address"
        else:
            detail = f"it is at {broken.refused}, which isn't a public address"
        if attempt.hops:
            detail = f"a redirect led to it, and {detail}. allow_private= can name its network"
        elif attempt.host in self._known:
            detail = f"{detail}, and it was elsewhere before. allow_private= can name its network"
        else:
            detail = (
                f"{detail}. If you mean to fetch from your own network, give allow_private=True, or the networks that "
                'may be fetched from: allow_private=["10.0.0.0/8"]'
            )
            return FetchError(url, "blocked", detail, stops_run=True)
        return FetchError(url, "blocked", detail)

    def _expired(self, attempt: Attempt, watch: Watch) -> FetchError:
        bound = watch.expired or "total"
        seconds: float = getattr(watch.timeout, bound) or 0.0
        said = {
            "connect": f"there was no connection within {seconds:g} s",
            "idle": f"nothing came for {seconds:g} s",
            "total": f"it took longer than {seconds:g} s",
        }[bound]
        harmless = attempt.idempotent or (bound == "connect" and not attempt.hops)
        detail = f"{said}. If it needs longer, give timeout=Timeout({bound}=...)"
        return FetchError(redact_url(str(attempt.url)), "timeout", detail, retryable=harmless)
