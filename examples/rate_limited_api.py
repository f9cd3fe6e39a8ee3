"""A little JSON API with a quota, to try things on: it counts every answer it gives, as one that bills would.

    python examples/rate_limited_api.py --per-minute 6000        prints its URL and serves until it is ended

POST /v1/mood {"text": …} answers {"mood": …, "words": …} after a few milliseconds, or 422 for a text without words.
Beyond the quota it answers 429 with Retry-After. GET /count tells how many answers it gave, how many refusals.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from typing import Any

from aiohttp import web

GLAD = {"good", "great", "happy", "love", "fine", "bright"}
SAD = {"bad", "sad", "hate", "poor", "dark", "late"}


class Quota:
    """A token bucket: so many requests a minute, spread evenly, with a tenth of a second of them at once."""

    def __init__(self, per_minute: float) -> None:
        self.rate = per_minute / 60
        self.most = max(1.0, self.rate / 10)
        self.left = self.most
        self.at = time.monotonic()

    def wait(self) -> float:
        """0 if a request may be served now, else the seconds until one may."""
        now = time.monotonic()
        self.left = min(self.most, self.left + (now - self.at) * self.rate)
        self.at = now
        if self.left < 1:
            return (1 - self.left) / self.rate
        self.left -= 1
        return 0.0


class Api:
    """``answers`` counts what was paid for, by the text that was asked about."""

    def __init__(self, per_minute: float, seconds: float = 0.02) -> None:
        self.quota = Quota(per_minute)
        self.seconds = seconds
        self.answers: Counter[str] = Counter()
        self.refused = 0

    async def mood(self, request: web.Request) -> web.Response:
        """One answer: the API's actual work."""
        wait = self.quota.wait()
        if wait > 0:
            self.refused += 1
            return web.json_response(
                {"error": "rate_limit_exceeded"}, status=429, headers={"Retry-After": f"{wait:.3f}"}
            )
        try:
            text = str((await request.json())["text"])
        except ConnectionError:  # the caller is gone
            return web.Response(status=400)
        words = text.lower().split()
        if not words:
            return web.json_response({"error": "there is nothing to judge"}, status=422)
        await asyncio.sleep(self.seconds)
        self.answers[text] += 1
        feeling = sum(word in GLAD for word in words) - sum(word in SAD for word in words)
        return web.json_response(
            {"mood": "glad" if feeling > 0 else "sad" if feeling < 0 else "calm", "words": len(words)}
        )

    async def count(self, request: web.Request) -> web.Response:
        """What it has done so far."""
        return web.json_response({"paid": self.answers.total(), "texts": len(self.answers), "refused": self.refused})


async def serve(api: Api) -> tuple[web.AppRunner, str]:
    """Serve on a free port of this machine; returns what to clean up, and the URL."""
    app = web.Application()
    app.add_routes([web.post("/v1/mood", api.mood), web.get("/count", api.count)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address: Any = runner.addresses[0]
    return runner, f"http://127.0.0.1:{address[1]}"


async def main(per_minute: float) -> None:
    runner, url = await serve(Api(per_minute))
    print(url, flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-minute", type=float, default=6000)
    try:
        asyncio.run(main(parser.parse_args().per_minute))
    except KeyboardInterrupt:
        pass
