"""Score card payments as they come: a state for each card, batches by deadline, dead letters, several processes.

    python examples/score_events.py                    2,000 payments, three workers
    python examples/score_events.py --kill             the same, one worker after the other killed (SIGKILL) on the way

Payments are events of a topic, their key is the card. Each worker is a process of its own in one group: it keeps what
is usual for a card, scores payments in batches of up to 32 that wait 20 ms at the most, and publishes the scores to
another topic of the same log. Outputs, acknowledgements and states count in one transaction, so whatever is killed,
each payment is scored once, with the state that all earlier ones of its card have left.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import penstock as ps

LOG = Path("run/score/events.db")
WORKERS = 3


class Payment(msgspec.Struct):
    number: int
    card: str
    amount: float


class Usual(msgspec.Struct):
    """What is usual for a card: how many payments, and a mean that follows the last ones."""

    count: int = 0
    mean: float = 0.0


class Score(msgspec.Struct):
    number: int
    card: str
    nth: int
    score: float


# -- the work ----------------------------------------------------------------------------------------------------------


def compare(usual: Usual | None, payment: Payment) -> tuple[Usual, tuple[Payment, Usual]]:
    """What a payment is beside those of its card before, and what is usual then."""
    before = usual or Usual(0, payment.amount)
    after = Usual(before.count + 1, 0.9 * before.mean + 0.1 * payment.amount)
    return after, (payment, before)


def score(batch: list[tuple[Payment, Usual]]) -> list[Score]:
    """A small model: how far an amount is from the usual, as a probability."""
    amounts = np.array([payment.amount for payment, _ in batch])
    if (amounts <= 0).any():
        raise ValueError("a payment of nothing, or less")
    usual = np.array([usual.mean for _, usual in batch])
    scores = 1 / (1 + np.exp(3 - np.abs(np.log(amounts / usual)) * 2))
    return [
        Score(payment.number, payment.card, before.count + 1, round(float(one), 3))
        for (payment, before), one in zip(batch, scores, strict=True)
    ]


def worker(log: ps.EventLog) -> ps.Job:
    payments = log.topic("payments", type=Payment).flow("scorer")
    scored = payments.map_state(compare).map_batches(score, batch_size=32, max_wait=0.02, retry=None)
    return scored.to(log.topic("scores", type=Score).as_sink(key=lambda one: one.card))


# -- the demonstration -------------------------------------------------------------------------------------------------


async def publish(log: ps.EventLog, count: int) -> None:
    """Payments of a hundred cards; every 400th is broken, and will be a dead letter."""
    draw = random.Random(3)
    payments = log.topic("payments", type=Payment)
    for start in range(0, count, 100):
        some = [
            Payment(number, f"card-{draw.randrange(100)}", -1 if number % 400 == 399 else draw.lognormvariate(3, 1))
            for number in range(start, min(count, start + 100))
        ]
        await payments.publish_many(some, key=lambda payment: payment.card)
        await asyncio.sleep(0.05)


def start_worker() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--work"], stdout=subprocess.DEVNULL)


async def demonstrate(count: int, kill: bool) -> None:
    shutil.rmtree(LOG.parent, ignore_errors=True)
    LOG.parent.mkdir(parents=True)
    async with ps.EventLog(LOG) as log:
        workers = [start_worker() for _ in range(WORKERS)]
        publishing = asyncio.create_task(publish(log, count))
        for number in range(WORKERS if kill else 0):
            await asyncio.sleep(0.5)
            workers[number].kill()
            workers[number].wait()
            workers[number] = start_worker()
        await publishing
        for one in workers:
            one.terminate()  # which drains: what was taken is finished
            await asyncio.to_thread(one.wait)
        await worker(log).run(until="drained")
        await tell(log, count)


async def tell(log: ps.EventLog, count: int) -> None:
    """What came of it, and that each payment was scored once, in the order of its card."""
    scores = [event.value async for event in log.topic("scores", type=Score).read()]
    dead = [letter.event.value.number async for letter in log.topic("payments", type=Payment).dead()]
    nth: dict[str, Any] = {}
    for one in scores:
        assert one.nth > nth.get(one.card, 0), "out of order, or scored twice"
        nth[one.card] = one.nth
    assert sorted([*(one.number for one in scores), *dead]) == list(range(count)), "not every payment exactly once"
    odd = sorted(scores, key=lambda one: -one.score)[:3]
    print(f"{count:,} payments: {len(scores):,} scored once each, {len(dead)} in the dead letters")
    print("the oddest:", ", ".join(f"{one.card} #{one.nth} ({one.score})" for one in odd))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=2000)
    parser.add_argument("--kill", action="store_true", help="kill one worker after the other on the way")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        worker(ps.EventLog(LOG)).run_sync(progress=False)
    else:
        asyncio.run(demonstrate(given.events, given.kill))


if __name__ == "__main__":
    main()
