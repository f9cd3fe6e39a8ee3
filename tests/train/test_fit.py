"""Training over flows: nothing is lost, one worker is a plain loop, rounds are the same bits, errors have names."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock as ps
from penstock.errors import GradientRejected, PlanError, WorkerDied
from penstock.train.tickets import Tickets

PLACES = ["local", "shared"]
OPTIMIZERS = [ps.SGD(lr=0.1), ps.SGD(lr=0.1, momentum=0.9), ps.Adam(1e-2), ps.AdamW(1e-2, clip=1.0)]
LARGE = 1 << 19  # elements: more than is worked on at once on the loop


def trained(
    gradient: Callable[[Any, Any], Any], flow: ps.Flow[Any], params: Any, *server: Any, place: Any = "local", **fit: Any
) -> tuple[Any, Any]:
    """Parameters after training, and the report."""

    async def main() -> tuple[Any, Any]:
        async with ps.ParameterServer(params, *server, place=place) as one:
            report = await one.fit(gradient, flow, **fit)
            found, version = await one.pull()
            assert version == one.version == report.version
            return found, report

    return asyncio.run(main())


def curved(params: Any, batch: Any) -> Any:
    """Depends on where the parameters are, on the batch, and on nothing else."""
    return {name: np.sin(value + np.float32(sum(batch))) for name, value in params.items()}


def start() -> dict[str, Any]:
    return {"a": np.linspace(-1, 1, 7, dtype=np.float32), "b": np.linspace(0, 1, 6).reshape(2, 3)}


@pytest.mark.parametrize(("place", "consistency"), [("local", ps.ASP()), ("local", ps.SSP(1)), ("shared", ps.SSP(3))])
def test_no_gradient_is_lost(place: Any, consistency: Any) -> None:
    """Integer gradients at rate 1: the weights are exactly minus their sum, the version is their number."""

    def gradient(params: Any, batch: list[int]) -> Any:
        time.sleep(0.001 * (batch[0] % 4))
        return float(batch[0]), {"a": np.full(3, batch[0], np.float32), "b": np.array([batch], float)}

    params = {"a": np.zeros(3, np.float32), "b": np.zeros((1, 2))}
    numbers = range(200)
    found, report = trained(
        gradient, ps.Flow(numbers).batch(2), params, ps.SGD(lr=1), consistency, place=place, workers=4
    )
    assert found["a"].tolist() == [-sum(numbers[::2])] * 3
    assert found["b"].tolist() == [[-sum(numbers[::2]), -sum(numbers[1::2])]]
    assert report.version == report.updates == 100 == sum(report.staleness.values())
    assert report.samples == report.delivered == 200
    assert report.loss == np.mean(numbers[::2])


@pytest.mark.parametrize(
    ("place", "consistency"), [("local", ps.ASP()), ("local", ps.SSP(1)), ("local", ps.BSP()), ("shared", ps.ASP())]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_one_worker_is_bitwise_a_plain_loop(place: Any, optimizer: Any, consistency: Any) -> None:
    """Also at the ends of epochs, whose last batch is short."""
    flow = ps.Flow(range(10)).batch(4)
    found, report = trained(curved, flow, start(), optimizer, consistency, place=place, workers=1, epochs=3)
    weights = start()
    vectors = [value.reshape(-1) for value in weights.values()]
    states = [[np.zeros_like(vector) for vector in vectors] for _ in optimizer.slots]
    version = 0
    for _ in range(3):
        for batch in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]):
            gradients = [value.reshape(-1) for value in curved(weights, batch).values()]
            optimizer.update(vectors, states, gradients, version)
            version += 1
    assert report.version == version
    for name, value in weights.items():
        assert found[name].tobytes() == value.tobytes()


def slow_at_random(params: Any, batch: Any) -> Any:
    time.sleep(hash((os.getpid(), time.monotonic_ns())) % 5 * 0.001)
    return curved(params, batch)


async def slow_on_the_loop(params: Any, batch: Any) -> Any:
    await asyncio.sleep(hash((os.getpid(), time.monotonic_ns())) % 5 * 0.001)
    return curved(params, batch)


def test_rounds_are_bitwise_the_same_whoever_is_first_and_wherever_they_run() -> None:
    runs = [
        trained(
            gradient, ps.Flow(range(22)).batch(2), start(), ps.Adam(1e-2), ps.BSP(), place=place, workers=3, epochs=2
        )
        for place in PLACES
        for gradient in (curved, slow_at_random, slow_on_the_loop)
    ]
    weights = start()
    vectors = [value.reshape(-1) for value in weights.values()]
    states = [[np.zeros_like(vector) for vector in vectors] for _ in range(2)]
    batches = [[at, at + 1] for at in range(0, 22, 2)] * 2
    for version, first in enumerate(range(0, len(batches), 3)):
        several = [curved(weights, batch) for batch in batches[first : first + 3]]
        totals = [sum(one[name] for one in several).reshape(-1) for name in weights]  # type: ignore[union-attr]
        ps.Adam(1e-2).update(vectors, states, totals, version, scale=1 / len(several))
    for found, report in runs:
        assert report.version == 8  # 22 batches, 3 at a time: the last round has one
        assert report.staleness == {0: 22}
        for name, value in weights.items():
            assert found[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [LARGE, 3])
def test_models_of_any_size_are_trained(place: Any, size: int) -> None:
    found, report = trained(
        lambda params, batch: params - 1,
        ps.Flow(range(6)),
        np.zeros(size, np.float32),
        ps.SGD(lr=1),
        place=place,
        workers=1,
    )
    assert (found == 1).all()
    assert report.updates == 6


def test_the_bound_holds_at_every_start_whoever_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Watched(Tickets):
        def start(self) -> int:
            ticket = super().start()
            started.append(ticket - min(self.out))
            return ticket

    monkeypatch.setattr("penstock.train.server.Tickets", Watched)

    def gradient(params: Any, batch: int) -> Any:
        mark = tmp_path / str(batch)
        if batch % 20 == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02 if batch % 10 == 0 else 0.001)
        count = np.zeros(60)
        count[batch] = -1
        return count

    found, report = trained(
        gradient, ps.Flow(range(60)), np.zeros(60), ps.SGD(lr=1), ps.SSP(1), place="shared", workers=3
    )
    assert (found == 1).all()
    assert report.version == 60
    assert len(started) == 60
    assert max(started) <= 3


def test_a_batch_that_kills_every_worker_is_named(tmp_path: Path) -> None:
    def gradient(params: Any, batch: list[int]) -> Any:
        if 5 in batch:
            with open(tmp_path / "deaths", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return params

    with pytest.raises(WorkerDied, match="signal 9"):
        trained(gradient, ps.Flow(range(8)).batch(2), np.zeros(1), place="shared", workers=2)
    assert (tmp_path / "deaths").read_text() == "x" * 6


@pytest.mark.parametrize("place", PLACES)
def test_an_async_gradient_runs_as_many_at_once_as_there_are_workers(place: Any) -> None:
    async def gradient(params: Any, batch: int) -> Any:
        await asyncio.sleep(0.001)
        return -np.ones(1)

    found, report = trained(gradient, ps.Flow(range(20)), np.zeros(1), ps.SGD(lr=1), place=place, workers=3)
    assert found.tolist() == [20]
    assert max(report.staleness) >= 1


# -- what is returned --------------------------------------------------------------------------------------------------

WRONG = {
    "the other way round": (
        lambda p, b: ({"w": p["w"]}, 0.5),
        r"\(gradients, loss\) was returned. Return \(loss, grad",
    ),
    "three": (lambda p, b: (0.5, p, 1), "3 values were returned"),
    "no loss": (lambda p, b: ("high", p), r"\(str, dict\) was returned"),
    "missing": (lambda p, b: {}, "'w': it is missing"),
    "shape": (lambda p, b: {"w": p["w"][:1]}, r"'w': float32\[1\] was given, expected float32\[3\]"),
    "type": (lambda p, b: {"w": p["w"].astype(float)}, r"'w': float64\[3\] was given"),
    "nan": (lambda p, b: {"w": p["w"] * np.float32("nan")}, r"'w': it is nan at \[0\]"),
    "inf": (lambda p, b: (1.0, {"w": np.array([0, 0, np.inf], np.float32)}), r"'w': it is inf at \[2\]"),
    "none": (lambda p, b: None, "a NoneType was given, expected a dict of w"),
}


@pytest.mark.parametrize(("gradient", "words"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_gradient_is_named(gradient: Any, words: str, place: Any) -> None:
    if place == "shared" and words[0] == "'":  # the same code: two of them will do
        return
    with pytest.raises(GradientRejected, match=words) as caught:
        trained(gradient, ps.Flow(range(3)), {"w": np.ones(3, np.float32)}, place=place, workers=1)
    assert any("item 1" in note or "record 1" in note or "epoch 1" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("loss", [0.5, np.float32(0.5), np.array(0.5), np.array([0.5]), 1])
def test_a_loss_is_any_number(loss: Any) -> None:
    _, report = trained(lambda p, b: (loss, p), ps.Flow(range(3)), np.ones(2), workers=1)
    assert report.loss == float(np.asarray(loss).reshape(-1)[0])


def test_arrays_that_are_used_again_are_copied() -> None:
    """As PyTorch does with its gradients: the next step writes where the last result is."""
    kept = np.zeros(1000)

    def gradient(params: Any, batch: int) -> Any:
        kept[:] = -batch
        return kept

    found, _ = trained(gradient, ps.Flow(range(300)), np.zeros(1000), ps.SGD(lr=1), workers=1)
    assert (found == sum(range(300))).all()


def test_several_steps_are_one_gradient() -> None:
    def gradient(params: Any, batch: Any) -> Any:
        there = params.copy()
        for _ in range(3):
            there -= 0.5 * (there - 1)
        return params - there

    found, _ = trained(gradient, ps.Flow(range(2)), np.zeros(1), ps.SGD(lr=1), workers=1)
    assert found.tolist() == [1 - 0.5**6]


def test_batches_are_collated_in_the_worker() -> None:
    found, _ = trained(
        lambda params, batch: -batch.sum(axis=0),
        ps.Flow([[1.0, 2.0], [3.0, 4.0]]).batch(2),
        np.zeros(2),
        ps.SGD(lr=1),
        place="shared",
        collate=np.array,
    )
    assert found.tolist() == [4, 6]


def test_failing_batches_go_by_on_error(tmp_path: Path) -> None:
    def gradient(params: Any, batch: int) -> Any:
        if batch % 5 == 0:
            raise ValueError("no")
        return -np.ones(1)

    for consistency in (ps.ASP(), ps.SSP(1), ps.BSP()):
        flow: ps.Flow[int] = ps.Flow(range(30), on_error="skip", retry=1)
        found, report = trained(gradient, flow, np.zeros(1), ps.SGD(lr=1), consistency, workers=4)
        assert (report.delivered, report.skipped) == (24, 6)
        assert found.tolist() == [6.0 if consistency == ps.BSP() else 24.0]
        assert report.errors[0].kind == "ValueError"


# -- epochs, scores ----------------------------------------------------------------------------------------------------


def walk(params: Any, batch: Any) -> Any:
    return -np.ones(1)


def test_each_epoch_is_evaluated_with_the_parameters_of_its_end() -> None:
    scores = []
    _, report = trained(
        walk, ps.Flow(range(10)).batch(3), np.zeros(1), ps.SGD(lr=1), workers=1, epochs=3, evaluate=lambda p: p[0]
    )
    assert report.scores == (4.0, 8.0, 12.0)
    assert "scores: 4, 8, 12" in str(report)

    async def evaluate(params: Any) -> Any:
        scores.append(params[0])
        return {"count": np.float32(params[0])}

    _, report = trained(
        walk, ps.Flow(range(10)).batch(3), np.zeros(1), ps.SGD(lr=1), workers=3, epochs=2, evaluate=evaluate, shuffle=0
    )
    assert report.scores[-1] == {"count": 8.0}
    assert len(scores) == 2


def test_training_stops_when_the_scores_say_so() -> None:
    _, report = trained(
        walk,
        ps.Flow(range(10)),
        np.zeros(1),
        ps.SGD(lr=1),
        workers=1,
        epochs=1000,
        evaluate=lambda p: float(p[0]),
        stop=lambda scores: len(scores) == 3,
    )
    assert report.stopped
    assert report.scores == (10.0, 20.0, 30.0)
    assert report.delivered < 1000


@pytest.mark.parametrize("evaluate", [lambda p: 1 / 0, lambda p: object()])
def test_what_evaluate_raises_comes_out(evaluate: Any) -> None:
    with pytest.raises((ZeroDivisionError, PlanError)):
        trained(walk, ps.Flow(range(10)), np.zeros(1), workers=1, epochs=3, evaluate=evaluate)
    with pytest.raises((ZeroDivisionError, PlanError)):
        trained(walk, ps.Flow(range(10)), np.zeros(1), workers=1, evaluate=evaluate)


def test_shuffling_gives_each_epoch_an_order_of_its_own_and_every_seed_another() -> None:
    def order(seed: int | None) -> list[int]:
        seen: list[int] = []

        def gradient(params: Any, batch: list[int]) -> Any:
            seen.extend(batch)
            return params

        trained(gradient, ps.Flow(list("0123456789")).map(int).batch(3), np.zeros(1), workers=1, epochs=2, shuffle=seed)
        return seen

    assert order(None) == [*range(10), *range(10)]
    first = order(1)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first[:10] != first[10:]
    assert first == order(1) != order(2)


def test_a_file_is_read_again_for_each_epoch(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"x": {n}}}\n' for n in range(25)))
    found, report = trained(
        lambda params, batch: -np.array([sum(row["x"] for row in batch)], float),
        ps.read.jsonl(str(tmp_path / "rows.jsonl")).batch(4),
        np.zeros(1),
        ps.SGD(lr=1),
        epochs=2,
    )
    assert found.tolist() == [2 * sum(range(25))]
    assert report.updates == 14


# -- topics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_events_are_learned_from_once(place: Any, tmp_path: Path) -> None:
    """As they come, by two runs, the second of which ends once everything has been published."""

    def gradient(params: Any, batch: list[int]) -> Any:
        count = np.zeros(60)
        for number in batch:
            count[number] -= 1
        return count

    async def main() -> None:
        async with (
            ps.EventLog(tmp_path / "events.db") as log,
            ps.ParameterServer(np.zeros(60), ps.SGD(lr=1), place=place, checkpoint=str(tmp_path / "run")) as server,
        ):
            topic = log.topic("numbers")
            flow = topic.flow("learner").batch(4, max_wait=0.05)
            await topic.publish_many(range(30))
            report = await server.fit(gradient, flow, workers=2, until="drained")
            assert (report.samples, report.delivered) == (30, 30)
            assert "exactly once" in report.guarantee

            async def publish() -> None:
                for start in range(30, 60, 10):
                    await topic.publish_many(range(start, start + 10))

            report = await server.fit(gradient, flow, workers=2, until=asyncio.create_task(publish()))
            assert report.samples == 30
            assert (await server.pull())[0].tolist() == [1] * 60
            assert (await topic.groups())[0].behind == 0

    asyncio.run(main())


# -- what is refused ---------------------------------------------------------------------------------------------------


def numbers() -> Any:
    return ps.Flow(range(8))


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no function": (lambda: {"gradient": 3}, "gradient=3"),
    "no flow": (lambda: {"flow": [1, 2]}, "a list to learn from"),
    "no source": (lambda: {"flow": ps.Flow().batch(2)}, "without a source"),
    "epochs": (lambda: {"epochs": 0}, "epochs=0"),
    "epochs of an iterator": (lambda: {"flow": ps.Flow(iter([1])), "epochs": 2}, "which can be read once"),
    "shuffle": (lambda: {"shuffle": True}, "shuffle=True"),
    "shuffling a stream": (lambda: {"flow": ps.Flow(iter([1])), "shuffle": 1}, "no order to choose from"),
    "ids": (lambda: {"flow": ps.Flow([{"id": 1}], id="id"), "epochs": 2}, "knows each item once"),
    "workers": (lambda: {"workers": 0}, "workers=0"),
    "stop": (lambda: {"stop": len}, "no scores"),
    "evaluate": (lambda: {"evaluate": 1}, "evaluate=1"),
    "per_worker": (lambda: {"gradient": ps.per_worker(dict)}, "per_worker"),
    "unordered": (lambda: {"flow": numbers().map(str, ordered=False)}, "isn't ordered"),
    "keyed": (lambda: {"flow": numbers().map(str, key=str)}, "isn't ordered"),
    "max_wait": (lambda: {"flow": numbers().batch(2, max_wait=1)}, "max_wait is over"),
    "expanded": (lambda: {"flow": numbers().flat_map(lambda x: [x])}, "whole=False"),
}


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cant_be_trained_is_refused_before_anything_runs(given: Any, words: str) -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), consistency=ps.BSP()) as server:
            with pytest.raises(PlanError, match=words):
                await server.fit(**({"gradient": walk, "flow": numbers()} | given()))
            assert server.version == 0

    asyncio.run(main())


def test_one_fit_at_a_time() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1)) as server:

            async def slowly(params: Any, batch: int) -> Any:
                with pytest.raises(PlanError, match="another fit"):
                    await server.fit(walk, numbers())
                return -np.ones(1)

            await server.fit(slowly, numbers())
            assert (await server.pull())[0].tolist() == [8]

    asyncio.run(main())


def test_a_push_needs_no_ticket_but_is_none_of_a_round() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), ps.SSP(1)) as server:
            await server.fit(walk, numbers())
            assert await server.push(np.ones(1), version=3) == 9
            assert (await server.pull())[0].tolist() == [7]
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), ps.BSP()) as server:
            with pytest.raises(PlanError, match="rounds are of gradients that fit"):
                await server.push(np.ones(1), version=0)

    asyncio.run(main())


def test_cancelling_ends_the_workers_and_leaves_whole_updates() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1)) as server:
            reached = asyncio.Event()

            async def gradient(params: Any, batch: int) -> Any:
                if batch == 20:
                    reached.set()
                if batch >= 20:
                    await asyncio.sleep(3600)
                return -np.ones(1)

            fitting = asyncio.ensure_future(server.fit(gradient, ps.Flow(range(100)), workers=3))
            await reached.wait()
            fitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fitting
            found, version = await server.pull()
            assert found.tolist() == [version]
            assert 17 <= version <= 20
            report = await server.fit(walk, ps.Flow(range(5)))
            assert report.updates == 5

    asyncio.run(main())


def test_gradients_that_cant_be_written_to_are_averaged() -> None:
    """As JAX's are."""

    def gradient(params: Any, batch: int) -> Any:
        fixed = -np.ones(3)
        fixed.flags.writeable = False
        return fixed

    for place in PLACES:
        found, _ = trained(gradient, numbers(), np.zeros(3), ps.SGD(lr=1), ps.BSP(), place=place, workers=2)
        assert found.tolist() == [4, 4, 4]
