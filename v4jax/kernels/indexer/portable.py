"""Exact selection in plain jnp, in bounded memory: tiles of queries × spans of entries.

A span's scores are cut into groups of neighbouring entries, and only the largest score of each
group is kept. The running state of a query is its best `count` groups by (largest score, smaller
id). That suffices: if `count` groups rank before a group g, each of them holds an entry that ranks
before every entry of g, so no entry of g is among the best `count`. In the end the scores of the
kept groups are made again, and the best `count` of these are the answer. Groups stand in order of
id and the smaller position wins a tie, so ties go to the smaller id. As long as a tile sees few
entries, a group is one entry, and its score is the answer's.

The choice touches one value a group (`largest`), nothing of size queries × entries exists, and
spans and blocks that no query of the tile sees are skipped.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from v4jax.kernels import dispatch
from v4jax.kernels.dispatch import Target
from v4jax.kernels.indexer.largest import find_largest
from v4jax.kernels.table import NEVER, EntryTable, visible_entries
from v4jax.kernels.tiles import map_query_tiles
from v4jax.shapes import ceil_div, round_up

QUERY_TILE = 256
GPU_TILE = 2048
HEADS = 4  # whose products are held at once
GPU_HEADS = 16
ENTRY_BLOCK = 2048  # entries scored at once for a full tile; few queries take as many more …
LARGEST_BLOCK = 16_384  # … up to these
GPU_BLOCK = 1 << 18  # on a GPU: all of a CSA layer at a million tokens
FEW_QUERIES = 4  # up to here a product has keys for rows: on CPU 1.4 times as fast
SPAN = 2048  # group maxima between two choices: what one choice is made from
SMALL = 4096  # entries of which each is a group of its own
# Channels of the kept groups that are scored again at once: 2 MiB in float32.
GATHERED_ELEMENTS = 1 << 19
GPU_ELEMENTS = 1 << 26  # 128 MiB in bfloat16
UNSEEN = -jnp.inf


def select(
    queries, head_weights, keys: EntryTable, start, end, *, ratio, count, target, begin=None
):
    """See `v4jax.kernels.indexer.select`."""
    tokens = queries.shape[1]
    kept = min(count, keys.capacity)

    def select_tile(first, queries_bqix, weights_bqi, begin_bq):
        positions_bq = start[:, None] + first + jnp.arange(queries_bqix.shape[1])
        range_seen = find_range(positions_bq, begin_bq, end, ratio)

        def all_visible():
            ids = jnp.arange(kept, dtype=jnp.int32)
            if range_seen.first is not None:
                ids = range_seen.first[..., None] + ids
            ids = jnp.broadcast_to(ids, (*positions_bq.shape, kept))
            return jnp.where(ids < range_seen.visible[..., None], ids, -1)

        def best_of(limit):
            return select_best(target, queries_bqix, weights_bqi, keys, limit, range_seen, kept)

        def best_visible():
            if keys.capacity <= SMALL:
                return best_of(keys.capacity)
            few = functools.partial(best_of, SMALL)
            return jax.lax.cond(range_seen.end <= SMALL, few, lambda: best_of(keys.capacity))

        if keys.capacity <= count:
            return all_visible()
        if target.waits_for_host and positions_bq.size <= FEW_QUERIES:
            return best_of(keys.capacity)
        return jax.lax.cond(range_seen.most <= kept, all_visible, best_visible)

    largest = target.sized(QUERY_TILE, gpu=max(GPU_TILE // queries.shape[0], 1))
    tile = min(largest, tokens)
    return map_query_tiles(select_tile, tile, queries, head_weights, begin)


class Range(NamedTuple):
    """Entries that the queries of a tile see: `first` … `visible` − 1 each; `first` None: 0.

    The real ones see entries `begin` … `end` − 1 together, and none of them more than `most`.
    """

    first: Int[Array, "b q"] | None
    visible: Int[Array, "b q"]
    begin: Int[Array, ""] | int
    end: Int[Array, ""]
    most: Int[Array, ""]

    def includes(self, ids: Int[Array, "..."]) -> Bool[Array, "b q w"]:
        """Returns which of the ids, [w] or [b, q, w], each query sees."""
        seen_bqw = ids < self.visible[..., None]
        return seen_bqw if self.first is None else seen_bqw & (ids >= self.first[..., None])


def find_range(positions_bq, begin_bq, end, ratio) -> Range:
    """Returns what the queries of a tile see."""
    visible_bq = visible_entries(positions_bq, ratio)
    last_b = jnp.minimum(positions_bq[:, -1], end - 1)
    needed = jnp.max(visible_entries(last_b, ratio))
    if begin_bq is None:
        return Range(None, visible_bq, 0, needed, needed)
    first_bq, real_bq = begin_bq // ratio, positions_bq < end[:, None]
    begin = jnp.min(first_bq, where=real_bq, initial=NEVER)
    most = jnp.max(visible_bq - first_bq, where=real_bq, initial=0)
    return Range(first_bq, visible_bq, begin, needed, most)


def select_best(
    target: Target, queries_bqix, weights_bqi, keys, capacity, range_seen: Range, count
):
    """Returns the ids of the best `count` entries for one tile of queries.

    `capacity`, a static bound of `range_seen.end`, is what the steps are sized by.
    """
    rows = range_seen.visible.shape
    group = choose_group(capacity, count)
    wider = max(target.sized(QUERY_TILE, gpu=GPU_TILE) // range_seen.visible.size, 1)
    block = min(ENTRY_BLOCK * wider, target.sized(LARGEST_BLOCK, gpu=GPU_BLOCK))
    block = round_up(ceil_div(capacity, ceil_div(capacity, block)), group)
    # The last block of a capacity that block does not divide is read from earlier on, by whole
    # groups, which every block therefore has room for.
    readable = capacity - max(capacity - block, 0) // group * group
    groups = ceil_div(readable, group)
    span = min(max(SPAN * group // block, 1), ceil_div(capacity, block))  # in blocks

    def is_seen(index, blocks):
        seen = index * block < range_seen.end
        if range_seen.first is not None:
            seen &= (index + blocks) * block > range_seen.begin
        return seen

    def first_group(index):
        return jnp.minimum(index * block, capacity - readable)

    def group_maxima(index):
        first = first_group(index)
        scores_bqw = score(target, queries_bqix, weights_bqi, keys.block(first, readable))
        ids_w = first + jnp.arange(readable)
        own_w = (ids_w >= index * block) & (ids_w < (index + 1) * block)
        scores_bqw = jnp.where(own_w & range_seen.includes(ids_w), scores_bqw, UNSEEN)
        padding = [(0, 0), (0, 0), (0, groups * group - readable)]
        scores_bqw = jnp.pad(scores_bqw, padding, constant_values=UNSEEN)
        return scores_bqw.reshape(*rows, groups, group).max(axis=-1)

    def add_span(state, index):
        best_max, best_id = state
        indices = index * span + jnp.arange(span, dtype=jnp.int32)

        def maxima_or_nothing(i):
            nothing = jnp.full((*rows, groups), UNSEEN, jnp.float32)
            return jax.lax.cond(is_seen(i, 1), group_maxima, lambda _: nothing, i)

        if capacity <= block:
            maxima = group_maxima(0)
        else:
            maxima = jnp.moveaxis(jax.lax.map(maxima_or_nothing, indices), 0, 2)
        maxima = maxima.reshape(*rows, span * groups)
        # In the order of ids: what was kept, then the span.
        maxima = jnp.concatenate([best_max, maxima], axis=-1)
        chosen = largest_of(target, maxima, count)
        new = chosen - count
        ids = first_group(index * span + new // groups) + new % groups * group
        kept = jnp.take_along_axis(best_id, jnp.minimum(chosen, count - 1), axis=-1)
        ids = jnp.where(new < 0, kept, ids)
        best_max = jnp.take_along_axis(maxima, chosen, axis=-1)
        return jnp.where(chosen < 0, UNSEEN, best_max), jnp.where(chosen < 0, -group, ids)

    def step(state, index):
        seen = is_seen(index * span, span)
        return jax.lax.cond(seen, add_span, lambda s, _: s, state, index), None

    state = jnp.full((*rows, count), UNSEEN, jnp.float32), jnp.full((*rows, count), -group)
    if capacity <= block:
        _, best_id = add_span(state, 0)
    else:
        spans = jnp.arange(ceil_div(capacity, span * block), dtype=jnp.int32)
        _, best_id = jax.lax.scan(step, state, spans)[0]
    if group == 1:
        return best_id
    ids = (best_id[..., None] + jnp.arange(group)).reshape(*rows, count * group)
    scores = score_taken(target, queries_bqix, weights_bqi, keys, ids)
    scores = jnp.where((ids >= 0) & range_seen.includes(ids), scores, UNSEEN)
    chosen = largest_of(target, scores, count)
    return jnp.where(chosen < 0, -1, jnp.take_along_axis(ids, chosen, axis=-1))


def choose_group(capacity: int, count: int) -> int:
    """Returns the entries of a group, a power of two.

    Choosing costs capacity / group, scoring again count · group, each of these about four times as
    much as each of those: the sum is least at the root of capacity / (4 · count).
    """
    if capacity <= SMALL:
        return 1
    return 1 << (max(capacity // (4 * count), 1).bit_length() - 1) // 2


def largest_of(target, values, count):
    """Returns `find_largest` of the last axis of [b, q, n]; `count` may exceed n."""
    width = values.shape[-1]
    chosen = find_largest(target, values.reshape(-1, width), min(count, width))
    return chosen.reshape(*values.shape[:-1], -1)


def select_with_scores(
    queries, head_weights, keys: EntryTable, start, end, *, ratio, count, target
):
    """See `v4jax.kernels.indexer.select_with_scores`."""
    options = {"ratio": ratio, "count": count, "target": target}
    ids = select(queries, head_weights, keys, start, end, **options)
    scores = score_taken(target, queries, head_weights, keys, ids)
    return ids, jnp.where(ids >= 0, scores, UNSEEN)


def score_taken(target: Target, queries_bqix, weights_bqi, keys, ids_bqw):
    """Returns the scores of every query's own entries [b, q, w]."""
    elements = target.sized(GATHERED_ELEMENTS, gpu=GPU_ELEMENTS // ids_bqw.shape[0])
    tile = elements // (ids_bqw.shape[-1] * queries_bqix.shape[-1])

    def score_tile(_, ids_bqw, queries_bqix, weights_bqi):
        # One batch axis, and the sum over heads written out: XLA on CPU runs this ten times as
        # fast as the same with two axes, or with a sum.
        keys_nwx = keys.take(ids_bqw).reshape(-1, ids_bqw.shape[2], queries_bqix.shape[3])
        products_niw = jnp.einsum(
            "nix,nwx->niw",
            queries_bqix.reshape(-1, *queries_bqix.shape[2:]),
            keys_nwx,
            preferred_element_type=jnp.float32,
            precision="highest",
        )
        weights_ni = weights_bqi.astype(jnp.float32).reshape(-1, weights_bqi.shape[2])
        scores_nw = jnp.zeros(keys_nwx.shape[:2], jnp.float32)
        for head in range(weights_ni.shape[1]):
            scores_nw += weights_ni[:, head, None] * jax.nn.relu(products_niw[:, head])
        return scores_nw.reshape(ids_bqw.shape)

    tile = min(max(tile, 1), ids_bqw.shape[1])
    return map_query_tiles(score_tile, tile, ids_bqw, queries_bqix, weights_bqi)


def score(target: Target, queries_bqix, weights_bqi, keys_bwx):
    """Returns index scores in float32 [b, q, w]; a GPU has a kernel that writes no product."""
    names, arguments = ("scores_gpu", "portable"), (queries_bqix, keys_bwx)
    chosen = dispatch.pick(target, "index_scores", __package__, *arguments, names=names)
    return chosen.score_block(target, queries_bqix, weights_bqi, keys_bwx)


def score_block(target: Target, queries_bqix, weights_bqi, keys_bwx):
    """Returns index scores in float32 [b, q, w]; the products of a few heads are held at once.

    One product for several heads, then their sum written out: XLA on CPU makes one loop of it.
    """
    batch, tokens, heads, channels = queries_bqix.shape
    together = target.sized(HEADS, gpu=heads if batch * tokens <= FEW_QUERIES else GPU_HEADS)
    together = together if heads % together == 0 else 1

    def add_heads(scores_bqw, parts):
        queries_bnx, weights_bhq = parts
        # [b, h·q, w]: written as one matrix per sequence, so that its rows stay rows.
        precise = {"preferred_element_type": jnp.float32, "precision": "highest"}
        if tokens <= FEW_QUERIES:
            # The many keys are the rows; the barrier keeps XLA from turning it round again.
            products_bwn = jnp.einsum("bwx,bnx->bwn", keys_bwx, queries_bnx, **precise)
            products = jnp.swapaxes(jax.lax.optimization_barrier(products_bwn), 1, 2)
        else:
            products = jnp.einsum("bnx,bwx->bnw", queries_bnx, keys_bwx, **precise)
        products = products.reshape(batch, together, tokens, -1)
        for head in range(together):
            weights_bq1 = weights_bhq[:, head, :, None]
            scores_bqw = scores_bqw + weights_bq1 * jax.nn.relu(products[:, head])
        return scores_bqw, None

    # [b, q, i, …] → [groups of heads, b, h, q, …]
    queries = jnp.moveaxis(queries_bqix, 2, 1).reshape(batch, -1, together * tokens, channels)
    weights = jnp.moveaxis(weights_bqi.astype(jnp.float32), 2, 1)
    weights = weights.reshape(batch, -1, together, tokens)
    parts = jnp.moveaxis(queries, 1, 0), jnp.moveaxis(weights, 1, 0)
    scores_bqw = jnp.zeros((batch, tokens, keys_bwx.shape[1]), jnp.float32)
    if heads == together:
        return add_heads(scores_bqw, jax.tree.map(lambda part: part[0], parts))[0]
    return jax.lax.scan(add_heads, scores_bqw, parts)[0]
