"""``Fetched``: what came back for one source, and the row it is written as."""

from __future__ import annotations

import codecs
import re
from typing import Any

import msgspec

from penstock.errors import DecodeError
from penstock.flow.codec import decoder
from penstock.flow.redact import redact_url
from penstock.net.row import Row

__all__ = ["Fetched", "decode_text", "is_text"]

_CHARSET = re.compile(r"""charset\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_NO_CHARSETS = frozenset({"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7"})
_TEXT = re.compile(r"text/|application/(.*\+)?(json|xml|yaml|javascript|x-javascript|x-ndjson|x-www-form-urlencoded)\b")
_BYTE = re.compile(r"\(byte (\d+)\)")


class Fetched(Row):
    """What ``ps.fetch`` gives for a source.

    ``source``: the row, URL or Request itself. ``url``: where the answer came from, after redirects. ``status``.
    ``headers``: a dict by lower-case name; a header that came more than once is joined by ``", "``. ``body``: bytes,
    decompressed; empty if it was saved, and then ``path`` names the file. ``elapsed``: seconds of the attempt that
    succeeded. ``attempts``: how many there were (where one object is listed twice and in flight twice, those of both).

    As a mapping it is the row that outputs write: these fields, with the body as ``text`` where it is text.
    """

    __slots__ = ("attempts", "body", "elapsed", "headers", "path", "source", "status", "url")

    def __init__(
        self,
        source: Any,
        url: str,
        status: int,
        headers: dict[str, str],
        body: bytes,
        elapsed: float,
        attempts: int = 1,
        path: str | None = None,
    ) -> None:
        self.source = source
        self.url = url
        self.status = status
        self.headers = headers
        self.body = body
        self.elapsed = elapsed
        self.attempts = attempts
        self.path = path

    def text(self) -> str:
        """The body as text: by the charset of its content type, else by its byte order mark, else as UTF-8.

        What can't be decoded becomes U+FFFD.

        >>> Fetched("a", "a", 200, {"content-type": "text/plain; charset=latin-1"}, b"caf\\xe9", 0.0).text()
        'café'
        """
        return decode_text(self.body, self.headers.get("content-type", ""))

    def json(self, type: Any = None) -> Any:
        """The body, decoded from JSON; ``type``: what it is to be, checked (a Struct, a dataclass, ``dict[str, int]``).

        Raises DecodeError, which names the URL and the line, for what isn't JSON or not of that type.

        >>> Fetched("a", "a", 200, {}, b'{"n": 1}', 0.0).json()
        {'n': 1}
        """
        body = self.body.removeprefix(codecs.BOM_UTF8)
        try:
            return decoder(type)(body)
        except msgspec.DecodeError as error:
            found = _BYTE.search(str(error))
            line = body.count(b"\n", 0, int(found[1])) + 1 if found is not None else 1
            raise DecodeError(redact_url(self.url), line, str(error)) from None

    def as_row(self) -> dict[str, Any]:
        """The row that outputs write: the body as ``text`` if it is text, and else as ``body``."""
        content_type = self.headers.get("content-type", "")
        text = self.text() if self.path is None and is_text(self.body, content_type) else None
        return {
            "source": self.source,
            "url": redact_url(self.url),
            "status": self.status,
            "headers": self.headers,
            "text": text,
            "body": None if self.path is not None or text is not None else self.body,
            "path": self.path,
            "elapsed": self.elapsed,
            "attempts": self.attempts,
        }

    def __repr__(self) -> str:
        kept = f"{len(self.body):,} bytes" if self.path is None else f"in {self.path}"
        return f"Fetched({self.status}, {redact_url(self.url)!r}, {kept})"

    def _parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in Fetched.__slots__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fetched) and self._parts() == other._parts()

    __hash__ = None  # type: ignore[assignment]  # it holds a dict


def decode_text(body: bytes, content_type: str) -> str:
    """Bytes as text, by the charset of the content type, else the byte order mark, else UTF-8."""
    named = _CHARSET.search(content_type)
    if named is not None:
        try:
            charset = codecs.lookup(named[1])
            if charset.name not in _NO_CHARSETS:
                return body.decode(named[1], "replace").removeprefix("\ufeff")
        except (LookupError, UnicodeError):  # a charset that nobody knows says nothing
            pass
    for mark, usual in _MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(usual, "replace")
    return body.decode("utf-8", "replace")


def is_text(body: bytes, content_type: str) -> bool:
    """Whether a body is text: by its content type; if there is none, by being UTF-8 without a NUL."""
    if content_type:
        return _TEXT.match(content_type.lower().strip()) is not None
    if b"\0" in body:
        return False
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True
