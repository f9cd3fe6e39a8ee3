"""A web server on loopback that gives out the .py files of the Python installation it runs on.

``/index.json`` names the files: those to be read, in a seeded order and up to so many bytes, and some that are held
out, by which is measured how well the others were learned from.
"""

from __future__ import annotations

import json
import random
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LIBRARY = Path(sysconfig.get_path("stdlib"))
OMITTED = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 20


def chosen(megabytes: float) -> dict[str, list[str]]:
    """The names of the files: ``{"read": […], "held_out": […]}``."""
    paths = sorted(path for path in LIBRARY.rglob("*.py") if not OMITTED & set(path.relative_to(LIBRARY).parts))
    paths = [path for path in paths if path.stat().st_size]
    random.Random(0).shuffle(paths)
    held_out, rest = paths[:HELD_OUT], iter(paths[HELD_OUT:])
    read, size = [], 0.0
    while size < megabytes * 1e6 and (path := next(rest, None)) is not None:
        read.append(path)
        size += path.stat().st_size
    return {
        name: [str(path.relative_to(LIBRARY)) for path in some]
        for name, some in (("read", read), ("held_out", held_out))
    }


class Handler(SimpleHTTPRequestHandler):
    """Answers with files, and with the index."""

    def __init__(self, *args: Any, index: bytes, **kwargs: Any) -> None:
        self.index = index
        super().__init__(*args, directory=str(LIBRARY), **kwargs)

    def do_GET(self) -> None:
        if self.path != "/index.json":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.index)))
        self.end_headers()
        self.wfile.write(self.index)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(megabytes: float) -> Iterator[str]:
    """The address of a server, which runs in a thread of this process."""
    index = json.dumps(chosen(megabytes)).encode()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, index=index)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
