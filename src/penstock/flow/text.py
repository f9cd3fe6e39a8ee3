"""Numbers and tables as people read them: plain text, no wider than a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = [
    "WIDTH",
    "compact",
    "cut",
    "duration",
    "number",
    "percent",
    "printable",
    "rate",
    "table",
    "with_article",
    "wrapped",
]

WIDTH = 100
_NARROWEST = 5
_LONG = 10**7
_SCALES = ((10**12, "T"), (10**9, "G"), (10**6, "M"))


def printable(text: str) -> str:
    """The text with what isn't Unicode (bytes of a file's name, say) escaped, so that it can be stored and shown.

    >>> printable("caf\\udce9.txt")
    'caf\\\\udce9.txt'
    """
    return text.encode("utf-8", "backslashreplace").decode()


def with_article(name: str) -> str:
    """The name of a type as a sentence has it.

    >>> with_article("int"), with_article("str")
    ('an int', 'a str')
    """
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def number(count: int) -> str:
    """A count with its thousands set apart.

    >>> number(1234567)
    '1,234,567'
    """
    return f"{count:,}"


def compact(count: int) -> str:
    """A count in at most nine characters.

    >>> compact(9_999_999), compact(12_345_678), compact(10**12)
    ('9,999,999', '12.3 M', '1 T')
    """
    if count < _LONG:
        return number(count)
    size, unit = next(scale for scale in _SCALES if count >= scale[0])
    return f"{_short(count / size)} {unit}"


def percent(share: float) -> str:
    """A share as a percentage: whole, but for what would read as none or all.

    >>> percent(0.5), percent(0.004), percent(0.0), percent(0.997)
    ('50 %', '0.4 %', '0 %', '99.7 %')
    """
    if 0.0005 <= share < 0.0095 or 0.9905 < share < 0.9995:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """A time in the unit that suits it, from microseconds to days.

    >>> [duration(seconds) for seconds in (0, 2.5e-6, 0.0123, 7.25, 75, 3700, 200000)]
    ['0 s', '2.5 µs', '12.3 ms', '7.25 s', '1 min 15 s', '1 h 1 min', '2 d 7 h']
    """
    if seconds <= 0:
        return "0 s"
    for factor, unit in ((1e6, "µs"), (1e3, "ms"), (1.0, "s")):
        value = seconds * factor
        if value < (59.95 if unit == "s" else 999.5):
            return f"{_short(value)} {unit}"
    whole = round(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest} {small}" if rest else f"{whole // size} {unit}"
    return "1 min"


def rate(a_second: float) -> str:
    """A rate of items, a second or, where that is slow, a minute or an hour.

    >>> rate(1234567), rate(12.345), rate(0.05), rate(0.0)
    ('1,234,567 items/s', '12.3 items/s', '3 items/min', '0 items/s')
    """
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if a_second * factor >= 1 or unit == "h":
            break
    if not a_second:
        factor, unit = 1, "s"
    return f"{_short(a_second * factor)} items/{unit}"


def cut(text: str, width: int) -> str:
    """``text``, shortened in its middle to ``width`` characters if it is longer.

    >>> cut("a_rather_long_name", 9)
    'a_ra…name'
    """
    if len(text) <= width:
        return text
    front = width // 2
    return text[:front] + "…" + text[len(text) - (width - front - 1) :]


def wrapped(text: str, first: str = "", following: str = "") -> list[str]:
    """``text`` as lines of at most 100 characters, behind these indents."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=following)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> list[str]:
    """Lines of a table: the first column to the left and shortened to fit ``width``, the others to the right.

    >>> for line in table(["stage", "in"], [["ask", "1,000"], ["keep", "9"]]):
    ...     print(line)
    stage     in
    ask    1,000
    keep       9
    """
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    widths[0] = max(_NARROWEST, min(widths[0], width - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for row in (heads, *rows):
        cells = [cut(row[0], widths[0]).ljust(widths[0])]
        cells += [cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _short(value: float) -> str:
    """Three figures, without the zeros that say nothing."""
    if value >= 99.95:
        return f"{value:,.0f}"
    text = f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")
