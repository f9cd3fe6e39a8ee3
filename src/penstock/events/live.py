"""Which processes have a log open, who of them may write now, and how they wake each other.

Beside ``events.db`` stands a directory ``events.db-live``. In it: ``lock``, held (``flock``) during each write; and for
each open log a *session*: a file that it keeps locked for as long as it lives, which the system unlocks when the
process ends, however that is, and a named pipe, its *bell*. After a commit, the writer puts a byte into the pipes of
the others. A session opens its pipe when it has somebody to wake; to ring where nobody listens fails at once.

No ring is lost: whoever waits first empties the bell, then looks, then waits. A writer that is killed between its
commit and the ringing is the exception: for it, whoever waits looks at the file once a second (see ``watch``).
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress

from penstock.errors import LogError

__all__ = ["Presence"]

_BELL = ".bell"


class Presence:
    """The session of one open log: created by ``enter``, ended by ``leave``. Methods may be called from any thread."""

    def __init__(self, path: str) -> None:
        self.directory = f"{path}-live"
        self.name = secrets.token_hex(8)
        self._path = path
        self._lock = self._mine = self.bell = -1
        self._is_first = False

    def enter(self) -> None:
        """Create the session. Raises LogError where the directory can't be written to."""
        try:
            with suppress(FileExistsError):
                os.mkdir(self.directory)
                self._is_first = True
            self._lock = os.open(f"{self.directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            entering = f"{self.directory}/{self.name}.entering"  # until it is locked, it would look like a dead one's
            self._mine = os.open(entering, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            fcntl.flock(self._mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(entering, f"{self.directory}/{self.name}")
            os.mkfifo(f"{self.directory}/{self.name}{_BELL}", 0o666)
            # For writing too, so that it never reads as ended.
            self.bell = os.open(f"{self.directory}/{self.name}{_BELL}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.leave()
            raise LogError(
                self._path, f"{self.directory} can't be used: {error}", "Give a path on a local disk"
            ) from error

    def leave(self, *, trace: bool = True) -> None:
        """End the session. Safe to call twice. ``trace``: False where it was no log, so that nobody else has joined: if
        the directory was created for this session, it goes too."""
        for name in (f"{self.name}{_BELL}", self.name):
            with suppress(OSError):
                os.unlink(f"{self.directory}/{name}")
        for descriptor in (self.bell, self._mine, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._mine = self.bell = -1
        if self._is_first and not trace:
            with suppress(OSError):
                os.unlink(f"{self.directory}/lock")
                os.rmdir(self.directory)

    def lock(self) -> None:
        """Wait until nobody else writes."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def unlock(self) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except OSError:
            return []

    def ring(self) -> None:
        """Wake all others that wait."""
        for name in self._names():
            if name.endswith(_BELL) and not name.startswith(self.name):
                with suppress(OSError):  # nobody listens, or the bell is full and so rings already
                    pipe = os.open(f"{self.directory}/{name}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    try:
                        os.write(pipe, b"!")
                    finally:
                        os.close(pipe)

    def empty(self) -> bool:
        """Take what was rung so far; whether there was any."""
        rung = False
        with suppress(OSError):  # there is nothing, or the session has ended
            while os.read(self.bell, 4096):
                rung = True
        return rung

    def is_alive(self, session: str) -> bool:
        """Whether the process of a session still lives. What a dead one left in the directory is removed."""
        if session == self.name:
            return True
        path = f"{self.directory}/{session}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # not to be told: its lease says when it has gone
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        for name in (f"{path}{_BELL}", path):
            with suppress(OSError):
                os.unlink(name)
        return False

    def has_lost_somebody(self) -> bool:
        """Whether another process that had the log open has ended without leaving."""
        sessions = [name for name in self._names() if "." not in name and name != "lock"]
        return sum(not self.is_alive(name) for name in sessions) > 0  # all of them are looked at
