"""Output as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.errors import CannotEncode, OutputRejected
from penstock.files.stream import StreamOutput
from penstock.flow.codec import encode_json, encode_lines
from penstock.flow.contract import Origin

__all__ = ["JsonLinesOutput"]


class JsonLinesOutput(StreamOutput):
    """One line of JSON for each output."""

    kind = "jsonl"

    def _encode(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> bytes:
        try:
            return encode_lines([value for _, values in outputs for value in values], self.path)
        except CannotEncode:
            raise OutputRejected(self._guilty(outputs)) from None

    def _guilty(self, outputs: Sequence[tuple[Origin, Sequence[Any]]]) -> list[tuple[int, Exception]]:
        rejected: list[tuple[int, Exception]] = []
        for index, (_, values) in enumerate(outputs):
            try:
                for value in values:
                    encode_json(value, self.path)
            except CannotEncode as error:
                rejected.append((index, error))
        return rejected
