"""Sparse attention on TPU: which of its kernels runs, and its gradient.

A prefill rewrites the entries in use as rows, once. Groups of neighbouring queries gather from them
what any of the group selected (`sparse_prefill_tpu`, `union_tpu`). If a long sequence has few
queries, each gathers its own entries straight from the table (`sparse_decode_tpu`).
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.attention import gradient, portable, sparse_decode_tpu, sparse_prefill_tpu
from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.attention.rows_tpu import WORD_CHANNELS
from v4jax.kernels.attention.tiles_tpu import why_not
from v4jax.kernels.attention.union_tpu import ABSENT
from v4jax.kernels.tpu import LANES

LARGEST_COUNT = 1024  # selected entries that VMEM holds decoded, with their blocks under way
# A row of the table is rewritten for this part of what it costs to gather an entry from the table.
REWRITTEN_ROWS = 32
MOST_QUERIES = 16  # of a sequence that gather one by one: they share the rows of one window


def supported(call: Call, inputs: Inputs) -> str | None:
    """Returns why the kernels cannot run on these arguments, or None."""
    queries, entries = inputs.queries, inputs.entries(call)
    reason = why_not(queries, inputs.recent, call.window)
    if reason is not None:
        return reason
    if queries.dtype != jnp.bfloat16 or entries.format.dtype != "bfloat16":
        return f"queries and entries must be bfloat16, got {queries.dtype}"
    heads, channels = queries.shape[2:]
    if channels % WORD_CHANNELS:
        return f"channels must divide by {WORD_CHANNELS}, got {channels}"
    if heads * sparse_prefill_tpu.LARGEST_GROUP < LANES:
        return f"heads must be at least {LANES // sparse_prefill_tpu.LARGEST_GROUP}, got {heads}"
    if entries.capacity << sparse_prefill_tpu.LARGEST_GROUP >= ABSENT:
        return f"an id and a bit of each query of a group share 31 bits: {entries.capacity} entries"
    count = inputs.selected.shape[-1]
    if count % LANES or count > LARGEST_COUNT:
        return f"selected entries must divide by {LANES} and be at most {LARGEST_COUNT}: {count}"
    if inputs.begin is not None and gathers_one_by_one(call, inputs):
        return f"rows of several documents need more than {MOST_QUERIES} queries"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, inputs: Inputs):
    """Returns (attended [b, t, h, c], log-sum-exp [b, t, h])."""
    few = gathers_one_by_one(call, inputs)
    return (sparse_decode_tpu if few else sparse_prefill_tpu).attend(call, inputs)


attend.defvjp(functools.partial(gradient.keep, attend), portable.attend_backward)


def gathers_one_by_one(call: Call, inputs: Inputs) -> bool:
    """Returns whether few queries read less of the table than all its entries.

    Without a window the table is a share of a sequence's entries (`model.attend`), and few
    of those selected are in it.
    """
    tokens, count = inputs.selected.shape[1:]
    capacity = inputs.entries(call).capacity
    cheap = call.window == 0 or tokens * count * REWRITTEN_ROWS <= capacity
    return cheap and tokens <= MOST_QUERIES and capacity % LANES == 0
