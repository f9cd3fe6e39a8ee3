"""Redirects are followed hop by hop: what goes along, what stays behind, and where they may not lead."""

from __future__ import annotations

from typing import Any

import pytest
from tests.net.hostile import Hostile, Seen, attempt, redirect

from penstock.errors import FetchError
from penstock.net.fetch import fetch
from penstock.net.fetcher import Fetcher
from penstock.net.request import Request
from penstock.testing import run_virtual

SECRETS = {
    "Authorization": "Bearer secret-one",
    "Cookie": "session=secret-two",
    "X-Api-Key": "secret-three",
    "api-key": "secret-four",
    "Proxy-Authorization": "Basic secret-five",
    "Accept": "text/html",
}


async def one(item: Any, **options: Any) -> Any:
    return await attempt(item, **{"allow_private": True, **options})


@pytest.mark.parametrize(
    ("code", "method", "becomes", "body"),
    [
        (301, "GET", "GET", b""),
        (301, "POST", "GET", b""),
        (302, "POST", "GET", b""),
        (303, "POST", "GET", b""),
        (303, "PUT", "GET", b""),
        (303, "HEAD", "HEAD", b""),
        (302, "PUT", "PUT", b'{"n":1}'),
        (307, "POST", "POST", b'{"n":1}'),
        (308, "PUT", "PUT", b'{"n":1}'),
    ],
)
def test_methods_and_bodies_change_as_browsers_change_them(code: int, method: str, becomes: str, body: bytes) -> None:
    async def main() -> Any:
        async with Hostile(routes={"go": redirect("/there?x=1", code)}) as server:
            json = {"n": 1} if method in ("POST", "PUT") else None
            page = await one(Request(server.url("/go"), method, json=json))
            return page, server.seen[-1], server.url("/there?x=1"), server.connections

    page, last, url, connections = run_virtual(main())
    assert (page.status, page.url) == (200, url)
    assert (last.method, last.target, last.body) == (becomes, "/there?x=1", body)
    assert ("content-type" in last.headers) == bool(body)
    assert connections == 1


def test_credentials_go_along_to_the_same_origin() -> None:
    async def main() -> Any:
        async with Hostile(routes={"go": redirect("/there")}) as server:
            await one(Request(server.url("/go"), headers=SECRETS))
            return server.seen[-1].headers

    headers = run_virtual(main())
    assert {name: headers[name.lower()] for name in SECRETS} == SECRETS


@pytest.mark.parametrize("where", ["another host", "another port"])
def test_credentials_stay_behind_at_another_origin(where: str) -> None:
    async def main() -> Any:
        async with Hostile("127.0.0.2" if where == "another host" else "127.0.0.1") as other:
            to = other.url("/there").replace("://", "://evil:planted@")
            async with Hostile(routes={"go": redirect(to)}) as server:
                url = server.url("/go").replace("://", "://me:secret-six@")
                headers = {name: value for name, value in SECRETS.items() if name != "Authorization"}
                page = await one(Request(url, headers=headers))
                return page, server.seen[0].headers, other.seen[0].headers

    page, first, second = run_virtual(main())
    assert first["authorization"] == "Basic bWU6c2VjcmV0LXNpeA=="
    assert second["accept"] == "text/html"
    assert not {"authorization", "cookie", "x-api-key", "api-key", "proxy-authorization"} & second.keys()
    assert "planted" not in page.url


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/caf\u00e9".encode("latin-1"), "/caf%E9"),
        ("/café".encode(), "/caf%C3%A9"),
        (b"/a%7Eb?x=%41&y=%2f", "/a%7Eb?x=%41&y=%2f"),
        (b"/a b\xff?x=\xff%20", "/a%20b%FF?x=%FF%20"),
    ],
)
def test_a_redirect_leads_to_the_bytes_it_names(location: bytes, target: str) -> None:
    async def go(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n")
        return True

    async def main() -> Any:
        async with Hostile(routes={"go": go}) as server:
            await one(server.url("/go"))
            return server.seen[-1].target

    assert run_virtual(main()) == target


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "blocked"),
        ("ftp://127.0.0.1/", "blocked"),
        ("data:text/plain,x", "blocked"),
        ("javascript:alert(1)", "blocked"),
        ("http://[::1", "decode"),
    ],
)
def test_redirects_lead_only_to_http(location: str, reason: str) -> None:
    async def main() -> Any:
        async with Hostile(routes={"go": redirect(location)}) as server:
            return await one(server.url("/go"))

    error = run_virtual(main())
    assert isinstance(error, FetchError), error
    assert (error.reason, error.retryable, error.stops_run) == (reason, False, False)


@pytest.mark.parametrize("code", [300, 301, 304])
def test_a_redirect_to_nowhere_is_an_answer_or_an_error(code: int) -> None:
    async def main() -> Any:
        async with Hostile() as server:
            return await one(server.url(f"/status/{code}"))

    found = run_virtual(main())
    assert found.status == code
    assert isinstance(found, FetchError) == (code == 301)


# -- where connections may lead ----------------------------------------------------------------------------------------


HOME = ["127.0.0.1/32"]


def test_a_redirect_to_a_private_address_is_that_item_s_error() -> None:
    async def main() -> Any:
        async with Hostile("127.0.0.2") as inner, Hostile(routes={"go": redirect(inner.url())}) as server:
            urls = [server.url("/go"), server.url("/ok")]
            found = await fetch(urls, allow_private=HOME, on_error="keep", ordered=True).collect()
            return found, inner.connections

    (failed, page), connections = run_virtual(main())
    assert failed.error.startswith("blocked: http://127.0.0.2:")
    assert "a redirect led to it" in failed.error
    assert failed.attempts == 1
    assert page.status == 200
    assert connections == 0


@pytest.mark.parametrize("host", ["127.0.0.2", "127.2", "2130706434", "0x7f.0.0.2", "0177.0.0.2", "[::ffff:127.0.0.2]"])
def test_a_listed_private_address_stops_the_run_and_tells_the_way_out(host: str) -> None:
    async def main() -> Any:
        async with Hostile("127.0.0.2") as inner:
            with pytest.raises(FetchError) as raised:
                await fetch([inner.url(host=host)], allow_private=HOME, on_error="skip", retry=0).collect()
            return raised.value, inner.connections

    error, connections = run_virtual(main())
    assert (error.reason, error.stops_run) == ("blocked", True)
    assert "allow_private=True" in str(error)
    assert connections == 0


def test_a_listed_name_that_leads_to_private_addresses_alone_stops_the_run_too() -> None:
    error = run_virtual(one("http://intern.test/", allow_private=False, lookup=lambda *_: ["10.1.2.3", "fd00::1"]))
    assert (error.reason, error.stops_run) == ("blocked", True)
    assert "10.1.2.3" in str(error)
    assert "fd00::1" in str(error)


def test_a_private_address_among_others_is_passed_over() -> None:
    async def main() -> Any:
        async with Hostile() as server, Hostile("127.0.0.2") as inner:
            url = server.url(host="mixed.test")
            page = await one(url, allow_private=HOME, lookup=lambda *_: ["127.0.0.2", "127.0.0.1"])
            return page, inner.connections

    page, connections = run_virtual(main())
    assert page.status == 200
    assert connections == 0


def test_a_name_that_moves_to_a_private_address_is_that_item_s_error() -> None:
    async def main() -> Any:
        async with Hostile() as server, Hostile("127.0.0.2") as inner:
            homes = {server.port: "127.0.0.1", inner.port: "127.0.0.2"}
            fetcher = Fetcher(allow_private=HOME, lookup=lambda host, port: [homes[port]])
            page = await fetcher(server.url(host="moves.test"))
            with pytest.raises(FetchError) as raised:
                await fetcher(inner.url(host="moves.test"))
            await fetcher.close()
            return page, raised.value, inner.connections

    page, error, connections = run_virtual(main())
    assert page.status == 200
    assert (error.reason, error.stops_run, connections) == ("blocked", False, 0)


def test_an_odd_form_of_an_allowed_address_is_fetched() -> None:
    async def main() -> Any:
        async with Hostile() as server:
            return [await one(server.url(host=host), allow_private=HOME) for host in ("2130706433", "0x7f.1", "127.1")]

    assert [page.status for page in run_virtual(main())] == [200] * 3


# -- a run that is doomed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [401, 403, 407])
def test_twenty_refusals_in_a_row_stop_the_run(code: int) -> None:
    async def main() -> Any:
        async with Hostile() as server:
            urls = [server.url(f"/status/{code}/{number}") for number in range(1000)]
            with pytest.raises(FetchError) as raised:
                await fetch(urls, allow_private=True, on_error="skip", concurrency=4).collect()
            return raised.value, len(server.seen)

    error, requests = run_virtual(main())
    assert 20 <= requests <= 24
    assert (error.status, error.stops_run) == (code, True)
    assert "has refused 20 requests in a row" in str(error)


def test_a_host_that_has_served_something_may_refuse_as_often_as_it_likes() -> None:
    async def main() -> Any:
        async with Hostile() as server:
            urls = [server.url("/ok"), *(server.url(f"/status/403/{number}") for number in range(50))]
            return await fetch(urls, allow_private=True, on_error="skip", concurrency=1).collect()

    assert len(run_virtual(main())) == 1


def test_a_crawl_goes_on_where_one_host_of_many_refuses() -> None:
    async def main() -> Any:
        async with Hostile() as server, Hostile("127.0.0.2") as other:
            urls = []
            for number in range(40):
                urls += [server.url(f"/status/403/{number}"), other.url(f"/ok/{number}")]
            return await fetch(urls, allow_private=True, on_error="skip", concurrency=1).collect()

    assert len(run_virtual(main())) == 40
