"""Sparse attention in plain jnp: tiles of queries, each gathering its own selected entries."""

import jax.numpy as jnp

from v4jax.kernels.dense_attention.reference import attend_window, pad_recent
from v4jax.kernels.softmax import MASKED, Partial, finish, merge, partial_weights
from v4jax.kernels.tiles import map_query_tiles
from v4jax.quant.formats import round_to

# Gathered channels of one tile: bounds the memory of the gather (4 MiB in float32).
GATHERED_ELEMENTS = 1 << 20
QUERY_TILE = 128
SMALLEST_TILE = 8


def attend(queries, recent, sink, start, *, window, entries, selected):
    """See `v4jax.kernels.sparse_attention.attend`."""
    channels = queries.shape[-1]
    tile = GATHERED_ELEMENTS // (selected.shape[-1] * channels)
    tile = min(max(tile, SMALLEST_TILE), QUERY_TILE, queries.shape[1])
    recent = pad_recent(recent, window, tile)

    def attend_tile(first, queries_bqhc, selected_bqk):
        positions_bq = start[:, None] + first + jnp.arange(queries_bqhc.shape[1])
        partial = attend_window(queries_bqhc, recent, first, positions_bq, window)
        partial = merge(partial, attend_selected(queries_bqhc, entries, selected_bqk))
        return round_to(finish(partial, sink)[0], queries.dtype)

    return map_query_tiles(attend_tile, tile, queries, selected)


def attend_selected(queries_bqhc, entries, selected_bqk) -> Partial:
    """Returns the partial softmax of a tile over its selected entries."""
    keys_bqkc = entries.take(selected_bqk)
    scores_bqhk = jnp.einsum(
        "bqhc,bqkc->bqhk",
        queries_bqhc,
        keys_bqkc,
        preferred_element_type=jnp.float32,
        precision="highest",
    ) * jnp.float32(queries_bqhc.shape[-1] ** -0.5)
    scores_bqhk = jnp.where((selected_bqk >= 0)[:, :, None, :], scores_bqhk, MASKED)
    maximum, mass, weights = partial_weights(scores_bqhk)
    weighted = jnp.einsum(
        "bqhk,bqkc->bqhc",
        round_to(weights, keys_bqkc.dtype),
        keys_bqkc,
        preferred_element_type=jnp.float32,
        precision="highest",
    )
    return Partial(maximum, mass, weighted)
