"""ParameterServer: weights that many workers read and change at once, each at its own pace.

*States.* A server is closed, or open inside ``async with``. There is one set of weights, of the optimizer's arrays, and
one version, all behind one lock: whoever holds it reads or changes all three, and nothing in between is ever seen. A
push is checked before the lock is taken, so that what can fail has failed before anything changes.

*Where.* Small models are worked on at once, on the thread that asks. Large ones (a copy takes longer than a hop) on a
thread of the server's own, in the order in which they were asked, and the event loop goes on meanwhile.

*Cancelling.* A pull leaves nothing behind. A push is applied or isn't, never in part: one that was handed to the thread
is applied whoever waits for it, and the version says so.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Self, TypeVar

import numpy as np

from penstock.errors import Closed, PlanError
from penstock.flow.blocking import Desk
from penstock.train.consistency import ASP
from penstock.train.kernels import Array
from penstock.train.optimizer import SGD, Optimizer
from penstock.train.params import Layout

__all__ = ["ParameterServer"]

T = TypeVar("T")

_AT_ONCE = 1 << 20  # bytes of parameters up to which work is done on the asking thread: about 0.1 ms
_STALEST = 1000


class ParameterServer:
    """The parameters of a model, for workers that pull them, compute gradients, and push those without waiting.

    ``params``: an array of float32 or float64, or nested dicts of such arrays; they are copied. NumPy's, or any that
    cross by DLPack (PyTorch's, JAX's). ``optimizer``: ``SGD(0.01)`` by default; it runs in the server, in place, once
    for each push, so that momentum and means are those of all workers together.

    ``consistency``: ``ASP()``, nobody waits for anybody: a push changes the weights as they are now, whatever version
    it was computed from. How much they had changed meanwhile, its *staleness*, is counted; see ``ASP`` for what else
    may be done about it.

    It belongs to no event loop: it may be used from several at once. Raises PlanError for parameters that can't be
    trained; ``async with`` raises MissingDependency where numba isn't installed.

    >>> import asyncio, numpy as np, penstock as ps
    >>> async def main() -> None:
    ...     async with ps.ParameterServer(np.zeros(3, np.float32), ps.SGD(lr=0.1)) as server:
    ...         params, version = await server.pull()
    ...         print(await server.push(params + 1, version=version))
    ...         print((await server.pull())[0])
    >>> asyncio.run(main())
    1
    [-0.1 -0.1 -0.1]
    """

    def __init__(self, params: Any, optimizer: Optimizer | None = None, consistency: ASP | None = None) -> None:
        optimizer = SGD(lr=0.01) if optimizer is None else optimizer
        if not isinstance(optimizer, Optimizer):
            raise PlanError(
                f"ParameterServer(optimizer={optimizer!r:.60})", "Give ps.SGD(…), ps.Adam(…) or ps.AdamW(…)"
            )
        consistency = ASP() if consistency is None else consistency
        if not isinstance(consistency, ASP):
            raise PlanError(f"ParameterServer(consistency={consistency!r:.60})", "Give ps.ASP(), or leave it out")
        self.optimizer = optimizer
        self.consistency = consistency
        self._layout = Layout(params)
        self._weights = [vector.copy() for vector in self._layout.vectors(params)]
        self._states = [[np.zeros_like(vector) for vector in self._weights] for _ in optimizer.slots]
        self._version = 0
        self._staleness: Counter[int] = Counter()
        self._dropped = 0
        self._lock = threading.Lock()
        self._opened = 0
        self._desk: Desk | None = None

    @property
    def version(self) -> int:
        """How many pushes were applied."""
        return self._version

    @property
    def staleness(self) -> dict[int, int]:
        """How many pushes that were applied were how stale: the updates between a push's version and itself.

        What was staler than 1,000 is counted there.
        """
        with self._lock:
            return dict(sorted(self._staleness.items()))

    @property
    def dropped(self) -> int:
        """How many pushes were too stale to be applied."""
        return self._dropped

    def __repr__(self) -> str:
        return f"ParameterServer({len(self._layout.names)} parameters, {self.optimizer!r}, version {self._version})"

    async def __aenter__(self) -> Self:
        """Compile what is needed, if it isn't yet. Cancelling leaves the server closed."""
        desk = Desk("penstock-server")
        try:
            await desk.call(self.optimizer.prepare, *set(self._layout.kinds))
        except BaseException:
            await desk.close()
            raise
        with self._lock:
            self._opened += 1
            if self._desk is None:
                self._desk = desk
                return self
        await desk.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Apply what was pushed, then close. Of several ``async with`` at once, the last one closes."""
        with self._lock:
            self._opened -= 1
            desk = None if self._opened else self._desk
            if desk is not None:
                self._desk = None
        if desk is not None:
            await desk.close()

    async def pull(self) -> tuple[Any, int]:
        """A copy of the parameters, in the form in which they were given, and their version.

        All of them are of that version. The copy is the caller's, to be kept or changed. Raises Closed outside of
        ``async with``. Cancelling leaves nothing behind.
        """
        vectors, version = await self._do(self._copy)
        return self._layout.tree(vectors), version

    async def push(self, gradients: Any, *, version: int) -> int:
        """Apply gradients that were computed from the parameters of ``version``; returns the version afterwards.

        ``gradients``: in the form, shapes and types of the parameters, of NumPy or crossing by DLPack; they are read
        only, and the caller's again on return.

        Raises GradientRejected, which names the parameter, for another form, shape or type, for NaN and infinity;
        PlanError for a version that isn't there yet; Closed outside of ``async with``. Nothing is changed then.
        Cancelled, it is applied as a whole or not at all; until the server is closed, its arrays may still be read.
        """
        vectors = self._layout.vectors(gradients)
        if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= self._version:
            raise PlanError(
                f"push(version={version!r}), and the server is at version {self._version}",
                "Give the version that pull returned with the parameters",
            )
        return await self._do(self._apply, vectors, version)

    async def _do(self, work: Callable[..., T], *args: Any) -> T:
        desk = self._desk
        if desk is None:
            raise Closed("the parameter server")
        if self._layout.bytes <= _AT_ONCE:
            return work(*args)
        return await desk.call(work, *args)

    def _copy(self) -> tuple[list[Array], int]:
        with self._lock:
            return [vector.copy() for vector in self._weights], self._version

    def _apply(self, gradients: list[Array], version: int) -> int:
        self._layout.check_finite(gradients)
        with self._lock:
            stale = self._version - version
            if self.consistency.drops(stale):
                self._dropped += 1
                return self._version
            damping = self.consistency.damping(stale)
            self.optimizer.update(self._weights, self._states, gradients, self._version, damping=damping)
            self._staleness[min(stale, _STALEST)] += 1
            self._version += 1
            return self._version
