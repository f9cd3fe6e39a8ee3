"""Looking names up: each in a daemon thread of its own, since nobody can interrupt the system's lookup.

A name server that doesn't answer holds a thread for half a minute. So there are at most so many at once, and whoever
waits for a free one gives up when a connection would have been given up. Cancelling leaves a lookup to end by itself.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from penstock.flow.blocking import Desk

__all__ = ["Lookup", "Resolver"]

Lookup = Callable[[str, int], Sequence[str]]
"""A name and a port to addresses; called in a thread. Raises OSError."""

_MOST = 64


class Resolver(AbstractResolver):
    """Asks ``lookup``, by default the system. ``patience``: seconds to wait where many lookups are under way."""

    def __init__(self, lookup: Lookup | None, patience: float | None) -> None:
        self._lookup = lookup
        self._patience = patience
        self._room = asyncio.Semaphore(_MOST)

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
        try:
            async with asyncio.timeout(self._patience):
                await self._room.acquire()
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, "too many other names wait for an answer") from None
        desk = Desk("penstock-name")
        try:
            found = await desk.call(self._look, host, port, family)
        finally:
            desk.dismiss()
            self._room.release()
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "it has no address")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in found
        ]

    def _look(self, host: str, port: int, family: int) -> list[tuple[int, str]]:
        if self._lookup is not None:
            return [
                (socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in self._lookup(host, port)
            ]
        found = []
        for kind, _, _, _, address in socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM):
            text = str(address[0])
            if kind == socket.AF_INET6 and len(address) > 3 and address[3] and "%" not in text:
                text = f"{text}%{address[3]}"
            found.append((int(kind), text))
        return found

    async def close(self) -> None:
        """Threads end by themselves."""
