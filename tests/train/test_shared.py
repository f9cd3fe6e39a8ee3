"""Other processes: they pull and push through shared memory, and whatever becomes of them, nothing is torn or lost."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock as ps
from penstock.errors import Closed, PlanError
from penstock.train.handle import Handle
from penstock.train.slot import HELLO, MESSAGE, PUSH, Slot

pytestmark = pytest.mark.usefixtures("unmeasured")

READS = 4000


def address(server: ps.ParameterServer) -> str:
    found: str = server.__reduce__()[1][0]
    return found


def test_a_server_can_be_taken_into_the_processes_of_another_flow() -> None:
    async def main() -> None:
        params = {"w": np.zeros(1000, np.float32), "b": {"c": np.zeros((3, 1))}}
        async with ps.ParameterServer(params, ps.SGD(lr=1), place="shared") as server:

            def learn(number: int) -> int:
                found, version = server.pull_sync()
                assert found["w"].shape == (1000,)
                return server.push_sync(
                    {"w": -np.ones(1000, np.float32), "b": {"c": found["b"]["c"] * 0 - number}}, version=version
                )

            async def look(number: int) -> tuple[int, float]:
                found, version = await server.pull()
                assert set(found["w"]) == {float(version)}
                return version, float(found["b"]["c"][0, 0])

            flow = ps.Flow(range(100)).map(learn, place="process", workers=3).map(look, place="process", workers=2)
            seen = await flow.collect()
            assert max(seen) == (100, sum(range(100)))
            found, version = await server.pull()
            assert version == server.version == 100
            assert found["b"]["c"].tolist() == [[sum(range(100))]] * 3

    asyncio.run(main())


def test_the_weights_of_a_running_training_can_be_pulled_elsewhere() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(3), ps.SGD(lr=1), place="shared") as server:
            scoring = ps.Flow(range(200)).map(lambda _: server.pull_sync(), place="process", workers=1)
            training = asyncio.ensure_future(server.fit(lambda p, b: -np.ones(3), ps.Flow(range(200)), workers=2))
            for params, version in await scoring.collect():
                assert params.tolist() == [version] * 3
            assert (await training).version == 200

    asyncio.run(main())


@pytest.mark.parametrize("reads", [READS, pytest.param(1_000_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("place", ["local", "shared"])
def test_a_pull_is_never_torn(reads: int, place: Any) -> None:
    """A writer that adds one everywhere, and readers in processes (or threads): no two elements ever differ."""
    size = 1024

    async def main() -> None:
        async with ps.ParameterServer({"a": np.zeros(size), "b": np.zeros(size)}, ps.SGD(lr=1), place=place) as server:
            over = threading.Event()

            def write() -> None:
                ones = {"a": -np.ones(size), "b": -np.ones(size)}
                while not over.is_set():
                    server.push_sync(ones, version=0)

            def read(count: int) -> int:
                for _ in range(count):
                    params, version = server.pull_sync()
                    assert (params["a"] == version).all()
                    assert (params["b"] == version).all()
                return count

            writer = threading.Thread(target=write)
            writer.start()
            try:
                where = "process" if place == "shared" else "thread"
                flow = ps.Flow([reads // 100] * 100).map(read, place=where, workers=3)  # type: ignore[arg-type]
                assert sum(await flow.collect()) == reads
            finally:
                over.set()
                writer.join()
            assert server.version > 0

    asyncio.run(main())


def test_a_push_counts_as_a_whole_or_not_at_all_when_its_process_is_killed(tmp_path: Path) -> None:
    """Each attempt is killed somewhere in its push; what was published is applied once, and what wasn't isn't."""
    size = 200_000

    async def main() -> None:
        async with ps.ParameterServer(np.zeros(size), ps.SGD(lr=1), place="shared") as server:

            def push(number: int) -> int:
                mark = tmp_path / str(number)
                if not mark.exists():
                    mark.touch()
                    server.pull_sync()  # connects
                    killer = threading.Timer(number * 0.0002, lambda: os.kill(os.getpid(), signal.SIGKILL))
                    killer.start()
                    while True:
                        server.push_sync(-np.ones(size), version=0)
                return number

            kills = 8
            assert len(await ps.Flow(range(kills)).map(push, place="process", workers=1, retry=3).collect()) == kills
            params, version = await server.pull()
            assert set(params) == {float(version)}

    asyncio.run(main())


def test_a_local_server_stays_where_it_is() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1)) as server:
            with pytest.raises(PlanError, match='Make it with place="shared"'):
                pickle.dumps(server)

    asyncio.run(main())
    with pytest.raises(PlanError, match="place='elsewhere'"):
        ps.ParameterServer(np.zeros(1), place="elsewhere")  # type: ignore[arg-type]


def test_a_closed_server_says_so_to_other_processes() -> None:
    server = ps.ParameterServer(np.zeros(1), place="shared")
    with pytest.raises(Closed):
        pickle.dumps(server)

    async def main() -> tuple[Any, Any]:
        async with server:
            used, unused = (Handle(address(server), server._weights.layout) for _ in range(2))
            assert (await used.pull())[1] == 0
            return used, unused

    for handle in asyncio.run(main()):
        with pytest.raises(Closed):
            handle.pull_sync()


def test_pushes_are_refused_where_they_need_tickets() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), consistency=ps.BSP(), place="shared") as server:
            handle = pickle.loads(pickle.dumps(server))
            with pytest.raises(PlanError, match="rounds are of gradients that fit"):
                await handle.push(np.ones(1), version=0)
            assert (await handle.pull())[1] == 0
            assert "in another process" in repr(handle)

    asyncio.run(main())


@pytest.mark.parametrize("said", [MESSAGE.pack(b"?", 0), MESSAGE.pack(PUSH, 0)[:4], b""])
def test_who_breaks_the_protocol_is_left_and_nobody_else_notices(said: bytes) -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), ps.SGD(lr=1), place="shared") as server:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.connect(address(server))
                first, descriptors, _, _ = socket.recv_fds(stranger, MESSAGE.size, 1)
                assert MESSAGE.unpack(first) == (HELLO, 0)
                os.close(descriptors[0])
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
            handle = pickle.loads(pickle.dumps(server))
            assert await handle.push(np.ones(1), version=0) == 1

    asyncio.run(main())


def test_there_is_one_handle_for_each_server_in_a_process() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), place="shared") as server:
            first, second = (pickle.loads(pickle.dumps(server)) for _ in range(2))
            assert first is second is pickle.loads(pickle.dumps(first))

    asyncio.run(main())


def test_nothing_is_left_open() -> None:
    async def main() -> None:
        async with ps.ParameterServer(np.zeros(1), place="shared") as server:
            await pickle.loads(pickle.dumps(server)).pull()

    def count() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    asyncio.run(main())
    before = count()
    threads = threading.active_count()
    for _ in range(5):
        asyncio.run(main())
    assert count() <= before + 1
    assert threading.active_count() <= threads


def test_a_push_that_is_interrupted_before_it_asks_is_applied_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights or gradients that come after it must not be taken for what was published, nor stand in its place."""

    async def main() -> None:
        async with ps.ParameterServer(np.full(4, 10.0), ps.SGD(lr=0.5), place="shared") as server:
            handle = pickle.loads(pickle.dumps(server))
            _, version = handle.pull_sync()

            publish = Slot.publish

            def interrupted(*given: Any) -> None:
                publish(*given)
                raise KeyboardInterrupt

            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Slot, "publish", interrupted)
                handle.push_sync(np.ones(4), version=version)
            handle.pull_sync()
            handle.push_sync(np.ones(4), version=version)
        async with server:
            assert (await server.pull())[0].tolist() == [9] * 4
            assert server.version == 2

    asyncio.run(main())
