"""The checkpoint on the disk: files of weights, and a database that says which count, with the progress of each fit.

*One act.* A checkpoint is written to files of its own, under other names; these are made durable, renamed, and the
renaming is made durable. Then one transaction of the database makes them count, together with everything that a fit
has settled by then: positions, dead letters, states. So whatever happens in between, the weights that count hold the
gradients of exactly the samples that count. Files that the database doesn't name are removed when it is opened, and
those of older checkpoints after the transaction that outdates them.

*Who may.* One server at a time, by a lock beside the database. Its disk thread calls everything here.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from penstock.errors import CheckpointRejected, MissingDependency
from penstock.flow.contract import JobId
from penstock.flow.database import Tables, connect, reported
from penstock.flow.disk import make_directory, put_in_place, sync_directory, writing
from penstock.flow.journal import Journal, letters_identity
from penstock.flow.letters import tables_in, tables_prefix
from penstock.flow.lock import OutputLock
from penstock.train.checkpoint import Checkpoint
from penstock.train.kernels import Array
from penstock.train.weights import Snapshot, Weights

__all__ = ["Store"]

_DATABASE = "checkpoint.db"
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS checkpoints"
    "(version INTEGER PRIMARY KEY, model TEXT, optimizer TEXT, description TEXT, time REAL)"
)
_OURS = re.compile(r"(model|optimizer)-\d{8,}\.safetensors(\.part)?")
_ONLY = "params"  # the name of a parameter that is all there is
_PARAMETER = "parameter"
_ELSEWHERE = "Give another checkpoint=, or move this one away"


class Store:
    """The checkpoint of one server, opened with ``open``; the weights come from ``weights`` and go there."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights) -> None:
        self.checkpoint = checkpoint
        self.directory = os.path.realpath(checkpoint.path)
        self.database = os.path.join(self.directory, _DATABASE)
        self.names = tuple(name or _ONLY for name in weights.layout.names)
        self._weights = weights
        self._lock: OutputLock | None = None
        self._connection: Any = None
        self._saved = -1

    @property
    def saved(self) -> int:
        """The version that was saved last; -1 while the weights in memory aren't known to belong to any progress."""
        return self._saved

    def open(self) -> None:
        """Take the directory, and go on from the checkpoint in it, if there is one.

        Raises OutputInUse, CheckpointRejected for weights of other shapes, WriteFailed, MissingDependency.
        """
        _safetensors()
        try:
            with writing(self.directory):
                make_directory(self.directory)
                self._lock = OutputLock(self.database)
                self._connection = connect(self.database)
                with reported(self.database):
                    self._connection.execute(_SCHEMA)
                self._remove_stray()
                if not self.load():
                    self.save(self._weights.snapshot())
        except BaseException:
            self.close()
            raise

    def load(self) -> bool:
        """Have the weights of the last checkpoint restored; False if there is none."""
        self._saved = -1
        with reported(self.database, "read"):
            row = self._connection.execute(
                "SELECT version, model, optimizer FROM checkpoints ORDER BY version DESC LIMIT 1"
            ).fetchone()
        if row is None:
            return False
        version, model, optimizer = row
        layout = self._weights.layout
        wanted = dict(zip(self.names, zip(layout.shapes, layout.kinds, strict=True), strict=True))
        found = self._read(model, wanted, _PARAMETER)
        slots = self._weights.optimizer.slots
        remembered = {f"{slot}/{name}": wanted[name] for slot in slots for name in self.names}
        states = self._read(optimizer, remembered, "optimizer's array") if optimizer or remembered else {}
        self._weights.restore(
            Snapshot(
                [found[name] for name in self.names],
                [[states[f"{slot}/{name}"] for name in self.names] for slot in slots],
                version,
            )
        )
        self._saved = version
        return True

    def save(self, snapshot: Snapshot, settle: Callable[[], None] | None = None) -> None:
        """Write a checkpoint, and make it count together with what ``settle`` writes to the database.

        Raises WriteFailed; then the checkpoint before this one counts.
        """
        model = optimizer = None
        version = snapshot.version
        if version > self._saved:
            layout = self._weights.layout
            shaped = [
                {
                    name: vector.reshape(shape)
                    for name, vector, shape in zip(self.names, one, layout.shapes, strict=True)
                }
                for one in (snapshot.weights, *snapshot.states)
            ]
            with writing(self.directory):
                model = self._write("model", version, shaped[0])
                slots = zip(self._weights.optimizer.slots, shaped[1:], strict=True)
                arrays = {f"{slot}/{name}": array for slot, state in slots for name, array in state.items()}
                optimizer = self._write("optimizer", version, arrays) if arrays else None
                sync_directory(self.directory)
        with reported(self.database), self._connection:
            if settle is not None:
                settle()
            if model is not None:
                self._connection.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)",
                    (version, model, optimizer, self._weights.optimizer.describe(), time.time()),
                )
                self._connection.execute(
                    "DELETE FROM checkpoints WHERE version NOT IN "
                    "(SELECT version FROM checkpoints ORDER BY version DESC LIMIT ?)",
                    (self.checkpoint.keep,),
                )
        if model is not None:
            self._saved = version
            self._remove_stray()

    def reset(self) -> None:
        """Forget everything, and begin with the parameters that the server was made with. Raises PlanError, if there
        were updates since."""
        self._weights.reset()
        with reported(self.database), self._connection:
            for job in tables_in(self.database):
                Tables(tables_prefix(job)).drop(self._connection)
            self._connection.execute("DELETE FROM checkpoints")
        self._saved = -1
        self._remove_stray()
        self.save(self._weights.snapshot())

    def journal(self, job: JobId) -> Journal:
        """The journal of this job, in tables of its own; its transactions are those of ``save``."""
        return Journal(
            self.database,
            output=self.checkpoint.path,
            letters=letters_identity(self.database, job.name),
            prefix=tables_prefix(job.name),
            lent=self._connection,
        )

    def close(self) -> None:
        """Give the directory back. Safe to call twice."""
        connection, self._connection = self._connection, None
        lock, self._lock = self._lock, None
        try:
            if connection is not None:
                with reported(self.database):
                    connection.close()
        finally:
            if lock is not None:
                lock.release()

    def _write(self, kind: str, version: int, arrays: dict[str, Array]) -> str:
        """One file, on the disk under its own name on return (the name itself isn't yet)."""
        name = f"{kind}-{version:08}.safetensors"
        path = os.path.join(self.directory, name)
        told = {"version": str(version), "optimizer": self._weights.optimizer.describe()}
        try:
            _safetensors().save_file(arrays, f"{path}.part", metadata=told)
        except Exception as error:
            if isinstance(error, OSError):
                raise
            raise OSError(None, str(error), path) from error  # the library has an error of its own for a full disk
        put_in_place(f"{path}.part", path)
        return name

    def _read(self, name: str | None, wanted: dict[str, tuple[tuple[int, ...], Any]], kind: str) -> dict[str, Array]:
        """The vectors of one file. Raises CheckpointRejected if they aren't those that are wanted."""
        path = os.path.join(self.directory, name or "")
        try:
            found = _safetensors().load_file(path) if name else {}
        except Exception as error:
            remedy = "Restore it from a copy, or move the directory away to start over"
            raise CheckpointRejected(path, f"can't be read: {error}", remedy) from error
        differences = []
        for key in sorted({*found, *wanted}):
            here = f"{found[key].dtype}{list(found[key].shape)}" if key in found else "missing"
            there = f"{wanted[key][1]}{list(wanted[key][0])}" if key in wanted else "unknown"
            if here != there:
                differences.append(f"{kind} {key!r} is {here} in it and {there} in this server")
        if differences:
            told = "; ".join(differences[:10]) + (
                f"; and {len(differences) - 10} more" if len(differences) > 10 else ""
            )
            other = "model" if kind == _PARAMETER else "optimizer"
            raise CheckpointRejected(self.checkpoint.path, f"belongs to another {other}: {told}", _ELSEWHERE)
        return {key: np.array(array).reshape(-1) for key, array in found.items()}

    def _remove_stray(self) -> None:
        """Remove the files that no checkpoint names."""
        rows = self._connection.execute("SELECT model, optimizer FROM checkpoints").fetchall()
        named = {name for row in rows for name in row}
        with writing(self.directory):
            for name in os.listdir(self.directory):
                if _OURS.fullmatch(name) and name not in named:
                    os.unlink(os.path.join(self.directory, name))


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise MissingDependency("safetensors", "checkpoint=", "train") from None
    return safetensors.numpy
