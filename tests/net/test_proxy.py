"""Proxies: those of the environment, for what goes outside, and checked as far as the target shows itself."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from tests.net.hostile import Hostile, Seen, attempt

from penstock.net.proxy import Proxies
from penstock.net.request import Request
from penstock.testing import run_virtual

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_proxies_of_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *map(str.lower, NAMES), "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)


def nowhere(host: str, port: int) -> list[str]:
    raise OSError(f"{host} is the proxy's to look up")


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_http_goes_through_the_proxy_that_looks_its_name_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    async def main() -> Any:
        async with Hostile() as proxy:
            monkeypatch.setenv(name, f"http://me:pass%3Aword@127.0.0.1:{proxy.port}")
            request = Request("http://example.test/a?b=1", headers={"X-Own": "1"})
            return await attempt(request, lookup=nowhere), proxy.seen

    page, seen = run_virtual(main())
    assert page.body == b"ok http://example.test/a?b=1"
    assert seen[0].headers["host"] == "example.test"
    assert seen[0].headers["x-own"] == "1"
    assert seen[0].headers["proxy-authorization"] == "Basic bWU6cGFzczp3b3Jk"


def test_https_goes_through_a_tunnel_and_is_verified_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(Path(__file__).with_name("selfsigned.pem"))

    async def main() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's side of it
        async with Hostile(tls=context) as server:

            async def tunnel(proxy: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
                inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(b"HTTP/1.1 200 Go on\r\n\r\n")
                try:
                    await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))
                finally:
                    inner_writer.close()
                return False

            async with Hostile(routes={"tls.test:443": tunnel}) as proxy:
                monkeypatch.setenv("HTTPS_PROXY", f"http://me:pw@127.0.0.1:{proxy.port}")
                return await attempt("https://tls.test/", lookup=nowhere), proxy.seen

    error, seen = run_virtual(main())
    assert (error.reason, error.retryable) == ("tls", False), error
    assert (seen[0].method, seen[0].target) == ("CONNECT", "tls.test:443")
    assert seen[0].headers["proxy-authorization"] == "Basic bWU6cHc="


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    if writer.can_write_eof():
        writer.write_eof()


@pytest.mark.parametrize(("code", "retryable"), [(407, False), (502, True)])
def test_a_proxy_that_refuses_a_tunnel(monkeypatch: pytest.MonkeyPatch, code: int, retryable: bool) -> None:
    async def refuse(proxy: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        writer.write(f"HTTP/1.1 {code} No\r\nContent-Length: 0\r\n\r\n".encode())
        return True

    async def main() -> Any:
        async with Hostile(routes={"tls.test:443": refuse}) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
            return await attempt("https://tls.test/", lookup=nowhere)

    error = run_virtual(main())
    assert (error.reason, error.retryable) == ("connect", retryable)
    assert f"the proxy answered {code}" in str(error)


def test_a_proxy_that_isn_t_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> Any:
        async with Hostile() as proxy:
            port = proxy.port
        monkeypatch.setenv("HTTP_PROXY", f"http://me:hunter2@127.0.0.1:{port}")
        return await attempt("http://example.test/", lookup=nowhere)

    error = run_virtual(main())
    assert error.reason == "connect"
    assert "the proxy can't be connected to" in str(error)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "http://", "http://[::1"])
def test_a_proxy_that_can_t_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    error = run_virtual(attempt("http://example.test/", lookup=nowhere))
    assert (error.reason, error.retryable) == ("connect", False)
    assert "Correct HTTP_PROXY" in str(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("allowed", [True, False])
def test_private_targets_bypass_the_proxy_and_are_checked_as_ever(
    monkeypatch: pytest.MonkeyPatch, host: str, allowed: bool
) -> None:
    async def main() -> Any:
        async with Hostile() as proxy, Hostile() as server:
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
            return await attempt(server.url(host=host), allow_private=allowed), proxy.connections

    found, connections = run_virtual(main())
    assert connections == 0
    assert found.status == 200 if allowed else (found.reason, found.stops_run) == ("blocked", True)


def test_which_proxy_a_target_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intern.test,.corp.test,10.9.9.9,8.8.8.8:53")
    proxies = Proxies()
    through = "http://proxy:3128"
    assert proxies.of("http", "example.com", 80) == through
    assert proxies.of("http", "8.8.8.8", 80) == through
    assert proxies.of("https", "example.com", 443) is None
    for host, port in [
        ("intern.test", 80),
        ("a.corp.test", 80),
        ("8.8.8.8", 53),
        ("localhost", 80),
        ("LOCALHOST.", 80),
        ("a.localhost", 80),
        ("127.0.0.1", 80),
        ("10.0.0.1", 80),
        ("::1", 80),
        ("0x7f.1", 80),
    ]:
        assert proxies.of("http", host, port) is None, host
    monkeypatch.setenv("NO_PROXY", "*")
    assert Proxies().of("http", "example.com", 80) is None
    monkeypatch.delenv("HTTP_PROXY")
    assert not Proxies().any
    assert Proxies().of("http", "example.com", 80) is None
