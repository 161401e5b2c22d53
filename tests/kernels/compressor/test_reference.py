"""Pooling against loops over windows, slots and channels as the specification words them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import compressor

from .. import naive

BATCH, RATIO, CHANNELS, WINDOWS = 2, 4, 6, 5

pool = jax.jit(compressor.pool, static_argnames="overlaps")


def make(overlaps, windows=WINDOWS, seed=0):
    """Returns (values, gates, position bias); with overlap, the previous window's rows first."""
    random = np.random.RandomState(seed)
    rows, width = RATIO * (windows + overlaps), CHANNELS * (1 + overlaps)
    values, gates = random.standard_normal((2, BATCH, rows, width))
    return values, 3 * gates, random.standard_normal((RATIO, width))


def naive_pool(values, gates, bias, first_window, overlaps, begin=None):
    """Spec B.7 (one series) and B.8 (the first half of the channels speaks to the next window)."""
    entries = []
    for b in range(BATCH):
        for w in range(values.shape[1] // RATIO - overlaps):
            own = slice((w + overlaps) * RATIO, (w + overlaps + 1) * RATIO)
            series = slice(CHANNELS, None) if overlaps else slice(None)
            value, gate = values[b, own, series], gates[b, own, series] + bias[:, series]
            if overlaps and first_window[b] + w > (0 if begin is None else begin[b][w]):
                before = slice(w * RATIO, (w + 1) * RATIO)
                value = np.concatenate([values[b, before, :CHANNELS], value])
                gate = np.concatenate([gates[b, before, :CHANNELS] + bias[:, :CHANNELS], gate])
            weight = np.exp(gate - gate.max(0))  # every channel has a softmax over slots of its own
            entries.append((weight / weight.sum(0) * value).sum(0))
    return np.stack(entries).reshape(BATCH, -1, CHANNELS)


# First own window of two sequences: 0 has no previous one.
FIRST = {"both begin": [0, 0], "one begins": [0, 7], "none begins": [3, 1]}


@pytest.mark.parametrize("overlaps", [False, True], ids=["HCA", "CSA"])
@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST.keys())
def test_values(first, overlaps):
    values, gates, bias = make(overlaps)
    expected = naive_pool(values, gates, bias, first, overlaps)
    pooled = pool(values, gates, bias, np.array(first), overlaps=overlaps)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, expected, 0, naive.FLOAT32)


@pytest.mark.parametrize("overlaps", [False, True], ids=["HCA", "CSA"])
def test_several_documents(overlaps):
    first, begin = np.array([0, 7]), np.array([[0, 0, 2, 2, 4], [5, 5, 9, 9, 9]])
    values, gates, bias = make(overlaps)
    expected = naive_pool(values, gates, bias, first, overlaps, begin)
    pooled = pool(values, gates, bias, first, overlaps=overlaps, begin=begin)
    np.testing.assert_allclose(pooled, expected, 0, naive.FLOAT32)


@pytest.mark.parametrize("overlaps", [False, True], ids=["HCA", "CSA"])
def test_one_window(overlaps):
    values, gates, bias = make(overlaps, windows=1)
    expected = naive_pool(values, gates, bias, [0, 2], overlaps)
    pooled = pool(values, gates, bias, np.array([0, 2]), overlaps=overlaps)
    np.testing.assert_allclose(pooled, expected, 0, naive.FLOAT32)


def test_rows_before_the_first_window_do_not_matter():
    """A ring may hold anything there: the reused slot of a longer sequence."""
    values, gates, bias = make(True)
    first = np.array([0, 4])
    expected = pool(values, gates, bias, first, overlaps=True)
    values[0, :RATIO], gates[0, :RATIO] = 1e30, 1e30
    np.testing.assert_array_equal(pool(values, gates, bias, first, overlaps=True), expected)


def test_large_gates_choose():
    """The softmax subtracts its maximum: gates of any size neither overflow nor vanish."""
    values, gates, bias = make(False)
    gates[:, 1::RATIO] += 1e4
    pooled = pool(values, gates, bias, np.array([0, 0]), overlaps=False)
    np.testing.assert_allclose(pooled, values[:, 1::RATIO], 0, naive.FLOAT32)


def test_bias_joins_the_gate_only():
    """A bias that is equal for all slots of a channel changes nothing."""
    values, gates, _ = make(False)
    first = np.array([0, 0])
    bias = np.broadcast_to(np.arange(CHANNELS, dtype=float), (RATIO, CHANNELS))
    pooled = pool(values, gates, bias, first, overlaps=False)
    plain = pool(values, gates, np.zeros_like(bias), first, overlaps=False)
    np.testing.assert_allclose(pooled, plain, 0, naive.FLOAT32)


@pytest.mark.parametrize("overlaps", [False, True], ids=["HCA", "CSA"])
def test_gradients(overlaps):
    first = np.array([0, 4])
    inputs = tuple(jnp.asarray(x, jnp.float32) for x in make(overlaps))
    weight = np.random.RandomState(1).standard_normal((BATCH, WINDOWS, CHANNELS))

    def ours(values, gates, bias):
        return (pool(values, gates, bias, first, overlaps=overlaps) * weight).sum()

    expected = naive.numeric_gradients(
        functools.partial(naive_pool, first_window=first, overlaps=overlaps), inputs, weight
    )
    found = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*inputs)
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, 0, 10 * naive.FLOAT32)
    if overlaps:  # exactly nothing flows to rows that do not exist
        assert not np.any(found[0][0, :RATIO]) and not np.any(found[1][0, :RATIO])
