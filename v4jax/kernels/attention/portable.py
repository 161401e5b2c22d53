"""Attention in plain jnp: tiles of queries; the window, then entries, merged exactly.

Dense attention walks over blocks of entries up to the last visible one; sparse attention gathers
the selected entries of each query. Scores are recomputed tile by tile in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.attention import gradient
from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.softmax import MASKED, Partial, finish, merge, partial_weights
from v4jax.kernels.table import NEVER, EntryTable, visible_entries
from v4jax.kernels.tiles import map_query_tiles
from v4jax.quant.formats import round_to
from v4jax.shapes import ceil_div, round_up

QUERY_TILE, GPU_SPARSE_TILE = 128, 256
ENTRY_BLOCK = 512  # entries of one step for a full tile; few queries take as many more …
LARGEST_BLOCK = 1024  # … up to these
GPU_BLOCK = 16_384  # on a GPU: all of an HCA layer at a million tokens
GPU_TOGETHER = 16  # tiles that a GPU takes at once
# Gathered channels of one tile: bounds the memory of the gather (4 MiB in float32).
GATHERED_ELEMENTS = 1 << 20
GPU_ELEMENTS = 1 << 26  # 128 MiB in bfloat16
SMALLEST_TILE = 8  # of queries that gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, inputs: Inputs):
    """Returns (attended [b, t, h, c], log-sum-exp [b, t, h])."""
    queries, entries = inputs.queries, inputs.entries(call)
    batch, _, _, channels = queries.shape
    tile = choose_tile(call, inputs)
    recent = pad_recent(inputs.recent, call.window, tile)

    def attend_tile(first, queries_bqhc, begin_bq, selected_bqk):
        positions_bq = inputs.start[:, None] + first + jnp.arange(queries_bqhc.shape[1])
        keys_bsc, seen_bqs = window_keys(recent, first, positions_bq, begin_bq, call.window)
        partial = attend_keys("bsc", queries_bqhc, keys_bsc, seen_bqs)
        if selected_bqk is not None:
            keys_bqkc = entries.take(selected_bqk)
            own = attend_keys("bqsc", queries_bqhc, keys_bqkc, selected_bqk >= 0)
            partial = merge(partial, own)
        elif entries is not None:
            blocks = Blocks(call, entries, positions_bq, begin_bq, inputs.end)
            partial = blocks.attend(queries_bqhc, partial)
        attended, log_mass = finish(partial, inputs.sink)
        return jnp.concatenate([attended, log_mass[..., None]], axis=-1)

    together = 1
    if inputs.selected is None:
        together = call.target.sized(1, gpu=max(GPU_TOGETHER // batch, 1))
    tiles = queries, inputs.begin, inputs.selected
    joined = map_query_tiles(attend_tile, tile, *tiles, together=together)
    return round_to(joined[..., :channels], queries.dtype), joined[..., channels]


def attend_backward(call: Call, kept, grads):
    inputs, attended, log_mass = kept
    entries = inputs.entries(call)
    tile = choose_tile(call, inputs)
    padded = pad_recent(inputs.recent, call.window, tile)
    slopes = gradient.row_slopes(attended, *grads)
    batch = jnp.arange(len(padded))[:, None, None]

    def attend_tile(sums, first, queries_bqhc, begin_bq, selected_bqk, *row_values):
        recent_sum, entry_sum = sums
        positions_bq = inputs.start[:, None] + first + jnp.arange(queries_bqhc.shape[1])

        def differentiate(layout, keys, seen):
            rows = queries_bqhc, keys, seen, *row_values
            return gradient.key_gradients(call.target, layout, *rows)

        window = window_keys(padded, first, positions_bq, begin_bq, call.window)
        query_grads, grads = differentiate("bsc", *window)
        recent_sum = gradient.add_rows(recent_sum, first, grads)

        def add_block(index, carry):
            query_grads, entry_sum = carry
            first, *block = blocks.read(index)
            more, grads = differentiate("bsc", *block)
            return query_grads + more, gradient.add_rows(entry_sum, first, grads)

        if selected_bqk is not None:
            keys_bqkc = entries.take(selected_bqk)
            more, grads_bqkc = differentiate("bqsc", keys_bqkc, selected_bqk >= 0)
            # The gradient of an absent id is zero, wherever it is added.
            entry_sum = entry_sum.at[batch, jnp.maximum(selected_bqk, 0)].add(grads_bqkc)
            query_grads += more
        elif entries is not None:
            blocks = Blocks(call, entries, positions_bq, begin_bq, inputs.end)
            carry = (query_grads, entry_sum)
            query_grads, entry_sum = jax.lax.fori_loop(*blocks.needed, add_block, carry)
        return (recent_sum, entry_sum), query_grads

    sums = (jnp.zeros(padded.shape, jnp.float32), gradient.zero_sums(entries))
    tiles = inputs.queries, inputs.begin, inputs.selected, log_mass, grads[0], slopes
    (recent_sum, entry_sum), query_grads = gradient.fold_query_tiles(
        attend_tile, sums, tile, *tiles
    )
    recent_sum = recent_sum[:, : inputs.recent.shape[1]]
    return gradient.close(call, kept, slopes, query_grads, recent_sum, entry_sum)


attend.defvjp(functools.partial(gradient.keep, attend), attend_backward)


def choose_tile(call: Call, inputs: Inputs) -> int:
    """Returns how many queries one step takes."""
    batch, tokens, _, channels = inputs.queries.shape
    if inputs.selected is None:
        return min(QUERY_TILE, tokens)
    elements = call.target.sized(GATHERED_ELEMENTS, gpu=GPU_ELEMENTS // batch)
    tile = elements // (inputs.selected.shape[-1] * channels)
    largest = call.target.sized(QUERY_TILE, gpu=GPU_SPARSE_TILE)
    return min(max(tile, SMALLEST_TILE), largest, tokens)


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


class Blocks:
    """The blocks of entries that one tile of queries may see.

    size: entries of a block. needed: (first, end) of the blocks to read.
    """

    def __init__(self, call: Call, entries: EntryTable, positions_bq, begin_bq, end):
        self.call, self.entries = call, entries
        self.positions_bq, self.begin_bq = positions_bq, begin_bq
        size = ENTRY_BLOCK * max(QUERY_TILE // positions_bq.size, 1)
        largest = call.target.sized(LARGEST_BLOCK, gpu=GPU_BLOCK)
        self.size = min(size, largest, entries.capacity)
        last_b = jnp.minimum(positions_bq[:, -1], end - 1)
        last = ceil_div(jnp.max(visible_entries(last_b, call.ratio)), self.size)
        first = 0
        if begin_bq is not None:
            begin_bq = jnp.where(positions_bq < end[:, None], begin_bq, NEVER)
            first = jnp.min(begin_bq) // call.ratio // self.size
        self.needed = first, last

    def read(self, index):
        """Returns (first entry, entries [b, w, c], which each query sees [b, q, w]) of a block."""
        # The last block of a capacity that the size does not divide starts early; what the block
        # before it has is masked.
        first = jnp.minimum(index * self.size, self.entries.capacity - self.size)
        ids_w = first + jnp.arange(self.size)
        visible_bq = visible_entries(self.positions_bq, self.call.ratio)
        seen_bqw = (ids_w < visible_bq[..., None]) & (ids_w >= index * self.size)
        if self.begin_bq is not None:
            seen_bqw &= ids_w >= self.begin_bq[..., None] // self.call.ratio
        return first, self.entries.block(first, self.size), seen_bqw

    def attend(self, queries_bqhc, partial: Partial) -> Partial:
        """Merges the visible entries into `partial`."""

        def add_block(index, partial):
            _, keys_bwc, seen_bqw = self.read(index)
            return merge(partial, attend_keys("bsc", queries_bqhc, keys_bwc, seen_bqw))

        if self.call.target.waits_for_host and self.size == self.entries.capacity:
            return add_block(0, partial)
        return jax.lax.fori_loop(*self.needed, add_block, partial)


def attend_keys(layout, queries_bqhc, keys, seen_bqs) -> Partial:
    """Returns the partial softmax; weights are rounded to the keys' dtype for the product.

    Args:
      layout: "bsc" where the queries share their keys, "bqsc" where each has its own.
    """

    def product(subscripts, left):
        exact = {"preferred_element_type": jnp.float32, "precision": "highest"}
        return jnp.einsum(subscripts, left, keys, **exact)

    scores_bqhs = product(f"bqhc,{layout}->bqhs", queries_bqhc)
    scores_bqhs *= jnp.float32(queries_bqhc.shape[-1] ** -0.5)
    scores_bqhs = jnp.where(seen_bqs[:, :, None, :], scores_bqhs, MASKED)
    maximum, mass, weights = partial_weights(scores_bqhs)
    weighted = product(f"bqhs,{layout}->bqhc", round_to(weights, keys.dtype))
    return Partial(maximum, mass, weighted)
