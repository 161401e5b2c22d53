"""Queries in tiles, processed one after another to bound the memory of their scores."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from v4jax.shapes import ceil_div, round_up


def map_query_tiles(
    body: Callable[..., jax.Array], tile: int, *arrays: jax.Array | None, together: int = 1
) -> jax.Array:
    """Returns body(first, tile of each array) for successive tiles of axis 1, concatenated.

    Args:
      body: takes the index of the tile's first query (int32 scalar) and [b, tile, …] slices;
        returns [b, tile, …]. The last tile is padded with zeros; what it returns for them is
        dropped.
      tile: queries per tile.
      arrays: [b, t, …] each; None stays None.
      together: tiles to process at once, with `body` vectorized over them.
    """
    length = arrays[0].shape[1]
    count = ceil_div(length, tile)
    if count == 1:
        return body(jnp.int32(0), *arrays)
    together = ceil_div(count, ceil_div(count, together))  # as evenly as possible
    count = round_up(count, together)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * tile - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], count, tile, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    firsts = jnp.arange(count, dtype=jnp.int32) * tile
    # The backward pass recomputes the tiles; no scores are stored.
    step = jax.checkpoint(lambda slices: body(*slices))
    slices = firsts, *jax.tree.map(cut, arrays)
    if together == 1:
        tiles = jax.lax.map(step, slices)
    else:
        groups = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), slices)
        tiles = jax.lax.map(jax.vmap(step), groups)
        tiles = tiles.reshape(count, *tiles.shape[2:])
    joined = jnp.moveaxis(tiles, 0, 1)
    return joined.reshape(joined.shape[0], count * tile, *joined.shape[3:])[:, :length]
