"""2,000 rows through a rate-limited API that bills each answer, killed (SIGKILL) five times and run again.

The API (examples/rate_limited_api.py) runs on loopback: 6,000 requests a minute, 20 ms each. Every form knows the
quota. The careful script is what a careful person writes: it appends each answer to a checkpoint file as it comes, and
skips what is there when it starts. Ray Data maps the rows with the same calls and writes when it is done.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from harness import HOUSE, NotRun, Outcome, Row, environment, python

ROWS = 2000
KILLS = 5
QUOTA = 6000  # requests a minute
AT_ONCE = 32
API = HOUSE / "examples" / "rate_limited_api.py"
DEADLINE = 300


def with_penstock(url: str) -> None:
    import penstock as ps

    def ask(row: dict[str, Any]) -> ps.Request:
        return ps.Request(f"{url}/v1/mood", json={"text": row["text"]}, idempotent=True)

    async def join(page: ps.Fetched) -> dict[str, Any]:
        return {**page.source, **page.json()}

    rows = ps.read.csv("rows.csv", id="id")
    pages = ps.fetch(rows, request=ask, limit=ps.Limit(per_minute=QUOTA), retry=5, allow_private=True)
    pages.map(join).to("out.jsonl").run_sync(progress=False)


def with_a_careful_script(url: str) -> None:
    import csv

    import aiohttp

    output = Path("out.jsonl")
    done = set()
    if output.exists():
        for line in output.read_text().splitlines():
            try:
                done.add(json.loads(line)["id"])
            except ValueError:  # the last line, cut by the kill: it is written again, behind the broken one
                pass

    async def work() -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        turn = asyncio.Lock()

        async def paced() -> None:
            async with turn:
                await asyncio.sleep(60 / QUOTA)

        async def one(row: dict[str, str]) -> None:
            async with gate:
                while True:
                    await paced()
                    async with session.post(f"{url}/v1/mood", json={"text": row["text"]}) as response:
                        if response.status == 429:
                            await asyncio.sleep(float(response.headers["Retry-After"]))
                            continue
                        response.raise_for_status()
                        checkpoint.write(json.dumps({**row, **await response.json()}) + "\n")
                        checkpoint.flush()
                        return

        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(one(row) for row in rows if row["id"] not in done))

    with open("rows.csv") as file:
        rows = list(csv.DictReader(file))
    with output.open("a") as checkpoint:
        asyncio.run(work())


def with_ray(url: str) -> None:
    import ray

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        from urllib.error import HTTPError
        from urllib.request import Request

        body = json.dumps({"text": row["text"]}).encode()
        while True:
            try:
                with urlopen(Request(f"{url}/v1/mood", body)) as answer:
                    return {**row, **json.load(answer)}
            except HTTPError as error:
                if error.code != 429:
                    raise
                time.sleep(float(error.headers["Retry-After"]))

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.read_csv("rows.csv").map(ask, num_cpus=0.1, concurrency=8).write_json("out")


FORMS: dict[str, Callable[[str], None]] = {
    "penstock": with_penstock,
    "a careful gather script": with_a_careful_script,
    "Ray Data": with_ray,
}


@contextmanager
def an_api() -> Iterator[str]:
    command = [python(), str(API), "--per-minute", str(QUOTA)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def count(url: str) -> dict[str, int]:
    with urlopen(f"{url}/count") as answer:
        counts: dict[str, int] = json.load(answer)
        return counts


def start(form: str, url: str, folder: str) -> subprocess.Popen[bytes]:
    command = [python(), __file__, "--form", form, url]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[bytes], form: str) -> NotRun | None:
    try:
        _, said = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return NotRun(f"no end within {DEADLINE} s")
    if process.returncode:
        return NotRun(f"{form}: {said.decode(errors='replace').strip().splitlines()[-1][:200]}")
    return None


def written(folder: str) -> list[str]:
    """The lines of the output, sorted, without those that a kill has cut."""
    lines = []
    for path in [Path(folder, "out.jsonl"), *sorted(Path(folder, "out").glob("*.json"))]:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.dumps(json.loads(line), sort_keys=True))
            except ValueError:
                lines.append(f"broken: {line[:40]}")
    return sorted(lines)


def measured(form: str, kills: int) -> dict[str, Any] | NotRun:
    """What a form pays, how much of the quota it uses, and what it wrote."""
    with tempfile.TemporaryDirectory() as folder, an_api() as url:
        lines = ["id,text", *(f"r{number},the film was good and late {number}" for number in range(ROWS))]
        Path(folder, "rows.csv").write_text("\n".join(lines) + "\n")
        for _ in range(kills):
            before = count(url)["paid"]
            process = start(form, url, folder)
            while count(url)["paid"] - before < ROWS // (kills + 1):
                if process.poll() is not None:
                    break
                time.sleep(0.02)
            process.kill()
            process.communicate()
        began, before = time.perf_counter(), count(url)["paid"]
        failed = end(start(form, url, folder), form)
        if failed is not None:
            return failed
        seconds = time.perf_counter() - began
        counted = count(url)
        used = (counted["paid"] - before) / (seconds * QUOTA / 60)
        return {"paid": counted["paid"], "refused": counted["refused"], "used": used, "lines": written(folder)}


def run() -> Outcome:
    rows: list[Row] = []
    remarks = []
    found: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        module = {"Ray Data": "ray"}.get(form)
        whole: dict[str, Any] | NotRun = NotRun("ray isn't installed: pip install 'ray[data]' in .venv-bench")
        broken: dict[str, Any] | NotRun = whole
        if module is None or _there(module):
            whole, broken = measured(form, 0), measured(form, KILLS)
        if isinstance(whole, NotRun) or isinstance(broken, NotRun):
            reason = whole.reason if isinstance(whole, NotRun) else broken.reason  # type: ignore[union-attr]
            if form == "penstock":
                raise SystemExit(f"penstock could not be measured: {reason}")
            rows.append(Row("calls paid, killed five times", "", form, f"not run: {reason}"))
            continue
        found[form] = broken
        same = broken["lines"] == whole["lines"] and len(whole["lines"]) == ROWS
        told = f"{broken['paid']:,} for {ROWS:,} rows; the output {'is' if same else 'is not'} the undisturbed one"
        if form == "penstock":
            share = broken["paid"] / ROWS
            rows.append(
                Row(
                    "calls paid, killed five times",
                    told,
                    ratio=f"{share:.3f} a row",
                    target="≤ 1.02, the same output",
                    met=share <= 1.02 and same,
                )
            )
            rows.append(
                Row(
                    "the quota used, undisturbed",
                    f"{whole['used']:.0%}, {whole['refused']} refused",
                    target="≥ 90 %",
                    met=whole["used"] >= 0.9,
                )
            )
        else:
            rows.append(Row("calls paid, killed five times", "", form, told))
            rows.append(
                Row("the quota used, undisturbed", "", form, f"{whole['used']:.0%}, {whole['refused']} refused")
            )
    remarks.append("The quota used counts from the start of the process to its end, imports and all.")
    remarks.append("Nobody learns what the workers of Ray's own processes used: it counts as other processes' here.")
    return Outcome(rows, remarks=remarks)


def _there(module: str) -> bool:
    script = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python(), "-c", script], check=False).returncode == 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--form"]:
        FORMS[sys.argv[2]](sys.argv[3])
    else:
        from harness import main

        main(run)
