"""Objects that are written as rows: a ``Mapping`` of what may be shown of them, by column."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Row"]


class Row(Mapping[str, Any]):
    """Something with attributes that is also a mapping of its row, as outputs write it.

    The attributes are for programs; the row is for files: it may hold a field in another form, or hide it.
    """

    __slots__ = ()

    @abstractmethod
    def as_row(self) -> dict[str, Any]:
        """The row: what an output writes, by column."""

    def __getitem__(self, name: str) -> Any:
        return self.as_row()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_row())

    def __len__(self) -> int:
        return len(self.as_row())
