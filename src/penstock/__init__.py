"""penstock: write the work once, run it over a list, a file, a topic or live requests; every item is accounted for.

The names below are all there is to type; each is loaded when it is first used, so that importing penstock
costs next to nothing and loads no optional package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock import errors, testing
    from penstock.events.log import EventLog
    from penstock.files import read, write
    from penstock.flow.contract import Failed
    from penstock.flow.flow import Flow
    from penstock.flow.job import Job
    from penstock.flow.limit import Limit
    from penstock.flow.report import Report
    from penstock.flow.retry import Retry
    from penstock.net.fetch import fetch
    from penstock.net.fetched import Fetched
    from penstock.net.request import Request
    from penstock.net.timing import Timeout
    from penstock.place.base import per_worker, worker_index
    from penstock.train.checkpoint import Checkpoint
    from penstock.train.consistency import ASP, BSP, SSP
    from penstock.train.optimizer import SGD, Adam, AdamW
    from penstock.train.server import ParameterServer

__all__ = [
    "ASP",
    "BSP",
    "SGD",
    "SSP",
    "Adam",
    "AdamW",
    "Checkpoint",
    "EventLog",
    "Failed",
    "Fetched",
    "Flow",
    "Job",
    "Limit",
    "ParameterServer",
    "Report",
    "Request",
    "Retry",
    "Timeout",
    "__version__",
    "errors",
    "fetch",
    "per_worker",
    "read",
    "testing",
    "worker_index",
    "write",
]

__version__ = "0.1.0"

_HOMES = {
    "ASP": "penstock.train.consistency:ASP",
    "BSP": "penstock.train.consistency:BSP",
    "SGD": "penstock.train.optimizer:SGD",
    "SSP": "penstock.train.consistency:SSP",
    "Adam": "penstock.train.optimizer:Adam",
    "AdamW": "penstock.train.optimizer:AdamW",
    "Checkpoint": "penstock.train.checkpoint:Checkpoint",
    "EventLog": "penstock.events.log:EventLog",
    "Failed": "penstock.flow.contract:Failed",
    "Fetched": "penstock.net.fetched:Fetched",
    "Flow": "penstock.flow.flow:Flow",
    "Job": "penstock.flow.job:Job",
    "Limit": "penstock.flow.limit:Limit",
    "ParameterServer": "penstock.train.server:ParameterServer",
    "Report": "penstock.flow.report:Report",
    "Request": "penstock.net.request:Request",
    "Retry": "penstock.flow.retry:Retry",
    "Timeout": "penstock.net.timing:Timeout",
    "errors": "penstock.errors",
    "fetch": "penstock.net.fetch:fetch",
    "per_worker": "penstock.place.base:per_worker",
    "read": "penstock.files.read",
    "testing": "penstock.testing",
    "worker_index": "penstock.place.base:worker_index",
    "write": "penstock.files.write",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    module, _, attribute = home.partition(":")
    value = import_module(module)
    found = getattr(value, attribute) if attribute else value
    globals()[name] = found  # the next access doesn't come here
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
