"""Enrich a table through a rate-limited JSON API: as fast as its quota allows, and no row is paid for twice.

    python examples/enrich.py             2,000 rows, then those that the API refused are mended and redone
    python examples/enrich.py --kill 5    the same, killed (SIGKILL) five times on the way, beside a gather script

The API is examples/rate_limited_api.py, which this starts and which counts every answer it gives. The output, with its
journal, is in run/enrich/.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import penstock as ps

FOLDER = Path("run/enrich")
TABLE, OUTPUT, GATHERED = FOLDER / "reviews.csv", FOLDER / "enriched.jsonl", FOLDER / "gathered.jsonl"
QUOTA = 12_000  # requests a minute


# -- the work ----------------------------------------------------------------------------------------------------------


def enrich(rows: ps.Flow[Any], api: str) -> ps.Job:
    """Ask the API about each row and write the row with its answer."""

    def ask(row: dict[str, Any]) -> ps.Request:
        return ps.Request(f"{api}/v1/mood", json={"text": row["text"]}, idempotent=True)

    async def join(page: ps.Fetched) -> dict[str, Any]:
        return {**page.source, **page.json()}

    return (
        ps.fetch(
            rows,
            request=ask,
            limit=ps.Limit(per_minute=QUOTA),
            retry=5,
            on_error="dead_letter",
            allow_private=True,  # the API is on this machine
        )
        .map(join)
        .to(OUTPUT)
    )


def work(api: str) -> ps.Report:
    """The table, each row by its id: run it again after a crash and it goes on."""
    return enrich(ps.read.csv(TABLE, id="id"), api).run_sync()


def redo(api: str) -> ps.Report:
    """What failed for good, mended, into the same output: each success takes its dead letter away."""

    async def mend(letter: ps.Failed) -> dict[str, Any]:
        return {**letter.item, "text": "nothing to say"}

    return enrich(ps.read.dead(OUTPUT).map(mend), api).run_sync()


# -- the same by hand, as such scripts are written ---------------------------------------------------------------------


async def gather_script(api: str) -> None:
    """Everything at once behind a semaphore, and written when all of it is there."""
    import aiohttp

    at_once = asyncio.Semaphore(32)

    async def one(row: dict[str, Any]) -> dict[str, Any] | None:
        async with at_once:
            while True:
                async with session.post(f"{api}/v1/mood", json={"text": row["text"]}) as response:
                    if response.status == 429:
                        await asyncio.sleep(float(response.headers["Retry-After"]))
                    elif response.status == 200:
                        return {**row, **await response.json()}
                    else:
                        return None

    async with aiohttp.ClientSession() as session:
        with TABLE.open() as file:
            rows = await asyncio.gather(*(one(row) for row in csv.DictReader(file)))
    with GATHERED.open("w") as output:
        output.writelines(json.dumps(row) + "\n" for row in rows if row is not None)


# -- the demonstration -------------------------------------------------------------------------------------------------


def make_table(rows: int) -> None:
    """Reviews; every hundredth is empty, and the API will have nothing to do with it."""
    words = "the film was good great happy fine bright bad sad poor dark late and then it rained"
    draw = random.Random(7)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        for number in range(rows):
            text = f"{' '.join(draw.choices(words.split(), k=6))} {number}" if number % 100 else ""
            writer.writerow([f"r{number}", text])


@contextmanager
def an_api() -> Iterator[str]:
    """The API, in a process of its own."""
    server = Path(__file__).with_name("rate_limited_api.py")
    command = [sys.executable, str(server), "--per-minute", str(QUOTA)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def count(api: str) -> dict[str, int]:
    with urlopen(f"{api}/count") as answer:
        counts: dict[str, int] = json.load(answer)
        return counts


def killed_on_the_way(what: str, api: str, rows: int, kills: int) -> None:
    """Run ``what`` as a process, kill it after so many answers, and again; then let it run to its end."""
    for number in range(kills + 1):
        before = count(api)["paid"]
        process = subprocess.Popen([sys.executable, __file__, "--run", what, "--api", api], stdout=subprocess.DEVNULL)
        while number < kills and process.poll() is None and count(api)["paid"] - before < rows // (kills + 1):
            time.sleep(0.02)
        if number < kills:
            process.kill()
        if process.wait() > 0:
            sys.exit(f"{what} failed")


def demonstrate(rows: int, kills: int) -> None:
    """What the first lines of this file promise."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    make_table(rows)
    with an_api() as api:
        if kills:
            killed_on_the_way("work", api, rows, kills)
            print(f"penstock, killed {kills} times: {rows:,} rows, {count(api)['paid']:,} calls paid", flush=True)
        else:
            print(work(api))
        print(f"{sum(1 for _ in ps.read.dead(OUTPUT))} rows were refused; mending and redoing them", flush=True)
        report = redo(api)
        written = [json.loads(line)["id"] for line in OUTPUT.read_text().splitlines()]
        assert sorted(written) == sorted(f"r{number}" for number in range(rows)), "not every row exactly once"
        print(f"redone: {report.delivered}. {OUTPUT} has every row, exactly once")
    if kills:
        with an_api() as api:
            killed_on_the_way("gather", api, rows, kills)
            print(f"a gather script, killed {kills} times: {rows:,} rows, {count(api)['paid']:,} calls paid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="kill it so many times on the way")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--run", choices=["work", "gather"], help=argparse.SUPPRESS)
    parser.add_argument("--api", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run == "work":
        work(given.api)
    elif given.run == "gather":
        asyncio.run(gather_script(given.api))
    else:
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
        demonstrate(given.rows, given.kill)


if __name__ == "__main__":
    main()
