"""Selection as the formula says it: all scores, then the best of each query.

The specification: plain jnp in float32, an array of queries × entries.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.table import hide_padding


def select(*arguments, **options):
    """See `v4jax.kernels.indexer.select`; the ids come in the order of their scores."""
    return select_with_scores(*arguments, **options)[0]


def select_with_scores(
    queries, head_weights, keys, start, end, *, ratio, count, begin=None, target=None
):
    """See `v4jax.kernels.indexer.select_with_scores`."""
    del end, target
    scores_btw = score(queries, head_weights, keys.block(jnp.int32(0), keys.capacity))
    positions = start[:, None, None] + jnp.arange(queries.shape[1])[:, None]
    ids = jnp.arange(keys.capacity)
    visible = (ids + 1) * ratio <= positions + 1
    if begin is not None:
        visible &= ids * ratio >= hide_padding(begin)[..., None]
    scores_btw = jnp.where(visible, scores_btw, -jnp.inf)
    # Ties go to the smaller id; −0 and +0 tie.
    best, ids = jax.lax.top_k(jnp.where(scores_btw == 0, 0.0, scores_btw), min(count, len(ids)))
    return jnp.where(best > -jnp.inf, ids, -1), best


def score(queries, head_weights, keys, *, target=None):
    """Returns Σ_i head_weights[i] · ReLU(q[i] · k) of all keys [b, w, x], in float32."""
    del target
    queries, head_weights, keys = (x.astype(jnp.float32) for x in (queries, head_weights, keys))
    products = jnp.einsum("btix,bwx->btiw", queries, keys, precision="highest")
    return (head_weights[..., None] * jax.nn.relu(products)).sum(axis=2)
