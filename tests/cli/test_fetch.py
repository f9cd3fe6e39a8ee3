"""``penstock fetch``, as a user types it, against a server on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.fetch import read_limit
from penstock.errors import PlanError

DEADLINE = 60
PENSTOCK = [sys.executable, "-P", "-m", "penstock.cli"]


class Site:
    """A server that says hello, doesn't know /missing, and counts what it was asked; ``gate`` holds back /slow."""

    def __init__(self) -> None:
        asked = self.asked = Counter[str]()
        gate = self.gate = threading.Event()
        began = self.began = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked[self.path] += 1
                if self.path.startswith("/slow"):
                    began.set()
                    gate.wait(DEADLINE)
                body = f"hello from {self.path}".encode()
                self.send_response(404 if self.path == "/missing" else 200)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def fetch(directory: Path, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PENSTOCK, "fetch", *arguments, "--no-progress"],
        cwd=directory,
        input=given,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def rows(path: Path) -> dict[str, Any]:
    return {row["source"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_a_list_is_fetched_once_and_again_has_nothing_to_do(tmp_path: Path, site: Site) -> None:
    listed = [f"{site.url}/{number}" for number in range(5)]
    (tmp_path / "urls.txt").write_text("# the pages\n\n" + "\n".join([*listed, f"  {site.url}/missing  "]) + "\n")
    options = ("urls.txt", "--to", "pages.jsonl", "--allow-private", "--limit", "6000/min", "--retry", "1")
    done = fetch(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "pages.jsonl")
    assert set(found) == set(listed)
    assert found[listed[3]]["text"] == "hello from /3"
    assert found[listed[3]]["status"] == 200
    assert "delivered 5" in done.stdout
    assert "penstock dead pages.jsonl" in done.stdout
    assert "404" in done.stdout
    again = fetch(tmp_path, *options)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    assert set(site.asked.values()) == {1}


def test_from_standard_input_each_url_counts_once_also_in_another_run(tmp_path: Path, site: Site) -> None:
    listed = [f"{site.url}/{number}" for number in (1, 2, 1)]
    options = ("-", "--to", "pages.jsonl", "--allow-private")
    done = fetch(tmp_path, *options, given="\n".join(listed) + "\n")
    assert done.returncode == 0, done.stderr
    more = fetch(tmp_path, *options, given="\n".join([*listed, f"{site.url}/3"]) + "\n")
    assert more.returncode == 0, more.stderr
    assert sorted(rows(tmp_path / "pages.jsonl")) == [f"{site.url}/{number}" for number in (1, 2, 3)]
    assert set(site.asked.values()) == {1}
    assert len((tmp_path / "pages.jsonl").read_text().splitlines()) == 3


def test_killed_and_run_again_it_asks_only_for_what_is_missing(tmp_path: Path, site: Site) -> None:
    listed = [f"{site.url}/{number}" for number in range(20)] + [f"{site.url}/slow"]
    (tmp_path / "urls.txt").write_text("\n".join(listed))
    command = [*PENSTOCK, "fetch", "urls.txt", "--to", "pages.jsonl", "--allow-private", "--no-progress"]
    first = subprocess.Popen(command, cwd=tmp_path)
    assert site.began.wait(DEADLINE)
    output = tmp_path / "pages.jsonl"
    while not output.exists() or output.read_bytes().count(b"\n") < 20:
        os.sched_yield()
    first.send_signal(signal.SIGINT)  # drains: what is finished is committed; the slow one is let go then
    site.gate.set()
    assert first.wait(DEADLINE) == 130
    done = fetch(tmp_path, *command[len(PENSTOCK) + 1 : -1])
    assert done.returncode == 0, done.stderr
    assert sorted(rows(output)) == sorted(listed)
    assert set(site.asked.values()) == {1}


def test_bodies_go_to_files(tmp_path: Path, site: Site) -> None:
    (tmp_path / "urls.txt").write_text(f"{site.url}/a.txt\n")
    done = fetch(tmp_path, "urls.txt", "--to", "pages.jsonl", "--allow-private", "--save-to", "bodies")
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path / "pages.jsonl").values()
    assert (tmp_path / row["path"]).read_text() == "hello from /a.txt"
    assert row["text"] is row["body"] is None


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["urls.txt", "--to", "pages.jsonl"], 1, "allow_private=True"),
        (["urls.txt", "--to", "pages.jsonl", "--limit", "fast"], 2, "--limit 500/min"),
        (["urls.txt", "--to", "pages.jsonl", "--per-host"], 2, "--limit 5/s --per-host"),
        (["nowhere.txt", "--to", "pages.jsonl"], 2, "there is no file 'nowhere.txt'"),
        (["urls.txt", "--to", "pages.what"], 2, "pages.what"),
    ],
)
def test_what_cant_be_done_is_one_sentence(
    tmp_path: Path, site: Site, options: list[str], code: int, says: str
) -> None:
    (tmp_path / "urls.txt").write_text(f"{site.url}/a.txt\n")
    done = fetch(tmp_path, *options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    assert not site.asked


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("500/min", "Limit(per_minute=500)"),
        ("20/s", "Limit(per_second=20)"),
        (" 0.5 per second", "Limit(per_second=0.5)"),
        ("3 / Minute", "Limit(per_minute=3)"),
    ],
)
def test_limits_as_people_write_them(text: str, limit: str) -> None:
    assert repr(read_limit(text)) == limit
    assert read_limit(None) is None


@pytest.mark.parametrize("text", ["", "5", "5/h", "-5/s", "five/s", "5/s/s", "0/s"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(PlanError):
        read_limit(text)
