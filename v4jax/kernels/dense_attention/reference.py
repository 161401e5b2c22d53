"""Dense attention in plain jnp: the window, then blocks of entries, merged exactly."""

import jax
import jax.numpy as jnp

from v4jax.kernels.softmax import MASKED, Partial, finish, merge, partial_weights
from v4jax.kernels.table import EntryTable, visible_entries
from v4jax.kernels.tiles import map_query_tiles
from v4jax.quant.formats import round_to
from v4jax.shapes import ceil_div, round_up

QUERY_TILE = 128
ENTRY_BLOCK = 512


def attend(queries, recent, sink, start, end, *, window, entries: EntryTable | None, ratio):
    """See `v4jax.kernels.dense_attention.attend`."""
    channels = queries.shape[-1]
    tile = min(QUERY_TILE, queries.shape[1])
    recent = pad_recent(recent, window, tile)

    def attend_tile(first, queries_bqhc):
        positions_bq = start[:, None] + first + jnp.arange(queries_bqhc.shape[1])
        partial = attend_window(queries_bqhc, recent, first, positions_bq, window)
        if entries is not None:
            last_b = jnp.minimum(positions_bq[:, -1], end - 1)
            partial = attend_entries(queries_bqhc, entries, positions_bq, last_b, ratio, partial)
        attended, log_mass = finish(partial, sink)
        return jnp.concatenate([attended, log_mass[..., None]], axis=-1)

    joined = map_query_tiles(attend_tile, tile, queries)
    return round_to(joined[..., :channels], queries.dtype), joined[..., channels]


def pad_recent(recent_bsc, window, tile):
    """Pads the rows after the history to whole tiles: the last slice is in bounds."""
    tokens = recent_bsc.shape[1] - window
    return jnp.pad(recent_bsc, [(0, 0), (0, round_up(tokens, tile) - tokens), (0, 0)])


def attend_window(queries_bqhc, recent_bsc, first, positions_bq, window) -> Partial:
    """Returns the partial softmax of a tile over its window keys."""
    tile, channels = queries_bqhc.shape[1], queries_bqhc.shape[-1]
    keys_bsc = jax.lax.dynamic_slice_in_dim(recent_bsc, first, window + tile, axis=1)
    # Row s of the slice is the token `window` before the tile's first query, plus s.
    key_positions_bs = positions_bq[:, :1] - window + jnp.arange(window + tile)
    distance_bqs = positions_bq[:, :, None] - key_positions_bs[:, None, :]
    seen_bqs = (distance_bqs >= 0) & (distance_bqs < window) & (key_positions_bs >= 0)[:, None, :]
    scores_bqhs = score(queries_bqhc, keys_bsc, channels)
    return weigh(jnp.where(seen_bqs[:, :, None, :], scores_bqhs, MASKED), keys_bsc)


def attend_entries(
    queries_bqhc, entries: EntryTable, positions_bq, last_b, ratio, partial
) -> Partial:
    """Merges the visible entries into `partial`, block by block up to the last visible one."""
    channels = queries_bqhc.shape[-1]
    block = min(ENTRY_BLOCK, entries.capacity)
    visible_bq = visible_entries(positions_bq, ratio)
    blocks_needed = ceil_div(jnp.max(visible_entries(last_b, ratio)), block)

    def add_block(partial, index):
        # The last block of a capacity that block does not divide starts early; its known part is
        # masked.
        first = jnp.minimum(index * block, entries.capacity - block)
        keys_bwc = entries.block(first, block)
        ids_w = first + jnp.arange(block)
        seen_bqw = (ids_w < visible_bq[..., None]) & (ids_w >= index * block)
        scores_bqhw = score(queries_bqhc, keys_bwc, channels)
        return merge(
            partial, weigh(jnp.where(seen_bqw[:, :, None, :], scores_bqhw, MASKED), keys_bwc)
        )

    def step(partial, index):
        return jax.lax.cond(index < blocks_needed, add_block, lambda p, _: p, partial, index), None

    blocks = jnp.arange(ceil_div(entries.capacity, block), dtype=jnp.int32)
    return jax.lax.scan(step, partial, blocks)[0]


def score(queries_bqhc, keys_bsc, channels):
    """Returns q·k/√c in float32 [b, q, h, s]."""
    scores = jnp.einsum(
        "bqhc,bsc->bqhs",
        queries_bqhc,
        keys_bsc,
        preferred_element_type=jnp.float32,
        precision="highest",
    )
    return scores * jnp.float32(channels**-0.5)


def weigh(scores_bqhs, values_bsc) -> Partial:
    """Returns the partial softmax; weights are rounded to the values' dtype for the product."""
    maximum, mass, weights = partial_weights(scores_bqhs)
    weighted = jnp.einsum(
        "bqhs,bsc->bqhc",
        round_to(weights, values_bsc.dtype),
        values_bsc,
        preferred_element_type=jnp.float32,
        precision="highest",
    )
    return Partial(maximum, mass, weighted)
