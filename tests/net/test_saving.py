"""Bodies that go to files: whole under their name or not there at all."""

from __future__ import annotations

import asyncio
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.net.hostile import BOMB, Hostile, bombs

from penstock.errors import FetchError, PlanError, WriteFailed
from penstock.flow import disk
from penstock.net import saving
from penstock.net.fetch import fetch
from penstock.net.fetcher import Fetcher
from penstock.net.request import Request
from penstock.net.saving import FileSink, Gathered, as_saver, file_name
from penstock.net.timing import Timeout
from penstock.testing import run_virtual


async def save(path: str, target: Any, **options: Any) -> Any:
    async with Hostile() as server:
        fetcher = Fetcher(**{"allow_private": True, "save_to": target, **options})
        try:
            return await fetcher(server.url(path))
        except (FetchError, WriteFailed, PlanError) as error:
            return error
        finally:
            await fetcher.close()


def test_bodies_go_to_a_directory_under_readable_names(tmp_path: Path) -> None:
    (tmp_path / "local.txt").write_text("local")

    async def main() -> Any:
        async with Hostile() as server:
            urls = [server.url("/pages/one.html?x=1"), server.url("/pages/one.html?x=2"), server.url("/")]
            sources = [*urls, Request(server.url("/post"), json=1), tmp_path / "local.txt"]
            return await fetch(sources, allow_private=True, save_to=tmp_path / "deep" / "er", ordered=True).collect()

    pages = run_virtual(main())
    names = [Path(page.path).name for page in pages]
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == sorted(names)
    assert [name.partition("-")[0] for name in names] == ["one", "one", "127.0.0", "post", "local"]
    assert [name.rpartition(".")[2] for name in names[:2]] == ["html", "html"]
    assert [Path(page.path).read_bytes() for page in pages[:2]] == [
        b"ok /pages/one.html?x=1",
        b"ok /pages/one.html?x=2",
    ]
    assert Path(pages[4].path).read_bytes() == b"local"
    assert {page.body for page in pages} == {b""}


def test_a_function_says_where_an_item_goes(tmp_path: Path) -> None:
    async def main() -> Any:
        async with Hostile() as server:
            rows = [{"id": "a"}, {"id": "b"}]
            flow = fetch(
                rows,
                request=lambda row: server.url(f"/{row['id']}"),
                save_to=lambda row: tmp_path / row["id"] / "page",
                allow_private=True,
            )
            return await flow.collect()

    assert sorted(page.path for page in run_virtual(main())) == [str(tmp_path / name / "page") for name in "ab"]


def test_a_large_body_passes_through_bounded_memory(tmp_path: Path) -> None:
    bombs("gzip")  # made before, for the server's own memory isn't what is measured
    tracemalloc.start()
    try:
        page = run_virtual(save("/bomb/gzip", tmp_path, max_bytes=2 * BOMB))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert os.path.getsize(page.path) == BOMB
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/bomb/gzip", "too_big"),
        ("/endless", "too_big"),
        ("/short", "decode"),
        ("/cut-gzip", "decode"),
        ("/reset-half-way", "connect"),
        ("/stall", "timeout"),
        ("/drip/100", "timeout"),
        ("/status/404", "status"),
    ],
)
def test_what_fails_leaves_no_file(tmp_path: Path, path: str, reason: str) -> None:
    error = run_virtual(save(path, tmp_path, max_bytes=3_000_000, timeout=Timeout(idle=5, total=20)))
    assert error.reason == reason
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("turns", [0, 1, 5, 50, 300])
def test_cancelling_leaves_no_file(tmp_path: Path, turns: int) -> None:
    async def main() -> None:
        async with Hostile() as server:
            fetcher = Fetcher(allow_private=True, save_to=tmp_path, max_bytes=10**10)
            task = asyncio.create_task(fetcher(server.url("/store/1000000000")))
            await server.until(lambda: server.seen)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await fetcher.close()

    run_virtual(main())
    assert os.listdir(tmp_path) == []


def test_cancelling_waits_for_the_thread_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the thread is just about to make isn't there when the cancelled fetch has ended, nor later."""
    write = FileSink._write
    began, go_on = threading.Event(), threading.Event()

    def slow(sink: FileSink) -> None:
        began.set()
        go_on.wait(30)
        write(sink)

    monkeypatch.setattr(FileSink, "_write", slow)

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        saved = asyncio.create_task(save("/store/3000000", tmp_path))
        await loop.run_in_executor(None, began.wait, 30)
        saved.cancel()
        await asyncio.sleep(0)
        loop.call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await saved
        return os.listdir(tmp_path)

    assert asyncio.run(main()) == []
    assert os.listdir(tmp_path) == []


def test_a_slow_disk_is_nobody_s_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes longer than the idle time doesn't end the fetch."""
    write = FileSink._write
    began = threading.Event()
    passed = threading.Event()

    def slow(sink: FileSink) -> None:
        began.set()
        passed.wait(30)
        write(sink)

    monkeypatch.setattr(FileSink, "_write", slow)

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        saved = asyncio.create_task(save("/store/3000000", tmp_path, timeout=Timeout(idle=0.05)))
        await loop.run_in_executor(None, began.wait, 30)
        loop.call_later(0.2, passed.set)  # far longer than the other side may be silent
        return await saved

    page = asyncio.run(main())
    assert os.path.getsize(page.path) == 3_000_000


def test_a_target_that_can_t_be_written_is_that_item_s_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "directory" / "x").mkdir(parents=True)
    error = run_virtual(save("/ok", tmp_path / "file" / "below"))
    assert isinstance(error, WriteFailed)
    error = run_virtual(save("/ok", lambda source: tmp_path / "directory"))
    assert isinstance(error, WriteFailed)
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]
    assert isinstance(run_virtual(save("/ok", lambda source: 7)), PlanError)


def test_data_is_on_the_disk_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    sync = disk.sync_file
    target = tmp_path / "page"
    monkeypatch.setattr(
        disk, "sync_file", lambda descriptor: (seen.append(("sync", target.exists())), sync(descriptor))
    )
    run_virtual(save("/ok", lambda source: target))
    assert seen == [("sync", False)]
    assert target.read_bytes() == b"ok /ok"


def test_a_file_that_was_there_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    target = tmp_path / "page"
    target.write_text("before")
    run_virtual(save("/short", lambda source: target))
    assert target.read_text() == "before"
    run_virtual(save("/ok", lambda source: target))
    assert target.read_text() == "ok /ok"
    assert os.listdir(tmp_path) == ["page"]


def test_a_descriptor_is_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another file's as soon as it is closed: also where the rename fails."""
    closed_again: list[int] = []
    close = os.close

    def watch(descriptor: int) -> None:
        try:
            close(descriptor)
        except OSError:
            closed_again.append(descriptor)
            raise

    target = tmp_path / "page"
    target.mkdir()

    async def main() -> None:
        sink = FileSink(target)
        await sink.write(b"x")
        with monkeypatch.context() as patched:
            patched.setattr(os, "close", watch)
            with pytest.raises(WriteFailed):
                await sink.finish()
            await sink.discard()

    asyncio.run(main())
    assert not closed_again
    assert os.listdir(tmp_path) == ["page"]


@given(st.text(min_size=1))
def test_no_url_leads_out_of_the_directory(path: str) -> None:
    from urllib.parse import quote

    for quoted in (quote(path, safe="/%\\:", errors="replace"), quote(path, safe="", errors="replace")):
        request = Request(f"https://example.com/{quoted}")
        saver = as_saver("/pages")
        assert saver is not None
        target = saver(None, request)
        assert target.parent == Path("/pages")
        assert target.name == file_name(request)
        assert not target.name.startswith(".")
        assert target.name.isascii()
        assert len(target.name) <= 120


def test_other_requests_have_other_names() -> None:
    url = "https://h/a"
    requests = [
        Request(url),
        Request(url + "?b"),
        Request(url, "HEAD"),
        Request(url, json=1),
        Request(url, json=2),
        Request(url, "GET", json=2),
        Request(url, headers={"Range": "bytes=0-9"}),
        Request(url, headers={"Range": "bytes=10-19"}),
        Path("/tmp/a"),
        Path("/var/a"),
    ]
    assert len({file_name(request) for request in requests}) == 10
    same = [Request(url), Request(url, headers={"X-API-Key": "k", "Idempotency-Key": "7"})]
    assert len({file_name(request) for request in same}) == 1


@given(st.integers(-1, 40), st.lists(st.binary(min_size=1, max_size=20), max_size=8))
def test_a_gathered_body_is_what_was_added(announced: int, pieces: list[bytes]) -> None:
    """Also where the other side announced less or more than it sends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_LARGE", 8)
        gathered = Gathered(announced)
        for piece in pieces:
            gathered.add(piece)
        assert gathered.size == len(b"".join(pieces))
        assert gathered.body() == b"".join(pieces)


def peak_of_gathering(announced: int, pieces: int) -> int:
    tracemalloc.start()
    try:
        gathered = Gathered(announced)
        for _ in range(pieces):
            gathered.add(bytes(1 << 18))
        gathered.body()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_body_takes_its_memory_once_and_none_for_an_announcement() -> None:
    whole = 16 << 20
    assert peak_of_gathering(whole, 64) < 1.4 * whole
    assert peak_of_gathering(whole, 4) < 0.2 * whole
