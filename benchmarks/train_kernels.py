"""The optimizers' loops: bytes a second, beside the obvious NumPy code and BLAS ``saxpy``, the limit of one core.

Counted are the bytes that a float32 parameter can't do without: SGD 12, momentum 20, Adam 28, ``saxpy`` 12, a copy 8.
A push is what penstock does with a gradient: the worker copies it into its slot and sees in the same pass whether it
is finite, then the server applies it. It stands beside ``np.copyto`` and ``saxpy``, and beside NumPy that copies,
asks ``np.isfinite`` and updates with temporaries. Everything on one thread, all variants in turn in each process.

A gradient that isn't finite must change nothing, so a check that isn't part of the copy is a pass before the update;
for SGD that is a third more to read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from harness import Figures, Outcome, Row, alternate, main, need, times

LARGE, SMALL = 25_000_000, 250_000
TURNS = 15
RATE = 1e-9
BYTES = {"SGD": 12, "momentum": 20, "Adam": 28}
TO_SAXPY = {"SGD": 0.75, "Adam": 0.6}
TO_NUMPY = {"Adam": 6.0}


def turns(size: int) -> Figures:
    """Seconds of each piece of work: the median of turns in which all of them ran. And ratios within the turns."""
    import numpy as np
    from scipy.linalg.blas import saxpy
    from threadpoolctl import threadpool_limits

    from penstock.train import kernels
    from penstock.train.optimizer import SGD, Adam

    large = np.empty(30_000_000, np.uint8)
    del large  # from now on malloc keeps what NumPy's temporaries of 1 MB need, as in any program of some age
    random = np.random.default_rng(0)
    w, g = (random.standard_normal(size, np.float32) for _ in range(2))
    slot, mean, square = np.empty_like(g), np.zeros_like(g), np.zeros_like(g)
    held: dict[str, Any] = {"m": np.zeros_like(g), "v": np.zeros_like(g)}

    def naive_sgd() -> None:
        nonlocal w
        w -= RATE * slot

    def naive_momentum() -> None:
        nonlocal w
        held["m"] = 0.9 * held["m"] + slot
        w -= RATE * held["m"]

    def naive_adam() -> None:
        nonlocal w
        held["m"] = 0.9 * held["m"] + (1 - 0.9) * slot
        held["v"] = 0.999 * held["v"] + (1 - 0.999) * (slot * slot)
        w -= RATE * ((held["m"] / (1 - 0.9**8)) / (np.sqrt(held["v"] / (1 - 0.999**8)) + 1e-8))

    optimizers = {"SGD": SGD(RATE), "momentum": SGD(RATE, momentum=0.9), "Adam": Adam(RATE)}
    naive = {"SGD": naive_sgd, "momentum": naive_momentum, "Adam": naive_adam}

    def limit(gradient: Any) -> None:
        saxpy(gradient, w, a=-RATE)

    def limit_of_push() -> None:
        np.copyto(slot, g)
        limit(slot)

    works: dict[str, Callable[[], object]] = {
        "saxpy": lambda: limit(g),
        "copy, saxpy": limit_of_push,
        "copy": lambda: np.copyto(slot, g),
        "check": lambda: kernels.squares(g),
    }
    for name, optimizer in optimizers.items():
        states = [[mean], [square]][: len(optimizer.slots)]

        def apply(optimizer: Any = optimizer, states: Any = states) -> None:
            optimizer.update([w], states, [slot], 7)

        def check_and_apply(apply: Callable[[], None] = apply) -> None:
            assert math.isfinite(kernels.squares(slot))
            apply()

        def push(apply: Callable[[], None] = apply) -> None:
            np.copyto(slot, g)
            assert math.isfinite(kernels.squares(slot))
            apply()

        def by_hand(update: Callable[[], None] = naive[name]) -> None:
            np.copyto(slot, g)
            assert np.isfinite(slot).all()
            update()

        works |= {
            f"{name}: update": apply,
            f"{name}: check, update": check_and_apply,
            f"{name}: push": push,
            f"{name}: NumPy": by_hand,
            f"{name}: NumPy's update": naive[name],
        }

    with threadpool_limits(limits=1):
        spent = {name: list[float]() for name in works}
        often = max(1, LARGE // size // 4)
        for work in works.values():
            work()
        for _ in range(TURNS):
            for name, work in works.items():
                began = time.perf_counter()
                for _ in range(often):
                    work()
                spent[name].append((time.perf_counter() - began) / often)
    with threadpool_limits(limits=2):
        spent["saxpy, two threads"] = []
        for _ in range(TURNS + 1):
            began = time.perf_counter()
            for _ in range(often):
                limit(g)
            spent["saxpy, two threads"].append((time.perf_counter() - began) / often)

    found = {name: median(seconds) for name, seconds in spent.items()}
    for name in BYTES:
        for ours, other in (
            ("push", "copy, saxpy"),
            ("update", "saxpy"),
            ("check, update", "saxpy"),
            ("push", f"{name}: NumPy"),
            ("update", f"{name}: NumPy's update"),
        ):
            pairs = zip(spent[other], spent[f"{name}: {ours}"], strict=True)
            found[f"{name}: {ours} / {other}"] = median(theirs / mine for theirs, mine in pairs)
    return found


def run() -> Outcome:
    rows = []
    remarks = []
    for size, told in ((LARGE, "100 MB"), (SMALL, "1 MB")):
        found = need(alternate(__file__, {"turns": {"size": size}}, rounds=3)["turns"], "the loops")

        def speed(work: str, bytes_each: int, found: Figures = found, size: int = size) -> str:
            return f"{size * bytes_each / found[work] / 1e9:.1f} GB/s"

        for name, each in BYTES.items():
            beside = "copy, saxpy"
            share = found[f"{name}: push / {beside}"] * (each + 8) / 20
            row = Row(f"{name}, {told}: a push, copied, checked and applied", speed(f"{name}: push", each + 8))
            row.peer, row.beside, row.ratio = "np.copyto and saxpy", speed(beside, 20), f"{share:.2f}"
            rows.append(row)

            ratio = found[f"{name}: push / {name}: NumPy"]
            row = Row("the same", speed(f"{name}: push", each + 8))
            row.peer, row.beside, row.ratio = "NumPy", speed(f"{name}: NumPy", each + 8), times(ratio)
            least = TO_NUMPY.get(name) if size == LARGE else 1.0
            if least is not None:
                row.target, row.met = f"≥ {times(least)}" if least > 1 else "not slower", ratio >= least
            rows.append(row)

            for work, claim in (
                ("update", "the update alone"),
                ("check, update", "checked in a pass of its own, then updated"),
            ):
                share = found[f"{name}: {work} / saxpy"] * each / 12
                row = Row(f"{name}, {told}: {claim}", speed(f"{name}: {work}", each))
                row.peer, row.beside, row.ratio = "saxpy", speed("saxpy", 12), f"{share:.2f}"
                least = TO_SAXPY.get(name) if size == LARGE and work != "update" else None
                if least is not None:
                    row.target, row.met = f"≥ {least}", share >= least
                rows.append(row)
            beside = f"{name}: NumPy's update"
            ratio = times(found[f"{name}: update / {beside}"])
            figure = speed(f"{name}: update", each)
            rows.append(Row(f"{name}, {told}: the update alone", figure, "NumPy's alone", speed(beside, each), ratio))

        remarks.append(
            f"{told}: `saxpy` on one thread {speed('saxpy', 12)}, on two {speed('saxpy, two threads', 12)}; "
            f"`np.copyto` {speed('copy', 8)}; the check alone {speed('check', 4)}."
        )
    return Outcome(rows, remarks=remarks)


if __name__ == "__main__":
    main(run, turns)
