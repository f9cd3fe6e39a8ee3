"""The journal: what a job has settled, kept beside its output, one transaction a commit.

A sink makes its data durable first and then calls ``Journal.transaction``; what the journal doesn't count, opening
undoes. A journal belongs to one job. Redoing the dead is the exception: a job whose source is the letters of this
very journal opens it beside the main job's progress, which stays as it is; settling a letter removes it.

Everything here blocks and is called on one thread at a time: the sink's desk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from penstock.errors import CannotEncode, ResumeMismatch
from penstock.flow.codec import encode_json, pack
from penstock.flow.contract import Delta, Failed, JobId
from penstock.flow.database import connect, opened_tables, reported
from penstock.flow.ledger import DEAD
from penstock.flow.progress import Intervals, Known, Position, Positions, Progress
from penstock.flow.text import printable

__all__ = ["LETTERS", "Journal", "journal_path", "letters_identity", "remove_journal"]

LETTERS = "dead"
"""The partition of letters read as items: a letter stands at ("dead", its number)."""

_REDONE = "\0dead"  # the partition of a redoing job's unfinished items; no source has a NUL in a partition's name
_KEYED = ""  # the partition of unfinished items under id=, whose item is their key
_RUNS_KEPT = 100


def journal_path(output: str) -> str:
    """Where the journal of a file or directory stands.

    >>> journal_path("/data/out.jsonl")
    '/data/out.jsonl.journal'
    """
    return f"{os.path.realpath(output)}.journal"


def remove_journal(path: str) -> None:
    """Remove a journal with the files that SQLite keeps beside it: those first, so that they never stand alone."""
    for name in (f"{path}-wal", f"{path}-shm", path):
        if os.path.lexists(name):
            os.unlink(name)


def letters_identity(output: str, table: str | None = None) -> str:
    """The identity of the source that reads the dead letters of an output.

    >>> letters_identity("/data/out.db", "rows")
    'dead:/data/out.db#rows'
    """
    real = os.path.realpath(output)
    return f"dead:{real}#{table}" if table is not None else f"dead:{real}"


class Journal:
    """The journal in the database at ``path``, opened for one job by ``load``.

    ``output`` names the output in messages, ``letters`` is the identity of its letters as a source, ``prefix`` that
    of the tables' names in a database that holds more. ``lent``: a connection that somebody else opened and closes, and
    whose transactions he begins and ends around every call. Raises JournalError for what can't be used as a journal.
    """

    def __init__(self, path: str, *, output: str, letters: str, prefix: str = "", lent: Any = None) -> None:
        self.path = path
        self.output = output
        self.letters = letters
        self._is_lent = lent is not None
        self.connection = lent if self._is_lent else connect(path)
        try:
            self._tables = opened_tables(self.connection, prefix)
            with reported(path):
                self.running = bool(self._get("running"))
                """Whether the last job to write ended without closing: what the journal doesn't count is then its."""
                stored = self._get("output")
        except BaseException:
            self._close()
            raise
        self.state: dict[str, Any] = {} if stored is None else msgspec.json.decode(stored)
        """What the last commit said of the output: its committed length, say. Empty before the first."""
        self._job: JobId | None = None
        self._begun = False
        self._redo = False
        self._keys_known = False

    def load(self, job: JobId) -> Progress:
        """What earlier runs of this job committed. Raises ResumeMismatch if the journal is another job's."""
        self._job = job
        self._redo = job.source == self.letters
        with reported(self.path):
            if self._redo:
                return Progress(children=self._children(redone=True), fates=self._fates(redone=True))
            if job.by_id:
                self._keys_known = self._any("ids") or self._any("unfinished")
                self.connection.execute(
                    f"DROP TABLE IF EXISTS temp.{self._tables.met}; CREATE TEMP TABLE {self._tables.met}"
                    "(key TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID"
                )
            if not self._is_touched():
                return Progress()
            self._check(job)
            if not (job.replayable or job.by_id):
                return Progress()
            snapshot = self._get("snapshot")
            tables = self._tables
            return Progress(
                settled=self._settled(),
                children={} if job.by_id else self._children(redone=False),
                fates={} if job.by_id else self._fates(redone=False),
                taken=dict(self.connection.execute(f"SELECT stage, amount FROM {tables.taken}")),
                counts=dict(self.connection.execute(f"SELECT name, amount FROM {tables.counts}")),
                snapshot=None if snapshot is None else msgspec.json.decode(snapshot),
                plan=self._get("plan"),
                finished=bool(self._get("finished")),
            )

    def begin(self) -> None:
        """Record that a job writes from now on: what a crash leaves beyond the last commit is its own."""
        if not self._begun:
            with self._transaction():
                self._record_begin()
            self._begun = True

    def hold(self) -> None:
        """Begin the next transaction now: what is written to the database meanwhile commits with it, or not at all."""
        with reported(self.path):
            if not self.connection.in_transaction:
                self.connection.execute("BEGIN IMMEDIATE")

    def transaction(
        self, delta: Delta, state: dict[str, Any] | None = None, write: Callable[[], None] | None = None
    ) -> None:
        """Add ``delta`` and the output's new ``state`` to the journal: all or none, on the disk on return.

        ``write`` is called inside the transaction: rows in the same database commit with it.
        Raises WriteFailed for a full or broken disk; nothing is changed then.
        """
        with self._transaction():
            if not self._begun:
                self._record_begin()
            if write is not None:
                write()
            if self._redo:
                self._apply_redone(delta)
            else:
                self._apply(delta)
            self.connection.executemany(
                f"INSERT OR REPLACE INTO {self._tables.states} VALUES (?, ?, ?)",
                [(stage, key, value) for (stage, _, key), value in delta.states.items()],
            )
            if delta.report is not None:
                self._keep_report(delta.report)
            if state is not None:
                self._set("output", encode_json(state))
        self._begun = True
        if state is not None:
            self.state = state

    def look_up(self, keys: list[str]) -> list[Known]:
        """What earlier runs committed of the items with these keys, in order; remembers that this run met them."""
        found = []
        with reported(self.path), self.connection:  # a savepoint, since the next transaction may be held
            execute = self.connection.execute
            for key in keys:
                times = execute(
                    f"INSERT INTO temp.{self._tables.met} VALUES (?, 1) "
                    "ON CONFLICT(key) DO UPDATE SET times = times + 1 RETURNING times",
                    (key,),
                ).get
                known = Known(key if times == 1 else f"{key}#{times}", repeated=times > 1)
                if self._keys_known:
                    self._recall(known)
                found.append(known)
        return found

    def load_states(self, stage: str, keys: list[str]) -> dict[str, bytes]:
        """The states of these keys that earlier commits left, of a ``map_state``; none, if all is done anew."""
        if self._is_anew and not self._begun:
            return {}
        query = f"SELECT value FROM {self._tables.states} WHERE stage = ? AND key = ?"
        with reported(self.path):
            found = {key: self.connection.execute(query, (stage, key)).get for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def close(self, *, clean: bool) -> None:
        """Close the file; ``clean``: the output holds nothing but what is counted. Safe to call twice."""
        try:
            if self.connection.in_transaction and not self._is_lent:
                self.connection.execute("ROLLBACK")
            if clean and (self._begun or self.running):
                with self._transaction():
                    self._set("running", 0)
        finally:
            self._begun = False
            self._close()

    def _close(self) -> None:
        if not self._is_lent:
            with reported(self.path):
                self.connection.close()

    # What a job is, and whether this is it.

    def _is_touched(self) -> bool:
        """Whether anything was ever settled: until then the journal is any job's."""
        return bool(self._get("finished")) or any(map(self._any, ("progress", "ids", "unfinished", "dead")))

    def _check(self, job: JobId) -> None:
        name, source, by_id = self._get("name"), self._get("source"), bool(self._get("by_id"))
        reason = None
        if source != job.source:
            reason = f"it holds what a job made of {source}, and this job reads {job.source}"
        elif name != job.name:
            reason = f"it belongs to the job {name!r}, and this job is {job.name!r}"
        elif by_id != job.by_id:
            kept, wanted = ("ids", "positions") if by_id else ("positions", "ids")
            reason = f"its progress is kept by {kept}, and this job asks for {wanted}: id= was added, or left out"
        if reason is not None:
            raise ResumeMismatch(self.output, reason)

    @property
    def _is_anew(self) -> bool:
        """Whether nothing that is kept is of this run's items: they can't be read again, nor known by their ids."""
        job = self._job
        return job is not None and not (job.replayable or job.by_id) and not self._redo

    def _record_begin(self) -> None:
        job = self._job
        assert job is not None, "load comes first"
        self._set("running", 1)
        if self._redo:
            return
        tables = self._tables
        execute = self.connection.execute
        if self._is_anew:
            for table in (
                tables.progress,
                tables.children,
                tables.unfinished,
                tables.taken,
                tables.counts,
                tables.ids,
                tables.states,
            ):
                execute(f"DELETE FROM {table}")
            # The letters stay, but later ones at the same positions are of other items.
            execute(f"UPDATE {tables.dead} SET slot = NULL")
        if self._is_anew or not self._is_touched():
            execute(f"DELETE FROM {tables.meta} WHERE name IN ('plan', 'snapshot', 'finished')")
        self._set("name", job.name)
        self._set("source", job.source)
        self._set("by_id", int(job.by_id))

    # Applying a delta.

    def _apply(self, delta: Delta) -> None:
        assert self._job is not None
        tables = self._tables
        self._keep_unfinished(
            delta, (lambda position: (_KEYED, delta.keys[position])) if self._job.by_id else (lambda position: position)
        )
        self.connection.executemany(
            f"UPDATE {tables.unfinished} SET digest = ? WHERE partition = '{_KEYED}' AND item = ?",
            [(digest, key) for key, digest in delta.digests.items()],
        )
        if self._job.by_id:
            self._settle_keys([key for position, key in delta.keys.items() if position in delta.settled])
        else:
            if self._job.settles:  # what the last commit said has been passed on since
                self.connection.execute(f"DELETE FROM {tables.progress}")
            self._settle(delta.settled)
        self._increase(tables.taken, "stage", delta.taken)
        self._increase(tables.counts, "name", delta.counts)
        for failed in delta.dead:
            self._keep_letter(failed, delta.keys.get(failed.position))
        if delta.snapshot is not None:
            self._set("snapshot", encode_json(delta.snapshot))
        if delta.plan is not None:
            self._set("plan", delta.plan)
        if delta.finished:
            self._set("finished", 1)
        elif delta.settled or delta.children:
            self._set("finished", 0)

    def _apply_redone(self, delta: Delta) -> None:
        """Settle letters: those that died again stay, all others go, and the counts say what became of them."""
        tables = self._tables
        execute = self.connection.execute
        self._keep_unfinished(delta, lambda position: (_REDONE, position[1]))
        died = {failed.position[1]: failed for failed in delta.dead}
        for letter, failed in died.items():
            execute(
                f"UPDATE {tables.dead} SET stage = ?, reason = ?, error = ?, attempts = attempts + ?, time = ? "
                "WHERE letter = ?",
                (failed.stage, failed.reason, printable(failed.error), failed.attempts, time.time(), letter),
            )
        settled = 0
        for start, stop in delta.settled.of(LETTERS):
            settled += execute(
                f"SELECT count(*) FROM {tables.dead} WHERE letter >= ? AND letter < ?", (start, stop)
            ).get
            died_before = execute(
                f"SELECT item FROM {tables.unfinished} WHERE partition = ? AND item >= ? AND item < ? AND fate = ?",
                (_REDONE, start, stop, DEAD),
            ).fetchall()
            stay = {*died, *(letter for (letter,) in died_before)}
            gone = [(letter,) for letter in range(start, stop) if letter not in stay]
            self.connection.executemany(f"DELETE FROM {tables.dead} WHERE letter = ?", gone)
            self._forget_unfinished(_REDONE, start, stop)
        counts = dict(delta.counts)
        counts["dead"] = counts.get("dead", 0) - settled
        self._increase(tables.counts, "name", counts)

    def _settle(self, settled: Positions) -> None:
        tables = self._tables
        unfinished = self._any("unfinished")
        for partition, intervals in settled.partitions.items():
            for start, stop in intervals:
                self._add(tables.progress, "partition = ?", (partition,), start, stop)
                if unfinished:
                    self._forget_unfinished(partition, start, stop)

    def _settle_keys(self, keys: list[str]) -> None:
        tables = self._tables
        rows = [(key,) for key in keys]
        executemany = self.connection.executemany
        executemany(f"INSERT OR IGNORE INTO {tables.ids} VALUES (?)", rows)
        if self._any("unfinished"):
            for table in (tables.children, tables.unfinished):
                executemany(f"DELETE FROM {table} WHERE partition = '{_KEYED}' AND item = ?", rows)

    def _keep_unfinished(self, delta: Delta, item_of: Callable[[Position], tuple[str, Any]]) -> None:
        tables = self._tables
        for position in delta.children.keys() | delta.fates.keys():
            item = item_of(position)
            self.connection.execute(
                f"INSERT INTO {tables.unfinished}(partition, item, fate) VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET fate = coalesce(excluded.fate, fate)",
                (*item, delta.fates.get(position)),
            )
            for start, stop in delta.children.get(position, ()):
                self._add(tables.children, "partition = ? AND item = ?", item, start, stop)

    def _forget_unfinished(self, partition: str, start: int, stop: int) -> None:
        for table in (self._tables.children, self._tables.unfinished):
            self.connection.execute(
                f"DELETE FROM {table} WHERE partition = ? AND item >= ? AND item < ?", (partition, start, stop)
            )

    def _add(self, table: str, where: str, group: tuple[Any, ...], start: int, stop: int) -> None:
        """Add [start, stop) to the disjoint intervals of a group, merging what it touches."""
        execute = self.connection.execute
        before = execute(
            f"SELECT start, stop FROM {table} WHERE {where} AND start < ? ORDER BY start DESC LIMIT 1",
            (*group, start),
        ).get
        if before is not None and before[1] >= start:
            start, stop = before[0], max(stop, before[1])
        for (other,) in execute(
            f"DELETE FROM {table} WHERE {where} AND start >= ? AND start <= ? RETURNING stop", (*group, start, stop)
        ):
            stop = max(stop, other)
        marks = ", ".join("?" * (len(group) + 2))
        execute(f"INSERT INTO {table} VALUES ({marks})", (*group, start, stop))

    def _increase(self, table: str, name: str, amounts: dict[Any, int]) -> None:
        for key, amount in amounts.items():
            self.connection.execute(
                f"INSERT INTO {table} VALUES (?, ?) "
                f"ON CONFLICT({name}) DO UPDATE SET amount = amount + excluded.amount",
                (key, amount),
            )

    def _keep_letter(self, failed: Failed, key: str | None) -> None:
        partition, place = failed.position
        slot = f"p{place} {partition}" if key is None else f"k{key}"
        self.connection.execute(
            f"INSERT INTO {self._tables.dead}(slot, partition, place, item, stage, reason, error, attempts, time) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(slot) DO UPDATE SET partition = excluded.partition, "
            "place = excluded.place, item = excluded.item, stage = excluded.stage, reason = excluded.reason, "
            "error = excluded.error, attempts = excluded.attempts, time = excluded.time",
            (slot, partition, place, pack(failed.item), failed.stage, failed.reason, printable(failed.error),
             failed.attempts, time.time()),
        )  # fmt: skip

    def _keep_report(self, report: dict[str, Any]) -> None:
        try:
            data = encode_json(report)
        except CannotEncode:
            data = encode_json({"text": str(report)})
        runs = self._tables.runs
        self.connection.execute(f"INSERT INTO {runs}(time, report) VALUES (?, ?)", (time.time(), data))
        last = self.connection.last_insert_rowid()
        self.connection.execute(f"DELETE FROM {runs} WHERE run <= ?", (last - _RUNS_KEPT,))

    # Reading.

    def _recall(self, known: Known) -> None:
        execute = self.connection.execute
        tables = self._tables
        if execute(f"SELECT 1 FROM {tables.ids} WHERE key = ?", (known.key,)).get:
            known.done = True
            return
        found = execute(
            f"SELECT fate, digest FROM {tables.unfinished} WHERE partition = '{_KEYED}' AND item = ?", (known.key,)
        ).get
        if found is not None:
            known.fate, known.digest = found[0] or 0, found[1]
            known.children = Intervals(
                execute(
                    f"SELECT start, stop FROM {tables.children} WHERE partition = '{_KEYED}' AND item = ?",
                    (known.key,),
                ).fetchall()
            )

    def _settled(self) -> Positions:
        settled = Positions()
        rows = self.connection.execute(
            f"SELECT partition, start, stop FROM {self._tables.progress} ORDER BY partition, start"
        )
        for partition, start, stop in rows:
            settled.partitions.setdefault(partition, Intervals()).add_range(start, stop)
        return settled

    def _children(self, *, redone: bool) -> dict[Position, Intervals]:
        children: dict[Position, Intervals] = {}
        rows = self.connection.execute(
            f"SELECT partition, item, start, stop FROM {self._tables.children} WHERE (partition = ?) = ?",
            (_REDONE, redone),
        )
        for partition, item, start, stop in rows:
            position = (LETTERS if redone else partition, item)
            children.setdefault(position, Intervals()).add_range(start, stop)
        return children

    def _fates(self, *, redone: bool) -> dict[Position, int]:
        rows = self.connection.execute(
            f"SELECT partition, item, fate FROM {self._tables.unfinished} "
            "WHERE (partition = ?) = ? AND fate IS NOT NULL",
            (_REDONE, redone),
        )
        return {(LETTERS if redone else partition, item): fate for partition, item, fate in rows}

    def _any(self, table: str) -> bool:
        name = getattr(self._tables, table)
        return self.connection.execute(f"SELECT 1 FROM {name} LIMIT 1").get is not None

    def _get(self, name: str) -> Any:
        return self.connection.execute(f"SELECT value FROM {self._tables.meta} WHERE name = ?", (name,)).get

    def _set(self, name: str, value: Any) -> None:
        self.connection.execute(f"INSERT OR REPLACE INTO {self._tables.meta} VALUES (?, ?)", (name, value))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._is_lent:
            yield
            return
        self.hold()
        with reported(self.path):
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:  # a full disk may have ended it
                    self.connection.execute("ROLLBACK")
                raise
