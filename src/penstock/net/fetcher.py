"""What the stage of ``ps.fetch`` calls: an object that makes one attempt at one item.

It keeps, for the items in flight that failed and will come again, how often they did, and for hosts whether they refuse
everything. Both are bounded. It is used by one loop alone, and nothing here waits but the attempts themselves.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import FetchError, PlanError
from penstock.flow.redact import redact_url
from penstock.flow.retry import Retry
from penstock.net.address import Guard
from penstock.net.fetched import Fetched
from penstock.net.refusals import REFUSED, Refusals
from penstock.net.repeating import as_fetch_retry
from penstock.net.request import Request, check_url, has_blank, is_http
from penstock.net.saving import FileSink, MemorySink, SaveTo, Sink, as_saver
from penstock.net.timing import Timeout
from penstock.place.loop import clock_of

if TYPE_CHECKING:
    from penstock.net.client import Client
    from penstock.net.http import HttpTransport
    from penstock.net.names import Lookup

__all__ = ["MAX_BYTES", "Fetcher", "Rows", "site_of"]

Rows = Callable[[Any], Request | str]
"""Makes a row's request, or the URL of it."""

MAX_BYTES = 64 * 1024 * 1024

_MOST_COUNTED = 65_536
_AUTHORITY = re.compile(r"https?://(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # one letter alone is a drive


def site_of(item: Any, request: Rows | None = None) -> str:
    """The host that an item goes to, ``""`` for a file: rates and concurrency are kept by host."""
    if request is not None:
        try:
            item = request(item)
        except Exception:  # the attempt will raise it again, and then it counts
            return ""
    url = item.url if not isinstance(item, str) and isinstance(item, Request) else item
    found = _AUTHORITY.match(url) if isinstance(url, str) else None
    return found[1].lower() if found is not None else ""


class Fetcher:
    """Makes one attempt at one item. Built on the loop that runs it; connections are opened at the first URL.

    Closed with the run. Cancelling a call closes its connection and leaves nothing, no file either.
    """

    def __init__(
        self,
        *,
        request: Rows | None = None,
        timeout: Timeout | None = None,
        retry: Retry | None = None,
        max_bytes: int = MAX_BYTES,
        save_to: SaveTo | None = None,
        allow_private: bool | Iterable[str] = False,
        lookup: Lookup | None = None,
    ) -> None:
        self._request = request
        self._timeout = timeout or Timeout()
        self._retry = retry or as_fetch_retry(None)
        self._max_bytes = max_bytes
        self._saver = as_saver(save_to)
        self._guard = Guard(allow_private)
        self._lookup = lookup
        self._refusals = Refusals()
        self._served = ""  # how the last URL began that was served, up to its path; and its host
        self._host = ""
        self._failures: dict[int, int] = {}
        self._transport: HttpTransport | None = None
        self._client: Client | None = None

    async def __call__(self, item: Any) -> Fetched:
        try:
            request = self._read(item)
            if isinstance(request, Path):
                fetched = await self._local(item, request)
            else:
                client = self._client or self._open()
                fetched = await client.fetch(item, request, self._saver and self._sink(item, request))
                self._note_success(fetched.url)
        except Exception as error:
            self._note_failure(item, error)
            raise
        if self._failures:
            fetched.attempts = self._failures.pop(id(item), 0) + 1
        return fetched

    def _read(self, item: Any) -> Request | str | Path:
        """What an item asks for; text: the GET of that URL. Raises PlanError, and what ``request=`` raises."""
        asked = item
        if self._request is not None:
            asked = self._request(item)
            if not isinstance(asked, (str, Request)):
                raise PlanError(
                    f"request= gave a {type(asked).__name__} for an item", "Let it return a Request or a URL"
                )
            if isinstance(asked, str) and not is_http(asked):
                check_url(asked)
        if isinstance(asked, str):  # first, since most are; asking whether something is a Request is dear
            if is_http(asked):
                if has_blank(asked):
                    check_url(asked)
                return asked
            return _local_path(asked)
        if isinstance(asked, Request):
            if asked.is_redacted:
                raise PlanError(
                    f"{asked!r} was written or sent to another process, which removed its credentials",
                    "Make the request from a row instead, by request=, or where it is fetched",
                )
            return asked
        if isinstance(asked, os.PathLike):
            return Path(asked)
        raise PlanError(
            f"fetch was given a {type(item).__name__}",
            "Give URLs, Requests or paths; for rows, give request=, a function that makes a row's Request or URL",
        )

    def _sink(self, item: Any, request: Request | str | Path) -> Callable[[], Sink]:
        saver = self._saver
        if saver is None:
            return MemorySink
        asked = Request(request) if isinstance(request, str) else request
        return lambda: FileSink(saver(item, asked))

    async def _local(self, item: Any, path: Path) -> Fetched:
        from penstock.net.local import read_file

        clock = clock_of(asyncio.get_running_loop())
        began = clock()
        sink = self._sink(item, path)()
        try:
            found = await read_file(path, sink, self._max_bytes)
        except BaseException:
            await sink.discard()
            raise
        return Fetched(item, path.absolute().as_uri(), 200, found.headers, found.body, clock() - began, 1, found.path)

    def _open(self) -> Client:
        from penstock.net.client import Client
        from penstock.net.http import HttpTransport

        self._transport = HttpTransport(self._guard, self._lookup, self._timeout.connect)
        clock = clock_of(asyncio.get_running_loop())
        self._client = Client(self._transport, self._timeout, self._max_bytes, clock)
        return self._client

    def _note_success(self, url: str) -> None:
        if not (self._served and url.startswith(self._served)):
            found = _AUTHORITY.match(url)
            self._served = f"{found[0]}/" if found is not None else ""
            self._host = site_of(url)
        self._refusals.served(self._host)

    def _note_failure(self, item: Any, error: Exception) -> None:
        """Count an attempt that failed, if another will follow; notice a doomed run."""
        if isinstance(error, FetchError) and error.status in REFUSED:
            self._note_refusal(error)
        failures = self._failures.get(id(item), 0)
        throttled = isinstance(error, FetchError) and error.reason == "throttled"
        if throttled or self._retry.repeats(error, failures + 1):
            if len(self._failures) >= _MOST_COUNTED:
                del self._failures[next(iter(self._failures))]
            self._failures[id(item)] = failures + 1
        else:
            self._failures.pop(id(item), None)

    def _note_refusal(self, error: FetchError) -> None:
        host = site_of(error.url)
        count = self._refusals.refused(host)
        if count:
            raise FetchError(
                error.url,
                error.reason,
                f"{error.detail}. {host} has refused {count} requests in a row, and nothing has succeeded meanwhile: "
                "the run is stopped. Look at the credentials, and run it again: what is done stays done",
                error.status,
                error.headers,
                stops_run=True,
            ) from None

    async def close(self) -> None:
        """Close every connection."""
        if self._client is not None:
            self._client.close()
        if self._transport is not None:
            await self._transport.close()


def _local_path(text: str) -> Path:
    """The path that a text names: a ``file:`` URL, or what has no scheme. Raises PlanError."""
    if text[:5].lower() == "file:":
        from penstock.net.local import path_of_url

        return path_of_url(text)
    if _SCHEME.match(text) or not text or "\0" in text:
        raise PlanError(
            f"{redact_url(text)[:200]!r} is no http, https or file URL, and no path",
            "Give URLs in full (https://…), paths, or Request objects",
        )
    return Path(text)
