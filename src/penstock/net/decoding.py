"""What a body's Content-Encoding says, and the decoder for it."""

from __future__ import annotations

from typing import Any

from penstock.flow.expand import Corrupt, Decoder, Deflate, Gzip, Zstd

__all__ = ["accepted_encodings", "make_decoder"]

_ACCEPTED = "gzip, deflate"  # what can always be expanded; zstd too where the package zstandard is installed
_ZSTD_WINDOW = 8 * 1024 * 1024  # what a decoder must accept; a larger window is memory that the sender chooses


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard


def accepted_encodings() -> str:
    """What ``Accept-Encoding`` says."""
    return _ACCEPTED if _zstandard() is None else f"{_ACCEPTED}, zstd"


def make_decoder(encoding: str) -> Decoder | None:
    """The decoder for a Content-Encoding; None where nothing is to be done. Raises Corrupt for one that isn't known."""
    names = [name for name in encoding.lower().replace(" ", "").split(",") if name and name != "identity"]
    if not names:
        return None
    if len(names) == 1:
        name = names[0]
        if name in ("gzip", "x-gzip"):
            return Gzip()
        if name == "deflate":
            return Deflate()
        if name == "zstd" and (zstandard := _zstandard()) is not None:
            return Zstd(zstandard, _ZSTD_WINDOW)
    raise Corrupt(f"its Content-Encoding is {encoding!r}, which wasn't asked for and can't be expanded")
