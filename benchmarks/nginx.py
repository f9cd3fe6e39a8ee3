"""One nginx worker on loopback that serves files of given sizes: what clients are measured against."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MISSING", "missing", "serving"]

MISSING = "{0} isn't installed: apt-get install {0} (Debian), brew install {0} (macOS)"

_CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 100000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {folder}/files; default_type application/octet-stream; }}
}}
"""


def missing(program: str) -> str | None:
    """Why a program can't be used; None if it is there."""
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    return None if found else MISSING.format(program)


@contextmanager
def serving(sizes: dict[str, int]) -> Iterator[str]:
    """Serve a file of each name and size (of bytes that don't compress); gives the URL of their folder."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SystemExit(MISSING.format("nginx"))
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "files")
        files.mkdir()
        for name, size in sizes.items():
            (files / name).write_bytes(os.urandom(size))
        os.chmod(folder, 0o755)  # the worker may run as somebody else
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = Path(folder, "nginx.conf")
        config.write_text(_CONFIG.format(folder=folder, port=port))
        server = subprocess.Popen([program, "-c", str(config), "-e", f"{folder}/error.log"])
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if server.poll() is not None:
            raise SystemExit(f"nginx ended at once, with code {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit("nginx did not begin to listen")
