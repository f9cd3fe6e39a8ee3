"""Redis and NATS servers on loopback, their data in a temporary directory: what the event log stands beside."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness import HERE, NotRun

__all__ = ["SERVERS", "folder", "serving", "versions"]

_MISSING = "{} isn't installed: apt install redis-server nats-server (Debian), brew install redis nats-server (macOS)"

_REDIS = ("redis-server", "--bind", "127.0.0.1", "--port", "{port}", "--dir", "{data}", "--save", "", "--loglevel",
          "warning", "--appendonly")  # fmt: skip
SERVERS = {
    "Redis, fsync always": (*_REDIS, "yes", "--appendfsync", "always"),
    "Redis, AOF off": (*_REDIS, "no"),
    "NATS JetStream": (
        "nats-server",
        "--addr",
        "127.0.0.1",
        "--port",
        "{port}",
        "--jetstream",
        "--store_dir",
        "{data}",
    ),
}
"""How each is started. Redis has no AOF by default; NATS leaves fsync to a timer of two minutes."""


def folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory on a disk, which /tmp need not be."""
    return tempfile.TemporaryDirectory(dir=HERE, ignore_cleanup_errors=True)


def versions() -> str:
    """What the servers that are installed say of themselves."""
    programs = dict.fromkeys(command[0] for command in SERVERS.values())
    found = [path for path in map(_found, programs) if path is not None]
    said = [subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout for path in found]
    return "; ".join(re.sub(r" (?:v=|v(?=\d)|sha=.*)|:", " ", line).strip().replace("  ", " ") for line in said)


@contextmanager
def serving() -> Iterator[dict[str, int | NotRun]]:
    """Start all of ``SERVERS``; gives the port of each, or why there is none."""
    with ExitStack() as stack:
        yield {name: _started(stack, command) for name, command in SERVERS.items()}


def _found(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")


def _started(stack: ExitStack, command: tuple[str, ...]) -> int | NotRun:
    program = _found(command[0])
    if program is None:
        return NotRun(_MISSING.format(command[0]))
    data = stack.enter_context(folder())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    arguments = [part.format(port=port, data=data) for part in command[1:]]
    said = Path(data, "server.log")
    with said.open("wb") as output:
        server = subprocess.Popen([program, *arguments], stdout=output, stderr=output, cwd=data)
    stack.callback(_stop, server)
    for _ in range(250):
        if server.poll() is not None:
            lines = said.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            return NotRun(f"{command[0]} ended at once: {lines[-1][:150]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return port
        time.sleep(0.02)
    return NotRun(f"{command[0]} did not begin to listen")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
