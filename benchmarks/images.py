"""Decode 2,000 JPEGs and run a small network over them in batches: work for two cores, and nothing to wait for.

The photographs are the two that come with scikit-learn, cut into crops. Decoding (Pillow) and the network (NumPy)
both leave the interpreter's lock, so threads can use every core; the bound is the time to draw the network's weights,
which everybody waits for, and all the work over all the cores.

What is imported on first use isn't a cost of pictures (``start`` measures that): every runner has its modules loaded by
a first run of one batch.
"""

from __future__ import annotations

import asyncio
import io
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from harness import ENVIRONMENT, Figures, NotRun, Outcome, Row, alternate, main, need, times

ITEMS = 2000
FIRST = 32
SIDE = 256
BATCH = 32
CORES = 2
SEED = 11


def photographs() -> list[bytes]:
    """The crops, made once and kept beside the environment."""
    kept = ENVIRONMENT / "crops.pickle"
    if not kept.exists():
        kept.write_bytes(pickle.dumps(crops()))
    made: list[bytes] = pickle.loads(kept.read_bytes())
    return made


def crops() -> list[bytes]:
    """2,000 crops of 256 by 256, as JPEG."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    chance = np.random.default_rng(SEED)
    pictures = load_sample_images().images
    made = []
    for number in range(ITEMS):
        picture = pictures[number % len(pictures)]
        top, left = (int(chance.integers(0, edge - SIDE)) for edge in picture.shape[:2])
        file = io.BytesIO()
        Image.fromarray(picture[top : top + SIDE, left : left + SIDE]).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def decode(data: bytes) -> Any:
    """The picture at 64 by 64, as an array."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR), np.float32)


class Network:
    """Two dense layers with weights drawn once: what counts is the time they take."""

    def __init__(self) -> None:
        import numpy as np

        chance = np.random.default_rng(SEED)
        self.first = chance.standard_normal((64 * 64 * 3, 512), np.float32)
        self.second = chance.standard_normal((512, 10), np.float32)

    def __call__(self, pictures: list[Any]) -> list[int]:
        import numpy as np

        flat = np.stack(pictures).reshape(len(pictures), -1) / 255
        hidden = np.maximum(flat @ self.first, 0)
        return [int(best) for best in (hidden @ self.second).argmax(1)]


def batches(data: list[Any]) -> Iterator[list[Any]]:
    for at in range(0, len(data), BATCH):
        yield data[at : at + BATCH]


def alone() -> Figures:
    """One after the other, in one thread: the work."""
    jpegs = photographs()
    Network()([decode(jpeg) for jpeg in jpegs[:FIRST]])
    began = time.perf_counter()
    network = Network()
    built = time.perf_counter()
    pictures = [decode(jpeg) for jpeg in jpegs]
    decoded = time.perf_counter()
    labels = [label for batch in batches(pictures) for label in network(batch)]
    ended = time.perf_counter()
    return {
        "build": built - began,
        "decode": decoded - built,
        "network": ended - decoded,
        "check": float(sum(labels)),
    }


def timed(work: Callable[[list[bytes]], list[int]]) -> Figures:
    """What ``work`` takes over all pictures, after a first run over a few."""
    jpegs = photographs()
    work(jpegs[:FIRST])
    began = time.perf_counter()
    labels = work(jpegs)
    return {"seconds": time.perf_counter() - began, "check": float(sum(labels))}


def penstock() -> Figures:
    import penstock as ps

    def work(jpegs: list[bytes]) -> list[int]:
        flow = ps.Flow(jpegs).map(decode, workers=CORES).map_batches(ps.per_worker(Network), batch_size=BATCH)
        return asyncio.run(flow.collect())

    return timed(work)


def spdl() -> Figures:
    from spdl.pipeline import PipelineBuilder

    def work(jpegs: list[bytes]) -> list[int]:
        pipeline = (
            PipelineBuilder()
            .add_source(jpegs)
            .pipe(decode, concurrency=CORES, output_order="input")
            .aggregate(BATCH)
            .pipe(Network(), concurrency=1)
            .add_sink(8)
            .build(num_threads=CORES + 1)
        )
        with pipeline.auto_stop():
            return [label for batch in pipeline for label in batch]

    return timed(work)


def pool() -> Figures:
    """By hand: a pool that decodes ahead, a thread that runs the network."""
    return timed(by_hand)


def by_hand(jpegs: list[bytes]) -> list[int]:
    network = Network()
    labels: list[int] = []
    with ThreadPoolExecutor(CORES) as decoders, ThreadPoolExecutor(1) as runner:
        ahead: deque[Future[Any]] = deque()
        running: deque[Future[list[int]]] = deque()
        for jpeg in jpegs:
            ahead.append(decoders.submit(decode, jpeg))
            if len(ahead) < 4 * BATCH:
                continue
            running.append(runner.submit(network, [ahead.popleft().result() for _ in range(BATCH)]))
            if len(running) > 2:
                labels += running.popleft().result()
        while ahead:
            batch = [ahead.popleft().result() for _ in range(min(BATCH, len(ahead)))]
            running.append(runner.submit(network, batch))
        for future in running:
            labels += future.result()
    return labels


def run() -> Outcome:
    found = alternate(__file__, {"alone": {}, "penstock": {}, "spdl": {}, "pool": {}}, rounds=5)
    work, ours = need(found["alone"], "the work alone"), need(found["penstock"], "penstock")
    bound = work["build"] + max(work["network"], (work["decode"] + work["network"]) / CORES)
    share = bound / ours["seconds"]
    figure = f"{ours['seconds']:.2f} s"
    parts = f"decode {work['decode']:.2f} s, network {work['network']:.2f} s of work"
    claim = f"{ITEMS:,} JPEGs: {parts}, after {work['build']:.2f} s for its weights"
    rows = [
        Row(
            claim, figure, f"all the work over {CORES} cores", f"{bound:.2f} s", f"{share:.0%}", "≥ 95 %", share >= 0.95
        )
    ]
    for name, told in (("spdl", "spdl"), ("pool", "a thread pool by hand")):
        peer = found[name]
        if isinstance(peer, NotRun):
            rows.append(Row("the same", figure, told, f"not run: {peer.reason}"))
            continue
        assert peer["check"] == ours["check"] == work["check"]
        ratio = peer["seconds"] / ours["seconds"]
        rows.append(Row("the same", figure, told, f"{peer['seconds']:.2f} s", times(ratio), "ahead", ratio >= 1))
    return Outcome(rows)


if __name__ == "__main__":
    main(run, alone, penstock, spdl, pool)
