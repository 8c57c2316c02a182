"""engines/attention.py against gpt2.attention in float64; a query's bits do not depend on what is computed with it."""

import copy
import hashlib
import subprocess
import sys

import numpy as np
import pytest

import gpt2
from tests.conftest import ROOT, one_line_error

pytest.importorskip("numba")

from engines import attention
from engines.attention import KVCache, RowCaches

N_HEAD = 3


def random_qkv(seed, *lead, n_seq, d):
    """Queries, keys and values as mha makes them: views of one array, [*lead, n_seq, 3*n_embd]."""
    x = np.random.default_rng(seed).standard_normal((*lead, n_seq, 3 * N_HEAD * d), dtype=np.float32)
    return [gpt2.split_heads(a, N_HEAD) for a in np.split(x, 3, axis=-1)]


def positions(qkv, start, stop):
    return [a[..., start:stop, :] for a in qkv]


def in_parts(qkv, ends, cache):
    """Attend with a cache, up to each of these positions in turn."""
    results = [cache.attend(*positions(qkv, i, j)) for i, j in zip([0, *ends], ends, strict=False)]
    return np.concatenate(results, axis=-2)


def truth(qkv):
    return gpt2.attention(*(a.astype(float) for a in qkv))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("d", [16, 32, 48, 64, 80, 128])
@pytest.mark.parametrize(
    ("n_past", "n_q"), [(0, 1), (0, 2), (0, 70), (1, 1), (3, 5), (16, 3), (62, 1), (63, 2), (70, 66)]
)
def test_agrees_with_float64(lead, d, n_past, n_q):
    qkv = random_qkv(d, *lead, n_seq=n_past + n_q, d=d)
    result = in_parts(qkv, [n_past, n_past + n_q] if n_past else [n_q], KVCache(n_past + n_q))
    np.testing.assert_allclose(result, truth(qkv), rtol=1e-5, atol=1e-5)
    uncached = attention.attention(*qkv)
    np.testing.assert_array_equal(uncached, result)
    q, k, v = qkv  # the last queries alone, without a cache
    np.testing.assert_array_equal(attention.attention(q[..., n_past:, :], k, v), result[..., n_past:, :])
    x = np.swapaxes(uncached, -2, -3)
    assert np.shares_memory(x, x.reshape(*x.shape[:-2], -1)), "mha would copy it"


@pytest.mark.parametrize("d", [16, 64])
def test_same_bits_in_any_company(d):
    """In chunks of any length, in a batch beside longer and shorter rows, and with one thread."""
    n = 150
    rows = random_qkv(1, 3, n_seq=n, d=d)
    expected = attention.attention(*rows)
    for chunk in (1, 2, 3, 7, 64, n):
        result = in_parts(rows, [*range(chunk, n, chunk), n], KVCache(n))
        np.testing.assert_array_equal(result, expected, err_msg=f"{chunk} at a time")
    pasts = [5, 130, 64]
    caches = [KVCache(n + i) for i in range(3)]
    for i, (cache, n_past) in enumerate(zip(caches, pasts, strict=True)):
        cache.attend(*positions([a[i] for a in rows], 0, n_past))
    q, k, v = (np.stack([a[i, :, p : p + 1] for i, p in enumerate(pasts)]) for a in rows)
    result = RowCaches(caches).attend(q, k, v)
    np.testing.assert_array_equal(result, np.stack([expected[i, :, p : p + 1] for i, p in enumerate(pasts)]))
    assert [cache.n_past for cache in caches] == [6, 131, 65]


def digest():
    return hashlib.sha256(attention.attention(*random_qkv(2, n_seq=200, d=64)).tobytes()).hexdigest()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_same_bits_with_any_number_of_threads(monkeypatch, n_threads):
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(n_threads))
    code = "import numba; from tests.test_attention import digest; print(digest(), numba.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{digest()} {n_threads}\n", done.stderr


@pytest.mark.parametrize("d", [12, 16, 64])
def test_truncated_cache(d):
    """Lowering n_past discards the newest positions, whatever they were; others take their place."""
    qkv, cache = random_qkv(3, n_seq=80, d=d), KVCache(80)
    expected = in_parts(qkv, [40, 80], KVCache(80))
    cache.attend(*positions(qkv, 0, 40))
    cache.attend(*(np.full_like(a, np.nan) for a in positions(qkv, 40, 80)))
    for n_past in (40, 20, 63):  # the cache's memory beyond n_past holds NaN, then another continuation
        cache.n_past = min(n_past, 40)
        result = cache.attend(*positions(qkv, cache.n_past, n_past + 1))
        np.testing.assert_allclose(result[..., -1, :], expected[..., n_past, :], rtol=1e-5, atol=1e-6)
    assert cache.n_past == 64


@pytest.mark.parametrize("d", [12, 64])
def test_copies_are_independent(d):
    """Each goes on after the same beginning; in turns, so that one would overwrite what the other reads next."""
    qkv, cache = random_qkv(4, n_seq=70, d=d), KVCache(70)
    assert copy.deepcopy(cache).n_past == 0
    other = [np.concatenate([a[:, :30], -a[:, 30:]], axis=1) for a in qkv]
    cache.attend(*positions(qkv, 0, 30))
    pairs = (cache, qkv), (copy.deepcopy(cache), other)
    expected = [in_parts(a, [30, 50, 70], KVCache(70)) for _, a in pairs]
    for i, j in ((30, 50), (50, 70)):
        for (own, a), results in zip(pairs, expected, strict=True):
            np.testing.assert_array_equal(own.attend(*positions(a, i, j)), results[:, i:j])


def test_memory_beyond_the_positions_is_not_used(monkeypatch):
    """Wherever np.empty's memory holds NaN."""
    qkv = random_qkv(5, n_seq=67, d=64)
    expected = in_parts(qkv, [5, 67], KVCache(200))
    monkeypatch.setattr(np, "empty", np.zeros)
    cache = KVCache(200)
    cache.attend(*positions(qkv, 0, 5))
    cache.kv[:] = np.where(cache.kv == 0, np.nan, cache.kv)
    np.testing.assert_array_equal(cache.attend(*positions(qkv, 5, 67)), expected[..., 5:, :])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("position", [0, 33, 66])
def test_what_is_not_finite_shows(bad, which, position):
    """As in gpt2.attention, from its position on; so that choose() finds it in the logits."""
    qkv = random_qkv(6, n_seq=67, d=64)
    qkv[which][1, position, 40] = bad
    result = attention.attention(*qkv)
    with np.errstate(invalid="ignore"):
        expected = truth(qkv)
    following = slice(position, position + 1 if which == 0 else None)  # a query concerns its own result only
    np.testing.assert_array_equal(np.isnan(result[:, following]), np.isnan(expected[:, following]))
    assert np.all(np.isfinite(result[[0, 2]])) and np.all(np.isfinite(result[:, : max(0, position - 3)]))


@pytest.mark.parametrize("d", [12, 64])
def test_cache_overflow(d):
    cache = KVCache(5)
    cache.attend(*random_qkv(7, n_seq=3, d=d))
    with one_line_error(3, 6, 5, kind=ValueError):
        cache.attend(*random_qkv(7, n_seq=3, d=d))
    assert cache.n_past == 3


def test_shapes_that_do_not_fit_are_refused():
    """The kernel works with addresses. Nothing is appended, and the cache can still be used."""
    qkv, cache = random_qkv(9, 2, n_seq=4, d=16), KVCache(4)
    q, k, v = qkv
    for wrong in (
        (q, k, v[:1]),
        (q, k, v[..., :3, :]),
        (q, k[..., :8], v),
        (q[:1], k, v),
        (q, k[:, 1:], v[:, 1:]),
        (q, k[..., 1:, :], v[..., 1:, :]),
    ):
        with pytest.raises(ValueError):
            cache.attend(*wrong)
        assert cache.n_past == 0
    expected = attention.attention(*qkv)
    np.testing.assert_array_equal(cache.attend(*qkv), expected)


def test_any_strides():
    """Rows that overlap or lie apart, in another order of the axes, and keys and values that differ in that."""
    q, k, v = random_qkv(10, 2, n_seq=9, d=32)
    same = np.broadcast_to(k[..., :1, :], k.shape)
    wide = np.repeat(v, 2, axis=-1)[..., ::2]
    fortran = np.asfortranarray(q)
    for views in (
        (q, same, v),
        (q, k, wide),
        (fortran, wide, same),
        (q[::-1], k[::-1], v[::-1]),
        (q, k[..., ::-1, :], v),
    ):
        expected = attention.attention(*map(np.ascontiguousarray, views))
        np.testing.assert_array_equal(attention.attention(*views), expected)
        np.testing.assert_allclose(expected, truth(views), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d", "dtype"), [(12, np.float32), (64, np.float64)])
def test_others_are_left_to_numpy(d, dtype):
    qkv = [a.astype(dtype) for a in random_qkv(8, 2, n_seq=9, d=d)]
    np.testing.assert_array_equal(attention.attention(*qkv), gpt2.attention(*qkv))
    caches, plain = [KVCache(9), KVCache(9)], [gpt2.KVCache(9), gpt2.KVCache(9)]
    expected = [cache.attend(*(a[i] for a in qkv)) for i, cache in enumerate(plain)]
    np.testing.assert_array_equal(RowCaches(caches).attend(*qkv), expected)
