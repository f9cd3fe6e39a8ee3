"""What makes bytes stay: writing whole buffers, syncing files and directories, errors that name the file."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.errors import PenstockError, WriteFailed

__all__ = ["make_directory", "put_in_place", "sync_directory", "sync_file", "write_whole", "writing"]


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Raise WriteFailed, which names ``path``, for whatever the system refuses: a full disk, no permission."""
    try:
        yield
    except PenstockError:  # some of them are OSErrors
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, path) else ""
        raise WriteFailed(path, f"{error.strerror or error}{where}") from error


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of ``data``: a single write may stop short of a full disk without an error."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_file(descriptor: int) -> None:
    """Return when the file's data is on the disk itself."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync there leaves the data in the drive's cache
    else:
        os.fdatasync(descriptor)


def put_in_place(part: str, path: str) -> None:
    """Rename a finished file to ``path``, when its data is on the disk. (The name itself isn't yet.)"""
    descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, path)


def sync_directory(path: str) -> None:
    """Return when the names in a directory (new files, renames) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: str) -> None:
    """Make a directory and those above it, so that they are still there after a power cut."""
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    above = os.path.dirname(path)
    make_directory(above)
    os.makedirs(path, exist_ok=True)
    sync_directory(above)
