"""``penstock fetch``: a list of URLs, as fast as their hosts allow, into a file; run again, it goes on."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from penstock.cli.logfile import piped
from penstock.cli.outcome import DONE, outcome
from penstock.errors import PlanError
from penstock.flow.flow import Flow
from penstock.flow.limit import Limit

__all__ = ["fetch_list", "read_limit"]

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/|per\s+)\s*(s|sec|second|m|min|minute)")


def fetch_list(
    urls: str,
    to: str,
    *,
    limit: str | None,
    per_host: bool,
    retry: int | None,
    timeout: float | None,
    save_to: str | None,
    allow_private: bool,
    fresh: bool,
    progress: bool | None,
) -> int:
    """Fetch what the file ``urls`` lists (``-``: standard input) into ``to`` and return the exit code."""

    def work() -> int:
        from penstock.net.fetch import fetch

        pages = fetch(
            _listed(urls),
            limit=read_limit(limit, per_host=per_host),
            retry=retry,
            timeout=timeout,
            save_to=save_to,
            allow_private=allow_private,
            on_error="dead_letter",
        )
        report = pages.to(to).run_sync(fresh=fresh, progress=progress)

        def tell() -> int:
            print(report)
            failed = report.dead + report.earlier.get("dead", 0)
            if failed:
                print(f"{failed:,} failed for good. To see why: penstock dead {shlex.quote(to)}")
            return DONE

        return piped(tell)

    return outcome(work)


def read_limit(text: str | None, *, per_host: bool = False) -> Limit | None:
    """The Limit that ``--limit`` means; None if there is nothing to limit.

    >>> read_limit("500/min"), read_limit("2.5/s", per_host=True)
    (Limit(per_minute=500), Limit(per_second=2.5, per_host=True))
    """
    if text is None:
        if per_host:
            raise PlanError("--per-host was given without --limit", "Say how many: --limit 5/s --per-host")
        return None
    found = _RATE.fullmatch(text.strip().lower())
    if found is None:
        raise PlanError(f"--limit {text!r}", "Give how many a second or a minute: --limit 20/s, --limit 500/min")
    rate: Any = float(found[1]) if "." in found[1] else int(found[1])
    if found[2].startswith("s"):
        return Limit(per_second=rate, per_host=per_host)
    return Limit(per_minute=rate, per_host=per_host)


def _listed(urls: str) -> Flow[str]:
    """The URLs, one a line; blank lines and those that begin with ``#`` are left out."""
    if urls == "-":
        # What comes through a pipe can't be read again from where it was, so progress is kept by URL (by its digest:
        # a URL may hold a credential).
        return Flow(_lines(), name="stdin", id=_digest, on_error="skip")
    from penstock.files.read import lines

    return lines(urls, on_error="dead_letter").map(_strip).filter(_is_url)


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        url = line.strip()
        if url and not url.startswith("#"):
            yield url


def _digest(url: str) -> str:
    return hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


async def _strip(line: str) -> str:
    return line.strip()


async def _is_url(line: str) -> bool:
    return bool(line) and not line.startswith("#")
