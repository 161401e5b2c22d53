"""The lightning indexer: which compressed entries a query attends to."""

import jax
from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.dispatch import Target
from v4jax.kernels.indexer import portable
from v4jax.kernels.table import EntryTable, hide_padding
from v4jax.shapes import check_shape


def select(
    queries: Float[Array, "b t i x"],
    head_weights: Float[Array, "b t i"],
    keys: EntryTable,
    start: Int[Array, "b"],
    end: Int[Array, "b"],
    *,
    ratio: int,
    count: int,
    begin: Int[Array, "b t"] | None = None,
    target: Target,
) -> Int[Array, "b t k"]:
    """Returns the ids of the `count` best visible entries, −1 where fewer are visible.

    The score of entry w for the query at position p is Σ_i head_weights[p, i] · ReLU(q[p, i] ·
    k[w]), in float32; entries w < (p+1) // ratio are visible. Ties go to the smaller id. The result
    is the exact top-k, independent of tiles and blocks; its order is not defined.

    Args:
      queries: rotated (and, if the format says so, quantized) index queries of tokens start …
        start+t−1.
      head_weights: signed weights, scaled.
      keys: index keys of all entries.
      start: position of the first query of each sequence.
      end: position after the last real token; later queries are padding.
      ratio: tokens per entry.
      count: entries to select (config.index_topk).
      begin: where a row holds several documents, the position of the first token of each query's
        document, a multiple of `table.DOCUMENT_UNIT`, as start then is; negative for padding. No
        entry before it is selected; what is selected for padding means nothing.
      target: the devices the program is made for.

    Source: spec B.9.
    """
    batch, tokens, heads, _ = queries.shape
    check_shape("head_weights", head_weights, (batch, tokens, heads))
    if begin is not None:
        check_shape("begin", begin, (batch, tokens))
    # Ids have no gradient; saying so keeps scores out of what the backward pass stores.
    queries, head_weights, keys = jax.lax.stop_gradient((queries, head_weights, keys))
    run = dispatch.pick(target, "indexer", __name__, queries, keys, count, begin).select
    options = {"ratio": ratio, "count": count, "begin": hide_padding(begin), "target": target}
    return run(queries, head_weights, keys, start, end, **options)


def select_with_scores(
    queries: Float[Array, "b t i x"],
    head_weights: Float[Array, "b t i"],
    keys: EntryTable,
    start: Int[Array, "b"],
    end: Int[Array, "b"],
    *,
    ratio: int,
    count: int,
    target: Target,
) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"]]:
    """As `select`, and the scores of the selected in float32, −∞ for the id −1.

    The scores let candidates from several tables of one sequence be compared.
    """
    batch, tokens, heads, _ = queries.shape
    check_shape("head_weights", head_weights, (batch, tokens, heads))
    queries, head_weights, keys = jax.lax.stop_gradient((queries, head_weights, keys))
    implementation = dispatch.pick(target, "indexer", __name__, queries, keys, count, None, True)
    options = {"ratio": ratio, "count": count, "target": target}
    return implementation.select_with_scores(queries, head_weights, keys, start, end, **options)


def score(
    queries: Float[Array, "b t i x"],
    head_weights: Float[Array, "b t i"],
    keys: Float[Array, "b w x"],
    *,
    target: Target,
) -> Float[Array, "b t w"]:
    """Returns the scores of all keys in float32, with a gradient: the indexer's loss needs both."""
    return portable.score_block(target, queries, head_weights, keys)


def score_selected(
    queries: Float[Array, "b t i x"],
    head_weights: Float[Array, "b t i"],
    keys: EntryTable,
    ids: Int[Array, "b t k"],
    *,
    target: Target,
) -> Float[Array, "b t k"]:
    """As `score`, of the keys with these ids; those of absent ids mean nothing."""
    return portable.score_taken(target, queries, head_weights, keys, ids)
