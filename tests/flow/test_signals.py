"""What outcomes say, read off the exceptions and responses of real SDKs that talk to a real server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from time import time
from typing import Any

import aiohttp
import anthropic
import httpx
import openai
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import StageTimeout
from penstock.flow.signals import OK, OVERLOADED, THROTTLED, UNKNOWN, Quota, Rates, Signal, read_signal

DATE = "Tue, 10 Jun 2025 10:00:00 GMT"
LATER = "Tue, 10 Jun 2025 10:00:07 GMT"


# -- a server, and those who talk to it --------------------------------------------------------------------------------


@asynccontextmanager
async def answering(status: int, headers: Mapping[str, str], body: Any) -> AsyncIterator[str]:
    """A server on loopback that gives every request the same answer; its address."""

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response(body, status=status, headers=dict(headers))

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def by_openai(url: str) -> Any:
    client = openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0)
    async with client:
        return await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])


async def by_anthropic(url: str) -> Any:
    client = anthropic.AsyncAnthropic(api_key="none", base_url=url, max_retries=0)
    async with client:
        return await client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])


async def by_httpx(url: str) -> Any:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(url)).raise_for_status()


async def by_httpx_unraised(url: str) -> Any:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url)


async def by_aiohttp(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        response.raise_for_status()
        return response


async def by_aiohttp_unraised(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response


Caller = Callable[[str], Awaitable[Any]]
CALLERS: list[Caller] = [by_openai, by_anthropic, by_httpx, by_httpx_unraised, by_aiohttp, by_aiohttp_unraised]
every_caller = pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)


async def outcome(caller: Caller, url: str) -> Signal:
    try:
        result = await caller(url)
    except Exception as error:
        return read_signal(error)
    return read_signal(None, result)


def signal_of(caller: Caller, status: int, headers: Mapping[str, str] | None = None, body: Any = None) -> Signal:
    async def work() -> Signal:
        async with answering(status, headers or {}, {} if body is None else body) as url:
            return await outcome(caller, url)

    return asyncio.run(work())


@pytest.fixture(autouse=True)
def _no_proxy_between(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


# -- kinds -------------------------------------------------------------------------------------------------------------


@every_caller
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "-4"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"Date": DATE, "Retry-After": LATER}, 7.0),
        ({"Date": LATER, "Retry-After": DATE}, 0.0),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
    ],
)
def test_429_is_throttled_with_every_form_of_retry_after(
    caller: Caller, headers: Mapping[str, str], seconds: float | None
) -> None:
    assert signal_of(caller, 429, headers) == Signal(THROTTLED, seconds)


def test_a_date_without_a_servers_clock_is_by_ours() -> None:
    error = httpx_error(429, {"Retry-After": formatdate(time() + 100, usegmt=True)})
    assert 90 < (read_signal(error).retry_after or 0) <= 100


@every_caller
@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (503, {"Retry-After": "2"}, THROTTLED),
        (503, {}, OVERLOADED),
        (529, {}, OVERLOADED),
        (502, {}, OVERLOADED),
        (504, {}, OVERLOADED),
        (500, {}, UNKNOWN),
        (400, {}, UNKNOWN),
        (401, {}, UNKNOWN),
        (404, {"Retry-After": "2"}, UNKNOWN),
    ],
)
def test_statuses(caller: Caller, status: int, headers: Mapping[str, str], kind: int) -> None:
    assert signal_of(caller, status, headers).kind == kind


@pytest.mark.parametrize("caller", [by_openai, by_anthropic])
def test_a_success_says_what_it_used(caller: Caller) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21, "input_tokens": 20, "output_tokens": 1}
    body = {"id": "1", "type": "message", "role": "assistant", "choices": [], "content": [], "usage": usage}
    assert signal_of(caller, 200, body=body) == Signal(OK, tokens=21.0)


@every_caller
def test_nobody_there_is_overload(caller: Caller) -> None:
    async def work() -> Signal:
        async with answering(200, {}, {}) as url:
            pass
        return await outcome(caller, url)

    assert asyncio.run(work()) == Signal(OVERLOADED)


@every_caller
def test_a_dropped_connection_is_overload(caller: Caller) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async def work() -> Signal:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            return await outcome(caller, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    assert asyncio.run(work()) == Signal(OVERLOADED)


def test_a_spent_quota_is_no_reason_to_wait() -> None:
    """It comes as a 429, and would be one for ever."""
    body = {"error": {"message": "check your plan", "type": "insufficient_quota", "code": "insufficient_quota"}}
    assert signal_of(by_openai, 429, body=body).kind == UNKNOWN


def test_a_code_counts_where_the_status_misleads() -> None:
    body = {"error": {"message": "slower", "code": "rate_limit_exceeded"}}
    assert signal_of(by_openai, 400, {"Retry-After": "2"}, body) == Signal(THROTTLED, 2.0)
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assert signal_of(by_anthropic, 500, body=overloaded).kind == OVERLOADED


# -- the shapes that others use ----------------------------------------------------------------------------------------


class Strange(Exception):
    """Any attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__("strange")
        self.__dict__.update(attributes)


@dataclass
class Response:
    status_code: Any = None
    headers: Any = None
    usage: Any = None


def httpx_error(status: int, headers: Mapping[str, str]) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://127.0.0.1")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, headers=headers))


RETRY = {"RETRY-AFTER": "2"}


@pytest.mark.parametrize(
    "error",
    [
        Strange(status_code=429, headers=RETRY),
        Strange(status=429, headers=[("Retry-After", "2")]),
        Strange(status="429", headers=[(b"Retry-After", b"2")]),
        Strange(http_status=429, headers={"retry-after": 2}),
        Strange(code=429, headers=RETRY),
        Strange(code=HTTPStatus.TOO_MANY_REQUESTS, headers=RETRY),
        Strange(code="429", headers=RETRY),
        Strange(code="rate_limit_exceeded", headers=RETRY),
        Strange(type="rate_limit_error", headers=RETRY),
        Strange(response=Response(429, RETRY)),
        Strange(response=Response("429", RETRY)),
        Strange(status_code=429, response=Response(None, RETRY)),
        Strange(status_code=503, headers=RETRY),
        Strange(code="TooManyRequestsException", headers=RETRY),
        Strange(
            response={
                "Error": {"Code": "ThrottlingException", "Message": "Rate exceeded"},
                "ResponseMetadata": {"HTTPStatusCode": 400, "HTTPHeaders": RETRY},
            }
        ),
        Strange(response={"ResponseMetadata": {"HTTPStatusCode": 429, "HTTPHeaders": RETRY}}),
    ],
    ids=lambda error: str(vars(error))[:70],
)
def test_throttled_in_many_shapes(error: Exception) -> None:
    assert read_signal(error) == Signal(THROTTLED, 2.0)
    outer = RuntimeError("a wrapper")
    outer.__cause__ = error
    assert read_signal(outer) == Signal(THROTTLED, 2.0), "one level of cause is looked at"
    outermost = RuntimeError("a wrapper of a wrapper")
    outermost.__cause__ = outer
    assert read_signal(outermost) == Signal(UNKNOWN), "and no more"


def test_a_class_named_so_is_throttled() -> None:
    for name in ("RateLimitError", "TooManyRequests", "ResourceExhausted"):
        kind = type(name, (Exception,), {})
        assert read_signal(kind()).kind == THROTTLED
        assert read_signal(type("Own", (kind,), {})()).kind == THROTTLED


def test_grpc() -> None:
    """Its ``code`` is a method; those of others are not called."""

    class Code:
        def __init__(self, name: str) -> None:
            self.name = name

    class AioRpcError(Exception):
        def __init__(self, name: str) -> None:
            self.code = lambda: Code(name)

    class Elsewhere(AioRpcError):
        pass

    AioRpcError.__module__ = "grpc.aio._call"
    assert read_signal(AioRpcError("RESOURCE_EXHAUSTED")).kind == THROTTLED
    assert read_signal(AioRpcError("UNAVAILABLE")).kind == OVERLOADED
    assert read_signal(AioRpcError("INVALID_ARGUMENT")).kind == UNKNOWN
    assert read_signal(Elsewhere("RESOURCE_EXHAUSTED")).kind == UNKNOWN


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        StageTimeout("ask", 3),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("gone"),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ServerTimeoutError(),
        openai.APITimeoutError(request=None),  # type: ignore[arg-type]
        type("FetchError", (OSError,), {"reason": "connect"})(),
        type("FetchError", (OSError,), {"reason": "timeout"})(),
    ],
    ids=repr,
)
def test_resets_and_timeouts_are_overload(error: Exception) -> None:
    assert read_signal(error) == Signal(OVERLOADED)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad row"),
        FileNotFoundError("x"),
        httpx.UnsupportedProtocol("gopher"),
        httpx.LocalProtocolError("bad header"),
        KeyError("usage"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "connect"),
        Strange(code=7, status="active", headers=RETRY),
        Strange(status=True),
        type("FetchError", (OSError,), {"reason": "dns"})(),
    ],
    ids=repr,
)
def test_other_errors_teach_nothing(error: Exception) -> None:
    assert read_signal(error) == Signal(UNKNOWN)


# -- results are the user's data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        None,
        "429",
        429,
        [429],
        {"status": 429, "headers": {"Retry-After": "5"}},
        {"status_code": 503},
        {"error": {"code": "rate_limit_exceeded"}},
        Strange(status_code=429),
        Strange(status="429", headers={}),
        Strange(status=True, headers={}),
        Strange(headers={"x-ratelimit-remaining-requests": "0"}),
    ],
    ids=repr,
)
def test_data_is_not_misread(data: object) -> None:
    assert read_signal(None, data) == Signal()


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"total_tokens": 5}, 5.0),
        ({"input_tokens": 2, "output_tokens": 4}, 6.0),
        ({"prompt_tokens": 3}, 3.0),
        ({"total_tokens": True}, None),
        ({"total_tokens": -1}, None),
        ({"total_tokens": float("nan")}, None),
        ({"total_tokens": "5"}, None),
        ("lots", None),
        (5, None),
    ],
)
def test_usage(usage: Any, tokens: float | None) -> None:
    assert read_signal(None, {"usage": usage}) == Signal(tokens=tokens)
    as_object = Strange(**usage) if isinstance(usage, dict) else usage
    assert read_signal(None, Response(usage=as_object)) == Signal(tokens=tokens)
    assert read_signal(None, Response(200, {}, as_object)) == Signal(tokens=tokens)


# -- quotas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize(
    ("headers", "rates"),
    [
        (
            {
                "x-ratelimit-limit-requests": "5000",
                "x-ratelimit-remaining-requests": "4999",
                "x-ratelimit-reset-requests": "12ms",
                "x-ratelimit-limit-tokens": "160000",
                "x-ratelimit-remaining-tokens": "159,976",
                "x-ratelimit-reset-tokens": "6m0.5s",
            },
            Rates(Quota(5000, 4999, 0.012, 60, True), Quota(160000, 159976, 360.5, 60, True)),
        ),
        (
            {
                "Date": DATE,
                "anthropic-ratelimit-requests-limit": "50",
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2025-06-10T10:00:30Z",
                "anthropic-ratelimit-input-tokens-limit": "30000",
                "anthropic-ratelimit-input-tokens-remaining": "29000",
                "anthropic-ratelimit-input-tokens-reset": "2025-06-10T09:00:00Z",
            },
            Rates(Quota(50, 0, 30, 60, True), Quota(30000, 29000, 0, 60, True)),
        ),
        (
            {"RateLimit-Limit": "100, 100;w=60", "RateLimit-Remaining": "50", "RateLimit-Reset": "30"},
            Rates(Quota(100, 50, 30, 60)),
        ),
        (
            {"RateLimit-Policy": '"default";q=100;w=10', "RateLimit": '"default";r=7;t=5'},
            Rates(Quota(100, 7, 5, 10)),
        ),
        ({"RateLimit": "limit=10, remaining=0, reset=2"}, Rates(Quota(10, 0, 2))),
        (
            {
                "Date": DATE,
                "X-RateLimit-Limit": "5000",
                "X-RateLimit-Remaining": "4000",
                "X-RateLimit-Reset": "1749549900",
            },
            Rates(Quota(5000, 4000, 300)),
        ),
        (
            {"Date": DATE, "X-Rate-Limit-Remaining": "4", "X-Rate-Limit-Reset": "1749549601500"},
            Rates(Quota(None, 4, 1.5)),
        ),
        ({"x-ratelimit-remaining": "many"}, None),
        (
            {"x-ratelimit-limit-requests": "60", "x-ratelimit-reset-requests": "?"},
            Rates(Quota(60, None, None, 60, True)),
        ),
    ],
)
def test_quotas_in_every_spelling(status: int, headers: Mapping[str, str], rates: Rates | None) -> None:
    assert read_signal(None, httpx.Response(status, headers=headers)).rates == rates
    if status == 429:
        assert read_signal(httpx_error(status, headers)).rates == rates


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("1h2m3.5s", 3723.5), ("2d", 172800), ("7m12s", 432), ("120ms", 0.12), ("90", 90), ("0.25", 0.25)],
)
def test_durations(text: str, seconds: float) -> None:
    rates = read_signal(None, Response(200, {"x-ratelimit-limit": "1", "x-ratelimit-reset": text})).rates
    assert rates is not None
    assert rates.requests is not None
    assert rates.requests.reset == pytest.approx(seconds)


def test_a_real_answer_tells_of_its_quotas() -> None:
    headers = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0", "retry-after": "1"}
    assert signal_of(by_openai, 429, headers).rates == Rates(Quota(60, 0, None, 60, True))
    assert signal_of(by_aiohttp_unraised, 200, headers).rates == Rates(Quota(60, 0, None, 60, True))


# -- nothing is ever raised --------------------------------------------------------------------------------------------


class Hostile:
    """Every attribute raises, or is another like it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class HostileError(Exception):
    @property
    def response(self) -> Any:
        raise RuntimeError("no")

    @property
    def headers(self) -> Any:
        raise ValueError("no")

    status_code = Hostile()


class Endless(Mapping[str, str]):
    def __getitem__(self, key: str) -> str:
        return "1"

    def __iter__(self) -> Any:
        number = 0
        while True:
            number += 1
            yield str(number)

    def __len__(self) -> int:
        return 1


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.binary(max_size=10),
    st.sampled_from([Hostile(), Endless(), object(), Hostile, len, float("nan"), 10**400]),
    st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=3),
    st.lists(st.tuples(st.sampled_from(["Retry-After", "retry-after-ms", "x-ratelimit-reset"]), st.text(max_size=20))),
)
names = st.sampled_from(
    ["status", "status_code", "code", "type", "response", "headers", "usage", "body", "reason", "http_status"]
)


@given(st.dictionaries(names, odd), odd)
def test_odd_things_are_survived(attributes: dict[str, Any], result: Any) -> None:
    strange = Strange(**attributes)
    for signal in (
        read_signal(strange),
        read_signal(Strange(response=strange)),
        read_signal(None, strange),
        read_signal(None, result),
        read_signal(None, {"usage": result}),
        read_signal(None, Response(429, result, result)),
        read_signal(HostileError()),
    ):
        assert signal.kind in (OK, THROTTLED, OVERLOADED, UNKNOWN)
        assert signal.retry_after is None or 0 <= signal.retry_after < 1e19
        assert signal.tokens is None or signal.tokens >= 0


@given(st.text(alphabet="0123456789.:-+ eTZ,smhd=;wGMT", max_size=40))
def test_odd_headers_are_survived(text: str) -> None:
    headers = dict.fromkeys(
        (
            "retry-after",
            "retry-after-ms",
            "date",
            "ratelimit",
            "ratelimit-policy",
            "ratelimit-limit",
            "ratelimit-reset",
            "x-ratelimit-reset-tokens",
            "x-ratelimit-limit-tokens",
            "anthropic-ratelimit-requests-reset",
            "anthropic-ratelimit-requests-limit",
        ),
        text,
    )
    signal = read_signal(None, Response(429, headers))
    assert signal.kind == THROTTLED
    assert signal.retry_after is None or signal.retry_after >= 0
