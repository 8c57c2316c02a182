"""engines/kernels.py and engines/vectors.py against NumPy in float64; a row's bits depend on that row alone."""

import subprocess
import sys

import numpy as np
import pytest

import gpt2
from tests.conftest import ROOT

numba = pytest.importorskip("numba")

from engines import kernels, vectors  # noqa: E402
from engines.vectors import LANES  # noqa: E402

ROUNDING = 2.0**-24  # largest relative error of one float32 operation
ROWS = [*range(1, 10), 16, 17, 256]
SHAPES = [(16, 7), (48, 8), (64, 9), (48, 10), (160, 131), (3072, 66)]  # of weights: [n_in, n_out]
OTHER_SHAPES = [(36, 108), (48, 3), (5, 1)]  # that gpt2.py's own function takes


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def weight(n_in, n_out):
    """A weight and a bias in the kernels' layout."""
    return kernels.transposed(random(n_in, n_out)), random(n_out)


def functions():
    """A kernel, gpt2.py's function and n, the length of the rows that both take."""
    for n_in, n_out in SHAPES:
        w, b = weight(n_in, n_out)
        pair = (lambda x, linear=m.linear, w=w, b=b: linear(x, w, b) for m in (kernels, gpt2))
        yield pytest.param(*pair, n_in, id=f"linear-{n_in}-{n_out}")
    for n in (16, 48, 768):
        g, b = random(n), random(1, n)[0]
        pair = (lambda x, layer_norm=m.layer_norm, g=g, b=b: layer_norm(x, g, b) for m in (kernels, gpt2))
        yield pytest.param(*pair, n, id=f"layer_norm-{n}")
        yield pytest.param(kernels.gelu, gpt2.gelu, n, id=f"gelu-{n}")


FUNCTIONS = list(functions())


def assert_within(found, expected, bound):
    assert found.dtype == np.float32 and found.shape == expected.shape
    excess = np.max(np.abs(found - expected) - bound)
    assert excess <= 0, f"{excess} above the bound"


# Rounding


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
@pytest.mark.parametrize("n_rows", ROWS)
def test_linear_has_the_error_of_its_additions(n_rows, n_in, n_out):
    """n_in/LANES products in each element of a vector, a tree of its elements, the bias (Higham 2002, section 3.1)."""
    x, (w, b) = random(n_rows, n_in), weight(n_in, n_out)
    x64, w64, b64 = (a.astype(np.float64) for a in (x, w, b))
    n_roundings = n_in // LANES + np.log2(LANES) + 1
    for bias, magnitude in ((b, np.abs(b64)), (0, 0)):
        bound = n_roundings * ROUNDING * 1.001 * (np.abs(x64) @ np.abs(w64) + magnitude)
        assert_within(kernels.linear(x, w, bias), x64 @ w64 + bias, bound)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("n", [16, 48, 768, 1600])
@pytest.mark.parametrize("n_rows", [1, 5, 256])
def test_layer_norm_is_exact_up_to_rounding(n_rows, n, mean):
    x, g, b = random(n_rows, n) + np.float32(mean), random(n), random(1, n)[0]
    expected = gpt2.layer_norm(*(a.astype(np.float64) for a in (x, g, b)))
    n_roundings = n // LANES + np.log2(LANES) + 4
    size = (np.abs(x) + np.abs(x).mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)
    bound = n_roundings * ROUNDING * (size * np.abs(g) + np.abs(b))
    assert_within(kernels.layer_norm(x, g, b), expected, bound)
    constant = np.full((n_rows, n), 3, dtype=np.float32)
    np.testing.assert_array_equal(kernels.layer_norm(constant, g, b), np.broadcast_to(b, (n_rows, n)))


@pytest.mark.parametrize("n", [16, 4800, 2**20])
def test_gelu_is_exact_up_to_rounding(n):
    """The rounding of the exponent counts as often as the exponent is large."""
    x = np.linspace(-12, 12, n, dtype=np.float32)
    expected = gpt2.gelu(x.astype(np.float64))
    bound = 4 * ROUNDING * np.abs(expected) * (2 + 2 * np.abs(x + 0.044715 * x.astype(np.float64) ** 3)) + 1e-14
    assert_within(kernels.gelu(x), expected, bound)
    large = np.array([1e4, -1e4, 1e15, -1e15, 3e38, 0, -0.0, *[1e-40] * 9], dtype=np.float32)
    np.testing.assert_allclose(kernels.gelu(large), np.maximum(large, 0), atol=1e-20)


@pytest.mark.parametrize(("n_in", "n_out"), OTHER_SHAPES)
def test_other_sizes_go_to_gpt2(n_in, n_out):
    x, (w, b), g = random(3, n_in), weight(n_in, n_out), random(n_in)
    np.testing.assert_array_equal(kernels.linear(x, w, b), gpt2.linear(x, w, b))
    if n_in % LANES:
        np.testing.assert_array_equal(kernels.layer_norm(x, g, g), gpt2.layer_norm(x, g, g))
        np.testing.assert_array_equal(kernels.gelu(x), gpt2.gelu(x))


@pytest.mark.parametrize(("kernel", "function", "n"), FUNCTIONS)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
def test_leading_axes(kernel, function, n, lead):
    """Also of a view that is not contiguous."""
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
    w[n_in // 2, 1], b[2] = np.nan, np.inf
    y = kernels.linear(x, kernels.transposed(w), b)
    assert np.isnan(y[:, 1]).all() and np.isinf(y[:, 2]).all() and np.isfinite(np.delete(y, [1, 2], axis=1)).all()


# The layout


@pytest.mark.parametrize("shape", [(16, 16), (48, 131), (1, 5), (37, 53), (768, 64)])
def test_a_weight_is_copied_into_fortran_order(shape):
    w = random(*shape)
    copy = kernels.transposed(w)
    np.testing.assert_array_equal(copy, w)
    assert copy.T.flags.c_contiguous and not copy.flags.writeable and not np.shares_memory(copy, w)


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
