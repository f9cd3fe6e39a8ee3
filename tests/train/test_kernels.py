"""The loops beside plain NumPy: the same bits, the same memory, and a wall before them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from penstock.train import kernels

Array = NDArray[Any]

SIZES = (0, 1, 3, 1000, 100_003)
every_type = pytest.mark.parametrize("dtype", [np.float32, np.float64])
every_size = pytest.mark.parametrize("size", SIZES)

ALL = """
import json, sys
import numpy as np
from penstock.train import kernels

def everything(dtype):
    g, w, m = (np.sin(np.arange(11) + shift).astype(dtype) for shift in (0, 1, 2))
    v = m * m
    made = [kernels.squares(g), kernels.first_bad(g), kernels.first_bad(np.array([1, np.inf, np.nan], dtype))]
    kernels.sgd(w, g, 0.1, 0.3)
    made.append(w.tolist())
    kernels.momentum(w, m, g, 0.1, 0.3, 0.9)
    made += [w.tolist(), m.tolist()]
    kernels.adam(w, m, v, g, 0.1, 0.3, decay=0.01, step=3)
    made += [w.tolist(), m.tolist(), v.tolist()]
    kernels.accumulate(w, g)
    made.append(w.tolist())
    return made
"""


def vectors(size: int, dtype: type, count: int) -> list[Array]:
    random = np.random.default_rng(size)
    return [random.standard_normal(size).astype(dtype) for _ in range(count)]


def same(found: Array, expected: Array) -> bool:
    """Bit for bit."""
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def child(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# -- updates -----------------------------------------------------------------------------------------------------------


@every_type
@every_size
def test_sgd_is_numpys(dtype: type, size: int) -> None:
    w, g = vectors(size, dtype, 2)
    expected = w.copy()
    for _ in range(3):
        kernels.sgd(w, g, 0.1, 0.3)
        expected -= 0.1 * (0.3 * g)
    assert same(w, expected)


@every_type
@every_size
def test_momentum_is_numpys(dtype: type, size: int) -> None:
    w, m, g = vectors(size, dtype, 3)
    expected, mean = w.copy(), m.copy()
    for _ in range(3):
        kernels.momentum(w, m, g, 0.1, 0.3, 0.9)
        mean = 0.9 * mean + 0.3 * g
        expected -= 0.1 * mean
    assert same(w, expected)
    assert same(m, mean)


@every_type
@every_size
def test_adam_is_numpys(dtype: type, size: int) -> None:
    w, m, v, g = vectors(size, dtype, 4)
    v *= v
    expected, mean, square = w.copy(), m.copy(), v.copy()
    for step in (1, 2, 3):
        kernels.adam(w, m, v, g, 0.1, 0.3, (0.9, 0.99), 1e-6, 0.01, step)
        scaled = 0.3 * g
        mean = 0.9 * mean + (1 - 0.9) * scaled
        square = 0.99 * square + (1 - 0.99) * (scaled * scaled)
        change = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-6)
        expected = (1 - 0.1 * 0.01) * expected - 0.1 * change
    assert same(w, expected)
    assert same(m, mean)
    assert same(v, square)


@every_type
def test_a_scale_of_one_and_no_decay_are_as_if_they_weren_t_there(dtype: type) -> None:
    w, m, g = vectors(1000, dtype, 3)
    w[:2] = 0.0, -0.0
    expected = w - 0.1 * g
    kernels.sgd(w, g, 0.1)
    assert same(w, expected)
    expected, mean = w.copy(), 0.9 * m + g
    expected -= 0.1 * mean
    kernels.momentum(w, m, g, 0.1)
    assert same(w, expected)
    m, v = np.zeros_like(w), np.zeros_like(w)
    mean, square = (1 - 0.9) * g, (1 - 0.999) * (g * g)
    expected = w - 0.1 * ((mean / (1 - 0.9)) / (np.sqrt(square / (1 - 0.999)) + 1e-8))
    kernels.adam(w, m, v, g, 0.1)
    assert same(w, expected)


@every_type
@every_size
def test_gradients_are_added_up_as_numpy_does(dtype: type, size: int) -> None:
    total, g = vectors(size, dtype, 2)
    expected = total + g
    kernels.accumulate(total, g)
    assert same(total, expected)


# -- the check ---------------------------------------------------------------------------------------------------------


@every_type
@every_size
def test_squares(dtype: type, size: int) -> None:
    (g,) = vectors(size, dtype, 1)
    expected = float((g.astype(np.float64) ** 2).sum())
    assert kernels.squares(g) == pytest.approx(expected, rel=1e-12)
    assert kernels.first_bad(g) == -1


@given(g=npst.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_a_sum_is_finite_if_and_only_if_every_element_is(g: Array) -> None:
    """Whatever the elements, the largest ones too."""
    bad = [at for at, x in enumerate(g) if not np.isfinite(x)]
    assert math.isfinite(kernels.squares(g)) == (not bad)
    assert kernels.first_bad(g) == (bad[0] if bad else -1)


@every_type
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_seen_wherever_it_stands(dtype: type, bad: float) -> None:
    for size in (1, 2, 3, 4, 5, 63, 64, 65, 131):
        for at in range(size):
            g = np.ones(size, dtype)
            g[at] = bad
            assert not math.isfinite(kernels.squares(g))
            assert kernels.first_bad(g) == at


def test_large_numbers_overflow_their_sum_and_are_not_bad() -> None:
    g = np.array([1.0, -1e200])
    assert kernels.squares(g) == math.inf
    assert kernels.first_bad(g) == -1


# -- the wall ----------------------------------------------------------------------------------------------------------


@every_type
def test_a_gradient_may_be_read_only(dtype: type) -> None:
    w, g = vectors(10, dtype, 2)
    expected = w - 0.5 * g
    g.flags.writeable = False
    kernels.sgd(w, g, 0.5)
    assert same(w, expected)


@pytest.mark.parametrize(
    ("w", "g", "says"),
    [
        (np.zeros(3), np.ones(4), r"float64\[3\] beside an array float64\[4\]"),
        (np.zeros(3), np.ones(3, np.float32), r"float64\[3\] beside an array float32\[3\]"),
        (np.zeros(3), np.ones(3, ">f8"), r"float64\[3\] beside an array >f8\[3\]"),
        (np.zeros(3, np.int64), np.ones(3, np.int64), "give float32 or float64"),
        (np.zeros(3, np.float16), np.ones(3, np.float16), "give float32 or float64"),
        (np.zeros((2, 2)), np.ones((2, 2)), "give a contiguous vector"),
        (np.zeros(3), np.ones(6)[::2], "not contiguous: give a contiguous vector"),
        (np.zeros(6)[::2], np.ones(3), "not contiguous beside"),
        (np.frombuffer(bytes(24)), np.ones(3), "read-only beside"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_written(w: Array, g: Array, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kernels.sgd(w, g, 0.1)
    assert not w.any()


def test_nothing_of_the_arrays_size_is_allocated() -> None:
    w, m, v, g = vectors(250_000, np.float32, 4)
    v *= v

    def work() -> None:
        kernels.squares(g)
        kernels.first_bad(g)
        kernels.accumulate(m, g)
        kernels.sgd(w, g, 0.1)
        kernels.momentum(w, m, g, 0.1)
        kernels.adam(w, m, v, g, 0.1)

    work()  # compiling is done
    tracemalloc.start()
    try:
        work()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000


# -- with and without a compiler ---------------------------------------------------------------------------------------


@every_type
def test_without_the_compiler_the_loops_do_the_same(dtype: type) -> None:
    code = f"{ALL}\nprint(json.dumps(everything(sys.argv[1])))"
    plain = json.loads(ended(child(code, np.dtype(dtype).name, NUMBA_DISABLE_JIT="1")))
    space: dict[str, Any] = {}
    exec(ALL, space)
    for found, expected in zip(plain, space["everything"](dtype), strict=True):
        if isinstance(found, float):  # sums, in another order
            assert found == pytest.approx(expected, rel=1e-14)
        else:
            assert found == expected


def test_without_numba_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["numba"] = None
import numpy as np
from penstock.errors import MissingDependency
from penstock.train import kernels
try:
    kernels.squares(np.zeros(3))
except MissingDependency as error:
    print(error)
"""
    assert ended(child(code)) == "Training needs numba. Install it, or penstock with its extra: penstock[train]\n"


COLD = """
import sys
import numpy as np
from penstock.train import kernels
for dtype in sys.argv[1:]:
    w = np.ones(3, dtype)
    kernels.sgd(w, w.copy(), 0.1)
    print(w.dtype, *w)
"""


def test_processes_that_start_at_once_share_a_cold_cache(tmp_path: Path, unmeasured: None) -> None:
    """One order of the types in each: what the first compiles for one type must never be taken for the other's."""
    orders = [("float32", "float64"), ("float64", "float32")]
    processes = [child(COLD, *order, NUMBA_CACHE_DIR=str(tmp_path)) for order in orders]
    expected = [f"{dtype} {' '.join(map(str, np.ones(3, dtype) - 0.1 * np.ones(3, dtype)))}" for dtype in orders[0]]
    for order, said in zip(orders, map(ended, processes), strict=True):
        assert said.splitlines() == expected[:: 1 if order == orders[0] else -1]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(path.suffix for path in kept) == [".lock", ".nbc", ".nbc", ".nbi"]
    assert ended(child(COLD, *orders[0], NUMBA_CACHE_DIR=str(tmp_path))).splitlines() == expected
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert again == kept, "the second start compiled"


def test_where_nothing_can_be_written_it_compiles_anyway(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code = "import numpy as np\nfrom penstock.train import kernels\nprint(kernels.squares(np.ones(7)))"
    nowhere = {"NUMBA_CACHE_DIR": str(blocked), "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    assert ended(child(code, **nowhere)) == "7.0\n"
