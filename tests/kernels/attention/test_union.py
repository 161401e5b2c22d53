"""The union of what neighbouring queries selected, against Python's sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels.attention.union_tpu import unite

BATCH, GROUPS = 2, 3
united = jax.jit(functools.partial(unite, interpret=True), static_argnums=1)


@pytest.mark.parametrize("members, count, entries", [(8, 16, 40), (2, 64, 64)])
def test_union(members, count, entries):
    """Groups with much in common, with nothing selected, and −1 anywhere."""
    random = np.random.RandomState(0)
    selected = np.full((BATCH, GROUPS, members, count), -1, np.int32)
    for b, g, m in np.ndindex(BATCH, GROUPS, members):
        ids = random.permutation(entries)[: random.randint(0, min(count, entries) + 1) if g else 0]
        selected[b, g, m][random.permutation(count)[: len(ids)]] = ids
    flat = jnp.asarray(selected.reshape(BATCH, GROUPS, -1))
    ids, bits, counts = (np.asarray(x) for x in united(flat, members))
    for b, g in np.ndindex(BATCH, GROUPS):
        wanted = {}
        for m in range(members):
            for entry in selected[b, g, m][selected[b, g, m] >= 0]:
                wanted[entry] = wanted.get(entry, 0) | 1 << m
        found = counts[b, g]
        assert ids[b, g, :found].tolist() == sorted(wanted)
        assert bits[b, g, :found].tolist() == [wanted[entry] for entry in sorted(wanted)]
        assert not bits[b, g, found:].any()
