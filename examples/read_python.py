"""Reads the Python installation it runs on, is killed half way, and goes on where it was.

    python examples/read_python.py        the demo: start the job, kill it half way in full view, start it again
    python examples/read_python.py job    the job alone: kill it yourself, as often as you like

The standard library's own .py files are decoded and tokenized (in processes), then each is scored in batches: how many
bits a byte it takes under a table that knows, from the first hundred files, which byte follows which two. What
takes many bits surprises the table. One line a file goes to run/files.jsonl.
"""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path
from typing import TypedDict

import msgspec
import numpy as np

import penstock as ps

LIBRARY = Path(sysconfig.get_path("stdlib"))
OUTPUT = Path("run/files.jsonl")
OMITTED = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


class Text(TypedDict):
    """A file, read."""

    module: str
    tokens: int
    raw: bytes


class Score(TypedDict):
    """A line of the output."""

    module: str
    tokens: int
    bytes: int
    bits_a_byte: float


def standard_library() -> list[str]:
    """The library's own files, without tests and what was installed, as paths relative to it."""
    paths = (path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
    return sorted(str(path) for path in paths if not OMITTED & set(path.parts))


def read(name: str) -> Text:
    """Read a file and take it apart, as Python itself would."""
    raw = (LIBRARY / name).read_bytes()
    tokens = sum(1 for _ in tokenize.tokenize(io.BytesIO(raw).readline))
    return {"module": name, "tokens": tokens, "raw": raw}


class Table:
    """Order-2 byte statistics: built once in each worker, then called with batches."""

    def __init__(self, names: list[str]) -> None:
        counts = np.zeros((1 << 16, 256), np.float32)
        for name in names:
            before, byte = self.split((LIBRARY / name).read_bytes())
            np.add.at(counts, (before, byte), 1)
        alone = (counts.sum(axis=0) + 1) / (counts.sum() + 256)  # what no pair of bytes is known to precede
        self.bits = -np.log2((counts + 2 * alone) / (counts.sum(axis=1, keepdims=True) + 2))

    def __call__(self, texts: list[Text]) -> list[Score]:
        return [self.score(text) for text in texts]

    def score(self, text: Text) -> Score:
        before, byte = self.split(text["raw"])
        bits = float(self.bits[before, byte].mean()) if len(byte) else 0.0
        size = len(text["raw"])
        return {"module": text["module"], "tokens": text["tokens"], "bytes": size, "bits_a_byte": round(bits, 4)}

    @staticmethod
    def split(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Every byte from the third on, and the two before it as one number."""
        data = np.frombuffer(raw, np.uint8).astype(np.int32)
        return data[:-2] << 8 | data[1:-1], data[2:]


names = standard_library()
job = (
    ps.Flow(names, name="standard-library")
    .map(read, place="process", workers=2)
    .map_batches(ps.per_worker(Table, names[:100]), batch_size=16, max_wait=0.2)
    .to(OUTPUT)
)


def lines() -> int:
    return OUTPUT.read_bytes().count(b"\n") if OUTPUT.exists() else 0


def start() -> subprocess.Popen[bytes]:
    """The job, as a process of its own."""
    return subprocess.Popen([sys.executable, __file__, "job"])


def demo() -> None:
    """Start the job, kill it half way, start it again, and show that nothing was lost or doubled."""
    shutil.rmtree(OUTPUT.parent, ignore_errors=True)
    OUTPUT.parent.mkdir()
    print(f"{len(names)} files of the standard library → {OUTPUT}", flush=True)
    first = start()
    while first.poll() is None and lines() < len(names) // 2:
        time.sleep(0.02)
    first.kill()
    print(f"\nkilled (signal {signal.SIGKILL.value}) with {lines()} files written; starting it again\n", flush=True)
    assert first.wait() == -signal.SIGKILL, "it was to be killed half way, and had ended before"
    second = start()
    if second.wait() != 0:
        sys.exit("the second run failed")

    scores = [msgspec.json.decode(line, type=Score) for line in OUTPUT.read_bytes().splitlines()]
    times = Counter(score["module"] for score in scores)
    assert times == Counter(names), f"not once each: {(times - Counter(names)) | (Counter(names) - times)}"
    print(f"\nevery one of the {len(names)} files is there, exactly once\n\nthe five most surprising modules:")
    for score in sorted(scores, key=lambda score: -score["bits_a_byte"])[:5]:
        print(f"  {score['bits_a_byte']:.2f} bits a byte  {score['module']}  ({score['bytes']:,} bytes)")


if __name__ == "__main__":
    if sys.argv[1:] == ["job"]:
        print(job.run_sync())
    else:
        demo()
