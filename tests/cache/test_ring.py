"""Rings against a plain list of everything a sequence has seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.cache import ring
from v4jax.parallel import ONE_DEVICE

SIZE, SLOTS, LAYERS, WIDTH = 8, 3, 2, 5


@pytest.mark.parametrize("tokens", [1, 3, 8, 21])
def test_ring_holds_the_last_rows(tokens):
    """After ragged appends of up to `tokens` rows, `ordered` gives the last SIZE rows in order."""
    random = np.random.RandomState(tokens)
    rings = jnp.full((LAYERS, SLOTS, SIZE, WIDTH), 77.0)
    seen = [np.zeros((0, WIDTH)) for _ in range(SLOTS)]
    for _ in range(12):
        start = jnp.array([len(rows) for rows in seen])
        lengths = random.randint(0, tokens + 1, SLOTS)
        rows = random.standard_normal((SLOTS, tokens, WIDTH)).astype(np.float32)
        rings = ring.append(
            ONE_DEVICE, rings, jnp.int32(1), jnp.asarray(rows), start, start + lengths
        )
        seen = [np.concatenate([s, r[:n]]) for s, r, n in zip(seen, rows, lengths, strict=True)]
        ordered = ring.ordered(rings, jnp.int32(1), jnp.array([len(rows) for rows in seen]), SIZE)
        for slot in range(SLOTS):
            kept = min(len(seen[slot]), SIZE)
            expected = seen[slot][len(seen[slot]) - kept :]
            np.testing.assert_array_equal(ordered[slot, SIZE - kept :], expected)
    np.testing.assert_array_equal(rings[0], 77.0)  # the other layer is untouched
