"""Pooling against `reference.py`, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import compressor
from v4jax.kernels.compressor import reference

from ..compare import FLOAT32, check

BATCH, RATIO, CHANNELS, WINDOWS = 2, 4, 6, 5


@functools.partial(jax.jit, static_argnames=("module", "overlaps"))
def pool(module, values, gates, bias, first_window, begin=None, *, overlaps):
    """Returns the entries, and the gradients of values, gates and bias."""
    options = {"overlaps": overlaps, "begin": begin}
    run = lambda *rows: module.pool(*rows, first_window, **options)  # noqa: E731
    found, pull = jax.vjp(run, values, gates, bias)
    return found, pull(jax.random.normal(jax.random.key(0), found.shape))


def make(overlaps, windows=WINDOWS):
    """Returns (values, gates, position bias); with overlap, the previous window's rows first."""
    random = np.random.RandomState(0)
    rows, width = RATIO * (windows + overlaps), CHANNELS * (1 + overlaps)
    values, gates = random.standard_normal((2, BATCH, rows, width))
    return [jnp.float32(x) for x in (values, 3 * gates, random.standard_normal((RATIO, width)))]


# Windows, first own window of two sequences (0 has no previous one), begin.
DOCUMENTS = np.array([[0, 0, 2, 2, 4], [5, 5, 9, 9, 9]])
CASES = {
    "both begin": (WINDOWS, [0, 0], None),
    "one begins": (WINDOWS, [0, 7], None),
    "none begins": (WINDOWS, [3, 1], None),
    "several documents": (WINDOWS, [0, 7], DOCUMENTS),
    "one window": (1, [0, 2], None),
}


@pytest.mark.parametrize("overlaps", [False, True], ids=["HCA", "CSA"])
def test_pool(overlaps):
    for name, (windows, first, begin) in CASES.items():
        arguments = *make(overlaps, windows), np.array(first), begin
        found, expected = (pool(x, *arguments, overlaps=overlaps) for x in (compressor, reference))
        check(found, expected, FLOAT32, name)
        if overlaps and first[0] == 0:  # exactly nothing flows to rows that do not exist
            _, (of_values, of_gates, _) = found
            assert not of_values[0, :RATIO].any() and not of_gates[0, :RATIO].any()


def test_rows_before_the_first_window_do_not_matter():
    """A ring may hold anything there: the reused slot of a longer sequence."""
    values, gates, bias = make(True)
    first = np.array([0, 4])
    expected, _ = pool(compressor, values, gates, bias, first, overlaps=True)
    values, gates = (x.at[0, :RATIO].set(1e30) for x in (values, gates))
    found, _ = pool(compressor, values, gates, bias, first, overlaps=True)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("overlaps", [False, True], ids=["HCA", "CSA"])
def test_large_gates_choose(overlaps):
    """The softmax subtracts its maximum: gates of any size neither overflow nor vanish."""
    values, gates, bias = make(overlaps)
    gates = gates.at[:, 1::RATIO, -CHANNELS:].add(1e4)
    found, _ = pool(compressor, values, gates, bias, np.array([0, 0]), overlaps=overlaps)
    expected = values[:, 1 + overlaps * RATIO :: RATIO, -CHANNELS:]
    np.testing.assert_allclose(found, expected, 0, FLOAT32)
