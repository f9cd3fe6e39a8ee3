"""Decompression in bounded steps, whatever the pieces it comes in."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.net.hostile import bombs

from penstock.flow.expand import Corrupt
from penstock.net.decoding import accepted_encodings, make_decoder


def raw_deflate(data: bytes) -> bytes:
    machine = zlib.compressobj(wbits=-15)
    return machine.compress(data) + machine.flush()


ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "members": ("gzip", lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:])),
    "padded": ("gzip", lambda data: gzip.compress(data) + b"\0" * 7),
    "deflate": ("deflate", zlib.compress),
    "raw": ("deflate", raw_deflate),
    "zstd": ("zstd", zstandard.compress),
    "frames": ("zstd", lambda data: zstandard.compress(data[:5]) + zstandard.compress(data[5:])),
    "identity": ("identity, gzip", gzip.compress),
}


@pytest.mark.parametrize("kind", ENCODERS)
@given(data=st.binary(max_size=3000), size=st.integers(1, 500))
def test_any_body_comes_back_from_any_pieces(kind: str, data: bytes, size: int) -> None:
    name, encode = ENCODERS[kind]
    encoded = encode(data)
    decoder = make_decoder(name)
    assert decoder is not None
    pieces = [piece for at in range(0, len(encoded), size) for piece in decoder.feed(encoded[at : at + size])]
    decoder.finish()
    assert b"".join(pieces) == data


@pytest.mark.parametrize("kind", ["gzip", "deflate", "raw", "zstd"])
@given(data=st.binary(min_size=1, max_size=300), cut=st.integers(1, 8))
def test_a_body_that_ends_too_early_is_told_from_a_whole_one(kind: str, data: bytes, cut: int) -> None:
    name, encode = ENCODERS[kind]
    encoded = encode(data)
    decoder = make_decoder(name)
    assert decoder is not None
    with pytest.raises(Corrupt, match="too early"):
        list(decoder.feed(encoded[: max(1, len(encoded) - cut)]))
        decoder.finish()


@pytest.mark.parametrize("kind", ["gzip", "deflate", "zstd"])
def test_a_body_that_isn_t_compressed_is_broken(kind: str) -> None:
    decoder = make_decoder(kind)
    assert decoder is not None
    with pytest.raises(Corrupt, match="damaged"):
        list(decoder.feed(b"\x28\xb5\x2f\xfd\xff\xffthis was never compressed"))


@pytest.mark.parametrize("kind", ["gzip", "deflate", "zstd"])
def test_a_bomb_is_expanded_in_small_pieces(kind: str) -> None:
    """All of it is looked at, and never more than a few megabytes of it are there."""
    data = bombs(kind)
    decoder = make_decoder(kind)
    assert decoder is not None
    tracemalloc.start()
    try:
        size = sum(len(piece) for piece in decoder.feed(data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == 64 * 1024 * 1024
    assert peak < 20_000_000


@pytest.mark.parametrize("encoding", ["", "identity", " identity , identity"])
def test_nothing_is_to_be_done(encoding: str) -> None:
    assert make_decoder(encoding) is None


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "compress", "x"])
def test_what_wasn_t_asked_for_is_refused(encoding: str) -> None:
    with pytest.raises(Corrupt, match="wasn't asked for"):
        make_decoder(encoding)


def test_zstd_is_asked_for_where_it_can_be_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accepted_encodings() == "gzip, deflate, zstd"
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert accepted_encodings() == "gzip, deflate"
    with pytest.raises(Corrupt):
        make_decoder("zstd")
