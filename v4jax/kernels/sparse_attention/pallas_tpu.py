"""Sparse attention on TPU: which of its kernels runs, and its gradient.

A prefill rewrites the entries in use as rows, once, from which groups of neighbouring queries
gather what any of them selected (`prefill_tpu`, `union_tpu`). A few queries of a long sequence each
gather their own, straight from the table (`decode_tpu`).
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.dense_attention import gradient
from v4jax.kernels.dense_attention.tiles_tpu import LANES, why_not
from v4jax.kernels.sparse_attention import decode_tpu, prefill_tpu, reference
from v4jax.kernels.sparse_attention.rows_tpu import WORD_CHANNELS
from v4jax.kernels.sparse_attention.union_tpu import NOTHING

LARGEST_COUNT = 1024  # selected entries that VMEM holds decoded, with their blocks under way
# A row of the table is rewritten for this part of what it costs to gather an entry from the table.
REWRITTEN_ROWS = 32
MOST_QUERIES = 16  # of a sequence that gather one by one: they share the rows of one window


def supported(queries, recent, window, entries, selected, begin=None) -> str | None:
    """Returns why the kernels cannot run on these arguments, or None."""
    reason = why_not(queries, recent, window)
    if reason is not None:
        return reason
    if queries.dtype != jnp.bfloat16 or entries.format.dtype != "bfloat16":
        return f"queries and entries must be bfloat16, got {queries.dtype}"
    heads, channels = queries.shape[2:]
    if channels % WORD_CHANNELS:
        return f"channels must divide by {WORD_CHANNELS}, got {channels}"
    if heads * prefill_tpu.LARGEST_GROUP < LANES:
        return f"heads must be at least {LANES // prefill_tpu.LARGEST_GROUP}, got {heads}"
    if entries.capacity << prefill_tpu.LARGEST_GROUP >= NOTHING:
        return f"an id and a bit of each query of a group share 31 bits: {entries.capacity} entries"
    count = selected.shape[-1]
    if count % LANES or count > LARGEST_COUNT:
        return f"selected entries must divide by {LANES} and be at most {LARGEST_COUNT}: {count}"
    if begin is not None and gathers_one_by_one(queries.shape[1], count, entries.capacity, window):
        return f"rows of several documents need more than {MOST_QUERIES} queries"
    return None


def attend_with_mass(queries, recent, sink, start, *, window, entries, selected, begin=None):
    """See `v4jax.kernels.sparse_attention.attend_with_mass`."""
    stored, layer, stored_as = gradient.open_table(entries)
    arguments = queries, recent, sink, start, begin
    return _attend(window, stored_as, *arguments, stored, layer, selected)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, stored_as, queries, recent, sink, start, begin, stored, layer, selected):
    entries = gradient.close_table(stored, layer, stored_as)
    few = gathers_one_by_one(queries.shape[1], selected.shape[-1], entries.capacity, window)
    options = {"window": window, "entries": entries, "selected": selected}
    if few:
        return decode_tpu.attend(queries, recent, sink, start, **options)
    return prefill_tpu.attend(queries, recent, sink, start, **options, begin=begin)


def _attend_forward(window, stored_as, *arguments):
    results = _attend(window, stored_as, *arguments)
    return results, (*arguments, *results)


_attend.defvjp(_attend_forward, reference.attend_backward)


def gathers_one_by_one(tokens: int, count: int, capacity: int, window: int) -> bool:
    """Returns whether few queries read less of the table than all its entries.

    Without a window the table is a share of a sequence's entries (`model.attend`), and few
    of those selected are in it.
    """
    cheap = window == 0 or tokens * count * REWRITTEN_ROWS <= capacity
    return cheap and tokens <= MOST_QUERIES and capacity % LANES == 0
