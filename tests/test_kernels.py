"""engines/functions.py and engines/vectors.py against NumPy in float64; a row's bits depend on that row alone."""

import functools
import subprocess
import sys

import numpy as np
import pytest

import gpt2
from tests.conftest import ROOT

numba = pytest.importorskip("numba")

from engines import functions, vectors  # noqa: E402
from engines.kernels import PANEL, narrow_columns, wide_columns  # noqa: E402
from engines.panels import packed  # noqa: E402
from engines.vectors import LANES  # noqa: E402

ROUNDING = 2.0**-24  # largest relative error of one float32 operation
ROWS = [*range(1, 14), 16, 17, 32, 33, 256]
# Of weights: [n_in, n_out]. Less than a panel of columns, whole panels, and panels of which the last is partial
SHAPES = [(5, 1), (16, 7), (48, 10), (36, 64), (64, 65), (7, 108), (160, 131), (32, 192), (3072, 66)]


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def cases():
    """A compiled function, gpt2.py's function and n, the length of the rows that both take."""
    for n_in, n_out in SHAPES:
        w, b = random(n_in, n_out), random(n_out)
        linear = functools.partial(functions.linear, w=packed(w), b=b)
        yield pytest.param(linear, functools.partial(gpt2.linear, w=w, b=b), n_in, id=f"linear-{n_in}-{n_out}")
    for n in (16, 48, 768):
        parts = {"g": random(n), "b": random(1, n)[0]}
        pair = (functools.partial(m.layer_norm, **parts) for m in (functions, gpt2))
        yield pytest.param(*pair, n, id=f"layer_norm-{n}")
        yield pytest.param(functions.gelu, gpt2.gelu, n, id=f"gelu-{n}")


FUNCTIONS = list(cases())


def assert_within(found, expected, bound):
    assert found.dtype == np.float32 and found.shape == expected.shape
    excess = np.max(np.abs(found - expected) - bound)
    assert excess <= 0, f"{excess} above the bound"


# Rounding


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_linear_has_the_error_of_its_additions(n_in, n_out):
    """One rounding for each product that is added, and one for the bias (Higham 2002, section 3.1).

    In long sums their errors cancel in part: n count no more than 6 sqrt(n) (Higham and Mary 2019, theorem 2.4).
    """
    x, w, b = random(max(ROWS), n_in), random(n_in, n_out), random(n_out)
    x64, w64, b64 = (a.astype(np.float64) for a in (x, w, b))
    exact, size = x64 @ w64, np.abs(x64) @ np.abs(w64)
    panels, n_roundings = packed(w), min(n_in, 6 * n_in**0.5)
    for bias, last in ((b, size + np.abs(b64)), (0, 0)):  # to add 0 is exact
        bound = ROUNDING * 1.001 * (n_roundings * size + last)
        for n in ROWS:
            assert_within(functions.linear(x[:n], panels, bias), exact[:n] + bias, bound[:n])


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("n", [16, 48, 768, 1600])
@pytest.mark.parametrize("n_rows", [1, 5, 256])
def test_layer_norm_is_exact_up_to_rounding(n_rows, n, mean):
    x, g, b = random(n_rows, n) + np.float32(mean), random(n), random(1, n)[0]
    expected = gpt2.layer_norm(*(a.astype(np.float64) for a in (x, g, b)))
    n_roundings = n // LANES + np.log2(LANES) + 4
    size = (np.abs(x) + np.abs(x).mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)
    bound = n_roundings * ROUNDING * (size * np.abs(g) + np.abs(b))
    assert_within(functions.layer_norm(x, g, b), expected, bound)
    constant = np.full((n_rows, n), 3, dtype=np.float32)
    np.testing.assert_array_equal(functions.layer_norm(constant, g, b), np.broadcast_to(b, (n_rows, n)))


@pytest.mark.parametrize("n", [16, 4800, 2**20])
def test_gelu_is_exact_up_to_rounding(n):
    """The rounding of the exponent counts as often as the exponent is large."""
    x = np.linspace(-12, 12, n, dtype=np.float32)
    expected = gpt2.gelu(x.astype(np.float64))
    bound = 4 * ROUNDING * np.abs(expected) * (2 + 2 * np.abs(x + 0.044715 * x.astype(np.float64) ** 3)) + 1e-14
    assert_within(functions.gelu(x), expected, bound)
    large = np.array([1e4, -1e4, 1e15, -1e15, 3e38, 0, -0.0, *[1e-40] * 9], dtype=np.float32)
    np.testing.assert_allclose(functions.gelu(large), np.maximum(large, 0), atol=1e-20)


@pytest.mark.parametrize("n", [5, 24, 36])
def test_other_sizes_go_to_gpt2(n):
    """Those that are no multiples of LANES, another eps, and float64; linear takes a weight that is an array."""
    x, g, w = random(3, n), random(n), random(n, 2 * n)
    np.testing.assert_array_equal(functions.linear(x, w, 0), gpt2.linear(x, w, 0))
    np.testing.assert_array_equal(functions.layer_norm(x, g, g), gpt2.layer_norm(x, g, g))
    np.testing.assert_array_equal(functions.gelu(x), gpt2.gelu(x))
    x, g = random(3, LANES), random(LANES)
    np.testing.assert_array_equal(functions.layer_norm(x, g, g, eps=0.1), gpt2.layer_norm(x, g, g, eps=0.1))
    x64 = x.astype(np.float64)
    np.testing.assert_array_equal(functions.layer_norm(x64, g, g), gpt2.layer_norm(x64, g, g))
    np.testing.assert_array_equal(functions.gelu(x64), gpt2.gelu(x64))


@pytest.mark.parametrize(("kernel", "function", "n"), FUNCTIONS)
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 1, 3)])
def test_leading_axes(kernel, function, n, lead):
    """Also of a view that is not contiguous, and no rows at all."""
    x = random(*lead, 2 * n)
    for part in (x[..., :n], np.ascontiguousarray(x[..., n:])):
        found = kernel(part)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, function(part), rtol=1e-4, atol=1e-4)


# Bits


@pytest.mark.parametrize(("kernel", "function", "n"), FUNCTIONS)
def test_a_row_has_the_same_bits_beside_any_other_rows(kernel, function, n):
    """More or fewer rows, so that other kernels and tiles are used; other neighbours."""
    x = random(2 * max(ROWS), n)
    together = kernel(x)
    np.testing.assert_array_equal(kernel(x[::-1]), together[::-1])
    for n_rows in ROWS:
        np.testing.assert_array_equal(kernel(x[:n_rows]), together[:n_rows])
        np.testing.assert_array_equal(kernel(x[n_rows : n_rows + 1]), together[n_rows : n_rows + 1])
        np.testing.assert_array_equal(kernel(x[5 : 5 + n_rows]), together[5 : 5 + n_rows])


@numba.njit
def products_of(x, panel, scales, wide, narrow):  # [rows, n_in], [n_in, PANEL], [PANEL] -> wide, narrow: [rows, PANEL]
    wide_columns(x, panel, scales, wide)
    for j in range(0, PANEL, LANES):
        narrow_columns(x, panel[:, j:], scales[j:], narrow[:, j:])


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 6, 7, 40])
def test_tiles_for_other_processors_have_the_same_bits(n_rows):
    """Those of one vector are used for many rows where there is no AVX-512."""
    wide, narrow = np.ones((2, n_rows, PANEL), np.float32)
    x, panel, scales = random(n_rows, 48), random(48, PANEL), random(PANEL)
    products_of(x, panel, scales, wide, narrow)
    np.testing.assert_array_equal(narrow, wide)
    np.testing.assert_allclose(wide, (x @ panel) * scales + 1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("a", [random(96)[::2], random(48)[::-1], random(48).astype(">f4"), random(48).astype(float)])
def test_gains_and_biases_of_any_strides_and_type(a):
    """The kernels read contiguous float32 elements."""
    x, w = random(3, 48), random(48, 48)
    np.testing.assert_allclose(functions.layer_norm(x, a, a), gpt2.layer_norm(x, a, a), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(functions.linear(x, packed(w), a), gpt2.linear(x, w, a), rtol=1e-4, atol=1e-4)
    for compiled in (lambda: functions.layer_norm(x, a[:8], a), lambda: functions.linear(x, packed(w), a[:8])):
        with pytest.raises(ValueError, match=r"\(8,\) instead of \(48,\)"):
            compiled()


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"48 .* 96"):
        functions.linear(random(3, 48), packed(random(96, 7)), 0)


THREADS = """
import numba
import numpy as np
from tests.test_kernels import FUNCTIONS, random
for kernel, _, n in (case.values for case in FUNCTIONS):
    results = []
    for n_threads in (1, 2, 3):
        numba.set_num_threads(n_threads)
        results.append([kernel(random(n_rows, n)).tobytes() for n_rows in (1, 5, 300)])
    assert results[0] == results[1] == results[2], n
print(numba.get_num_threads())
"""


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    done = subprocess.run([sys.executable, "-c", THREADS], check=False, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"3\n"), done.stderr


# NaN and infinity


@pytest.mark.parametrize(("kernel", "function", "n"), FUNCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n_rows", [2, 6, 256])
def test_what_is_not_finite_stays_so_and_in_its_row(kernel, function, n, value, n_rows):
    x = random(n_rows, n)
    expected, place = kernel(x), n_rows // 2
    x[place, n - 3] = value
    found = kernel(x)
    reached = slice(n - 3, n - 2) if function is gpt2.gelu else slice(None)  # gelu: of each element alone
    assert not np.isfinite(found[place, reached]).any()
    found[place, reached] = expected[place, reached]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_what_is_not_finite_in_a_weight_stays_in_its_column(n_in, n_out):
    x, w, b = random(5, n_in), random(n_in, n_out), random(n_out)
    w[n_in // 2, n_out // 2], b[-1] = np.nan, np.inf
    for n_rows in (1, 5):
        y = functions.linear(x[:n_rows], packed(w), b)
        expected = np.zeros(n_out)
        expected[-1] = np.inf
        expected[n_out // 2] = np.nan
        np.testing.assert_array_equal(np.where(np.isfinite(y), 0, y), np.broadcast_to(expected, y.shape))


# Vectors


@vectors.kernel()
def exp_of(x, y):  # [n] -> y: [n]
    for i in range(0, x.size, LANES):
        vectors.store(y, i, vectors.exp(vectors.load(x, i)))


def exp(x):
    """vectors.exp of an array of any length."""
    padded = np.pad(np.asarray(x, dtype=np.float32), (0, -len(x) % LANES))
    y = np.empty_like(padded)
    exp_of(padded, y)
    return y[: len(x)]


def test_exp_has_an_error_of_at_most_2_units_in_the_last_place():
    x = np.concatenate([np.linspace(-87.3, 88, 2**20), np.linspace(-1e-3, 1e-3, 2**16), random(2**16)])
    x = x.astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    units = np.abs(exp(x) - expected) / np.spacing(expected.astype(np.float32))
    assert units.max() <= 2, x[units.argmax()]


def test_exp_at_its_limits():
    zeros = [-np.inf, -1e38, -1000, -88]
    np.testing.assert_array_equal(exp(zeros), 0)
    ones = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-9, -1e-9]
    np.testing.assert_array_equal(exp(ones), 1)
    np.testing.assert_array_equal(exp([88, 89, 1e38, np.inf]), exp([88])[0])
    np.testing.assert_array_equal(exp([np.nan, 1.0]), [np.nan, exp([1.0])[0]])


@vectors.kernel()
def operations_of(x, results):  # [n, LANES] -> results: [n, 8, LANES]
    for i in range(len(x) - 1):
        a, b = vectors.load(x, (i, 0)), vectors.load(x, (i + 1, 0))
        vectors.store(results, (i, 0, 0), a + b)
        vectors.store(results, (i, 1, 0), a - b)
        vectors.store(results, (i, 2, 0), a * b)
        vectors.store(results, (i, 3, 0), a / b)
        vectors.store(results, (i, 4, 0), vectors.fma(a, b, a))
        vectors.store(results, (i, 5, 0), vectors.maximum(a, b))
        vectors.store(results, (i, 6, 0), vectors.splat(vectors.total(a)))
        vectors.store(results, (i, 7, 0), vectors.splat(vectors.largest(b)))


def test_operations_on_vectors():
    x = random(20, LANES)
    results = np.full((20, 8, LANES), np.nan, dtype=np.float32)
    operations_of(x, results)
    for a, b, found in zip(x[:-1], x[1:], results[:-1], strict=True):
        rounded_once = (a.astype(np.float64) * b + a).astype(np.float32)
        expected = [a + b, a - b, a * b, a / b, rounded_once, np.maximum(a, b)]
        np.testing.assert_array_equal(found[:6], expected)
        np.testing.assert_allclose(found[6], a.astype(np.float64).sum(), atol=np.abs(a).sum() * 4 * ROUNDING)
        np.testing.assert_array_equal(found[7], b.max())
