"""Which host an item goes to, where rates and concurrency are kept by host."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from penstock.errors import PlanError

__all__ = ["host_of"]


def host_of(item: Any) -> str:
    """The host (with its port, if it names one) of an item that is a URL, or has one as ``url``.

    Raises PlanError for an item that has none.

    >>> host_of("https://api.example.com/v1/items?page=2"), host_of({"url": "http://127.0.0.1:8080/"})
    ('api.example.com', '127.0.0.1:8080')
    """
    url = item
    if not isinstance(item, str):
        url = item.get("url") if isinstance(item, dict) else getattr(item, "url", None)
    if url is not None:
        host = urlsplit(str(url)).netloc.rpartition("@")[2].lower()
        if host:
            return host
    raise PlanError(
        f"Limit(per_host=True) was given a {type(item).__name__} without a host",
        "Give items that are URLs, or that have one as 'url'; without per_host=True the limit is for all together",
    )
