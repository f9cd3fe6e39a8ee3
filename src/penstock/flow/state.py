"""A ``map_state`` stage at run time: each item changes the state of its key, one item after the other.

One task works on what has come, a chunk at a time: it finds the keys, reads the states that aren't here yet from where
they are kept, calls the function for each item in order (a ``def`` in a thread of its own) and puts the outputs into
the next channel. Nobody cancels it but ``abort``, which waits for the call that is under way; what was taken from the
channel and not put into the next stays open in the ledger.

A state is here, as a lane of the ledger, for as long as an item that changed it is on its way or the change isn't
committed; then it can be read again. So what is in memory is bounded by what is on its way, not by the number of keys.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from penstock.errors import StrayException
from penstock.flow.blocking import Desk
from penstock.flow.codec import id_key
from penstock.flow.failing import DEAD_LETTER, KEEP_IT, RAISE, Policy
from penstock.flow.ledger import DEAD, SKIPPED
from penstock.flow.origin import Lane, Stated, positions_of
from penstock.flow.progress import Position, StateIndex
from penstock.flow.segment import Runner
from penstock.flow.stage import MapState
from penstock.flow.statecodec import StateCodec
from penstock.place.base import Task, as_failure, is_async
from penstock.place.loop import is_cancelled

__all__ = ["StateRunner"]

_CHUNK = 256


class StateRunner(Runner):
    """``states``: where they are kept, or None. ``key_of``: the key of an event at a position, over a topic."""

    def __init__(
        self,
        *args: Any,
        stage: MapState,
        policy: Policy,
        states: StateIndex | None,
        key_of: Callable[[Position], str | None] | None,
    ) -> None:
        super().__init__(*args)
        self._stage = stage
        self._name = self.names[0]
        self._policy = policy
        self._states = states
        self._key_of = key_of
        self._by_partition = key_of is not None
        self._codec = StateCodec(stage.function)
        self._initial: bytes | None = None
        self._working: asyncio.Task[None] | None = None
        self._desk = Desk(f"penstock-state-{self._name}")
        self.ledger.forgets = states is not None

    def _turn(self) -> None:
        if self._working is not None:
            return
        room = min(self.sink.room, _CHUNK)
        if room > 0 and self.source.items:
            tasks = self.source.take(room)
            self.meter.first.taken += len(tasks)
            self._working = self.host.loop.create_task(self._work(tasks), name=f"penstock state {self._name}")
            self._working.add_done_callback(self._worked)
        elif self.source.ended:
            self.sink.close()

    def _worked(self, working: asyncio.Task[None]) -> None:
        self._working = None
        if working.cancelled():
            if not self.stopped:
                self.host.fail(StrayException(self._name, "CancelledError"))
        elif (error := working.exception()) is not None:
            self.host.fail(error)
        self.pump()

    async def _work(self, tasks: Sequence[Task]) -> None:
        found = [(task, self._key(task)) for task in tasks]
        lanes = await self._lanes({key for _, key in found if isinstance(key, tuple)})
        steps = [(task, key if isinstance(key, Exception) else lanes[key]) for task, key in found]
        began = perf_counter()
        if is_async(self._stage.function):
            results = []
            for task, lane in steps:
                results.append(await self._step_async(task, lane))
                if self._is_last(results[-1]):
                    break
        else:
            results = await self._desk.call(self._steps, steps)
        meter = self.meter.first
        meter.calls += len(results)
        meter.add_sample((perf_counter() - began) / len(results))
        out = [task for task in map(self._ended, tasks, results) if task is not None]
        for lane in lanes.values():
            lane.users -= 1
            self.ledger.leave_lane(lane)
        meter.emitted += len(out)
        if not self.stopped:
            self.sink.put(out)

    def _key(self, task: Task) -> tuple[str, str] | Exception:
        """The partition and the key whose state the item changes, or why there is none."""
        self._policy.tried += 1
        position = positions_of(task.origin)[0]
        partition = position[0] if self._by_partition else ""
        try:
            if self._stage.key is not None:
                return partition, id_key(task.value, self._stage.key, "key=")
            if self._key_of is None:
                return partition, ""
            key = self._key_of(position)
        except (Exception, asyncio.CancelledError) as error:
            failure = as_failure(self._name, error)
            assert isinstance(failure, Exception)
            return failure
        if key is None:
            why = f"stage {self._name!r} keeps a state for each key, and the event has none. Publish with key="
            return ValueError(why)
        return partition, key

    async def _lanes(self, keys: set[tuple[str, str]]) -> dict[tuple[str, str], Lane]:
        """The states of these keys, which stay here until they have been used."""
        known = self.ledger.lanes
        lanes = {key: known[self._name, *key] for key in keys if (self._name, *key) in known}
        for lane in lanes.values():
            lane.users += 1
        missing = [key for key in keys if key not in lanes]
        kept: dict[str, bytes] = {}
        if missing and self._states is not None:
            kept = await self._states.load_states(self._name, sorted({key for _, key in missing}))
        for partition, key in missing:
            packed = kept.get(key) or self._first()
            lane = Lane(self._name, partition, key, self._codec.unpack(packed), packed)
            known[self._name, partition, key] = lane
            lane.users = 1
            lanes[partition, key] = lane
        return lanes

    def _first(self) -> bytes:
        """The first state of a key. None is one whatever the function says of its states."""
        if self._initial is None:
            initial = self._stage.initial
            self._initial = StateCodec(None).pack(None) if initial is None else self._codec.pack(initial)
        return self._initial

    def _steps(self, steps: Sequence[tuple[Task, Lane | Exception]]) -> list[Any]:
        results = []
        for task, lane in steps:
            results.append(self._step(task, lane))
            if self._is_last(results[-1]):
                break
        return results

    def _is_last(self, result: Any) -> bool:
        """Whether nothing more is to be called after this: the run is stopped, or will be."""
        return self.stopped or (isinstance(result, Exception) and self._policy.end == RAISE)

    def _step(self, task: Task, lane: Lane | Exception) -> Any:
        """Call the function with one item; what came out, or the exception."""
        if isinstance(lane, Exception):
            return lane
        try:
            return self._changed(lane, self._stage.function(lane.value, task.value))
        except (Exception, asyncio.CancelledError) as error:
            lane.value = self._codec.unpack(lane.packed)  # it may have been changed half way
            return as_failure(self._name, error)

    async def _step_async(self, task: Task, lane: Lane | Exception) -> Any:
        if isinstance(lane, Exception):
            return lane
        try:
            return self._changed(lane, await self._stage.function(lane.value, task.value))
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            lane.value = self._codec.unpack(lane.packed)
            return as_failure(self._name, error)

    def _changed(self, lane: Lane, returned: Any) -> tuple[Lane, bytes, Any]:
        if not isinstance(returned, tuple) or len(returned) != 2:
            if inspect.isawaitable(returned):
                getattr(returned, "close", lambda: None)()  # a coroutine that nobody will await
            raise TypeError(f"stage {self._name!r} returned {returned!r:.60}; return (state, output)")
        lane.value, output = returned
        lane.packed = self._codec.pack(lane.value)
        return lane, lane.packed, output

    def _ended(self, task: Task, result: Any) -> Task | None:
        """The task with its output, or None if it was given up."""
        if not isinstance(result, Exception):
            lane, packed, task.value = result
            stated = Stated(task.origin, lane, packed)
            lane.entries.append(stated)
            task.origin = stated
            return task
        verdict = self._policy.give_up(task.value, task.origin, result, 1)
        if verdict.kind == RAISE:
            self.host.fail(verdict.error)
            return None
        if verdict.kind == KEEP_IT:
            task.value = verdict.failed
            return task
        self.ledger.settle(task.origin, DEAD if verdict.kind == DEAD_LETTER else SKIPPED, verdict.failed)
        return None

    async def close(self) -> None:
        await self._desk.close()

    async def abort(self) -> None:
        self.stopped = True
        working = self._working
        if working is not None:
            if is_async(self._stage.function):
                working.cancel()
            await asyncio.wait([working])
        await self._desk.close()
