"""Stages that call a real SDK (openai's), against a server on loopback that keeps a quota of requests a minute."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from aiohttp import web

import penstock as ps
from penstock.testing import run_virtual


class ChatApi:
    """Answers chat completions by the virtual clock: ``quota`` in any minute, beyond them 429. Counts both."""

    def __init__(self, quota: int, retry_after: bool) -> None:
        self.quota = quota
        self.retry_after = retry_after
        self.served: list[float] = []
        self.refused = 0
        self._recent: deque[float] = deque()

    async def answer(self, request: web.Request) -> web.Response:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._recent and self._recent[0] <= now - 60:
            self._recent.popleft()
        if len(self._recent) >= self.quota:
            self.refused += 1
            headers = {"Retry-After": f"{self._recent[0] + 60 - now:.2f}"} if self.retry_after else {}
            error = {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}
            return web.json_response({"error": error}, status=429, headers=headers)
        self._recent.append(now)
        self.served.append(now)
        asked = (await request.json())["messages"][0]["content"]
        return web.json_response(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": asked[::-1]}}
                ],
                "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
            }
        )


@asynccontextmanager
async def served(api: ChatApi) -> AsyncIterator[openai.AsyncOpenAI]:
    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", api.answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address: Any = runner.addresses[0]
    client = openai.AsyncOpenAI(api_key="k", base_url=f"http://127.0.0.1:{address[1]}/v1", max_retries=0)
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


@pytest.mark.parametrize("quota", [60, pytest.param(600, marks=pytest.mark.soak)])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_quota_is_used_and_nothing_is_wasted_through_the_real_sdk(quota: int, tokens: bool) -> None:
    api = ChatApi(quota, retry_after=not tokens)
    limit = ps.Limit(per_minute=quota)
    if tokens:
        limit = ps.Limit(per_minute=quota, tokens_per_minute=10**6, tokens=len)

    async def main() -> tuple[list[str], ps.Report]:
        async with served(api) as client:

            async def ask(text: str) -> str:
                answer = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": text}], timeout=3600
                )
                return answer.choices[0].message.content or ""

            outputs: list[str] = []
            flow = ps.Flow([f"question {number}" for number in range(2 * quota)])
            report = await flow.map(ask, limit=limit, concurrency="auto", name="ask").to(outputs.append).run()
            return outputs, report

    outputs, report = run_virtual(main())
    assert outputs == [f"question {number}"[::-1] for number in range(2 * quota)]
    assert api.refused <= 0.01 * 2 * quota
    used = 2 * quota / ((api.served[-1] - api.served[0]) / 60) / quota
    assert used >= 0.9
    assert report.stages[0].throttled == api.refused
    assert report.retried == 0


def test_an_sdks_refusal_in_a_thread_costs_no_attempt() -> None:
    """The synchronous client, which most people start with."""
    api = ChatApi(600, retry_after=True)
    turned_away: set[str] = set()

    async def answer(request: web.Request) -> web.Response:
        asked = json.loads(await request.read())["messages"][0]["content"]
        if asked not in turned_away:
            turned_away.add(asked)
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0"})
        return await api.answer(request)

    async def main() -> ps.Report:
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", answer)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address: Any = runner.addresses[0]
        with openai.OpenAI(api_key="k", base_url=f"http://127.0.0.1:{address[1]}/v1", max_retries=0) as client:

            def ask(text: str) -> str:
                created = client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])
                return created.choices[0].message.content or ""

            flow = ps.Flow(["one", "two", "three"]).map(ask, limit=ps.Limit(), workers=2)
            try:
                return await flow.to(outputs.append).run()
            finally:
                await runner.cleanup()

    outputs: list[str] = []
    report = asyncio.run(main())
    assert sorted(outputs) == ["eerht", "eno", "owt"]
    assert (report.stages[0].throttled, report.retried) == (3, 0)
