"""Tiles of queries, one after another and several together."""

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.kernels.tiles import map_query_tiles


def test_tiles_at_once():
    """Nine tiles, four at once at most: three groups of three, and the last tile not full."""
    groups = []

    def body(first, x):
        groups.append(x.shape)
        return x + first

    found = jax.jit(lambda x: map_query_tiles(body, 4, x, together=4))(jnp.zeros((2, 34)))
    np.testing.assert_array_equal(found[1], np.arange(34) // 4 * 4)
    assert groups == [(2, 4)]
