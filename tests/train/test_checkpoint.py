"""Checkpoints: weights that others read, progress beside them, and nothing that is foreign is touched."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import penstock as ps
from penstock.errors import CheckpointRejected, OutputInUse, PlanError, ResumeMismatch, WriteFailed
from penstock.testing import run_virtual
from penstock.train.store import Store


class Interrupted(Exception):
    """Ends a run in the middle."""


def start() -> dict[str, Any]:
    return {"layer": {"w": np.zeros((2, 3), np.float32)}, "count": np.zeros(40)}


def count(params: Any, batch: Any) -> Any:
    """One at the place of each sample."""
    gradient = {"layer": {"w": np.ones((2, 3), np.float32)}, "count": np.zeros(40)}
    gradient["count"][batch] = -1  # type: ignore[call-overload]
    return gradient


def fit(
    kept: Any, gradient: Any = count, flow: Any = None, *, params: Any = None, optimizer: Any = None, **more: Any
) -> Any:
    """Parameters after training, and the report."""

    async def main() -> Any:
        given = start() if params is None else params
        async with ps.ParameterServer(given, optimizer or ps.SGD(lr=1), checkpoint=kept) as server:
            report = await server.fit(gradient, ps.Flow(range(40)).batch(4) if flow is None else flow, **more)
            return (await server.pull())[0], report

    return asyncio.run(main())


def breaking(at: int) -> Any:
    def gradient(params: Any, batch: Any) -> Any:
        if at in batch:
            raise Interrupted
        return count(params, batch)

    return gradient


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    kept = tmp_path / "run"
    with pytest.raises(Interrupted):
        fit(kept, breaking(25), workers=1)
    found, report = fit(kept, workers=1)
    assert (found["count"] == 1).all()
    assert (report.earlier["delivered"], report.delivered, report.version) == (24, 16, 10)
    found, report = fit(kept)
    assert (report.updates, report.version, (found["count"] == 1).all()) == (0, 10, True)
    assert any("nothing to do" in note for note in report.notes)


def test_more_epochs_are_more_work_and_a_grown_list_too(tmp_path: Path) -> None:
    assert fit(tmp_path / "run")[1].updates == 10
    found, report = fit(tmp_path / "run", epochs=3)
    assert report.updates == 20
    assert (found["count"] == 3).all()
    with pytest.raises(ResumeMismatch, match="shuffled by shuffle=None before, and is by shuffle=3 now"):
        fit(tmp_path / "run", epochs=3, shuffle=3)
    with pytest.raises(ResumeMismatch, match="first items of the list differ"):
        fit(tmp_path / "run", flow=ps.Flow([*range(39), 0]).batch(4), epochs=3)
    assert fit(tmp_path / "shuffled", shuffle=1)[1].updates == 10
    with pytest.raises(ResumeMismatch, match="shuffled into another order"):
        fit(tmp_path / "shuffled", flow=ps.Flow(range(41)).batch(4), shuffle=1)


def test_each_fit_has_a_progress_of_its_own(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    found, report = fit(tmp_path / "run", flow=ps.Flow(range(8), name="more").batch(4))
    assert report.updates == 2
    assert found["count"].tolist() == [2] * 8 + [1] * 32
    assert fit(tmp_path / "run", flow=ps.Flow(range(8), name="more").batch(4))[1].updates == 0
    assert fit(tmp_path / "run")[1].updates == 0


def test_fresh_begins_again(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    found, report = fit(tmp_path / "run", fresh=True)
    assert (report.updates, report.version, (found["count"] == 1).all()) == (10, 10, True)

    async def late() -> None:
        async with ps.ParameterServer(start(), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server:
            await server.push(count(None, [0]), version=0)
            with pytest.raises(PlanError, match="has applied 1 updates since it was made"):
                await server.fit(count, ps.Flow(range(4)), fresh=True)
            assert server.version == 11

    asyncio.run(late())


def test_others_read_the_weights(tmp_path: Path) -> None:
    found, _ = fit(tmp_path / "run", optimizer=ps.Adam(0.1))
    model = load_file(tmp_path / "run" / "model-00000010.safetensors")
    assert sorted(model) == ["count", "layer/w"]
    assert model["layer/w"].tobytes() == found["layer"]["w"].tobytes()
    assert model["layer/w"].shape == (2, 3)
    optimizer = load_file(tmp_path / "run" / "optimizer-00000010.safetensors")
    assert sorted(optimizer) == ["mean/count", "mean/layer/w", "square/count", "square/layer/w"]


def test_an_array_alone_has_a_name_too(tmp_path: Path) -> None:
    found, _ = fit(tmp_path / "run", lambda p, b: -np.ones(2), params=np.zeros(2))
    assert load_file(tmp_path / "run" / "model-00000010.safetensors")["params"].tolist() == found.tolist() == [10, 10]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_ones_are_kept(keep: int, tmp_path: Path) -> None:
    async def main() -> None:
        kept = ps.Checkpoint(str(tmp_path / "run"), updates=1, keep=keep)
        async with ps.ParameterServer(np.zeros(2), ps.SGD(lr=1, momentum=0.5), checkpoint=kept) as server:
            for version in range(7):
                await server.push(np.ones(2), version=version)

    asyncio.run(main())
    expected = [f"{kind}-{version:08}.safetensors" for kind in ("model", "optimizer") for version in range(8 - keep, 8)]
    assert names(tmp_path / "run") == ["checkpoint.db", *expected]


def test_adam_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def gradient(params: Any, batch: Any) -> Any:
        return np.sin(params + sum(batch))

    def stopping(params: Any, batch: Any) -> Any:
        if 30 in batch:
            raise Interrupted
        return gradient(params, batch)

    given = {"params": np.linspace(0, 1, 5), "optimizer": ps.Adam(0.1), "workers": 1, "epochs": 2}
    with pytest.raises(Interrupted):
        fit(tmp_path / "killed", stopping, **given)
    assert fit(tmp_path / "killed", gradient, **given)[0].tobytes() == fit(None, gradient, **given)[0].tobytes()


def test_what_was_pushed_is_saved(tmp_path: Path) -> None:
    async def main(expected: float) -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server:
            assert (await server.pull())[0].tolist() == [expected]
            server.push_sync(np.ones(1), version=0)
            assert server.pull_sync()[1] == server.version

    for expected in (0, -1, -2):
        asyncio.run(main(expected))


def test_scores_are_kept_and_a_stopped_training_stays_so(tmp_path: Path) -> None:
    given = {"epochs": 50, "evaluate": lambda p: float(p["count"].sum()), "stop": lambda scores: len(scores) == 3}
    _, report = fit(tmp_path / "run", workers=1, **given)
    assert (report.stopped, report.scores) == (True, (40.0, 80.0, 120.0))
    _, again = fit(tmp_path / "run", workers=1, **given)
    assert (again.stopped, again.scores, again.updates) == (True, report.scores, 0)


def test_an_evaluation_that_fails_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", evaluate=lambda p: 1 / 0)
    _, report = fit(tmp_path / "run", evaluate=lambda p: float(p["count"].sum()))
    assert (report.updates, report.scores) == (0, (40.0,))


def test_the_dead_are_kept_and_can_be_read(tmp_path: Path) -> None:
    flow = ps.Flow(range(40), name="samples", on_error="dead_letter").map(lambda x: 40 // (x - 7) * 0 + x).batch(3)
    found, report = fit(tmp_path / "run", flow=flow, epochs=2)
    assert report.dead == 2
    assert found["count"].tolist() == [2] * 7 + [0] + [2] * 32
    letters = ps.read.dead(str(tmp_path / "run" / "checkpoint.db"), table="samples").collect_sync()
    assert sorted((letter.item, letter.position) for letter in letters) == [(7, ("epoch 1", 7)), (7, ("epoch 2", 7))]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "optimizer", "words"),
    [
        (
            {"layer": {"w": np.zeros((2, 4), np.float32)}, "count": np.zeros(40)},
            ps.SGD(lr=1),
            r"'layer/w' is float32\[2, 3\] in it and float32\[2, 4\] in this server",
        ),
        ({"count": np.zeros(40)}, ps.SGD(lr=1), r"'layer/w' is float32\[2, 3\] in it and unknown in this server"),
        (
            {"layer": {"w": np.zeros((2, 3), np.float32)}, "count": np.zeros(40, np.float32)},
            ps.SGD(lr=1),
            r"'count' is float64\[40\] in it and float32\[40\] in this server",
        ),
        (None, ps.Adam(0.1), "'mean/count' is missing in it"),
    ],
)
def test_another_model_is_refused_with_the_difference(params: Any, optimizer: Any, words: str, tmp_path: Path) -> None:
    fit(tmp_path / "run")
    before = names(tmp_path / "run")
    with pytest.raises(CheckpointRejected, match=words):
        fit(tmp_path / "run", params=params, optimizer=optimizer)
    assert names(tmp_path / "run") == before
    assert fit(tmp_path / "run", optimizer=ps.SGD(lr=0.5))[1].updates == 0


@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    fit(tmp_path / "run")
    model = tmp_path / "run" / "model-00000010.safetensors"
    whole = model.read_bytes()
    if damage == "gone":
        model.unlink()
    else:
        model.write_bytes(whole[:100] if damage == "cut" else b"\xff" * len(whole))
    with pytest.raises(CheckpointRejected, match=r"model-00000010\.safetensors can't be read"):
        fit(tmp_path / "run")
    model.write_bytes(whole)
    assert fit(tmp_path / "run")[1].updates == 0


def test_two_servers_dont_share_a_checkpoint(tmp_path: Path) -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), checkpoint=str(tmp_path / "run")):
            with pytest.raises(OutputInUse):
                async with ps.ParameterServer(np.zeros(1), checkpoint=str(tmp_path / "run")):
                    raise AssertionError
        async with ps.ParameterServer(np.zeros(1), checkpoint=str(tmp_path / "run")):
            pass

    asyncio.run(main())


def test_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "model-00000003.safetensors.part").write_bytes(b"left by a crash")
    fit(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert not (tmp_path / "model-00000003.safetensors.part").exists()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(WriteFailed):
        fit(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": 3}, r"Checkpoint\(3\)"),
        ({"path": ""}, "Give the path"),
        ({"path": "run", "seconds": -1}, "seconds=-1"),
        ({"path": "run", "seconds": True}, "seconds=True"),
        ({"path": "run", "updates": 0}, "updates=0"),
        ({"path": "run", "keep": 0}, "keep=0"),
    ],
)
def test_odd_checkpoints_are_refused(given: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ps.Checkpoint(**given)


def test_what_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(PlanError, match="checkpoint=3"):
        ps.ParameterServer(np.zeros(1), checkpoint=3)  # type: ignore[arg-type]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files of more than so many bytes can't be written, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="the bound on files is told in another way")
def test_a_full_disk_ends_the_run_and_takes_back_what_isnt_saved(tmp_path: Path) -> None:
    size = 200_000

    async def main() -> None:
        def gradient(params: Any, batch: int) -> Any:
            return -np.ones(size)

        async with ps.ParameterServer(np.zeros(size), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server:
            await server.fit(gradient, ps.Flow(range(10), name="first"))
            with pytest.raises(WriteFailed), full_disk(size):
                await server.fit(gradient, ps.Flow(range(5), name="second"))
            found, version = await server.pull()
            assert (version, set(found)) == (10, {10.0})
            report = await server.fit(gradient, ps.Flow(range(5), name="second"))
            assert (report.updates, report.version) == (5, 15)
        assert [name for name in os.listdir(tmp_path / "run") if name.endswith(".part")] == []

    asyncio.run(main())


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions that are saved, as they are."""
    seen: list[int] = []
    save = Store.save

    def watched(store: Store, snapshot: Any, *args: Any) -> None:
        seen.append(snapshot.version)
        save(store, snapshot, *args)

    monkeypatch.setattr(Store, "save", watched)
    return seen


async def in_half_a_second(params: Any, batch: Any) -> Any:
    await asyncio.sleep(0.5)
    return -np.ones(1)


def test_checkpoints_come_by_the_second_or_after_so_many_updates(tmp_path: Path, saved: list[int]) -> None:
    async def main(**kept: Any) -> None:
        checkpoint = ps.Checkpoint(str(tmp_path / str(kept)), **kept)
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), checkpoint=checkpoint) as server:
            await server.fit(in_half_a_second, ps.Flow(range(100)), workers=1)

    run_virtual(main(seconds=10))
    assert saved[0] == 0
    assert saved[-1] == 100
    assert 5 <= len(saved) <= 7
    saved.clear()
    run_virtual(main(seconds=1000, updates=25))
    assert saved == [0, 25, 50, 75, 100, 100]  # the last one says that it is the end


def test_events_that_come_one_by_one_are_no_reason_for_a_checkpoint_each(tmp_path: Path, saved: list[int]) -> None:
    """Each of them finds all workers idle."""

    async def main() -> None:
        async with (
            ps.EventLog(tmp_path / "events.db") as log,
            ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server,
        ):

            async def fill() -> None:
                for number in range(50):
                    await log.topic("t").publish(number)
                    await asyncio.sleep(0.02)

            flow = log.topic("t").flow("g")
            report = await server.fit(lambda p, b: -np.ones(1), flow, workers=1, until=asyncio.create_task(fill()))
            assert report.version == 50

    run_virtual(main())
    assert saved[-1] == 50
    assert len(saved) < 30


def failing_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise WriteFailed("run", "no space left")

    monkeypatch.setattr(Store, "_write", refuses)


def test_what_was_taken_back_is_no_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that saved nothing is taken back; ``fresh`` then begins with what the server was made with."""

    async def main() -> None:
        async with ps.ParameterServer(np.full(1, 5.0), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server:
            with monkeypatch.context() as patched, pytest.raises(WriteFailed):
                failing_to_save(patched)
                await server.fit(lambda p, b: -np.ones(1), ps.Flow(range(7)))
            assert (await server.pull()) == (np.array([5.0]), 0)
            await server.fit(lambda p, b: -np.ones(1), ps.Flow(range(7)), fresh=True)
            assert (await server.pull()) == (np.array([12.0]), 7)
            with monkeypatch.context() as patched, pytest.raises(WriteFailed):
                failing_to_save(patched)
                await server.fit(lambda p, b: -np.ones(1), ps.Flow(range(3), name="more"))
            with pytest.raises(PlanError, match="has applied 7 updates"):
                await server.fit(lambda p, b: -np.ones(1), ps.Flow(range(3)), fresh=True)
            assert (await server.pull()) == (np.array([12.0]), 7)

    asyncio.run(main())


def test_what_cant_be_taken_back_isnt_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights hold more than the progress says, and the checkpoint can't be read: nothing makes them count."""

    def unreadable(*_: Any) -> Any:
        raise CheckpointRejected("run", "can't be read", "Restore it")

    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server:
            with monkeypatch.context() as patched, pytest.raises(WriteFailed):
                failing_to_save(patched)
                patched.setattr(Store, "_read", unreadable)
                await server.fit(lambda p, b: -np.ones(1), ps.Flow(range(7)))
            await server.push(np.zeros(1), version=0)
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), checkpoint=str(tmp_path / "run")) as server:
            assert (await server.pull()) == (np.zeros(1), 0)
            await server.fit(lambda p, b: -np.ones(1), ps.Flow(range(7)))
            assert (await server.pull()) == (np.array([7.0]), 7)

    asyncio.run(main())
