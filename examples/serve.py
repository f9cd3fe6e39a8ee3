"""The same work three ways: over a file, over a topic of events, behind an HTTP endpoint whose callers share batches.

    python examples/serve.py            all three; the endpoint under load, then under more than it can take
    python examples/serve.py --serve    the endpoint alone: prints its URL and serves until it is ended

The work tells which language a text is in. The endpoint is FastAPI's, on uvicorn: pip install fastapi uvicorn
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

import penstock as ps

FOLDER = Path("run/serve")
LEARNED = {  # how articles 1 and 3 of the Universal Declaration of Human Rights begin
    "English": "All human beings are born free and equal in dignity and rights.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
}
ASKED = {
    "English": "Everyone has the right to life, liberty and security of person.",
    "French": "Tout individu a droit à la vie, à la liberté et à la sûreté de sa personne.",
    "German": "Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.",
    "Spanish": "Todo individuo tiene derecho a la vida, a la libertad y a la seguridad de su persona.",
}
sizes: Counter[int] = Counter()  # how often the model was called with how many texts

# -- the work: a model that takes batches, and what is made of each of its answers -------------------------------------


def letters(texts: list[str]) -> np.ndarray:
    """For each text, how often which three letters follow one another (hashed), as a row of length 1."""
    codes = [np.frombuffer(f"  {text.lower()}  ".encode(), np.uint8).astype(int) for text in texts]
    hashed = [(one[:-2] * 961 + one[1:-1] * 31 + one[2:]) % 4096 for one in codes]
    counts = np.array([np.bincount(one, minlength=4096) for one in hashed], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


class Model:
    """Built once in each worker, and called with up to 32 texts."""

    def __init__(self) -> None:
        self.learned = letters(list(LEARNED.values()))

    def __call__(self, texts: list[str]) -> np.ndarray:
        sizes[len(texts)] += 1
        time.sleep(0.05)  # as long as a larger model would take, on another chip
        return letters(texts) @ self.learned.T


def answer(scores: np.ndarray) -> dict[str, Any]:
    return {"language": list(LEARNED)[int(scores.argmax())], "score": round(float(scores.max()), 3)}


WORK = ps.Flow().map(str.strip).map_batches(ps.per_worker(Model), batch_size=32, max_wait=0.02).map(answer)

# -- over a file, over a topic -----------------------------------------------------------------------------------------


def over_a_file() -> ps.Report:
    """Each line of a file into a line of another. Killed and run again, it goes on where it was."""
    return WORK.over(ps.read.jsonl(FOLDER / "texts.jsonl")).to(FOLDER / "languages.jsonl").run_sync()


async def over_a_topic(texts: list[str]) -> ps.Report:
    """Each event of a topic into an event of another. Without ``until`` it would go on with what comes."""
    async with ps.EventLog(FOLDER / "events.db") as log:
        await log.topic("texts").publish_many(texts)
        return await WORK.over(log.topic("texts").flow("tellers")).to(log.topic("languages")).run(until="drained")


# -- behind an endpoint ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """All requests share one call, and so its batches. At most 64 wait; at the end those are still answered."""
    async with WORK.open(max_waiting=64) as call:
        yield {"call": call}


app = FastAPI(lifespan=lifespan)


@app.get("/language")
async def language(text: str, request: Request) -> dict[str, Any]:
    told: dict[str, Any] = await request.state.call(text)
    return told


@app.exception_handler(ps.errors.Overloaded)
async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Said at once, so that those who wait already are answered in time."""
    return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "1"})


@app.get("/sizes")
async def sizes_since_asked() -> dict[int, int]:
    told = dict(sizes)
    sizes.clear()
    return told


def serve() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as port:
        print(f"http://127.0.0.1:{port.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[port])


# -- its callers -------------------------------------------------------------------------------------------------------


async def ask(url: str, callers: int, times: int) -> None:
    """So many callers ask at once, each of them so many times. Tells how they fared."""
    took: list[float] = []
    refused = 0

    async def caller(expected: str, text: str) -> None:
        nonlocal refused
        for _ in range(times):
            began = time.perf_counter()
            async with session.get("/language", params={"text": text}) as response:
                told = await response.json()
            if response.status == 503:
                refused += 1
                continue
            took.append(time.perf_counter() - began)
            assert told["language"] == expected, told

    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(caller(*asked) for asked in list(ASKED.items()) * (callers // len(ASKED))))
        async with session.get("/sizes") as response:
            batches = {int(size): count for size, count in sorted((await response.json()).items())}
    p50, p99 = (sorted(took)[int(share * len(took))] * 1000 for share in (0.5, 0.99))
    print(f"{callers} callers: {len(took)} answered, p50 {p50:.0f} ms, p99 {p99:.0f} ms; {refused} refused (503)")
    print("    batches:", ", ".join(f"{count} of {size}" for size, count in sorted(batches.items(), reverse=True)))


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    texts = list(ASKED.values()) * 25
    (FOLDER / "texts.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    print(f"over a file\n{over_a_file()}\n")
    print(f"over a topic\n{asyncio.run(over_a_topic(texts))}\n")
    print("behind an endpoint", flush=True)
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            asyncio.run(ask(url, callers=48, times=3))
            asyncio.run(ask(url, callers=200, times=2))
        finally:
            server.terminate()


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
