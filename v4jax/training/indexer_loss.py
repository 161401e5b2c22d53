"""How far the indexer's scores are from attention: its training loss and its recall.

For the query t let lse[t, h] be the log-sum-exp of head h over window, entries and sink. The
teacher of entry w is its share of the attention that goes to entries,

    p[t, w] = Σ_h exp(q[t, h]·k[w] / √c − lse[t, h]) / the same summed over w,

so that a head which looks at its window or sink weighs little; the student is the softmax of the
index scores over the same entries, and the loss of a query is KL(p ‖ student). Queries are taken in
tiles, which the backward pass computes again: nothing of size queries × entries is kept.

Source: spec G.4; the published code has no training part, this form is what independent ports
converged on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.kernels import Target, indexer
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import EntryTable, visible_entries
from v4jax.kernels.tiles import map_query_tiles
from v4jax.parallel import Axes

# Products of one tile: heads × entries, or gathered channels; 8 MiB in float32.
TILE_ELEMENTS = 1 << 21
TINY = 1e-30


class Comparison(NamedTuple):
    """Index scores beside attention, per query; all 0 where a query sees no entry.

    divergence: KL(teacher ‖ student) over the entries compared, in nats. recall: share of the
    teacher's mass on the entries that the student would select; 1 where it selects all.
    """

    divergence: Float[Array, "b t"]
    recall: Float[Array, "b t"]


class Shown(NamedTuple):
    """What a CSA layer shows of its attention, and of its indexer (`Context.show`)."""

    queries: Float[Array, "b t h c"]
    log_mass: Float[Array, "b t h"]
    entries: EntryTable
    index_queries: Float[Array, "b t i x"]
    index_weights: Float[Array, "b t i"]
    index_keys: EntryTable

    def hold_attention(self) -> "Shown":
        """Returns it with an attention side that gets no gradient."""
        return Shown(*jax.lax.stop_gradient(self[:3]), *self[3:])


def compare_selected(
    axes: Axes, target: Target, shown: Shown, selected: Int[Array, "b t k"]
) -> Comparison:
    """Compares on the selected entries: the loss once attention is sparse. Its recall is 1.

    As in `compare_visible`, the attention side gets no gradient.
    """
    shown = shown.hold_attention()

    def compare_tile(_, queries, log_mass, index_queries, index_weights, selected):
        seen = selected >= 0
        scores = _attention_scores("bqhc,bqkc->bqhk", queries, shown.entries.take(selected))
        teacher = _teacher(axes, scores, log_mass, seen)
        student = indexer.score_selected(
            index_queries, index_weights, shown.index_keys, selected, target=target
        )
        divergence = _divergence(teacher, jnp.where(seen, student, MASKED), seen)
        return jnp.stack([divergence, seen.any(axis=-1).astype(jnp.float32)], axis=-1)

    elements = selected.shape[-1] * max(shown.queries.shape[-2:])
    return _compare(compare_tile, elements, shown, selected)


def compare_visible(
    axes: Axes,
    target: Target,
    shown: Shown,
    positions: Int[Array, "b t"],
    first: Int[Array, "b t"],
    *,
    ratio: int,
    count: int,
) -> Comparison:
    """Compares on all visible entries: the loss while attention is dense, and the true recall.

    Args:
      positions: of the queries, in the numbering of the entries.
      first: id of the first entry that a query may see; 0 unless a row holds several documents.
      count: entries that the indexer selects.
    """
    shown, capacity = shown.hold_attention(), shown.entries.capacity
    ids_w = jnp.arange(capacity)

    def compare_tile(_, queries, log_mass, index_queries, index_weights, positions, first):
        visible_bq = visible_entries(positions, ratio)
        seen = (ids_w >= first[..., None]) & (ids_w < visible_bq[..., None])
        entries = shown.entries.block(jnp.int32(0), capacity)
        scores = _attention_scores("bqhc,bkc->bqhk", queries, entries)
        teacher = _teacher(axes, scores, log_mass, seen)
        keys = shown.index_keys.block(jnp.int32(0), shown.index_keys.capacity)
        student = indexer.score(index_queries, index_weights, keys, target=target)
        student = jnp.where(seen, student, MASKED)
        best = jax.lax.top_k(jax.lax.stop_gradient(student), min(count, capacity))[1]
        recall = jnp.take_along_axis(teacher, best, axis=-1).sum(axis=-1)
        return jnp.stack([_divergence(teacher, student, seen), recall], axis=-1)

    return _compare(compare_tile, capacity * shown.queries.shape[2], shown, positions, first)


def _compare(compare_tile: Callable, elements: int, shown: Shown, *rows: Array) -> Comparison:
    """Returns what `compare_tile` finds for all queries, in tiles.

    Args:
      elements: products of one query; they decide the size of a tile.
      rows: what `compare_tile` takes of each query beside what is shown.
    """
    batch, tokens = shown.queries.shape[:2]
    tile = min(max(TILE_ELEMENTS // (batch * elements), 1), tokens)
    arrays = shown.queries, shown.log_mass, shown.index_queries, shown.index_weights, *rows
    return Comparison(*jnp.moveaxis(map_query_tiles(compare_tile, tile, *arrays), -1, 0))


def _attention_scores(products: str, queries, keys):
    scale = jnp.float32(queries.shape[-1] ** -0.5)
    precise = {"preferred_element_type": jnp.float32, "precision": "highest"}
    return jnp.einsum(products, queries, keys, **precise) * scale


def _teacher(axes, scores_bqhk, log_mass_bqh, seen_bqk):
    """Returns p[t, w], 0 everywhere where a query sees no entry."""
    logits = jnp.where(seen_bqk[:, :, None], scores_bqhk - log_mass_bqh[..., None], MASKED)
    mass_bqk = axes.psum(jnp.exp(logits).sum(axis=2), "heads")
    mass_bqk = jnp.where(seen_bqk, mass_bqk, 0.0)
    return mass_bqk / jnp.maximum(mass_bqk.sum(axis=-1, keepdims=True), TINY)


def _divergence(teacher, student, seen):
    log_student = student - jax.nn.logsumexp(student, axis=-1, keepdims=True)
    log_teacher = jnp.log(jnp.maximum(teacher, TINY))
    terms = teacher * (log_teacher - jnp.where(seen, log_student, 0.0))
    return jnp.where(teacher > 0, terms, 0.0).sum(axis=-1)
