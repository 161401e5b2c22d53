"""Sparse attention in plain jnp: tiles of queries, each gathering its own selected entries."""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.dense_attention import gradient
from v4jax.kernels.dense_attention.reference import attend_window, pad_recent, window_keys
from v4jax.kernels.softmax import MASKED, Partial, finish, merge, partial_weights
from v4jax.kernels.tiles import map_query_tiles, sized
from v4jax.quant.formats import round_to

# Gathered channels of one tile: bounds the memory of the gather (4 MiB in float32).
GATHERED_ELEMENTS = 1 << 20
GPU_ELEMENTS = 1 << 26  # 128 MiB in bfloat16
QUERY_TILE = 128
GPU_TILE = 256
SMALLEST_TILE = 8


def attend_with_mass(queries, recent, sink, start, *, window, entries, selected, begin=None):
    """See `v4jax.kernels.sparse_attention.attend_with_mass`."""
    stored, layer, stored_as = gradient.open_table(entries)
    arguments = queries, recent, sink, start, begin
    return _attend(window, stored_as, *arguments, stored, layer, selected)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, stored_as, queries, recent, sink, start, begin, stored, layer, selected):
    channels = queries.shape[-1]
    entries = gradient.close_table(stored, layer, stored_as)
    tile = choose_tile(queries, selected)
    recent = pad_recent(recent, window, tile)

    def attend_tile(first, queries_bqhc, selected_bqk, begin_bq):
        positions_bq = start[:, None] + first + jnp.arange(queries_bqhc.shape[1])
        partial = attend_window(queries_bqhc, recent, first, positions_bq, begin_bq, window)
        partial = merge(partial, attend_selected(queries_bqhc, entries, selected_bqk))
        attended, log_mass = finish(partial, sink)
        return jnp.concatenate([attended, log_mass[..., None]], axis=-1)

    joined = map_query_tiles(attend_tile, tile, queries, selected, begin)
    return round_to(joined[..., :channels], queries.dtype), joined[..., channels]


def _attend_forward(window, stored_as, *arguments):
    results = _attend(window, stored_as, *arguments)
    return results, (*arguments, *results)


def attend_backward(window, stored_as, kept, grads):
    queries, recent, sink, start, begin, stored, layer, selected, attended, log_mass = kept
    entries = gradient.close_table(stored, layer, stored_as)
    tile = choose_tile(queries, selected)
    padded = pad_recent(recent, window, tile)
    slopes = gradient.row_slopes(attended, *grads)
    batch = jnp.arange(queries.shape[0])[:, None, None]

    def attend_tile(sums, first, selected_bqk, begin_bq, queries_bqhc, *row_values):
        recent_sum, entry_sum = sums
        positions_bq = start[:, None] + first + jnp.arange(queries_bqhc.shape[1])
        keys_bsc, seen_bqs = window_keys(padded, first, positions_bq, begin_bq, window)
        query_grads, grads = gradient.key_gradients(queries_bqhc, keys_bsc, seen_bqs, *row_values)
        recent_sum = gradient.add_rows(recent_sum, first, grads)
        more, grads_bqkc = gradient.own_key_gradients(
            queries_bqhc, entries.take(selected_bqk), selected_bqk >= 0, *row_values
        )
        # The gradient of an absent id is zero, wherever it is added.
        ids_bqk = jnp.maximum(selected_bqk, 0)
        return (recent_sum, entry_sum.at[batch, ids_bqk].add(grads_bqkc)), query_grads + more

    sums = (jnp.zeros(padded.shape, jnp.float32), gradient.zero_sums(entries))
    (recent_sum, entry_sum), query_grads = gradient.fold_query_tiles(
        attend_tile, sums, tile, selected, begin, queries, log_mass, grads[0], slopes
    )
    return (
        query_grads.astype(queries.dtype),
        recent_sum[:, : recent.shape[1]].astype(recent.dtype),
        gradient.sink_gradient(sink, log_mass, slopes),
        None,
        None,
        gradient.stored_gradient(entries, entry_sum),
        None,
        None,
    )


_attend.defvjp(_attend_forward, attend_backward)


def choose_tile(queries, selected) -> int:
    """Returns how many queries gather at once."""
    elements = sized(GATHERED_ELEMENTS, gpu=GPU_ELEMENTS // queries.shape[0])
    tile = elements // (selected.shape[-1] * queries.shape[-1])
    largest = sized(QUERY_TILE, gpu=GPU_TILE)
    return min(max(tile, SMALLEST_TILE), largest, queries.shape[1])


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
