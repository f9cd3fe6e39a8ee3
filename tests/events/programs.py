"""Programs that use a log from processes of their own, and how tests run them.

Each is called as ``programs.py NAME events.db ARGUMENT…``; it says what happens in lines on its standard output.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import penstock as ps


def say(*words: Any) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def publish(log: ps.EventLog, start: str, keys: str) -> None:
    """Publishes numbers one after the other from ``start`` on, and says each when it is acknowledged."""
    topic = log.topic("t")
    number = int(start)
    say("ready")
    while True:
        await topic.publish(number, key=f"k{number % int(keys)}")
        say(number)
        number += 1


async def publish_together(log: ps.EventLog, start: str, keys: str) -> None:
    """The same, by a hundred publishers at once."""
    topic = log.topic("t")
    numbers = iter(range(int(start), 1 << 40))
    say("ready")

    async def one() -> None:
        for number in numbers:
            await topic.publish(number, key=f"k{number % int(keys)}", id=str(number))
            say(number)

    await asyncio.gather(*(one() for _ in range(100)))


async def consume(log: ps.EventLog, lease: str, attempts: str) -> None:
    """Handles events and says so, before and after; ends its process at a negative one."""
    async with log.topic("t").subscribe("g", lease=float(lease), max_attempts=int(attempts)) as deliveries:
        say("ready")
        async for delivery in deliveries:
            async with delivery as value:
                say("begin", value, delivery.attempt)
                if value < 0:
                    os._exit(3)
                await asyncio.sleep(0)
            say("end", value)


async def hold(log: ps.EventLog, lease: str) -> None:
    """Takes one event, waits for a line on its standard input, and then acknowledges."""
    async with log.topic("t").subscribe("g", lease=float(lease)) as deliveries:
        delivery = await anext(deliveries)
        say("holds", delivery.value)
        await asyncio.to_thread(sys.stdin.readline)
        try:
            await delivery.ack()
        except ps.errors.LeaseLost:
            say("lost")
        else:
            say("acknowledged")


async def wait(log: ps.EventLog) -> None:
    """Says each event as soon as it comes."""
    say("ready")
    async for event in log.topic("t").read(follow=True):
        say(event.value)


class Program:
    """One of these under way."""

    def __init__(self, name: str, path: Path, *arguments: Any, output: Any = subprocess.PIPE) -> None:
        command = [sys.executable, "-W", "error", __file__, name, str(path), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=output, stdin=subprocess.PIPE, text=True)

    def line(self) -> str:
        """The next line that it says; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def lines(self) -> list[str]:
        """All further lines, to its end. The last may have been cut."""
        assert self.process.stdout is not None
        return self.process.stdout.read().splitlines()

    def wait_for(self, words: str) -> str:
        while line := self.line():
            if line.startswith(words):
                return line
        raise AssertionError(f"it ended without saying {words!r}")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """Kill it and wait for its end."""
        self.kill()
        self.process.communicate()

    def end(self) -> int:
        return self.process.wait(60)


@contextmanager
def program(name: str, path: Path, *arguments: Any) -> Iterator[Program]:
    started = Program(name, path, *arguments)
    try:
        yield started
    finally:
        started.stop()


async def main(name: str, path: str, *arguments: str) -> None:
    async with ps.EventLog(path) as log:
        await globals()[name](log, *arguments)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
