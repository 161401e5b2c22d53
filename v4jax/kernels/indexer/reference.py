"""Exact selection in plain jnp, in bounded memory: tiles of queries × blocks of entries.

A block's scores are cut into groups of GROUP neighbouring entries. The running state of a query is
its best `count` groups by (largest score, smaller id first), with all their scores, in order of id.
That suffices: if `count` groups rank before a group g, each of them holds an entry that ranks
before every entry of g, so no entry of g is among the best `count`. One final top-k over the kept
groups gives the answer; since they stand in order of id, ties go to the smaller id. Sorting thus
touches 1/GROUP of the scores, and nothing of size queries × entries exists.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.table import EntryTable, visible_entries
from v4jax.kernels.tiles import map_query_tiles
from v4jax.shapes import ceil_div, round_up

QUERY_TILE = 128
ENTRY_BLOCK = 4096
GROUP = 16
UNSEEN = -jnp.inf


def select(queries, head_weights, keys: EntryTable, start, end, *, ratio, count):
    """See `v4jax.kernels.indexer.select`."""
    tokens = queries.shape[1]
    kept = min(count, keys.capacity)

    def select_tile(first, queries_bqix, weights_bqi):
        positions_bq = start[:, None] + first + jnp.arange(queries_bqix.shape[1])
        visible_bq = visible_entries(positions_bq, ratio)
        last_b = jnp.minimum(positions_bq[:, -1], end - 1)
        needed = jnp.max(visible_entries(last_b, ratio))

        def all_visible():
            ids = jnp.broadcast_to(jnp.arange(kept, dtype=jnp.int32), (*visible_bq.shape, kept))
            return jnp.where(ids < visible_bq[..., None], ids, -1)

        def best_visible():
            return select_best(queries_bqix, weights_bqi, keys, visible_bq, needed, kept)

        if keys.capacity <= count:
            return all_visible()
        return jax.lax.cond(needed <= kept, all_visible, best_visible)

    return map_query_tiles(select_tile, min(QUERY_TILE, tokens), queries, head_weights)


def select_best(queries_bqix, weights_bqi, keys, visible_bq, needed, count):
    """Returns the ids of the best `count` of `needed` entries for one tile of queries."""
    block = min(ENTRY_BLOCK, round_up(keys.capacity, GROUP))
    readable = min(block, keys.capacity)
    groups = block // GROUP
    rows = visible_bq.shape

    def add_block(state, index):
        best_max, best_id, best_scores = state
        # The last block of a capacity that block does not divide starts early; its known part is
        # masked.
        first = jnp.minimum(index * block, keys.capacity - readable)
        scores_bqw = score(queries_bqix, weights_bqi, keys.block(first, readable))
        ids_w = first + jnp.arange(readable)
        seen_bqw = (ids_w < visible_bq[..., None]) & (ids_w >= index * block)
        scores_bqw = jnp.where(seen_bqw, scores_bqw, UNSEEN)
        scores_bqw = jnp.pad(
            scores_bqw, [(0, 0), (0, 0), (0, block - readable)], constant_values=UNSEEN
        )
        new_scores = scores_bqw.reshape(*rows, groups, GROUP)
        new_id = jnp.broadcast_to(first + jnp.arange(groups) * GROUP, (*rows, groups))
        # Kept groups stand in order of id, before the new ones, whose ids are larger: top_k's
        # preference for the smaller index is the preference for the smaller id.
        all_max = jnp.concatenate([best_max, new_scores.max(axis=-1)], axis=-1)
        chosen = jnp.sort(jax.lax.top_k(all_max, count)[1], axis=-1)
        best_max = jnp.take_along_axis(all_max, chosen, axis=-1)
        best_id = jnp.take_along_axis(jnp.concatenate([best_id, new_id], axis=-1), chosen, axis=-1)
        all_scores = jnp.concatenate([best_scores, new_scores], axis=-2)
        best_scores = jnp.take_along_axis(all_scores, chosen[..., None], axis=-2)
        return best_max, best_id, best_scores

    def step(state, index):
        seen = index * block < needed
        return jax.lax.cond(seen, add_block, lambda s, _: s, state, index), None

    state = (
        jnp.full((*rows, count), UNSEEN, jnp.float32),
        jnp.zeros((*rows, count), jnp.int32),
        jnp.full((*rows, count, GROUP), UNSEEN, jnp.float32),
    )
    blocks = jnp.arange(ceil_div(keys.capacity, block), dtype=jnp.int32)
    (_, best_id, best_scores), _ = jax.lax.scan(step, state, blocks)
    ids = best_id[..., None] + jnp.arange(GROUP)
    values, chosen = jax.lax.top_k(best_scores.reshape(*rows, -1), count)
    ids = jnp.take_along_axis(ids.reshape(*rows, -1), chosen, axis=-1)
    return jnp.where(values > UNSEEN, ids, -1)


def score(queries_bqix, weights_bqi, keys_bwx):
    """Returns index scores in float32 [b, q, w]; only one head's products are held."""

    def add_head(scores_bqw, head):
        queries_bqx, weights_bq = head
        products = jnp.einsum(
            "bqx,bwx->bqw",
            queries_bqx,
            keys_bwx,
            preferred_element_type=jnp.float32,
            precision="highest",
        )
        weights_bq = weights_bq.astype(jnp.float32)
        return scores_bqw + weights_bq[..., None] * jax.nn.relu(products), None

    shape = (*queries_bqix.shape[:2], keys_bwx.shape[1])
    heads = (jnp.moveaxis(queries_bqix, 2, 0), jnp.moveaxis(weights_bqi, 2, 0))
    return jax.lax.scan(add_head, jnp.zeros(shape, jnp.float32), heads)[0]
