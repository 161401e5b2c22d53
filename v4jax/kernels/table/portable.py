"""Writing entries in plain jnp: one scatter."""

import jax
import jax.numpy as jnp


def write(stored, layer, rows, first, count, *, target):
    """See `v4jax.kernels.table.write`."""
    del target
    capacity = next(iter(stored.values())).shape[2]
    batch, given = next(iter(rows.values())).shape[:2]
    row = jnp.arange(given)
    place_bn = first[:, None] + row
    real = (row < count[:, None]) & (place_bn >= 0) & (place_bn < capacity)
    place_bn = jnp.where(real, place_bn, capacity)  # out of bounds: dropped
    slots = jnp.arange(batch)[:, None]
    return jax.tree.map(
        lambda array, new: array.at[layer, slots, place_bn].set(new, mode="drop"), stored, rows
    )
