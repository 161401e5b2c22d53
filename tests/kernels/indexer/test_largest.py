"""The largest values of a row against a stable sort."""

import functools

import jax
import numpy as np
import pytest

from v4jax.kernels.indexer.largest import count_largest, sort_largest

CASES = {
    "reals": lambda random, shape: random.standard_normal(shape),
    "ties": lambda random, shape: random.randint(0, 4, shape),
    "all equal": lambda random, shape: np.zeros(shape),
    "signed zeros": lambda random, shape: random.choice([-0.0, 0.0], shape),
    "both infinities": lambda random, shape: random.choice([-np.inf, -1.0, 2.0, np.inf], shape),
    "few are there": lambda random, shape: np.where(random.rand(*shape) < 0.01, 1.0, -np.inf),
    "none is there": lambda random, shape: np.full(shape, -np.inf),
    "tiny and huge": lambda random, shape: random.standard_normal(shape) ** 15 * 1e-20,
    "ascending": lambda random, shape: np.broadcast_to(np.arange(shape[1]) / 7 - 50.0, shape),
    "largest first": lambda random, shape: -np.broadcast_to(np.arange(shape[1]), shape),
}
# Rows × values, and how many to find: more than half of them, an odd number, all; long rows.
SIZES = [(3, 70, 40), (5, 200, 7), (2, 64, 64), (2, 9000, 65), (4, 1, 1)]
WAYS = {
    way.__name__: functools.partial(jax.jit, static_argnums=1)(way)
    for way in (count_largest, sort_largest)
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows, width, count", SIZES)
def test_against_a_stable_sort(way, rows, width, count):
    for name, draw in CASES.items():
        values = draw(np.random.RandomState(width), (rows, width)).astype(np.float32)
        expected = np.full((rows, count), -1)
        for row, line in zip(expected, values, strict=True):
            order = np.argsort(-line, kind="stable")[:count]
            order = np.sort(order[line[order] > -np.inf])
            row[: len(order)] = order
        np.testing.assert_array_equal(WAYS[way](values, count), expected, err_msg=name)
