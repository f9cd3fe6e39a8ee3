"""A model that learns to write Python by reading your Python installation.

    python examples/read_python.py          the demo: killed half way in full view, started again, and compared
    python examples/read_python.py run      one run, which goes on where the last one was: kill it as often as you like

1. *fetch*: the standard library's .py files come over HTTP (``--from URL`` takes another server than its own).
2. *events*: each file becomes an event of a topic in run/events.db, once.
3. *pipeline*: each file is taken apart into tokens, then scored by the newest parameters: how many bits a byte the
   model needs for a file that it hasn't learned from yet. The score and the file's parts are events of a second topic.
4. *train*: four processes learn from each part, once, and push gradients to a parameter server, never waiting for the
   slowest for more than three rounds.

All of it is in progress at once: while the first files are learned from, later ones are scored and fetched.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import msgspec
from baselines import by_table, by_zlib
from byte_network import PART, bits, gradient, learning_rate, make_params, parts_of, write
from library_server import serving
from reading_picture import draw

import penstock as ps

FOLDER = Path("run")
PLAIN = FOLDER / "plain_loop.json"
WORKERS = 4
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the processes, of which there are more than cores


class File(msgspec.Struct):
    """An event of the topic "files"."""

    name: str
    raw: bytes


class Part(msgspec.Struct):
    """An event of the topic "parts": what is to be learned from at once, and what its file was scored."""

    name: str
    number: int
    raw: bytes
    size: int
    tokens: int
    bits: float
    version: int


# -- the work ----------------------------------------------------------------------------------------------------------


def fetched(names: list[str], url: str) -> ps.Flow[ps.Fetched]:
    """The files of these names, as they come; ``source`` is the name."""
    return ps.fetch(names, request=lambda name: f"{url}/{quote(name)}", allow_private=True, retry=2)


def as_file(page: ps.Fetched) -> File:
    return File(page.source, page.body)


def tokenized(file: File) -> tuple[File, int]:
    """How many tokens there are, as Python itself would see them."""
    return file, sum(1 for _ in tokenize.tokenize(io.BytesIO(file.raw).readline))


class Scorer:
    """Scores whole files by the parameters as they are now."""

    def __init__(self, server: ps.ParameterServer) -> None:
        self.server = server

    def __call__(self, given: tuple[File, int]) -> list[Part]:
        file, tokens = given
        params, version = self.server.pull_sync()
        score = bits(params, file.raw)
        parts = enumerate(parts_of(file.raw))
        return [Part(file.name, number, raw, len(file.raw), tokens, score, version) for number, raw in parts]


def learn(params: Any, part: Part) -> tuple[float, Any]:
    return gradient(params, part.raw)


# -- one run -----------------------------------------------------------------------------------------------------------


async def run(url: str, beside: Path | None) -> None:
    os.nice(5 if beside else 0)  # the plain loop has but one process: so both end at about the same time
    FOLDER.mkdir(exist_ok=True)
    names = json.loads(await asyncio.to_thread(lambda: urlopen(f"{url}/index.json").read()))
    async with (
        ps.EventLog(FOLDER / "events.db") as log,
        ps.ParameterServer(make_params(), ps.Adam(learning_rate), ps.SSP(3), "shared", str(FOLDER / "model")) as server,
        asyncio.TaskGroup() as tasks,
    ):
        files, parts = log.topic("files", type=File), log.topic("parts", type=Part)
        pages = fetched(names["read"], url)
        scored = files.flow("scorer").map(tokenized, place="process", workers=1)
        scored = scored.flat_map(Scorer(server), place="process", workers=1)

        fetching = tasks.create_task(pages.map(as_file).to(files).run())
        scoring = tasks.create_task(scored.to(parts).run(until=fetching))
        training = tasks.create_task(server.fit(learn, parts.flow("learner"), workers=WORKERS, until=scoring))
        report = await training
        await tell(url, names, log, server, report, beside)


async def tell(
    url: str, names: Any, log: ps.EventLog, server: ps.ParameterServer, report: Any, beside: Path | None
) -> None:
    """Check that every file was scored once and learned from once, and show what became of it."""
    parts = [event.value async for event in log.topic("parts", type=Part).read()]
    scored = [part for part in parts if part.number == 0]
    assert Counter(part.name for part in scored) == Counter(names["read"]), "not every file was scored once"
    assert Counter((part.name, part.number) for part in parts).most_common(1)[0][1] == 1, "a part is there twice"
    params, version = await server.pull()
    assert version == len(parts), f"{len(parts)} parts and {version} updates"
    print(f"\n{report}\n")
    print(f"{len(scored)} files scored once each and learned from once: {len(parts):,} parts, {version:,} updates")

    curve = [(part.size, part.bits) for part in scored]
    quarter = -(-len(curve) // 4)
    means = [_mean(curve[start : start + quarter]) for start in range(0, len(curve), quarter)]
    print(f"bits a byte before it was learned from, by quarter: {', '.join(f'{mean:.2f}' for mean in means)}")

    read = [event.value.raw async for event in log.topic("files", type=File).read()]
    held_out = [page.body for page in await fetched(names["held_out"], url).collect()]
    found = {
        "single bytes": by_table(read, held_out, 0),
        "two bytes before": by_table(read, held_out, 2),
        "zlib -9": by_zlib(held_out),
        "this network": sum(bits(params, raw) for raw in held_out) / sum(map(len, held_out)),
    }
    if beside:
        found["… by a plain loop"] = await asyncio.to_thread(waited_for, beside)
    print(f"\nbits a byte of {len(held_out)} files that were held out:")
    for name, value in found.items():
        print(f"  {name:17} {value:.3f}")
    draw(FOLDER / "reading.svg", curve, found)
    print(f"\nthe curve is in {FOLDER / 'reading.svg'}. What it writes now:\n")
    print("\n".join(f"    {line}" for line in write(params, 400).splitlines()[:12]))


def waited_for(figure: Path) -> float:
    while not figure.exists():
        time.sleep(0.1)
    value: float = json.loads(figure.read_text(encoding="utf-8"))
    return value


def _mean(curve: list[tuple[int, float]]) -> float:
    return sum(score for _, score in curve) / sum(size for size, _ in curve)


# -- the demo ----------------------------------------------------------------------------------------------------------


def updates() -> int:
    """How many updates the last checkpoint holds."""
    return max((int(path.stem.partition("-")[2]) for path in (FOLDER / "model").glob("model-*.safetensors")), default=0)


def demo(megabytes: float) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    half = megabytes * 1e6 / PART / 2
    with serving(megabytes) as url:
        plain = subprocess.Popen([sys.executable, str(Path(__file__).with_name("byte_network.py")), url, str(PLAIN)])
        command = [sys.executable, __file__, "run", "--from", url, "--beside", str(PLAIN)]
        print(f"learning from {megabytes:g} MB of the standard library; a plain loop runs beside it\n", flush=True)
        first = subprocess.Popen(command)
        while first.poll() is None and updates() < half:
            time.sleep(0.1)
        first.kill()
        print(f"\nkilled (SIGKILL) after about {updates():,} updates; starting it again\n", flush=True)
        assert first.wait() == -signal.SIGKILL, "it was to be killed half way, and had ended before"
        second = subprocess.Popen(command)
        if plain.wait() or second.wait():
            second.kill()
            sys.exit("the second run failed, or the plain loop")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["demo", "run"], default="demo")
    parser.add_argument("--megabytes", type=float, default=5, help="how much of the library to read")
    parser.add_argument("--from", dest="url", help="a server that gives out files, and names them in /index.json")
    parser.add_argument("--beside", type=Path, help="wait for this figure of a plain loop, and show it")
    given = parser.parse_args()
    if given.what == "demo":
        demo(given.megabytes)
    elif given.url:
        asyncio.run(run(given.url, given.beside))
    else:
        with serving(given.megabytes) as address:
            asyncio.run(run(address, given.beside))
