"""Dense attention in plain jnp: the window, then blocks of entries, merged exactly."""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels import dispatch
from v4jax.kernels.dense_attention import gradient
from v4jax.kernels.softmax import MASKED, Partial, finish, merge, partial_weights
from v4jax.kernels.table import NEVER, EntryTable, visible_entries
from v4jax.kernels.tiles import map_query_tiles, sized
from v4jax.quant.formats import round_to
from v4jax.shapes import ceil_div, round_up

QUERY_TILE = 128
ENTRY_BLOCK = 512  # entries of one step for a full tile; few queries take as many more …
LARGEST_BLOCK = 1024  # … up to these
GPU_BLOCK = 16_384  # on a GPU: all of an HCA layer at a million tokens
GPU_TOGETHER = 16  # tiles that a GPU takes at once


def attend(
    queries, recent, sink, start, end, *, window, entries: EntryTable | None, ratio, begin=None
):
    """See `v4jax.kernels.dense_attention.attend`."""
    stored, layer, stored_as = gradient.open_table(entries)
    arguments = queries, recent, sink, start, end, begin
    return _attend(window, ratio, stored_as, *arguments, stored, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(window, ratio, stored_as, queries, recent, sink, start, end, begin, stored, layer):
    channels = queries.shape[-1]
    entries = gradient.close_table(stored, layer, stored_as)
    tile = min(QUERY_TILE, queries.shape[1])
    recent = pad_recent(recent, window, tile)

    def attend_tile(first, queries_bqhc, begin_bq):
        positions_bq = start[:, None] + first + jnp.arange(queries_bqhc.shape[1])
        partial = attend_window(queries_bqhc, recent, first, positions_bq, begin_bq, window)
        if entries is not None:
            places = positions_bq, begin_bq, end
            partial = attend_entries(queries_bqhc, entries, *places, ratio, partial)
        attended, log_mass = finish(partial, sink)
        return jnp.concatenate([attended, log_mass[..., None]], axis=-1)

    together = sized(1, gpu=max(GPU_TOGETHER // queries.shape[0], 1))
    joined = map_query_tiles(attend_tile, tile, queries, begin, together=together)
    return round_to(joined[..., :channels], queries.dtype), joined[..., channels]


def _attend_forward(window, ratio, stored_as, *arguments):
    results = _attend(window, ratio, stored_as, *arguments)
    return results, (*arguments, *results)


def _attend_backward(window, ratio, stored_as, kept, grads):
    queries, recent, sink, start, end, begin, stored, layer, attended, log_mass = kept
    entries = gradient.close_table(stored, layer, stored_as)
    tile = min(QUERY_TILE, queries.shape[1])
    padded = pad_recent(recent, window, tile)
    slopes = gradient.row_slopes(attended, *grads)

    def attend_tile(sums, first, queries_bqhc, begin_bq, *row_values):
        recent_sum, entry_sum = sums
        positions_bq = start[:, None] + first + jnp.arange(queries_bqhc.shape[1])
        keys_bsc, seen_bqs = window_keys(padded, first, positions_bq, begin_bq, window)
        query_grads, grads = gradient.key_gradients(queries_bqhc, keys_bsc, seen_bqs, *row_values)
        recent_sum = gradient.add_rows(recent_sum, first, grads)

        def add_block(index, carry):
            query_grads, entry_sum = carry
            first, keys_bwc, seen_bqw = entry_keys(entries, index, positions_bq, begin_bq, ratio)
            more, grads = gradient.key_gradients(queries_bqhc, keys_bwc, seen_bqw, *row_values)
            return query_grads + more, gradient.add_rows(entry_sum, first, grads)

        if entries is not None:
            needed = blocks_needed(entries, positions_bq, begin_bq, end, ratio)
            carry = (query_grads, entry_sum)
            query_grads, entry_sum = jax.lax.fori_loop(*needed, add_block, carry)
        return (recent_sum, entry_sum), query_grads

    entry_sum = None if entries is None else gradient.zero_sums(entries)
    sums = (jnp.zeros(padded.shape, jnp.float32), entry_sum)
    (recent_sum, entry_sum), query_grads = gradient.fold_query_tiles(
        attend_tile, sums, tile, queries, begin, log_mass, grads[0], slopes
    )
    return (
        query_grads.astype(queries.dtype),
        recent_sum[:, : recent.shape[1]].astype(recent.dtype),
        gradient.sink_gradient(sink, log_mass, slopes),
        None,
        None,
        None,
        None if entries is None else gradient.stored_gradient(entries, entry_sum),
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def pad_recent(recent_bsc, window, tile):
    """Pads the rows after the history to whole tiles: the last slice is in bounds."""
    tokens = recent_bsc.shape[1] - window
    return jnp.pad(recent_bsc, [(0, 0), (0, round_up(tokens, tile) - tokens), (0, 0)])


def window_keys(recent_bsc, first, positions_bq, begin_bq, window):
    """Returns the rows around a tile, [b, s, c], and which of them each query sees, [b, q, s]."""
    tile = positions_bq.shape[1]
    keys_bsc = jax.lax.dynamic_slice_in_dim(recent_bsc, first, window + tile, axis=1)
    # Row s of the slice is the token `window` before the tile's first query, plus s.
    key_positions_bs = positions_bq[:, :1] - window + jnp.arange(window + tile)
    distance_bqs = positions_bq[:, :, None] - key_positions_bs[:, None, :]
    begin_bq1 = 0 if begin_bq is None else begin_bq[:, :, None]
    exists_bqs = key_positions_bs[:, None, :] >= begin_bq1
    return keys_bsc, (distance_bqs >= 0) & (distance_bqs < window) & exists_bqs


def attend_window(queries_bqhc, recent_bsc, first, positions_bq, begin_bq, window) -> Partial:
    """Returns the partial softmax of a tile over its window keys."""
    keys_bsc, seen_bqs = window_keys(recent_bsc, first, positions_bq, begin_bq, window)
    return attend_keys(queries_bqhc, keys_bsc, seen_bqs)


def blocks_needed(entries: EntryTable, positions_bq, begin_bq, end, ratio):
    """Returns (first, end) of the blocks that hold what the real queries of a tile may see."""
    last_b = jnp.minimum(positions_bq[:, -1], end - 1)
    block = choose_block(entries, positions_bq)
    first = 0
    if begin_bq is not None:
        begin_bq = jnp.where(positions_bq < end[:, None], begin_bq, NEVER)
        first = jnp.min(begin_bq) // ratio // block
    return first, ceil_div(jnp.max(visible_entries(last_b, ratio)), block)


def choose_block(entries: EntryTable, positions_bq) -> int:
    """Returns the entries of one step."""
    block = ENTRY_BLOCK * max(QUERY_TILE // positions_bq.size, 1)
    return min(block, sized(LARGEST_BLOCK, gpu=GPU_BLOCK), entries.capacity)


def entry_keys(entries: EntryTable, index, positions_bq, begin_bq, ratio):
    """Returns (first entry, entries [b, w, c], which each query sees [b, q, w]) of a block."""
    block = choose_block(entries, positions_bq)
    # The last block of a capacity that block does not divide starts early; its known part is
    # masked.
    first = jnp.minimum(index * block, entries.capacity - block)
    ids_w = first + jnp.arange(block)
    visible_bq = visible_entries(positions_bq, ratio)
    seen_bqw = (ids_w < visible_bq[..., None]) & (ids_w >= index * block)
    if begin_bq is not None:
        seen_bqw &= ids_w >= begin_bq[..., None] // ratio
    return first, entries.block(first, block), seen_bqw


def attend_entries(
    queries_bqhc, entries, positions_bq, begin_bq, end, ratio, partial: Partial
) -> Partial:
    """Merges the visible entries into `partial`, block by block up to the last visible one."""

    def add_block(index, partial):
        _, keys_bwc, seen_bqw = entry_keys(entries, index, positions_bq, begin_bq, ratio)
        return merge(partial, attend_keys(queries_bqhc, keys_bwc, seen_bqw))

    if dispatch.platform() == "gpu" and choose_block(entries, positions_bq) == entries.capacity:
        return add_block(0, partial)  # a loop of unknown length waits for the host
    needed = blocks_needed(entries, positions_bq, begin_bq, end, ratio)
    return jax.lax.fori_loop(*needed, add_block, partial)


def attend_keys(queries_bqhc, keys_bsc, seen_bqs) -> Partial:
    """Returns the partial softmax; weights are rounded to the keys' dtype for the product."""
    channels = queries_bqhc.shape[-1]
    scores_bqhs = jnp.einsum(
        "bqhc,bsc->bqhs",
        queries_bqhc,
        keys_bsc,
        preferred_element_type=jnp.float32,
        precision="highest",
    ) * jnp.float32(channels**-0.5)
    scores_bqhs = jnp.where(seen_bqs[:, :, None, :], scores_bqhs, MASKED)
    maximum, mass, weights = partial_weights(scores_bqhs)
    weighted = jnp.einsum(
        "bqhs,bsc->bqhc",
        round_to(weights, keys_bsc.dtype),
        keys_bsc,
        preferred_element_type=jnp.float32,
        precision="highest",
    )
    return Partial(maximum, mass, weighted)
