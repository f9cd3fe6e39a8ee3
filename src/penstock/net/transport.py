"""What a transport does: one method, which sends one request and hands the answer to whoever receives it.

A transport knows no redirects, retries, decompression or sinks, and the client knows no sockets. So another HTTP
library is one class, and a test can be its own server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from penstock.net.timing import Watch

__all__ = ["Answer", "Broken", "Outgoing", "Read", "Receive", "Transport"]

T = TypeVar("T")


@dataclass(slots=True)
class Outgoing:
    """One request as it goes out: the parsed URL (a ``yarl.URL``) without its user, and everything else in full."""

    method: str
    url: Any
    headers: Mapping[str, str]
    body: bytes | None = None


@dataclass(slots=True)
class Answer:
    """The head of an answer; ``headers`` by lower-case name. ``bodiless``: no body follows, whatever they say."""

    status: int
    phrase: str
    headers: dict[str, str]
    bodiless: bool = False


class Broken(Exception):
    """An exchange failed: ``reason`` as in FetchError, ``detail`` in words that show no URL.

    ``sent``: whether the other side may have seen the request. ``stale``: the connection was a kept one that the other
    side had closed, so that nothing is known against the request. ``retryable``: it may go better the next time.
    ``refused``: the addresses that the guard refused, where that was why.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        sent: bool = True,
        stale: bool = False,
        retryable: bool = True,
        refused: str | None = None,
    ) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.sent = sent
        self.stale = stale
        self.retryable = retryable
        self.refused = refused


Read = Callable[[], Awaitable[bytes]]
"""Gives the next bytes of the body as they come over the wire, and ``b""`` at its end. Raises Broken."""

Receive = Callable[[Answer, Read], Awaitable[T]]


class Transport(Protocol):
    """Sends requests."""

    async def send(self, outgoing: Outgoing, watch: Watch, receive: Receive[T]) -> T:
        """Send a request, hand the answer to ``receive``, and return what that returns.

        When it returns, the connection is whole and kept, or closed; closed too if it raises or is cancelled, so
        half an answer is never left for the next request. Raises Broken, or what ``receive`` raises.
        """
