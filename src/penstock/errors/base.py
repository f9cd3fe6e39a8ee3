"""The base of every exception."""

from __future__ import annotations

__all__ = [
    "PenstockError",
]


class PenstockError(Exception):
    """The base of every exception that penstock itself raises.

    >>> import penstock as ps
    >>> try:
    ...     ps.Flow(5)
    ... except ps.errors.PenstockError as error:
    ...     print(type(error).__name__)
    PlanError
    """

    stops_run = False
    """Whether every other item would meet the same, so that the run ends whatever ``on_error`` says."""
