"""The edges of training: a server that is left early, scores and losses of all kinds, numbers at their limits."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock as ps
from penstock.errors import CheckpointRejected, GradientRejected, PlanError
from penstock.train.params import Layout
from penstock.train.worker import _taken_apart

DEADLINE = 60


def go(main: Any) -> Any:
    return asyncio.run(asyncio.wait_for(main, DEADLINE))


def ones(params: Any, batch: Any) -> tuple[float, Any]:
    return 1.0, np.ones_like(params)


async def own_place(params: Any, batch: Sequence[int]) -> Any:
    """Counts each sample at a place of its own."""
    await asyncio.sleep(0.002)
    gradient = np.zeros_like(params)
    gradient[list(batch)] = 1
    return gradient


async def trained(path: Any, epochs: int, samples: Any = range(8), **options: Any) -> ps.TrainingReport:
    async with ps.ParameterServer(np.zeros(1, np.float32), ps.SGD(lr=1), checkpoint=path) as server:
        return await server.fit(ones, ps.Flow(samples).batch(2), workers=1, epochs=epochs, **options)


# -- the end of a server -----------------------------------------------------------------------------------------------


def test_leaving_while_fit_runs_neither_ends_it_nor_applies_anything_twice(tmp_path: Path) -> None:
    path = ps.Checkpoint(str(tmp_path / "run"), seconds=100)

    def make() -> ps.ParameterServer:
        return ps.ParameterServer(np.zeros(100), ps.SGD(lr=1.0), checkpoint=path)

    async def main() -> Any:
        left = make()
        with pytest.raises(ValueError, match="of the user's"):
            async with left:
                flow = ps.Flow(range(100)).batch(1)
                fitting = asyncio.create_task(left.fit(own_place, flow, workers=2))
                while left.version < 10:  # noqa: ASYNC110  # it is on its way
                    await asyncio.sleep(0.001)
                raise ValueError("of the user's")
        report = await fitting
        async with make() as server:
            again = await server.fit(own_place, ps.Flow(range(100)).batch(1), workers=2)
            return report.updates, again.updates, (await server.pull())[0]

    first, second, weights = go(main())
    assert (first, second) == (100, 0)
    assert (weights == -1).all()


def test_a_push_counts_though_its_checkpoint_can_t_be_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run"

    async def main() -> None:
        kept = ps.Checkpoint(str(path), updates=1)
        with pytest.raises(ps.errors.PenstockError):  # closing tries again, and says so
            async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1.0), checkpoint=kept) as server:
                shutil.move(path, tmp_path / "away")
                assert await server.push(np.ones(1), version=0) == 1

    with caplog.at_level(logging.WARNING):
        go(main())
    assert "couldn't be saved after a push" in caplog.text


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["evaluate", "stop"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("epochs", [2, 3])
def test_what_an_evaluation_raises_is_raised_and_its_score_made_up_for(
    which: str, kept: bool, epochs: int, tmp_path: Path
) -> None:
    calls: list[str] = []

    def evaluate(params: Any) -> float:
        calls.append("evaluate")
        if which == "evaluate" and calls.count("evaluate") == 1:
            raise RuntimeError("boom")
        return float(params[0])

    def stop(scores: list[Any]) -> bool:
        calls.append("stop")
        if which == "stop" and calls.count("stop") == 1:
            raise RuntimeError("boom")
        return False

    path = str(tmp_path / "run") if kept else None
    with pytest.raises(RuntimeError, match="boom"):
        go(trained(path, epochs, evaluate=evaluate, stop=stop))
    if kept:
        report = go(trained(path, epochs, evaluate=evaluate, stop=stop))
        assert report.scores[-1] == -4 * epochs


def test_scores_that_are_no_finite_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    found = iter([math.nan, {"loss": math.inf, "n": 3}, 1, 2.5])
    first = go(trained(str(tmp_path / "run"), 3, evaluate=lambda params: next(found)))
    second = go(trained(str(tmp_path / "run"), 4, evaluate=lambda params: next(found)))
    assert math.isnan(first.scores[0])
    assert math.isnan(second.scores[0])
    assert second.scores[1:] == ({"loss": math.inf, "n": 3}, 1, 2.5)


@pytest.mark.parametrize("score", [None, "good", [1.0], np.zeros(2), {"a": None}])
def test_what_is_no_score_is_refused(score: Any) -> None:
    with pytest.raises(PlanError, match="evaluate returned a"):
        go(trained(None, 1, evaluate=lambda params: score))


def test_a_source_that_has_grown_is_evaluated_again(tmp_path: Path) -> None:
    source = tmp_path / "samples.jsonl"
    scores = []
    for count in (4, 8, 8):
        source.write_text("".join(f"{n}\n" for n in range(count)))
        flow = ps.read.jsonl(source).batch(2)

        async def main(flow: Any = flow) -> Any:
            async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server:
                return await server.fit(ones, flow, workers=1, evaluate=lambda params: float(params[0]))

        scores.append(go(main()).scores)
    assert scores == [(-2.0,), (-2.0, -4.0), (-2.0, -4.0)]


def test_a_training_that_was_stopped_goes_on_where_nobody_would_stop_it(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    options: dict[str, Any] = {"evaluate": lambda params: float(params[0])}
    first = go(trained(path, 200, stop=lambda scores: len(scores) >= 2, **options))
    assert first.stopped
    assert first.version < 800
    again = go(trained(path, 200, stop=lambda scores: len(scores) >= 2, **options))
    assert (again.stopped, again.updates) == (True, 0)
    rest = go(trained(path, 200, **options))
    assert (rest.stopped, rest.version) == (False, 800)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_dropped_gradients_count_neither_as_samples_nor_in_the_loss() -> None:
    async def slow(params: Any, batch: Any) -> tuple[float, Any]:
        await asyncio.sleep(0.002 * (batch[0] % 4))
        return 1.0, np.ones_like(params)

    async def main() -> ps.TrainingReport:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=0.1), ps.ASP(drop=0)) as server:
            return await server.fit(slow, ps.Flow(range(40)).batch(2), workers=4)

    report = go(main())
    assert report.dropped > 0
    assert report.samples == 2 * report.updates


@pytest.mark.parametrize("place", ["local", "shared"])
def test_a_round_whose_sum_is_too_large_is_refused(place: Any) -> None:
    async def main() -> Any:
        server = ps.ParameterServer(np.zeros(2, np.float32), ps.Adam(lr=1, clip=1), ps.BSP(), place=place)
        async with server:
            with pytest.raises(GradientRejected, match="inf"):
                await server.fit(huge, ps.Flow(range(4)).batch(1), workers=2)
            return (await server.pull())[0]

    assert np.isfinite(go(main())).all()


def huge(params: Any, batch: Any) -> Any:
    return np.full_like(params, 2e38)


class Sly(Exception):
    """Can't be pickled."""

    def __init__(self) -> None:
        super().__init__("sly")
        self.lock = asyncio.Lock

    def __reduce__(self) -> Any:
        raise TypeError("no")


@pytest.mark.parametrize("error", [FileNotFoundError("no rates"), Sly(), KeyError("rate")])
def test_what_a_schedule_raises_reaches_the_process_that_pushed(error: Exception) -> None:
    def rate(version: int) -> float:
        if version:
            raise error
        return 1.0

    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=rate), place="shared") as server:
            flow = ps.Flow([0]).map(Pusher(server), place="process", workers=1)
            with pytest.raises(Exception) as raised:  # which is what it is about
                await flow.collect()
            assert type(raised.value).__name__ == type(error).__name__
            assert str(raised.value) == str(error)

    go(main())


class Pusher:
    def __init__(self, server: Any) -> None:
        self.server = server

    def __call__(self, x: int) -> Any:
        self.server.push_sync(np.ones(1), version=0)
        return self.server.push_sync(np.ones(1), version=1)


def test_a_version_may_be_any_whole_number() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1)) as server:
            version: Any = np.int64(0)
            assert await server.push(np.ones(1), version=version) == 1
            for wrong in (True, 1.0, "1", -1, 2):
                with pytest.raises(PlanError, match="and the server is at version 1"):
                    await server.push(np.ones(1), version=wrong)  # type: ignore[arg-type]  # the point

    go(main())


@pytest.mark.parametrize("loss", [10**400, b"3", "3", None], ids=["huge", "bytes", "text", "none"])
def test_what_is_no_loss_is_refused(loss: Any) -> None:
    with pytest.raises(GradientRejected, match="the loss a number"):
        _taken_apart((loss, {"a": np.ones(1)}))


# -- parameters and plans ----------------------------------------------------------------------------------------------


def test_many_parameters_are_looked_up_and_not_searched_for() -> None:
    tree = {f"p{n}": np.zeros(1) for n in range(20_000)}
    layout = Layout(tree)
    assert len(layout.vectors(tree)) == 20_000  # a minute and a half where each is searched for


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"__metadata__": np.zeros(1)}, "a name that safetensors keeps to itself"),
        ({"a": {"b": np.array([1.0, np.nan])}}, "the parameter 'a/b' has a NaN or an infinity"),
        (np.array([np.inf]), "has a NaN or an infinity"),
    ],
)
def test_parameters_that_can_t_be_trained_are_refused_at_once(params: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        ps.ParameterServer(params)


def test_plans_that_would_do_otherwise_than_they_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="which counts over all epochs together"):
        go(_fit(ps.Flow(range(10)).take(6).batch(2), epochs=3))
    with pytest.raises(PlanError, match="there is none to be forgotten"):
        go(_fit(ps.Flow(range(10)).batch(2), fresh=True))


async def _fit(flow: Any, **options: Any) -> None:
    async with ps.ParameterServer(np.zeros(1)) as server:
        await server.fit(ones, flow, workers=1, **options)


def test_a_checkpoint_of_another_optimizer_is_told_as_such(tmp_path: Path) -> None:
    go(trained(str(tmp_path / "run"), 1))

    async def main() -> None:
        with pytest.raises(CheckpointRejected, match="belongs to another optimizer"):
            async with ps.ParameterServer(np.zeros(1, np.float32), ps.Adam(), checkpoint=str(tmp_path / "run")):
                pass

    go(main())
