"""The states of keys that flows over a group keep in the log, beside what is acknowledged.

A state counts with the events that made it, in one transaction, and only while their owner holds its lease; since the
events of a key are with one owner at a time, nobody else can have changed it meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.events.transaction import Transaction

__all__ = ["keep_states", "load_states"]


def load_states(connection: Any, group: int, stage: str, keys: Sequence[str]) -> dict[str, bytes]:
    """The states of these keys, as far as there are any."""
    query = "SELECT value FROM states WHERE grp = ? AND stage = ? AND key = ?"
    found = {key: connection.execute(query, (group, stage, key)).get for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def keep_states(transaction: Transaction, group: int, states: Sequence[tuple[str, str, bytes]]) -> None:
    """From now on these are the states: (stage, key, value)."""
    transaction.connection.executemany(
        "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", [(group, *state) for state in states]
    )
