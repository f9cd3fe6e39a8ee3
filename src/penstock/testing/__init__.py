"""What penstock is tested with, for your own tests: each name is loaded when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.testing.clock import run_virtual
    from penstock.testing.faults import Faults, InjectedFault
    from penstock.testing.killing import TortureResult, torture

__all__ = ["Faults", "InjectedFault", "TortureResult", "run_virtual", "torture"]

_HOMES = {
    "Faults": "penstock.testing.faults",
    "InjectedFault": "penstock.testing.faults",
    "TortureResult": "penstock.testing.killing",
    "run_virtual": "penstock.testing.clock",
    "torture": "penstock.testing.killing",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'penstock.testing' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
