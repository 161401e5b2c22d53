"""Index scores as one kernel for GPUs: the products of a tile never leave the chip.

In plain jnp they are written out, a float32 for each query, head and entry, before the heads are
added: sixty-four times what is left of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from v4jax.kernels.dispatch import Target
from v4jax.shapes import round_up

QUERIES, ENTRIES, WARPS = 64, 128, 4  # of a program: the fastest of five that were tried
FEWEST = 16  # queries: a product has no fewer rows


def supported(queries_bqix: jax.Array, keys_bwx: jax.Array) -> str | None:
    """Returns why the kernel cannot score these, or None."""
    channels = queries_bqix.shape[-1]
    if queries_bqix.dtype != jnp.bfloat16 or keys_bwx.dtype != jnp.bfloat16:
        return f"queries and keys must be bfloat16, got {queries_bqix.dtype} and {keys_bwx.dtype}"
    if channels & (channels - 1) or channels < FEWEST:
        return f"channels must be a power of two from {FEWEST} on, got {channels}"
    if queries_bqix.shape[1] < FEWEST:
        return f"queries must be at least {FEWEST}, got {queries_bqix.shape[1]}"
    return None


def score_block(target: Target, queries_bqix, weights_bqi, keys_bwx) -> jax.Array:
    """See `portable.score_block`."""
    batch, tokens, heads, channels = queries_bqix.shape
    entries = keys_bwx.shape[1]
    queries = jnp.moveaxis(queries_bqix, 2, 1)  # a head's rows are one matrix
    weights = jnp.moveaxis(weights_bqi.astype(jnp.float32), 2, 1)
    rows, columns = round_up(tokens, QUERIES), round_up(entries, ENTRIES)
    queries = jnp.pad(queries, [(0, 0), (0, 0), (0, rows - tokens), (0, 0)])
    weights = jnp.pad(weights, [(0, 0), (0, 0), (0, rows - tokens)])
    keys = jnp.pad(keys_bwx, [(0, 0), (0, columns - entries), (0, 0)])
    scores = pl.pallas_call(
        functools.partial(_score_tile, heads),
        out_shape=jax.ShapeDtypeStruct((batch, rows, columns), jnp.float32),
        # Programs that follow each other share their keys.
        grid=(batch, columns // ENTRIES, rows // QUERIES),
        in_specs=[
            pl.BlockSpec((None, heads, QUERIES, channels), lambda b, w, q: (b, 0, q, 0)),
            pl.BlockSpec((None, heads, QUERIES), lambda b, w, q: (b, 0, q)),
            pl.BlockSpec((None, ENTRIES, channels), lambda b, w, q: (b, w, 0)),
        ],
        out_specs=pl.BlockSpec((None, QUERIES, ENTRIES), lambda b, w, q: (b, q, w)),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=3),
        interpret=target.interpret,
        name="index_scores",
    )(queries, weights, keys)
    return scores[:, :tokens, :entries]


def _score_tile(heads, queries_ref, weights_ref, keys_ref, scores_ref):
    keys_wx = keys_ref[...]

    def add_head(i, scores_qw):
        products_qw = triton.dot(queries_ref[i], keys_wx, trans_b=True)
        return scores_qw + weights_ref[i][:, None] * jnp.maximum(products_qw, 0.0)

    zeros = jnp.zeros(scores_ref.shape, jnp.float32)
    scores_ref[...] = jax.lax.fori_loop(0, heads, add_head, zeros)
