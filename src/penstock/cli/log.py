"""``penstock log``: look at the topics of an event log, at their events, publish to them and trim them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from penstock.cli.logfile import check_log, in_log, json_value, known_topic, piped, read_place, shortened
from penstock.cli.outcome import DONE, INTERRUPTED, outcome, say
from penstock.errors import CannotEncode, DecodeError, PayloadTooLarge, PenstockError, PlanError

if TYPE_CHECKING:
    from penstock.events.event import Event
    from penstock.events.log import EventLog
    from penstock.events.reading import GroupInfo, TopicInfo
    from penstock.events.topic import Topic

__all__ = ["publish_lines", "show_topics", "tail_topic", "trim_topic"]

_TAIL = 10
_BATCH = 1000
_READ = 1 << 18
_LONGEST_LINE = 128 << 20  # several times the largest event, since JSON may be written with escapes


# -- topics -------------------------------------------------------------------------------------------------------


def show_topics(path: str) -> int:
    """Print the topics of a log with their groups and return the exit code."""

    async def look(log: EventLog) -> list[tuple[TopicInfo, list[GroupInfo]]]:
        return [(info, await log.topic(info.name).groups()) for info in await log.topics()]

    def work() -> int:
        found = in_log(path, look)
        if sys.stdout.isatty():
            _table(found)
            return DONE
        for info, groups in found:
            shown = {**info._asdict(), "groups": [group._asdict() for group in groups]}
            sys.stdout.buffer.write(msgspec.json.encode(shown) + b"\n")
        return DONE

    return outcome(lambda: piped(work))


def _table(found: list[tuple[TopicInfo, list[GroupInfo]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    topics = Table("topic", box=None, pad_edge=False)
    groups = Table("topic", "group", box=None, pad_edge=False)
    for name in ("events", "first", "next", "bytes", "groups", "dead"):
        topics.add_column(name, justify="right")
    for name in ("behind", "held", "waiting", "dead", "readers"):
        groups.add_column(name, justify="right")
    for info, its in found:
        topics.add_row(Text(info.name), *(f"{number:,}" for number in info[1:]))  # Text: a name may look like markup
        for group in its:
            groups.add_row(Text(info.name), Text(group.name), *(f"{number:,}" for number in group[1:]))
    if found:
        console.print(topics)
    if groups.row_count:
        console.print()
        console.print(groups)
    if not found:
        console.print("0 topics")


# -- tail ---------------------------------------------------------------------------------------------------------


def tail_topic(path: str, name: str, *, count: int | None, follow: bool, start: str | None) -> int:
    """Print the last events of a topic, or those from ``start`` on, and return the exit code.

    ``follow``: print what comes, too, until Ctrl-C.
    """

    def work() -> int:
        if count is not None and start is not None:
            raise PlanError("-n and --start were both given", "Give where to begin, or how many of the last")
        place = None if start is None else read_place("--start", start)

        async def print_them(log: EventLog) -> None:
            info = await known_topic(log, name)
            last = max(info.first, info.next - (_TAIL if count is None else count))
            write = _for_people() if sys.stdout.isatty() else _for_programs
            stop = None if follow else info.next
            events = log.topic(name, bytes).read(last if place is None else place, stop, follow=follow)
            try:
                async for event in events:
                    write(event)
                    if follow:
                        sys.stdout.flush()
            finally:
                await events.aclose()

        try:
            in_log(path, print_them)
        except KeyboardInterrupt:
            return INTERRUPTED  # without a word: it is how a tail that follows ends
        return DONE

    return outcome(lambda: piped(work))


def _for_programs(event: Event[bytes]) -> None:
    shown = {
        "position": event.position,
        "time": event.time,
        "key": event.key,
        "id": event.id,
        "headers": event.headers,
        **json_value(event.value),
    }
    sys.stdout.buffer.write(msgspec.json.encode(shown) + b"\n")


def _for_people() -> Callable[[Event[bytes]], None]:
    width = shutil.get_terminal_size().columns

    def write(event: Event[bytes]) -> None:
        time = event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        key = "" if event.key is None else f"  {event.key}"
        value = event.value[: 4 * width].decode(errors="backslashreplace")
        print(shortened(f"{event.position}  {time}{key}  {value}", width))

    return write


# -- publish ------------------------------------------------------------------------------------------------------


def publish_lines(path: str, name: str, *, key: str | None, id: str | None, text: bool) -> int:
    """Publish the lines of standard input to a topic and return the exit code."""

    def work() -> int:
        from penstock.events.log import EventLog

        if text and (key is not None or id is not None):
            raise PlanError("--text was given with --key or --id", "They name a field of a JSON object: leave one out")
        if path == ":memory:":
            raise PlanError("a log in memory ends with the command", "Give the path of a file")
        if os.path.exists(path) and (not os.path.isfile(path) or os.path.getsize(path)):
            check_log(path)
        log = EventLog(path)
        publishing = _Publishing(log.topic(name), key, id, text)
        log.open_sync()
        try:
            for number, lines in _numbered(_lines(0)):
                publishing.publish(number, lines)
        except KeyboardInterrupt:
            say(f"interrupted: {publishing.so_far()}")
            return INTERRUPTED
        except PenstockError as error:
            error.add_note(publishing.so_far())
            raise
        finally:
            log.close_sync()
        print(f"{_counted(publishing.count, 'line')} published to {name!r}")
        return DONE

    return outcome(lambda: piped(work))


class _Line(NamedTuple):
    """A line that can be published, and its number."""

    number: int
    value: Any


class _Publishing:
    """Publishes lines to a topic, and knows how many it has."""

    def __init__(self, topic: Topic[Any], key: str | None, id: str | None, text: bool) -> None:
        self._topic = topic
        self._text = text
        self._key = None if key is None else lambda value: _field(value, key)
        self._id = None if id is None else lambda value: _field(value, id)
        self.count = 0
        self._last = 0

    def so_far(self) -> str:
        if not self.count:
            return "no line was published"
        return f"{_counted(self.count, 'line')} published, up to line {self._last:,}"

    def publish(self, number: int, lines: list[bytes]) -> None:
        """Publish lines, of which the first has this number. Raises DecodeError for a bad one, with all those before
        it published."""
        good: list[_Line] = []
        for at, line in enumerate(lines, number):
            if not self._text and not line.strip():
                continue
            try:
                value = self._read(line)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                self._append(good)
                raise _refused(at, str(error)) from None
            good.append(_Line(at, value))
        self._append(good)

    def _read(self, line: bytes) -> Any:
        if self._text:
            return line.removesuffix(b"\r").decode()
        value = msgspec.json.decode(line)
        for name in (self._key, self._id):
            if name is not None:
                name(value)
        return value

    def _append(self, lines: list[_Line]) -> None:
        if not lines:
            return
        try:
            self._append_all(lines)
        except (CannotEncode, PayloadTooLarge):  # nothing of it is published
            for index, (number, value) in enumerate(lines):
                try:
                    self._topic.codec.pack(value)
                except (CannotEncode, PayloadTooLarge) as error:
                    self._append(lines[:index])
                    raise _refused(number, str(error)) from None
            raise

    def _append_all(self, lines: list[_Line]) -> None:
        from penstock.flow.commit import uninterrupted
        from penstock.flow.sync import run_blocking

        async def publish() -> None:
            await self._topic.publish_many([line.value for line in lines], key=self._key, id=self._id)
            self.count += len(lines)
            self._last = lines[-1].number

        run_blocking(lambda: uninterrupted(publish()))  # so that it is known after Ctrl-C how many were published


def _refused(number: int, reason: str) -> DecodeError:
    return DecodeError("standard input", number, f"{reason.removesuffix('.')}. Mend it and publish from there on")


def _field(value: Any, name: str) -> str:
    """The text or the whole number in a field of an object. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"an object with a field {name!r} was expected, and this is {_kind(value)}")
    if name not in value:
        raise ValueError(f"the object has no field {name!r}")
    found = value[name]
    if isinstance(found, str):
        return found
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    raise ValueError(f"the field {name!r} is {_kind(found)}, and must be text or a whole number")


def _kind(value: Any) -> str:
    """What JSON calls a value of this kind."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "a string", dict: "an object", list: "an array"}
    return names.get(type(value), "a number")


def _lines(descriptor: int) -> Iterator[list[bytes]]:
    """The lines that come, as soon as they do; many at once where they come quickly. Raises ValueError for one
    without an end."""
    begun: list[bytes] = []
    size = 0
    while chunk := _read(descriptor):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            begun.append(head)
            yield b"".join(begun).split(b"\n")
            begun, size = [], 0
        begun.append(tail)
        size += len(tail)
        if size > _LONGEST_LINE:
            raise ValueError(f"it has over {_LONGEST_LINE:,} bytes, and an event is a line")
    if last := b"".join(begun):
        yield [last]


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _READ)
    except OSError as error:
        raise PlanError(
            f"standard input can't be read: {error}", "Give lines: penstock log publish … < lines"
        ) from None


def _numbered(groups: Iterator[list[bytes]]) -> Iterator[tuple[int, list[bytes]]]:
    """Batches of lines, each with the number of its first line. Raises DecodeError."""
    number = 1
    try:
        for lines in groups:
            for begin in range(0, len(lines), _BATCH):
                yield number + begin, lines[begin : begin + _BATCH]
            number += len(lines)
    except PlanError:  # which is a ValueError, too, and not about a line
        raise
    except ValueError as error:
        raise _refused(number, str(error)) from None


# -- trim ---------------------------------------------------------------------------------------------------------


def trim_topic(
    path: str, name: str, *, keep: int | None, before: str | None, max_bytes: int | None, force: bool
) -> int:
    """Remove the oldest events of a topic, say how many, and return the exit code."""

    def work() -> int:
        if keep is None and before is None and max_bytes is None:
            raise PlanError("log trim was given no limit", "Say what may stay: --keep, --before or --max-bytes")
        limit = None if before is None else read_place("--before", before)

        async def trim(log: EventLog) -> tuple[int, bool]:
            from penstock.events.reading import seek

            await known_topic(log, name)
            place = limit
            if isinstance(limit, datetime):
                place = await log.look(seek, await log.number(name), int(limit.timestamp() * 1e6))
            removed = await log.topic(name).trim(before=place, keep=keep, max_bytes=max_bytes, force=force)
            left = await known_topic(log, name)
            over = keep is not None and left.events > keep
            over = over or (max_bytes is not None and left.bytes > max_bytes)
            return removed, over or (isinstance(place, int) and left.first < min(place, left.next))

        removed, more = in_log(path, trim)
        print(f"{_counted(removed, 'event')} removed from {name!r}")
        if more and not force:
            print("More stay than was asked, since a group still needs them: --force removes them, too")
        return DONE

    return outcome(lambda: piped(work))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)} {'was' if count == 1 else 'were'}"
