"""Rings: the last `size` rows of each sequence, the row of position p at place p mod size.

Nothing is cleared when a sequence starts over: readers mask by position, so a reused slot remembers
  nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from v4jax.parallel import Axes
from v4jax.parallel.context_parallel import take_owned


def append(
    axes: Axes,
    rings: jax.Array,
    layer: Int[Array, ""],
    rows: jax.Array,
    start: Int[Array, "b"],
    end: Int[Array, "b"],
) -> jax.Array:
    """Returns `rings` [l, b, size, …] with positions start … end−1 written in one layer.

    Args:
      rows: [b, t, …], the row of position start+i at place i; rows from end−start on are padding.
        Where a sequence lies on several devices, they are this device's shard and `start` the
        position of its first; every device ends up with the whole ring.
    """
    size, tokens = rings.shape[2], rows.shape[1]
    if tokens == 1:
        place_b = jnp.where(end > start, start % size, size)  # `size` is out of bounds: dropped
        batch = jnp.arange(rows.shape[0])
        return rings.at[layer, batch, place_b].set(rows[:, 0].astype(rings.dtype), mode="drop")
    old = jax.lax.dynamic_index_in_dim(rings, layer, keepdims=False)
    last_b = end[:, None] - 1
    call_b = start - axes.offset("tokens", tokens)  # position of the first token of all shards
    position_bs = last_b - (last_b - jnp.arange(size)) % size  # newest position of each place
    fresh_bs = position_bs >= call_b[:, None]
    source_bs = position_bs - start[:, None]
    new = take_rows(rows, jnp.clip(source_bs, 0, tokens - 1)).astype(rings.dtype)
    if axes.size("tokens") > 1:
        new = take_owned(axes, new, fresh_bs & (source_bs >= 0) & (source_bs < tokens))
    fresh = fresh_bs.reshape(*fresh_bs.shape, *(1,) * (new.ndim - 2))
    return jax.lax.dynamic_update_index_in_dim(rings, jnp.where(fresh, new, old), layer, axis=0)


def ordered(
    rings: jax.Array, layer: Int[Array, ""], start: Int[Array, "b"], count: int
) -> jax.Array:
    """Returns the rows of positions start−count … start−1; those before 0 are arbitrary.

    Args:
      count: at most the size.
    """
    ring = jax.lax.dynamic_index_in_dim(rings, layer, keepdims=False)
    return take_rows(ring, (start[:, None] - count + jnp.arange(count)) % ring.shape[1])


def take_rows(rows: jax.Array, index: Int[Array, "b s"]) -> jax.Array:
    """Returns rows[b, index[b, s]] as [b, s, …]; indices are in bounds."""
    batch = jnp.arange(rows.shape[0])[:, None]
    return rows.at[batch, index].get(mode="promise_in_bounds")
