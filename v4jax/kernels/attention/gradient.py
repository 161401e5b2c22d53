"""The backward pass of attention in plain jnp: scores are recomputed tile by tile, and not kept.

With weights p = exp(z − log_mass) and the output's cotangent g, the cotangent of a score is

    p · (g·k − g·attended + cotangent of log_mass)

A tile therefore needs its queries, its outputs and one block of keys at a time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import EntryTable
from v4jax.quant.formats import round_to
from v4jax.shapes import ceil_div


def keep(attend, call: Call, inputs: Inputs):
    """Returns the results of `attend`, and what its backward pass needs."""
    results = attend(call, inputs)
    return results, (inputs, *results)


def fold_query_tiles(body, carry, tile, *arrays):
    """Returns (carry, rows): body(carry, first, slices) → carry, [b, tile, …] over all tiles.

    As `tiles.map_query_tiles`, with sums that go from tile to tile. The last tile is padded with
    zeros; rows of zero queries and zero cotangents add nothing to any sum.
    """
    length = arrays[0].shape[1]
    count = ceil_div(length, tile)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * tile - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, tile, *x.shape[2:]), 1, 0)

    firsts = jnp.arange(count, dtype=jnp.int32) * tile
    carry, tiles = jax.lax.scan(
        lambda carry, slices: body(carry, *slices), carry, (firsts, *jax.tree.map(cut, arrays))
    )
    joined = jnp.moveaxis(tiles, 0, 1)
    return carry, joined.reshape(joined.shape[0], count * tile, *joined.shape[3:])[:, :length]


def row_slopes(attended, attended_grad, log_mass_grad):
    """Returns what every score of a row gets beside g·k: its log_mass cotangent − g·attended."""
    product = attended.astype(jnp.float32) * attended_grad.astype(jnp.float32)
    return log_mass_grad - product.sum(-1)


def key_gradients(
    target, layout, queries_bqhc, keys, seen_bqs, log_mass_bqh, grad_bqhc, slopes_bqh
):
    """Returns the cotangents of queries [b, q, h, c] and of keys, float32, of one block.

    As flash attention rounds: what multiplies keys, queries or cotangents has their dtype.

    Args:
      layout: "bsc" where the queries share their keys, "bqsc" where each has its own.
    """

    def product(subscripts, left, right):
        if not target.multiplies_bfloat16:
            left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        exact = {"preferred_element_type": jnp.float32, "precision": "highest"}
        return jnp.einsum(subscripts, left, right, **exact)

    scale = jnp.float32(queries_bqhc.shape[-1] ** -0.5)
    scores_bqhs = product(f"bqhc,{layout}->bqhs", queries_bqhc, keys) * scale
    scores_bqhs = jnp.where(seen_bqs[:, :, None], scores_bqhs, MASKED)
    weights_bqhs = jnp.exp(scores_bqhs - log_mass_bqh[..., None])
    weight_grads_bqhs = product(f"bqhc,{layout}->bqhs", grad_bqhc, keys)
    score_grads_bqhs = weights_bqhs * (weight_grads_bqhs + slopes_bqh[..., None]) * scale
    score_grads_bqhs = round_to(score_grads_bqhs, keys.dtype)
    weights_bqhs = round_to(weights_bqhs, keys.dtype)
    query_grads = product(f"bqhs,{layout}->bqhc", score_grads_bqhs, keys)
    as_keys = product(f"bqhs,bqhc->{layout}", score_grads_bqhs, queries_bqhc)
    as_values = product(f"bqhs,bqhc->{layout}", weights_bqhs, grad_bqhc)
    return query_grads, as_keys + as_values


def sink_gradient(sink, log_mass_bth, slopes_bth) -> Float[Array, "h"]:
    """Returns the cotangent of the sink: a key of value zero."""
    return (jnp.exp(sink - log_mass_bth) * slopes_bth).sum((0, 1)).astype(sink.dtype)


def add_rows(sums_bsc, first, rows_bsc):
    """Returns `sums` with rows added from row `first` on."""
    old = jax.lax.dynamic_slice_in_dim(sums_bsc, first, rows_bsc.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(sums_bsc, old + rows_bsc, first, axis=1)


def zero_sums(entries: EntryTable | None) -> Float[Array, "b w c"] | None:
    """Returns zeros for the cotangents of the entries of a table."""
    if entries is None:
        return None
    batch = next(iter(entries.stored.values())).shape[1]
    return jnp.zeros((batch, entries.capacity, entries.format.channels), jnp.float32)


def stored_gradient(entries: EntryTable, grad_bwc) -> dict[str, jax.Array]:
    """Returns the cotangent of the stored arrays whose entries have cotangent `grad`."""

    def decode(stored):
        rows = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, entries.layer, keepdims=False), stored
        )
        return entries.format.decode(rows)

    decoded, pull = jax.vjp(decode, entries.stored)
    return pull(grad_bwc.astype(decoded.dtype))[0]


def close(call: Call, kept, slopes, query_grads, recent_grads, entry_grads) -> tuple[Inputs]:
    """Returns the cotangents of the inputs from those of queries, recent rows and entries."""
    inputs, _, log_mass = kept
    entries = inputs.entries(call)
    return (
        Inputs(
            query_grads.astype(inputs.queries.dtype),
            recent_grads.astype(inputs.recent.dtype),
            sink_gradient(inputs.sink, log_mass, slopes),
            *(None, None, None, None),
            None if entries is None else stored_gradient(entries, entry_grads),
            None,
        ),
    )
