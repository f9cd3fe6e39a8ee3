"""Enrichment through an API that bills each answer: however it is killed, no committed answer is asked for twice."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

pytestmark = pytest.mark.usefixtures("unmeasured")

DEADLINE = 120
AT_ONCE = 16
KILLS = 5
COMMIT_INTERVAL = 600
"""Rows: more than are answered between two commits. Those follow one another at 20 times what a commit takes."""

PROGRAM = """
    import sys
    import penstock as ps

    def ask(row):
        return ps.Request(sys.argv[1], json={"id": row["id"]}, idempotent=True)

    async def join(page):
        return {**page.source, **page.json()}

    rows = ps.read.csv("rows.csv", id="id")
    pages = ps.fetch(rows, request=ask, concurrency=16, retry=5, allow_private=True)
    print(pages.map(join).to("out.jsonl").run_sync(progress=False))
    """


class Api:
    """Bills each answer, by row. One in a hundred it refuses the first time, with 429 or 503."""

    def __init__(self) -> None:
        self.bill = Counter[str]()
        self.turned_away = set[str]()
        self.at_work = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(DEADLINE)

    async def _answer(self, request: web.Request) -> web.Response:
        self.at_work += 1
        try:
            row = (await request.json())["id"]
            if int(row[1:]) % 100 == 7 and row not in self.turned_away:
                self.turned_away.add(row)
                status = 429 if int(row[1:]) % 200 == 7 else 503
                return web.json_response({}, status=status, headers={"Retry-After": "0"} if status == 429 else {})
            self.bill[row] += 1
            return web.json_response({"answer": row[::-1]})
        finally:
            self.at_work -= 1

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        app = web.Application()
        app.add_routes([web.post("/", self._answer)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address: Any = runner.addresses[0]
        self.url = f"http://127.0.0.1:{address[1]}/"
        self._ready.set()
        await self._over.wait()
        await runner.cleanup()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.close()


def committed(output: Path) -> set[str]:
    """The rows whose answers count, as the journal says."""
    journal = Path(f"{output}.journal")
    if not journal.exists():
        return set()
    with sqlite3.connect(journal) as database:
        return {key.rpartition(":")[2].strip('"') for (key,) in database.execute("SELECT key FROM ids")}


@pytest.mark.parametrize("rows", [2000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_no_committed_answer_is_asked_for_twice(rows: int, tmp_path: Path, api: Api) -> None:
    names = [f"r{number}" for number in range(rows)]
    (tmp_path / "rows.csv").write_text("id\n" + "\n".join(names) + "\n")
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    output = tmp_path / "out.jsonl"
    draw = random.Random(rows)
    command = [sys.executable, "program.py", api.url]
    kept: list[tuple[set[str], Counter[str]]] = []
    for kill in range(KILLS):
        paid = api.bill.total() + draw.randrange(1, rows // KILLS)
        process = subprocess.Popen(command, cwd=tmp_path)
        while api.bill.total() < paid:
            assert process.poll() is None, f"it ended before kill {kill}"
        process.kill()
        process.wait()
        while api.at_work:
            pass
        safe = committed(output)
        kept.append((safe, Counter(api.bill)))
        assert api.bill.total() - len(safe) <= (kill + 1) * (AT_ONCE + COMMIT_INTERVAL)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    for safe, bill in kept:
        assert all(api.bill[row] == bill[row] for row in safe), "a committed answer was paid for again"
    written = [msgspec.json.decode(line) for line in output.read_bytes().splitlines()]
    assert sorted(row["id"] for row in written) == sorted(names)
    assert all(row["answer"] == row["id"][::-1] for row in written)
    print(f"{rows:,} rows, {api.bill.total():,} answers paid")
