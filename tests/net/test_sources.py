"""What can be fetched, what comes back, and the stage that ``fetch`` is."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.net.hostile import Hostile, Seen, answer, failing_first

import penstock as ps
from penstock.errors import DecodeError, FetchError, PlanError
from penstock.net.fetch import fetch
from penstock.net.fetched import Fetched
from penstock.net.fetcher import Fetcher, site_of
from penstock.net.repeating import as_fetch_retry, worth_it
from penstock.net.request import Request
from penstock.net.timing import Timeout
from penstock.testing import run_virtual


def collect(flow: ps.Flow[Any]) -> list[Any]:
    return run_virtual(flow.collect())


# -- sources -----------------------------------------------------------------------------------------------------------


def test_urls_requests_and_files_are_fetched_alike(tmp_path: Path) -> None:
    (tmp_path / "a b.html").write_bytes(b"<p>hello")
    (tmp_path / "data").write_bytes(b"\0\1")

    async def main() -> Any:
        async with Hostile() as server:
            sources = [
                server.url("/x?y=1#part"),
                Request(server.url("/r"), "PUT", json=[1]),
                tmp_path / "a b.html",
                f"file://{tmp_path}/a%20b.html",
                f"file://localhost{tmp_path}/data",
                str(tmp_path / "data"),
            ]
            flow = fetch(sources, allow_private=True, ordered=True)
            return sources, await flow.collect(), server

    sources, pages, server = run_virtual(main())
    assert [page.source for page in pages] == sources
    assert [page.status for page in pages] == [200] * 6
    assert [page.attempts for page in pages] == [1] * 6
    assert [page.body for page in pages] == [b"ok /x?y=1", b"ok /r", b"<p>hello", b"<p>hello", b"\0\1", b"\0\1"]
    assert {(seen.method, seen.target, seen.body) for seen in server.seen} == {
        ("GET", "/x?y=1", b""),
        ("PUT", "/r", b"[1]"),
    }
    assert pages[2].headers == {"content-length": "8", "content-type": "text/html"}
    assert pages[4].headers == {"content-length": "2"}
    assert pages[2].url == (tmp_path / "a b.html").as_uri()
    assert all(page.elapsed >= 0 for page in pages)


def test_what_every_request_says() -> None:
    async def main() -> list[Seen]:
        async with Hostile() as server:
            plain, own = server.url(), Request(server.url(), headers={"User-Agent": "me", "accept-encoding": "gzip"})
            await fetch([plain, own], allow_private=True, concurrency=1).collect()
            return server.seen

    plain, own = run_virtual(main())
    assert plain.headers["user-agent"] == f"penstock/{ps.__version__}"
    assert plain.headers["accept-encoding"] == "gzip, deflate, zstd"
    assert (own.headers["user-agent"], own.headers["accept-encoding"]) == ("me", "gzip")
    assert "cookie" not in plain.headers


def test_cookies_are_nobody_s() -> None:
    async def bake(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        writer.write(answer(b"", headers={"Set-Cookie": "a=b"}))
        return True

    async def main() -> list[Seen]:
        async with Hostile(routes={"bake": bake}) as server:
            urls = [server.url("/bake", host="localhost")] * 2  # of an address, no cookie is ever kept
            await fetch(urls, allow_private=True, concurrency=1).collect()
            return server.seen

    assert not any("cookie" in seen.headers for seen in run_virtual(main()))


def test_rows_are_fetched_by_the_request_that_is_made_of_them_at_each_attempt() -> None:
    signatures = iter(range(100))

    async def main() -> Any:
        async def unavailable(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
            writer.write(answer(b"", "500 So"))
            return True

        async with Hostile(routes={"shaky": failing_first(1, unavailable)}) as server:

            def sign(row: dict[str, Any]) -> Request | str:
                if row["id"] == 2:
                    raise KeyError("no signature for 2")
                return Request(server.url(f"/shaky?id={row['id']}"), headers={"X-Signature": str(next(signatures))})

            rows = [{"id": 1}, {"id": 2}, {"id": 3}]
            found = await fetch(
                rows, request=sign, allow_private=True, on_error="keep", ordered=True, concurrency=1
            ).collect()
            return rows, found, [seen.headers["x-signature"] for seen in server.seen]

    rows, found, signed = run_virtual(main())
    assert [found[0].source, found[2].source] == [rows[0], rows[2]]
    assert [found[0].attempts, found[1].attempts, found[2].attempts] == [2, 1, 2]
    assert (found[1].reason, found[1].error) == ("KeyError", "'no signature for 2'")
    assert len(set(signed)) == 4


@pytest.mark.parametrize(
    ("row", "request_", "says"),
    [
        ({"a": 1}, None, "fetch was given a dict"),
        (7, None, "fetch was given a int"),
        ("ftp://example.com", None, "no http, https or file URL"),
        ("mailto:me@example.com", None, "no http, https or file URL"),
        ("", None, "no http, https or file URL"),
        ("file://other/etc/passwd", None, "on another machine"),
        ("http://h/a b", None, "blank"),
        ("x", lambda row: 7, "gave a int"),
        ("x", lambda row: "/etc/passwd", "is no http or https URL"),
        ("x", lambda row: "file:///etc/passwd", "is no http or https URL"),
    ],
)
def test_what_is_no_source_is_that_item_s_error(row: Any, request_: Any, says: str) -> None:
    (failed,) = collect(fetch([row], request=request_, on_error="keep"))
    assert says in failed.error
    assert failed.attempts == 1


@pytest.mark.parametrize(("name", "status"), [("missing", 404), ("file/below", 404), ("", 403), ("pipe", 403)])
def test_files_that_can_t_be_read(tmp_path: Path, name: str, status: int) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    (failed,) = collect(fetch([tmp_path / name], on_error="keep"))
    assert failed.error.startswith(f"status: {tmp_path / name}: {status}")


def test_files_have_the_bound_that_bodies_have(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * 3_000_000)
    (failed,) = collect(fetch([path], max_bytes=2_999_999, on_error="keep"))
    assert "it has 3,000,000 bytes, and max_bytes=2,999,999" in failed.error
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(10**12)
    (failed,) = collect(fetch([tmp_path / "sparse"], max_bytes=2_999_999, on_error="keep"))
    assert "it has 1,000,000,000,000 bytes" in failed.error  # before any of it is read
    (page,) = collect(fetch([path], max_bytes=3_000_000))
    assert page.body == path.read_bytes()


def test_a_flow_goes_on_into_fetch_and_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(b"one")
    flow = ps.Flow([1]).map(lambda number: tmp_path / str(number))
    assert collect(fetch(flow).map(lambda page: page.text())) == ["one"]


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"request": 7}, r"fetch\(request=7\)"),
        ({"max_bytes": 0}, r"max_bytes=0"),
        ({"max_bytes": 1.5}, r"max_bytes=1.5"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": 0}, "total=0"),
        ({"retry": -1}, "attempts=-1"),
        ({"retry": "3"}, "retry='3'"),
        ({"save_to": 7}, "save_to=7"),
        ({"allow_private": ["intern"]}, "allow_private="),
        ({"allow_private": "10.0.0.0/8"}, "allow_private="),
        ({"concurrency": 0}, "concurrency=0"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(given: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        fetch(["https://example.com"], **given)


def test_a_flow_s_defaults_are_fetch_s_too() -> None:
    flow: ps.Flow[Any] = ps.Flow(
        ["https://example.com"], timeout=7, retry=2, on_error="skip", place="thread", workers=3
    )
    (stage,) = fetch(flow).stages
    options = stage.options  # type: ignore[union-attr]
    assert (options.place, options.on_error, options.timeout, options.retry.attempts) == ("loop", "skip", None, 2)
    assert stage.function.kwargs["timeout"] == Timeout(total=7)  # type: ignore[union-attr]
    (stage,) = fetch(flow, retry=ps.Retry(7, backoff=2), timeout=Timeout(idle=3), on_error="keep").stages
    options = stage.options  # type: ignore[union-attr]
    assert (options.retry.attempts, options.retry.backoff, options.on_error) == (7, 2, "keep")
    assert stage.name == "fetch"
    assert not options.ordered


def test_what_is_retried_follows_from_the_error_unless_it_is_said() -> None:
    assert as_fetch_retry(None).attempts == 4
    assert as_fetch_retry(ps.Retry(2)).on is worth_it
    assert as_fetch_retry(ps.Retry(2, on=KeyError)).on is KeyError
    no, yes = FetchError("u", "status", "404"), FetchError("u", "connect", "lost", retryable=True)
    assert [worth_it(error) for error in (no, yes, OSError())] == [False, True, False]
    assert as_fetch_retry(ps.Retry(2, on=lambda error: True)).repeats(no, 1)


def test_the_host_that_an_item_goes_to() -> None:
    assert site_of("https://me:pw@API.example.com:8080/a@b?c@d") == "api.example.com:8080"
    assert site_of(Request("http://h")) == "h"
    assert site_of("HTTP://H?x") == "h"
    assert site_of(Path("/tmp")) == site_of("/tmp") == site_of("file:///x") == site_of(7) == ""
    assert site_of({"id": 1}, lambda row: f"http://h/{row['id']}") == "h"
    assert site_of({}, lambda row: row["id"]) == ""


def test_a_limit_by_host_holds_for_fetches() -> None:
    async def main() -> Any:
        async with Hostile() as one, Hostile("127.0.0.2") as other:
            urls = [server.url(f"/{number}") for number in range(10) for server in (one, other)]
            began = asyncio.get_running_loop().time()
            await fetch(urls, allow_private=True, limit=ps.Limit(per_second=1, per_host=True)).collect()
            return asyncio.get_running_loop().time() - began

    assert 8 < run_virtual(main()) < 12


def test_throttling_costs_no_attempt_of_the_stage_and_is_told() -> None:
    async def busy(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        writer.write(answer(b"", "429 So", {"Retry-After": "3"}))
        return True

    async def main() -> Any:
        async with Hostile(routes={"busy": failing_first(7, busy)}) as server:
            return await fetch([server.url("/busy")], allow_private=True, retry=0).collect()

    (page,) = run_virtual(main())
    assert page.attempts == 8


@pytest.mark.parametrize("concurrency", [1, 3])
def test_law_ceilings_hold_for_fetches(concurrency: int) -> None:
    async def slow(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        await asyncio.sleep(1)
        writer.write(answer(b"", "500 So" if request.target.endswith("3") else "200 OK"))
        return True

    async def main() -> int:
        async with Hostile(routes={"slow": slow}) as server:
            urls = [server.url(f"/slow/{number}") for number in range(12)]
            await fetch(urls, allow_private=True, concurrency=concurrency, on_error="skip", retry=2).collect()
            return server.peak

    assert run_virtual(main()) == concurrency


# -- what comes back ---------------------------------------------------------------------------------------------------


def page(body: bytes, content_type: str = "", **headers: str) -> Fetched:
    return Fetched(
        "s", "https://h/?key=k", 200, {**({"content-type": content_type} if content_type else {}), **headers}, body, 1.0
    )


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (b"caf\xe9", "text/html; charset=ISO-8859-1", "café"),
        (b"caf\xe9", 'text/html; Charset="latin-1"', "café"),
        ("café".encode(), "text/html", "café"),
        ("café".encode(), "", "café"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "text/html; charset=utf-8", "café"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "", "café"),
        ("café".encode("utf-16"), "text/plain", "café"),
        (b"\xfe\xff" + "café".encode("utf-16-be"), "text/plain", "café"),
        (b"caf\xe9", "text/plain", "caf\ufffd"),
        (b"caf\xc3\xa9", "text/plain; charset=nonsense", "café"),
        (b"caf\xc3\xa9", "text/plain; charset=idna", "café"),
        (b"caf\xc3\xa9", "text/plain; charset=hex", "café"),
        (b"a\\u0041", "text/plain; charset=unicode_escape", "a\\u0041"),
        (b"a\\u0041", "text/plain; charset=raw-unicode-escape", "a\\u0041"),
        (b"+AGE-", "text/plain; charset=U7", "+AGE-"),
    ],
)
def test_text_is_decoded_as_it_says(body: bytes, content_type: str, text: str) -> None:
    assert page(body, content_type).text() == text


def test_json_is_decoded_and_checked() -> None:
    class Answer(msgspec.Struct):
        n: int

    assert page(b'\xef\xbb\xbf{"n": 1}').json() == {"n": 1}
    assert page(b'{"n": 1}').json(type=Answer) == Answer(1)
    with pytest.raises(DecodeError, match=r"https://h/\?key=\*\*\*, line 3: JSON is malformed"):
        page(b'{\n"n":\noops}').json()
    with pytest.raises(DecodeError, match="Expected `int`"):
        page(b'{"n": "x"}').json(Answer)


def test_a_page_is_a_row_of_what_can_be_shown() -> None:
    text, binary = page(b"hello", "text/plain"), page(b"\xff\0", "image/png")
    saved = Fetched("s", "u", 200, {}, b"", 1.0, 2, "/tmp/x")
    assert list(text) == ["source", "url", "status", "headers", "text", "body", "path", "elapsed", "attempts"]
    assert len(text) == 9
    assert (text["text"], text["body"], text["url"]) == ("hello", None, "https://h/?key=***")
    assert (binary["text"], binary["body"]) == (None, b"\xff\0")
    assert (saved["text"], saved["body"], saved["path"]) == (None, None, "/tmp/x")
    assert (page(b"plain")["text"], page(b"\xff")["text"], page(b"a\0")["text"]) == ("plain", None, None)
    assert page(b"{}", "application/problem+json; charset=utf-8")["text"] == "{}"
    assert {**text, "more": 1}["more"] == 1
    assert repr(text) == "Fetched(200, 'https://h/?key=***', 5 bytes)"
    assert repr(saved) == "Fetched(200, 'u', in /tmp/x)"
    assert text == page(b"hello", "text/plain")
    assert text != binary


def test_heads_that_are_not_utf_8_are_read_as_latin_1(tmp_path: Path) -> None:
    async def odd(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        status = b"200 Gefunden" if request.target == "/odd/ok" else b"404 Pas trouv\xe9"
        writer.write(b"HTTP/1.1 " + status + b"\r\nX-A: caf\xe9\r\nX-B: caf\xc3\xa9\r\nContent-Length: 0\r\n\r\n")
        return True

    async def main() -> None:
        async with Hostile(routes={"odd": odd}) as server:
            urls = [server.url("/odd/ok"), server.url("/odd/no")]
            await fetch(urls, allow_private=True, on_error="dead_letter").to(tmp_path / "out.jsonl").run()

    run_virtual(main())
    (row,) = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert (row["headers"]["x-a"], row["headers"]["x-b"]) == ("café", "café")
    (letter,) = ps.read.dead(tmp_path / "out.jsonl").collect_sync()
    assert "404 Pas trouvé" in letter.error


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/a%7Eb?x=%41&y=%2f&z=a+b", "127.0.0.1"),
        ("/it's(so)!*@:;,=$&[]", "127.0.0.1"),
        ("/upper?A=%aA", "LOCALHOST"),
        ("/.well-known/a%7Eb?to=/..%2Fc", "127.0.0.1"),
    ],
)
def test_a_url_goes_out_as_it_was_written(target: str, host: str) -> None:
    async def main() -> Any:
        async with Hostile() as server:
            await fetch([server.url(target, host=host)], allow_private=True).collect()
            return server.seen[-1]

    seen = run_virtual(main())
    assert (seen.target, seen.host.partition(":")[0]) == (target, host.lower())


def test_the_user_in_a_plain_url_is_sent_as_authorization() -> None:
    async def main() -> Any:
        async with Hostile() as server:
            urls = [server.url("/a").replace("://", "://me:p%40w@"), server.url("/b@c")]
            await fetch(urls, allow_private=True, concurrency=1).collect()
            return [request.headers.get("authorization") for request in server.seen]

    assert run_virtual(main()) == ["Basic bWU6cEB3", None]


def test_a_file_is_read_to_its_end_in_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems give less at once than is there."""
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 20)
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 100)))
    (found,) = run_virtual(fetch([path]).collect())
    assert found.body == bytes(range(256)) * 20


def test_headers_that_come_twice_are_joined() -> None:
    async def twice(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 0\r\nx-a: 2\r\nVary: b\r\n\r\n")
        return True

    async def main() -> Any:
        async with Hostile(routes={"twice": twice}) as server:
            return await fetch([server.url("/twice")], allow_private=True).collect()

    (found,) = run_virtual(main())
    assert found.headers == {"x-a": "1, 2", "content-length": "0", "vary": "b"}


def test_a_head_has_no_body_however_long_it_would_be() -> None:
    async def main() -> Any:
        async with Hostile() as server:
            request = Request(server.url("/ok"), "HEAD")
            pages = await fetch([request, request], allow_private=True, concurrency=1, max_bytes=1).collect()
            return pages, server.connections

    pages, connections = run_virtual(main())
    assert [found.body for found in pages] == [b"", b""]
    assert connections == 1


def test_law_exactly_once_pages_are_written_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    async def binary(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        writer.write(answer(b"\xff\xfe\0", headers={"Content-Type": "image/png"}))
        return True

    async def main() -> Any:
        async with Hostile(routes={"image": binary}) as server:
            urls = [server.url("/a"), server.url("/image"), server.url("/status/404")]
            job = fetch(urls, allow_private=True, on_error="dead_letter", ordered=True).to(tmp_path / "pages.jsonl")
            report = await job.run(progress=False)
            again = await job.run(progress=False)
            return report, again, len(server.seen), urls

    report, again, requests, urls = run_virtual(main())
    assert (report.delivered, report.dead, requests) == (2, 1, 3)
    assert again.issued == report.issued or again.issued == 0
    rows = [msgspec.json.decode(line) for line in (tmp_path / "pages.jsonl").read_bytes().splitlines()]
    assert [row["source"] for row in rows] == urls[:2]
    assert (rows[0]["text"], rows[0]["body"]) == ("ok /a", None)
    assert (rows[1]["text"], rows[1]["body"]) == (None, "//4A")
    (letter,) = ps.read.dead(tmp_path / "pages.jsonl").collect_sync()
    assert (letter.item, letter.attempts) == (urls[2], 1)


def test_describing_a_fetch_loads_no_client() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from penstock.net.fetch import fetch\n"
        "fetch(['https://example.com'], retry=2, allow_private=['10.0.0.0/8']).explain()\n"
        "heavy = [name for name in ('aiohttp', 'yarl', 'zstandard') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_the_plan_of_a_fetch_is_the_same_in_every_process() -> None:
    flow = fetch(["https://example.com"], save_to="pages", request=lambda row: row)
    assert "map(fetch)" in flow.explain()
    assert " at 0x" not in flow.explain()


def test_a_name_is_looked_up_by_the_system() -> None:
    async def main() -> Any:
        async with Hostile() as server:
            found = await fetch(
                [server.url(host="localhost")] * 3, allow_private=["127.0.0.0/8"], concurrency=3
            ).collect()
            with pytest.raises(FetchError, match=r"it is at .*127\.0\.0\.1"):
                await fetch([server.url(host="localhost")], on_error="skip").collect()
            return found

    assert [found.status for found in run_virtual(main())] == [200] * 3


def test_connections_are_kept_for_a_bounded_number_of_hosts() -> None:
    async def main() -> int:
        async with Hostile() as server:
            fetcher = Fetcher(allow_private=True, lookup=lambda host, port: ["127.0.0.1"])
            for number in range(300):
                await fetcher(server.url(host=f"h{number}.test"))
            await server.until(lambda: server.open <= 256)
            kept = server.open
            await fetcher.close()
            return kept

    assert run_virtual(main()) == 256
