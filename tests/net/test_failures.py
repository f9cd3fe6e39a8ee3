"""What can go wrong between here and a server: each has its reason, and nothing hangs or is left behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.net.hostile import BEHAVIOURS, Hostile, Seen, answer, attempt, failing_first, ok

import penstock as ps
from penstock.errors import FetchError
from penstock.net.fetch import fetch
from penstock.net.fetcher import Fetcher
from penstock.net.request import Request
from penstock.net.timing import Timeout
from penstock.testing import run_virtual

HERE = Path(__file__).parent
BOUNDS = Timeout(connect=5, idle=10, total=60)


async def one(item: Any, **options: Any) -> Any:
    return await attempt(item, **{"allow_private": True, "timeout": BOUNDS, "max_bytes": 1_000_000, **options})


async def ask(path: str, **options: Any) -> Any:
    async with Hostile() as server:
        return await one(server.url(path), **options)


@pytest.mark.parametrize(
    ("path", "reason", "retryable", "says"),
    [
        ("/silent", "timeout", True, "nothing came for 10 s"),
        ("/late", "timeout", True, "Timeout(idle=...)"),
        ("/stall", "timeout", True, "nothing came for 10 s"),
        ("/drip/100", "timeout", True, "it took longer than 60 s"),
        ("/reset-half-way", "connect", True, "lost half way"),
        ("/reset-unframed", "connect", True, "lost half way"),
        ("/reset-at-once", "connect", True, "lost the connection before an answer came"),
        ("/hang-up", "connect", True, "closed the connection without an answer"),
        ("/short", "decode", True, "ended too early"),
        ("/cut-chunks", "decode", True, "ended too early"),
        ("/long", "decode", True, "isn't HTTP"),
        ("/bad-chunks", "decode", True, "isn't "),
        ("/not-http", "decode", True, "isn't HTTP"),
        ("/endless-head", "decode", True, "isn't HTTP"),
        ("/not-gzip", "decode", False, "is damaged"),
        ("/cut-gzip", "decode", False, "ends too early"),
        ("/odd-encoding", "decode", False, "'rot13', which wasn't asked for"),
        ("/endless", "too_big", False, "more than 1,000,000 bytes"),
        ("/huge", "too_big", False, "its body has 1,000,000,000,000 bytes, and max_bytes=1,000,000"),
        ("/bomb/gzip", "too_big", False, "expands to more than 1,000,000 bytes"),
        ("/bomb/deflate", "too_big", False, "expands to more"),
        ("/bomb/zstd", "too_big", False, "expands to more"),
        ("/around/0", "status", False, "more than 10 redirects, the last to /around/11"),
        ("/status/404", "status", False, "404 So: sorry"),
        ("/status/408", "status", True, "408 So"),
        ("/status/425", "status", True, "425 So"),
        ("/status/500", "status", True, "500 So"),
        ("/status/501", "status", False, "501 So"),
        ("/status/502", "status", True, "502 So"),
        ("/status/503", "status", True, "503 So"),
        ("/status/504", "status", True, "504 So"),
        ("/status/429", "throttled", True, "429 So"),
        ("/throttle/429?Retry-After=5", "throttled", True, "429 So: slowly"),
        ("/throttle/429?Retry-After=Wed%2C%2021%20Oct%202037%2007:28:00%20GMT", "throttled", True, "429"),
        ("/throttle/429?retry-after-ms=500", "throttled", True, "429"),
        ("/throttle/503?Retry-After=5", "throttled", True, "503"),
    ],
)
def test_each_failure_has_its_reason(path: str, reason: str, retryable: bool, says: str) -> None:
    error = run_virtual(ask(path))
    assert isinstance(error, FetchError), error
    assert (error.reason, error.retryable) == (reason, retryable), str(error)
    assert says in str(error)
    assert str(error).startswith(f"{reason}: http://127.0.0.1:")


def test_what_is_slow_or_odd_and_whole_is_fetched() -> None:
    async def main() -> list[Any]:
        async with Hostile() as server:
            paths = ["/drip/30", "/unframed", "/status/304", "/encoded/gzip", "/encoded/deflate", "/encoded/raw"]
            paths += ["/encoded/members", "/encoded/zstd", "/store/900000"]
            return [await one(server.url(path)) for path in paths]

    found = run_virtual(main())
    assert [page.status for page in found] == [200, 200, 304, *[200] * 6]
    assert [page.body for page in found[:3]] == [b"." * 30, b"all of it", b""]
    assert {page.body for page in found[3:8]} == {b"a" * 1000}
    assert len(found[8].body) == 900_000


def test_the_answer_of_an_error_can_be_read_from_it() -> None:
    error = run_virtual(ask("/throttle/503?Retry-After=7"))
    assert (error.status, error.status_code, error.headers["retry-after"]) == (503, 503, "7")


def test_nobody_listens() -> None:
    async def main() -> Any:
        async with Hostile() as server:
            url = server.url()
        return await one(url)

    error = run_virtual(main())
    assert (error.reason, error.retryable) == ("connect", True)
    assert "can't be connected to (Connection refused)" in str(error)


def test_a_server_that_never_lets_anybody_in() -> None:
    """The queue of a listening socket that nobody accepts from is full: the connection is never made."""
    import socket

    async def main() -> Any:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            waiting = [socket.socket() for _ in range(3)]
            try:
                for one_ in waiting:
                    one_.setblocking(False)
                    one_.connect_ex(deaf.getsockname())
                return await one(f"http://127.0.0.1:{deaf.getsockname()[1]}/")
            finally:
                for one_ in waiting:
                    one_.close()

    error = run_virtual(main())
    assert (error.reason, error.retryable) == ("timeout", True)
    assert "no connection within 5 s" in str(error)


@pytest.mark.parametrize(("code", "retryable"), [("EAI_NONAME", False), ("EAI_AGAIN", True)])
def test_a_name_that_nobody_knows(code: str, retryable: bool) -> None:
    import socket

    def lookup(host: str, port: int) -> list[str]:
        raise socket.gaierror(getattr(socket, code), "said the resolver")

    error = run_virtual(one("http://nowhere.test/", lookup=lookup))
    assert (error.reason, error.retryable) == ("dns", retryable)
    assert "can't be resolved (said the resolver)" in str(error)


@pytest.mark.parametrize("url", ["http://[::1", "http://h:99999/", "http://h:port/", "http:///path", "http://a..b/"])
def test_a_url_that_can_t_be_read_is_an_error_of_its_item(url: str) -> None:
    error = run_virtual(one(url, lookup=lambda host, port: []))
    assert isinstance(error, FetchError)
    assert error.reason == "dns"
    assert not error.retryable


def test_a_certificate_that_nobody_vouches_for() -> None:
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(HERE / "selfsigned.pem")

    async def main() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's side of it
        async with Hostile(tls=context) as server:
            return await one(server.url())

    error = run_virtual(main())
    assert (error.reason, error.retryable) == ("tls", False)
    assert "SSL_CERT_FILE" in str(error)


def test_a_certificate_that_the_trust_store_vouches_for(tmp_path: Path) -> None:
    script = tmp_path / "trusting.py"
    script.write_text(
        "import asyncio, ssl, sys\n"
        "from tests.net.hostile import Hostile\n"
        "from penstock.net.fetcher import Fetcher\n"
        "async def main():\n"
        "    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)\n"
        "    context.load_cert_chain(sys.argv[1])\n"
        "    async with Hostile(tls=context) as server:\n"
        "        fetcher = Fetcher(allow_private=True)\n"
        "        print((await fetcher(server.url('/secure'))).text())\n"
        "        await fetcher.close()\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "SSL_CERT_FILE": str(HERE / "selfsigned.pem"), "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(script), str(HERE / "selfsigned.pem")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "ok /secure\n", ran.stderr


# -- retries -----------------------------------------------------------------------------------------------------------


async def through(server: Hostile, *items: Any, **options: Any) -> list[Any]:
    return await fetch(list(items), allow_private=True, timeout=BOUNDS, on_error="keep", **options).collect()


@pytest.mark.parametrize("how", ["status", "short", "reset-at-once", "silent", "hang-up"])
def test_what_may_go_better_is_tried_again(how: str) -> None:
    async def main() -> tuple[list[Any], int]:
        async def unavailable(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
            writer.write(answer(b"", "503 So"))
            return True

        by = {**BEHAVIOURS, "status": unavailable}[how]
        async with Hostile(routes={"shaky": failing_first(2, by)}) as server:
            found = await through(server, server.url("/shaky"), retry=2, concurrency=1)
            return found, len(server.seen)

    (page,), requests = run_virtual(main())
    assert (page.status, page.attempts, requests) == (200, 3, 3)


@pytest.mark.parametrize(
    ("request_", "attempts"),
    [
        (lambda url: url, 5),
        (lambda url: Request(url, "HEAD"), 5),
        (lambda url: Request(url, "PUT", data=b"x"), 5),
        (lambda url: Request(url, "DELETE"), 5),
        (lambda url: Request(url, json={}), 1),
        (lambda url: Request(url, "PATCH", data=b"x"), 1),
        (lambda url: Request(url, json={}, idempotent=True), 5),
        (lambda url: Request(url, json={}, headers={"Idempotency-Key": "7"}), 5),
        (lambda url: Request(url, idempotent=False), 1),
    ],
)
@pytest.mark.parametrize("path", ["/status/500", "/short"])
def test_what_would_do_harm_twice_is_sent_once(request_: Any, attempts: int, path: str) -> None:
    async def main() -> tuple[list[Any], int]:
        async with Hostile() as server:
            found = await through(server, request_(server.url(path)), concurrency=1)
            return found, len(server.seen)

    (failed,), requests = run_virtual(main())
    if isinstance(failed, ps.Failed):  # a HEAD has no body that could be too short
        assert (failed.attempts, requests) == (attempts, attempts)


def test_what_never_reached_the_server_may_be_sent_again() -> None:
    async def main() -> list[Any]:
        async with Hostile() as server:
            url = server.url()
        return await through(server, Request(url, json={}), retry=3, concurrency=1)

    (failed,) = run_virtual(main())
    assert failed.attempts == 4


def test_a_status_that_says_no_is_final() -> None:
    async def main() -> tuple[list[Any], int]:
        async with Hostile() as server:
            found = await through(server, server.url("/status/404"), server.url("/bomb/gzip"), max_bytes=1000)
            return found, len(server.seen)

    found, requests = run_virtual(main())
    assert [failed.attempts for failed in found] == [1, 1]
    assert requests == 2


def test_a_kept_connection_that_the_server_dropped_costs_no_attempt() -> None:
    """The server closes just when the next request is on its way; a new connection takes it, at once."""

    async def once_each(server: Hostile, request: Seen, reader: Any, writer: Any) -> bool:
        if server.open_answers.pop(id(writer), 0):  # type: ignore[attr-defined]
            return False
        server.open_answers[id(writer)] = 1  # type: ignore[attr-defined]
        return await ok(server, request, reader, writer)

    async def main() -> Any:
        async with Hostile(routes={"once": once_each}) as server:
            server.open_answers = {}  # type: ignore[attr-defined]
            fetcher = Fetcher(allow_private=True)
            try:
                pages = [await fetcher(server.url(f"/once/{number}")) for number in range(3)]
                with pytest.raises(FetchError) as raised:
                    await fetcher(Request(server.url("/once/4"), json={}))
            finally:
                await fetcher.close()
            return pages, raised.value, server.connections, len(server.seen)

    pages, error, connections, requests = run_virtual(main())
    assert [(page.status, page.attempts) for page in pages] == [(200, 1)] * 3
    assert (connections, requests) == (3, 6)
    assert (error.reason, error.retryable) == ("connect", False)


@pytest.mark.parametrize("path", ["/status/404", "/status/500", "/not-gzip", "/store/5000"])
def test_an_answer_that_is_refused_costs_no_connection(path: str) -> None:
    """Its body came whole, so the connection is kept: and may be another request's before this one is told off."""

    async def main() -> tuple[list[Any], int]:
        async with Hostile() as server:
            requests = [Request(server.url(path), json={"n": n}) for n in range(60)]
            return await through(server, *requests, concurrency=4, max_bytes=1000), server.connections

    found, connections = run_virtual(main())
    reason = {"/not-gzip": "decode", "/store/5000": "too_big"}.get(path, "status")
    assert {failed.reason for failed in found} == {reason}
    assert connections <= (60 if path == "/store/5000" else 4)  # where the size alone is too much, nothing is read


def test_a_name_server_that_does_not_answer_holds_up_nobody_for_ever() -> None:
    """A hundred names hang: those looked up, and those that wait for their turn, end by connect=; nothing waits on."""
    code = (
        "import asyncio, threading, time\n"
        "from penstock.net.fetch import fetch\n"
        "from penstock.net.fetcher import Fetcher\n"
        "from penstock.net.timing import Timeout\n"
        "from penstock.errors import FetchError\n"
        "gate = threading.Event()\n"
        "asked = []\n"
        "def lookup(host, port):\n"
        "    asked.append(host)\n"
        "    if host != 'known.test':\n"
        "        gate.wait()\n"
        "    return ['127.0.0.1']\n"
        "async def one(fetcher, host):\n"
        "    try:\n"
        "        await fetcher(f'http://{host}:9/')\n"
        "    except FetchError as error:\n"
        "        return error.reason\n"
        "async def main():\n"
        "    fetcher = Fetcher(allow_private=True, lookup=lookup, timeout=Timeout(connect=0.2))\n"
        "    found = await asyncio.gather(*(one(fetcher, f'h{n}.test') for n in range(100)))\n"
        "    assert set(found) <= {'dns', 'timeout'}, found\n"
        "    assert len(asked) == 64, len(asked)\n"
        "    await fetcher.close()\n"
        "asyncio.run(main())\n"
        "print('over')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.returncode) == ("over\n", 0), ran.stderr


# -- what is left behind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/silent", "/stall", "/endless", "/drip/1000", "/store/100000000"])
def test_cancelling_closes_the_connection(path: str) -> None:
    async def main() -> tuple[int, int]:
        async with Hostile() as server:
            fetcher = Fetcher(allow_private=True, max_bytes=10**12)
            task = asyncio.create_task(fetcher(server.url(path)))
            await server.until(lambda: server.seen)
            for _ in range(200):  # well into the body, where there is one: time stands still while bytes flow
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if path not in ("/silent", "/stall"):  # those two aren't listening
                await server.until(lambda: not server.open)
            page = await fetcher(server.url("/ok"))
            await fetcher.close()
            return page.status, server.connections

    assert run_virtual(main()) == (200, 2)


def test_an_upload_that_nobody_reads_leaves_nothing_when_it_is_cancelled() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport: Any = writer.transport
        transport.pause_reading()
        ears.append((reader, writer, transport))

    ears: list[Any] = []

    async def main() -> Any:
        listening = await asyncio.start_server(deaf, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        request = Request(f"http://127.0.0.1:{port}/", data=b"x" * 50_000_000)
        before = len(os.listdir("/proc/self/fd"))
        error = await one(request, max_bytes=100)
        after = len(os.listdir("/proc/self/fd"))
        listening.close()
        ears[0][-1].abort()
        await asyncio.sleep(1)
        return error, after - before

    error, left = run_virtual(main())
    assert (error.reason, error.retryable) == ("timeout", False)
    assert left == 1  # the server's own side


def test_a_large_upload_that_goes_on_is_not_idle() -> None:
    """The other side takes a piece every few seconds, the whole of it in far more than the idle time."""

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        got = 0
        while got < 40_000_000:
            got += len(await reader.read(4_000_000))
            await asyncio.sleep(0.02)  # on the virtual clock, as all waits here
        writer.write(answer(str(got).encode()))
        await writer.drain()
        writer.close()

    async def main() -> Any:
        listening = await asyncio.start_server(slow, "127.0.0.1", 0, limit=100_000)
        port = listening.sockets[0].getsockname()[1]
        began = asyncio.get_running_loop().time()
        page = await one(
            Request(f"http://127.0.0.1:{port}/", data=b"x" * 40_000_000), timeout=Timeout(connect=5, idle=1)
        )
        took = asyncio.get_running_loop().time() - began
        listening.close()
        return page, took

    page, took = run_virtual(main())
    assert page.body == b"40000000"
    assert took > 1
