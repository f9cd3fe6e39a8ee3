from __future__ import annotations

import asyncio
import gc
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator

import pytest

import penstock as ps
from penstock.errors import Deadlock
from penstock.flow.blocking import Desk
from penstock.testing import run_virtual


def now() -> float:
    return asyncio.get_running_loop().time()


def test_sleeps_timeouts_and_timers_follow_the_virtual_clock_in_no_time() -> None:
    log: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        log.append((name, now()))

    async def main() -> str:
        assert now() == 0.0
        asyncio.get_running_loop().call_later(5, lambda: log.append(("timer", now())))
        await asyncio.gather(sleeper("long", 86_400 * 30), sleeper("short", 0.25), sleeper("same", 0.25))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        log.append(("timeout", now()))
        return "done"

    began = time.monotonic()
    assert run_virtual(main()) == "done"
    assert time.monotonic() - began < 30
    month = 86_400 * 30
    assert log == [("short", 0.25), ("same", 0.25), ("timer", 5.0), ("long", month), ("timeout", month + 3600)]


def test_work_in_threads_holds_the_clock() -> None:
    """A jump would let the timeouts pass first: the threads wait until the loop has had the chance to jump."""
    go = threading.Event()

    async def main() -> None:
        desk = Desk("clerk")
        async with asyncio.timeout(20):
            waiting = asyncio.create_task(asyncio.to_thread(go.wait, 10))
            asking = asyncio.create_task(desk.call(go.wait, 10))
            asyncio.get_running_loop().call_later(0.01, go.set)  # really: both are at work
            assert await waiting
            assert await asking
        assert now() < 20
        await desk.close()
        await asyncio.sleep(1000)

    run_virtual(main())


def test_sockets_within_the_process_work() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        await asyncio.sleep(60)
        writer.write(line.upper())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def main() -> bytes:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            async with asyncio.timeout(61):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"hello\n")
                got = await reader.readline()
            writer.close()
            await writer.wait_closed()
        assert 60 <= now() < 61
        return got

    assert run_virtual(main()) == b"HELLO\n"


def test_a_descriptor_without_a_timer_is_waited_for() -> None:
    async def main() -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            threading.Timer(0.02, theirs.send, [b"late"]).start()
            return await asyncio.get_running_loop().sock_recv(ours, 10)

    assert run_virtual(main()) == b"late"


def test_an_answer_from_elsewhere_is_waited_for_before_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.testing.clock.PATIENCE", 10)

    def answer(there: socket.socket) -> None:
        there.sendall(there.recv(10).upper())

    async def main() -> bytes:
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            thread = threading.Thread(target=answer, args=(there,))
            thread.start()
            async with asyncio.timeout(60):
                await asyncio.get_running_loop().sock_sendall(here, b"hello")
                got = await asyncio.get_running_loop().sock_recv(here, 10)
            thread.join()
            return got

    assert run_virtual(main()) == b"HELLO"


def test_processes_hold_the_clock() -> None:
    async def main() -> tuple[bytes, int | None]:
        async with asyncio.timeout(30):
            silent = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass")
            code = await silent.wait()
            shell = await asyncio.create_subprocess_shell("echo done", stdout=asyncio.subprocess.PIPE)
            out, _ = await shell.communicate()
        return out, code

    assert run_virtual(main()) == (b"done\n", 0)


def test_what_can_never_go_on_is_an_error_that_names_the_tasks() -> None:
    states: list[str] = []

    async def consumer() -> None:
        try:
            await asyncio.Queue[int]().get()
        finally:
            states.append("cancelled")

    async def main() -> None:
        await asyncio.gather(asyncio.create_task(consumer(), name="consumer"))

    with pytest.raises(Deadlock) as caught:
        run_virtual(main())
    assert states == ["cancelled"]
    assert len(caught.value.tasks) == 2
    assert any(task.startswith("consumer in ") for task in caught.value.tasks)
    assert "consumer in " in str(caught.value)


def test_the_result_is_raised_as_itself_and_everything_is_closed() -> None:
    before = threading.active_count()

    closed: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(5)
            closed.append("generator")

    async def background() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            await asyncio.sleep(5)
            closed.append("task")

    async def main() -> None:
        asyncio.create_task(background())  # noqa: RUF006  # left behind on purpose
        stream = numbers()
        assert await anext(stream) == 1
        await asyncio.to_thread(int)
        raise LookupError("lost")

    with pytest.raises(LookupError, match="lost"):
        run_virtual(main())
    assert sorted(closed) == ["generator", "task"]
    assert threading.active_count() == before
    gc.collect()  # an unclosed socket or loop would warn here
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_a_sleep_for_ever_is_a_deadlock() -> None:
    with pytest.raises(Deadlock):
        run_virtual(asyncio.sleep(float("inf")))


@pytest.mark.parametrize("progress", [None, False])
def test_a_run_that_is_stuck_is_a_deadlock_though_somebody_looks_on(progress: bool | None) -> None:
    async def work(x: int) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="work"):
        run_virtual(ps.Flow(range(3)).map(work).to(lambda x: None).run(progress=progress))
