from __future__ import annotations

import gc
import os
import pickle
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.place.shm import LEAST, SIZE, WHOLE, Arena, Window, create

MEGABYTE = 1024 * 1024


@pytest.fixture
def ends() -> Iterator[tuple[Arena, Window]]:
    descriptor = create(WHOLE)
    arena, window = Arena(descriptor), Window(descriptor)
    os.close(descriptor)
    yield arena, window
    window.retire()
    arena.close()


def resident(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def test_what_is_placed_can_be_read(ends: tuple[Arena, Window]) -> None:
    arena, window = ends
    offset = arena.place([b"ab" * LEAST, memoryview(b"c" * LEAST)], 3 * LEAST)
    assert bytes(window.read(offset, 3 * LEAST)) == b"ab" * LEAST + b"c" * LEAST
    window.release(offset)


def test_a_block_is_recycled_when_the_last_array_on_it_is_gone(ends: tuple[Arena, Window]) -> None:
    arena, window = ends
    first = arena.place([b"1" * LEAST], LEAST)
    view = window.lend(first, LEAST)
    array = np.frombuffer(view, dtype=np.uint8)[10:]
    part = array[5:].reshape(-1, 1)
    view.release()  # it can be released while arrays live: that says nothing
    del view, array
    others = [arena.place([b"2" * LEAST], LEAST) for _ in range(50)]
    assert first not in others
    assert (part == ord("1")).all()
    del part
    for other in others:
        window.release(other)
    assert first in [arena.place([b"3" * LEAST], LEAST) for _ in range(51)]


def test_arrays_are_built_on_the_block_itself(ends: tuple[Arena, Window]) -> None:
    arena, window = ends
    given = np.arange(100_000)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(given, protocol=5, buffer_callback=buffers.append)
    offset = arena.place([buffers[0].raw()], given.nbytes)
    got = pickle.loads(data, buffers=[window.lend(offset, given.nbytes)])
    assert (got == given).all()
    got[0] = 77
    assert window.read(offset, 1)[0] == 77
    assert given[0] == 0


def test_a_full_arena_says_so_and_nobody_waits(ends: tuple[Arena, Window]) -> None:
    arena, window = ends
    offsets = [arena.place([], SIZE // 4) for _ in range(4)]
    assert -1 not in offsets
    assert arena.place([], LEAST) == -1
    window.release(offsets[1])
    window.release(offsets[2])
    assert arena.place([], SIZE // 2) == offsets[1]
    assert arena.place([], SIZE + 1) == -1


def test_what_was_never_sent_can_be_taken_back(ends: tuple[Arena, Window]) -> None:
    arena, _ = ends
    arena.free(arena.place([], SIZE))
    assert arena.place([], SIZE) >= 0


def test_a_forked_copy_gives_nothing_back(ends: tuple[Arena, Window]) -> None:
    arena, window = ends
    array = np.frombuffer(window.lend(arena.place([b"1" * LEAST], LEAST), LEAST), dtype=np.uint8)
    child = os.fork()
    if not child:
        del array
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert arena.place([b"2" * LEAST] * (SIZE // LEAST), SIZE) == -1
    for _ in range(20):
        arena.place([b"2" * LEAST], LEAST)
    assert (array == ord("1")).all()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can give pages of a shared file back")
def test_a_retired_window_keeps_only_what_is_held() -> None:
    descriptor = create(WHOLE)
    arena, window = Arena(descriptor), Window(descriptor)
    held = []
    for x in range(8):
        data = bytes([x]) * MEGABYTE
        held.append(np.frombuffer(window.lend(arena.place([data], MEGABYTE), MEGABYTE), dtype=np.uint8))
    assert resident(descriptor) > 8 * MEGABYTE
    del held[1::2]
    arena.close()
    window.retire()
    assert resident(descriptor) <= 4 * MEGABYTE + 65536
    assert [(array == 2 * x).all() for x, array in enumerate(held)] == [True] * 4
    del held[:]
    assert resident(descriptor) <= 65536
    os.close(descriptor)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)), max_size=80))
def test_blocks_never_overlap(steps: list[tuple[int, int]]) -> None:
    """Whatever is placed and let go in whatever order, what is lent keeps its bytes."""
    descriptor = create(WHOLE)
    arena, window = Arena(descriptor), Window(descriptor)
    os.close(descriptor)
    lent: list[tuple[int, int]] = []
    for cells, victim in steps:
        size = cells * (LEAST // 8)
        offset = arena.place([], size)
        assert offset >= 0
        room = max(size, LEAST)
        assert all(offset + room <= start or start + length <= offset for start, length in lent)
        lent.append((offset, room))
        if victim < len(lent):
            window.release(lent.pop(victim)[0])
    for offset, _ in lent:
        window.release(offset)
    assert arena.place([], SIZE) >= 0
    arena.close()
