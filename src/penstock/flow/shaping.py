"""The stages that call nothing: ``take`` counts and ``unbatch`` makes items of lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from penstock.errors import ExpansionTooLarge
from penstock.flow.failing import DEAD_LETTER, KEEP_IT, RAISE, Policy
from penstock.flow.ledger import DEAD, SKIPPED
from penstock.flow.origin import Family
from penstock.flow.segment import Runner
from penstock.place.base import SPREAD_BOUND, Task, spread

__all__ = ["TakeRunner", "UnbatchRunner"]


class TakeRunner(Runner):
    """A ``take`` stage: counts what passes, and has everything before it stopped when that is enough.

    What was taken beyond stays open in the ledger, to be released. A whole expansion that was cut in the middle is
    complete with the outputs that passed.
    """

    def __init__(self, *args: Any, number: int, left: int) -> None:
        super().__init__(*args)
        self._number = number
        self._left = left
        self._families: dict[int, Family] = {}
        self._satisfied = False

    def _turn(self) -> None:
        if self._left > 0:
            out = self.source.take(min(self.sink.room, self._left))
            self._left -= len(out)
            self.meter.first.taken += len(out)
            self.meter.first.emitted += len(out)
            for task in out:
                for family in self.ledger.admit(task, self._number):
                    self._families[id(family)] = family
            if len(self._families) > 1:
                self._families = {key: family for key, family in self._families.items() if family.pending}
            self.sink.put(out)
        if not self._satisfied and (self._left <= 0 or self.source.ended):
            self._satisfied = True
            if not self.source.ended:
                self.host.satisfied(self)
                self.source.items.clear()
                self.ledger.cut(self._families.values(), self._number)
            self._families.clear()
            self.sink.close()


class UnbatchRunner(Runner):
    """An ``unbatch`` stage: every element of a list is an item; they are accounted for together."""

    def __init__(self, *args: Any, policy: Policy) -> None:
        super().__init__(*args)
        self._policy = policy

    def _turn(self) -> None:
        while self.sink.room > 0 and self.source.items and not self.stopped:  # a take behind it may have enough
            task = self.source.take(1)[0]
            self.meter.first.taken += 1
            outputs = self._outputs(task)
            if outputs is not None:
                origin = self.ledger.expand(task.origin, len(outputs))
                self.meter.first.emitted += len(outputs)
                self.sink.put([Task(output, origin) for output in outputs])
        if self.source.ended:
            self.sink.close()

    def _outputs(self, task: Task) -> list[Any] | None:
        """The elements; None if there are none to be had, which ``on_error`` then deals with."""
        error: Exception
        if isinstance(task.value, Iterable) and not isinstance(task.value, (str, bytes)):
            try:
                outputs = spread(self.names[0], task.value)
                if self.ledger.fits(task.origin, len(outputs), SPREAD_BOUND):
                    return outputs
                error = ExpansionTooLarge(self.names[0], SPREAD_BOUND)
            except Exception as raised:  # too many, or what the iterable itself raised
                error = raised
        else:
            error = TypeError(
                f"stage {self.names[0]!r} was given a {type(task.value).__name__}, and unbatch() needs lists. "
                "Use it after batch(), or after a stage that returns lists"
            )
        verdict = self._policy.give_up(task.value, task.origin, error, 1)
        if verdict.kind == RAISE:
            self.host.fail(verdict.error)
            return None
        if verdict.kind == KEEP_IT:
            return [verdict.failed]
        self.ledger.settle(task.origin, DEAD if verdict.kind == DEAD_LETTER else SKIPPED, verdict.failed)
        return None
