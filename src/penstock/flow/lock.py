"""The lock that keeps an output to one job: a ``flock`` on a file beside the output, held for the job's life.

The lock has a file of its own because the output can't carry it: on some systems ``flock`` collides with the locks
SQLite takes on a database, and an output may be a directory. The file is removed with the lock; one that is left
after a crash is empty, holds nobody up, and goes with the next job.
"""

from __future__ import annotations

import os

from penstock.errors import OutputInUse, PlanError

__all__ = ["OutputLock"]


class OutputLock:
    """Takes ``<output>.lock`` without waiting. Raises OutputInUse while another job holds it, in any process."""

    def __init__(self, output: str) -> None:
        try:
            import fcntl
        except ImportError:
            raise PlanError(
                f"{output} can't be kept to one job here: this system has no flock", "Write to a function instead"
            ) from None
        self.path = f"{output}.lock"
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                raise OutputInUse(output) from None
            if self._is_current(self._descriptor):
                return
            os.close(self._descriptor)  # its last holder removed the file in between: what was locked is no lock

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the output up; safe to call twice."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if self._is_current(descriptor):
                os.unlink(self.path)
        finally:
            os.close(descriptor)
