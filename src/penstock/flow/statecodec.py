"""How the states of a ``map_state`` become bytes and are read back, also by another process and another version.

If the function says what its state is (the annotation of its first parameter), states are JSON of that type: a Struct
whose new fields have defaults reads old states. Otherwise what JSON can say is JSON, and all else is pickled, with
classes of a script or a notebook by value.
"""

from __future__ import annotations

import pickle
import typing
from collections.abc import Callable
from inspect import signature
from typing import Any

from penstock.errors import PlanError
from penstock.flow.codec import decoder, encode_json, is_plain
from penstock.place.pickling import dumps

__all__ = ["StateCodec"]

_JSON, _PICKLE = b"j", b"p"


class StateCodec:
    """``pack`` and ``unpack`` for the states of ``function``."""

    def __init__(self, function: Any) -> None:
        self._kind = _kind_of(function)
        self._decode: Callable[[bytes], Any] = decoder(self._kind)

    def pack(self, state: Any) -> bytes:
        """A state as bytes. Raises what can't be encoded or pickled."""
        if self._kind is not None or is_plain(state):
            return _JSON + encode_json(state, "a state")
        return _PICKLE + dumps(state, {})

    def unpack(self, packed: bytes) -> Any:
        """The state again. Raises msgspec.ValidationError for one that isn't of the function's type any more."""
        if packed[:1] == _JSON:
            return self._decode(packed[1:])
        return pickle.loads(packed[1:])


def _kind_of(function: Any) -> Any:
    """What the function says its state is; None if it says nothing, or nothing that JSON can be read into."""
    try:
        hints = typing.get_type_hints(function)
        kind = hints.get(next(iter(signature(function).parameters)))
        if kind in (None, Any, object):
            return None
        decoder(kind)
    except (PlanError, TypeError, NameError, ValueError, AttributeError, StopIteration):
        return None
    return kind
