"""``ps.fetch``: a flow of what many sources answer, as fast as they allow and no faster.

It is a ``map`` stage on the event loop, named "fetch", whose function is a ``Fetcher``. The stage does what every stage
does: ceilings and rates by host, retries, what becomes of failures. The Fetcher makes one attempt at one item.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

from penstock.errors import PlanError
from penstock.flow.contract import Failed, Source
from penstock.flow.flow import Flow
from penstock.flow.limit import Limit
from penstock.flow.retry import Retry
from penstock.flow.stage import OnError, positive
from penstock.net.address import Guard
from penstock.net.fetched import Fetched
from penstock.net.fetcher import MAX_BYTES, Fetcher, Rows, site_of
from penstock.net.repeating import as_fetch_retry
from penstock.net.saving import SaveTo, as_saver
from penstock.net.timing import Timeout, as_timeout
from penstock.place.base import per_worker

__all__ = ["FetchOptions", "Sources", "fetch"]

Sources = Flow[Any] | Iterable[Any] | AsyncIterable[Any] | Source[Any]


class FetchOptions(TypedDict, total=False):
    """The keyword parameters of ``fetch`` but ``on_error``."""

    request: Rows | None
    limit: Limit | None
    timeout: float | Timeout | None
    retry: int | Retry | None
    concurrency: int | Literal["auto"]
    max_bytes: int
    save_to: SaveTo | None
    allow_private: bool | Iterable[str]
    max_failures: float | None
    ordered: bool
    key: Callable[[Any], Any] | None
    name: str


@overload
def fetch(
    sources: Sources, *, on_error: Literal["keep"], **options: Unpack[FetchOptions]
) -> Flow[Fetched | Failed]: ...
@overload
def fetch(
    sources: Sources, *, on_error: Literal["raise", "skip", "dead_letter"] | None = ..., **options: Unpack[FetchOptions]
) -> Flow[Fetched]: ...
def fetch(
    sources: Sources,
    *,
    request: Rows | None = None,
    limit: Limit | None = None,
    timeout: float | Timeout | None = None,
    retry: int | Retry | None = None,
    concurrency: int | Literal["auto"] = "auto",
    max_bytes: int = MAX_BYTES,
    save_to: SaveTo | None = None,
    allow_private: bool | Iterable[str] = False,
    on_error: OnError | None = None,
    max_failures: float | None = None,
    ordered: bool = False,
    key: Callable[[Any], Any] | None = None,
    name: str = "fetch",
) -> Flow[Any]:
    """Fetch what ``sources`` name, many at once, as a flow of ``Fetched``, in the order in which they come.

    ``sources``: an iterable or a flow of URLs, ``Request`` objects, paths and ``file://`` URLs, or of any rows with
    ``request=``, a function that makes a row's ``Request`` or URL. It is called at each attempt, so that signatures are
    fresh; what it raises is that item's error. Rates by host ask it too, so let it do nothing but make the request.

    - ``limit``, ``concurrency``: see ``Flow``; ``"auto"`` is found out for each host.
    - ``timeout``: seconds for an attempt, or a ``Timeout``. ``retry``: further attempts (4), or a ``Retry``. Only what
      may go better the next time and does no harm is tried again: a POST if it is ``idempotent``, or wasn't done.
    - ``max_bytes``: the most that a body may have, on the wire and decompressed (64 MB).
    - ``save_to``: a directory, or a function of an item that returns its path. The body goes to that file, which
      appears when it is whole; ``Fetched.path`` names it.
    - ``allow_private``: True, or networks such as ``["10.0.0.0/8"]``. Other addresses that aren't public (loopback is
      one) are refused: a listed one stops the run, one behind a redirect is that item's error.
    - ``on_error``, ``max_failures``, ``ordered``, ``key``, ``name``: see ``Flow``.

    A status of 400 or more is an error. Failures are ``FetchError``, with a ``reason`` of ``dns connect tls timeout
    throttled status decode too_big blocked``; and ``WriteFailed``, for a file of ``save_to=`` that can't be written.
    Twenty refusals (401, 403, 407) in a row from one host, while nothing else succeeds, stop the run. Proxies are those
    of the environment. Raises PlanError for what can't be run.

    >>> import pathlib, tempfile, penstock as ps
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "page.html")
    ...     _ = path.write_text("hello")
    ...     [page] = ps.fetch([path]).collect_sync()
    ...     page.text(), page.headers["content-type"]
    ('hello', 'text/html')
    """
    flow: Flow[Any] = sources if isinstance(sources, Flow) else Flow(sources)
    if request is not None and not callable(request):
        raise PlanError(f"fetch(request={request!r})", "Give a function that makes an item's Request or URL")
    bounds = as_timeout(timeout if timeout is not None else flow.defaults.get("timeout"))
    again = as_fetch_retry(retry if retry is not None else flow.defaults.get("retry"))
    positive(max_bytes, "fetch(max_bytes")
    as_saver(save_to)
    networks = allow_private if isinstance(allow_private, (bool, str)) else tuple(allow_private)
    Guard(networks)
    fetcher = per_worker(
        Fetcher,
        request=request,
        timeout=bounds,
        retry=again,
        max_bytes=max_bytes,
        save_to=save_to,
        allow_private=networks,
    )
    # a flow's own defaults hold where nothing is given, but for its timeout, which is the Fetcher's to keep
    options: dict[str, Any] = {
        "name": name,
        "place": "loop",
        "concurrency": concurrency,
        "ordered": ordered,
        "retry": again,
        "timeout": None,
        "on_error": on_error,
        "key": key,
        "site": partial(site_of, request=request),
    }
    if limit is not None:
        options["limit"] = limit
    if max_failures is not None:
        options["max_failures"] = max_failures
    return flow.map(fetcher, **options)
