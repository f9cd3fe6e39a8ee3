"""What a topic holds: events, what they are made of, and how a value becomes one and is read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import msgspec

from penstock.errors import CannotEncode, DecodeError, LogError, PayloadTooLarge, PlanError
from penstock.events.transaction import Appended
from penstock.flow.codec import decoder, encode_json

__all__ = ["Codec", "DeadLetter", "Event", "moment"]

T = TypeVar("T")


class Event(msgspec.Struct, Generic[T], frozen=True):
    """One event of a topic, as ``Topic.read`` yields it.

    ``value``: what was published. ``position``: its number in the topic, from 0. ``time``: when it was appended; never
    earlier than the one before. ``key``, ``id``, ``headers``: as they were published.
    """

    value: T
    position: int
    time: datetime
    key: str | None = None
    id: str | None = None
    headers: Mapping[str, str] = {}


class DeadLetter(msgspec.Struct, Generic[T], frozen=True):
    """An event that a group gave up.

    ``group``: which; ``event``: the event; ``attempts``: how often it was delivered; ``stage``: the stage of a flow
    that failed, else empty; ``reason``: the kind of error; ``error``: its message, with the traceback if the function
    raised it; ``time``: when.
    """

    group: str
    event: Event[T]
    attempts: int
    stage: str
    reason: str
    error: str
    time: datetime


def moment(microseconds: int) -> datetime:
    """A moment of the calendar, in UTC."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


class Codec:
    """Between the values of one topic and bytes. ``kind``: None for any JSON value, ``bytes``, or a type.

    Raises PlanError for a type that JSON can't be decoded into.
    """

    def __init__(self, topic: str, kind: Any, most: int) -> None:
        self.topic = topic
        self.kind = kind
        self._most = most
        self._target = f"topic {topic!r}"
        self._decode: Callable[[bytes], Any] = bytes if kind is bytes else decoder(kind)
        is_class = isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind))
        self._class: Any = kind if is_class else None
        self._is_plain = kind in (None, Any)

    def pack(
        self,
        value: Any,
        key: str | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        at: datetime | None = None,
    ) -> Appended:
        """An event to be appended. Raises CannotEncode, PayloadTooLarge, PlanError: then nothing is published."""
        body = self._encode(value)
        if len(body) > self._most:
            raise PayloadTooLarge(self.topic, len(body), self._most)
        if key is None and id is None and headers is None and at is None:
            return Appended(body)
        for name, text in (("key", key), ("id", id)):
            if text is not None and not _is_text(text):
                raise PlanError(f"{self._target}: {name}={text!r}, a {type(text).__name__}", f"Give {name} as text")
        shown = None
        if headers:
            if not all(_is_text(part) for pair in headers.items() for part in pair):
                raise PlanError(f"{self._target}: headers={headers!r}", "Give a dict of text to text")
            shown = encode_json(dict(headers), self._target).decode()
        due = None
        if at is not None:
            if not isinstance(at, datetime):
                raise PlanError(f"{self._target}: at={at!r}", "Give a datetime: the event isn't delivered before it")
            due = int(at.timestamp() * 1e6)
        return Appended(body, key, id, shown, due)

    def _encode(self, value: Any) -> bytes:
        if self._is_plain:
            return encode_json(value, self._target)
        if self.kind is bytes:
            if type(value) is bytes:
                return value
            if not isinstance(value, (bytes, bytearray, memoryview)):
                raise CannotEncode(self._target, type(value).__name__, "its type is bytes")
            return bytes(value)
        if self._class is not None:
            if not isinstance(value, self._class):
                raise CannotEncode(self._target, type(value).__name__, f"its type is {self._class.__name__}")
        else:
            try:
                msgspec.convert(value, self.kind)
            except msgspec.ValidationError as error:
                raise CannotEncode(self._target, type(value).__name__, str(error)) from None
        return encode_json(value, self._target)

    def unpack(self, body: bytes | None, seq: int, path: str) -> Any:
        """The value of an event. Raises DecodeError if it isn't of the topic's type, LogError if it was damaged."""
        if body is None:
            raise LogError(
                path, f"event {seq} of {self._target} isn't what was published: it was damaged", "Restore from a copy"
            )
        try:
            return self._decode(body)
        except Exception as error:  # of msgspec, or of a __post_init__ of the user's; or it is nested too deeply
            raise DecodeError(f"{path}, {self._target}", seq, str(error) or type(error).__name__, "event") from None

    @staticmethod
    def headers(shown: str | None) -> Mapping[str, str]:
        return {} if shown is None else msgspec.json.decode(shown)


def _is_text(value: Any) -> bool:
    """Whether it is text that can be written as Unicode."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
