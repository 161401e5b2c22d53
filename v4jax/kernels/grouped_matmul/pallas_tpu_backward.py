"""Gradients of routed experts on TPU, over the same tiles as the forward pass.

Only the arguments are kept; gate and up are computed again. With G the gradient of the
outputs' rows, h = weight · SwiGLU(a, b) and out = down · h:

    dh = downᵀ G,  (da, db, dweight) from dh by SwiGLU,  dx = w1ᵀ da + w3ᵀ db,
    d(gate, up) = Σ_rows (da, db) xᵀ,  d(down) = Σ_rows G hᵀ

in three kernels: `inner` (a, b, dh and what follows from them), `multiply_transposed` (dx) and
`sum_products` (both weights; XLA drops it where its result is unused, as for quantized experts).
Empty rows have weight 0, and therefore h, da and db are 0.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.dispatch import Target
from v4jax.kernels.grouped_matmul import portable
from v4jax.kernels.scaled_matmul import pallas_tpu as linear
from v4jax.kernels.tpu import VMEM_BYTES

# A tile holds twice the rows' bytes here (inputs and gradients).
LARGEST_TILE = 256
# Channels of one block of the inner activations, and of one block of a weight's gradient.
INNER, ROWS, COLUMNS = 256, 512, 1024


def backward(target: Target, plan, tile, x, weights, gate_up, down, gradient, *, limit):
    """Returns the gradients of x, routing weights, gate_up and down.

    Args:
      plan: of `portable`, with tiles of `tile` rows.
      gradient: [t, d] of the experts' sum.
    """
    tokens, chosen = weights.shape
    rows_ad = plan.lay_out(x, chosen)
    gradient_ad = plan.lay_out(gradient.astype(jnp.bfloat16), chosen)
    weights_a1 = plan.lay_out(weights.reshape(-1, 1)).astype(jnp.float32)
    weights_a1 = jnp.where(plan.valid.reshape(-1, 1), weights_a1, 0.0)
    experts, used = plan.experts.astype(jnp.int32), plan.valid[:, 0].sum().astype(jnp.int32)
    hidden_af, inner_a2f, shares_a = inner(
        target,
        rows_ad,
        gradient_ad,
        weights_a1,
        gate_up,
        down,
        experts,
        used,
        tile=tile,
        limit=limit,
    )
    count, _, width_f, width_d = gate_up.shape
    flat_gate_up = gate_up.reshape(count, 2 * width_f, width_d)
    d_rows_ad = multiply_transposed(target, inner_a2f, flat_gate_up, experts, used, tile=tile)
    d_x = plan.take_back(d_rows_ad, tokens).astype(jnp.float32).sum(axis=1)
    has_tokens = (experts[:, None] == jnp.arange(count)) & plan.valid[:, :1]
    has_tokens = has_tokens.any(axis=0)[:, None, None]

    def weight_gradient(left, right):
        total = sum_products(target, left, right, experts, used, count=count, tile=tile)
        return jnp.where(has_tokens, total, 0)  # no tile has written the others

    return (
        d_x.astype(x.dtype),
        plan.take_back(shares_a, tokens).astype(weights.dtype),
        weight_gradient(inner_a2f, rows_ad).reshape(gate_up.shape),
        weight_gradient(gradient_ad, hidden_af),
    )


def inner(
    target: Target, rows_ad, gradient_ad, weights_a1, gate_up, down, experts, used, *, tile, limit
):
    """Returns h [a, f], (da, db) [a, 2f] in bfloat16, and dweight [a] in float32."""
    width_f, width_d = gate_up.shape[-2:]
    block = min(INNER, width_f)
    blocks, rows = width_f // block, rows_ad.shape[0]
    row = pl.BlockSpec((tile, width_d), lambda j, n, experts: (n, 0))
    hidden, gates, ups, shares = pl.pallas_call(
        functools.partial(_inner_body, limit),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, used),
            in_specs=[
                row,
                row,
                pl.BlockSpec((tile, 1), lambda j, n, experts: (n, 0)),
                pl.BlockSpec((None, 2, block, width_d), lambda j, n, e: (e[n], 0, j, 0)),
                pl.BlockSpec((None, width_d, block), lambda j, n, e: (e[n], 0, j)),
            ],
            out_specs=[pl.BlockSpec((tile, block), lambda j, n, experts: (n, j))] * 3
            + [pl.BlockSpec((None, tile, 1), lambda j, n, experts: (j, n, 0))],
        ),
        out_shape=[jax.ShapeDtypeStruct((rows, width_f), jnp.bfloat16)] * 3
        + [jax.ShapeDtypeStruct((blocks, rows, 1), jnp.float32)],
        compiler_params=_parameters("parallel", "arbitrary"),
        interpret=target.interpret,
        name="grouped_matmul_inner_gradient",
    )(experts, rows_ad, gradient_ad, weights_a1, gate_up, down)
    return hidden, jnp.concatenate([gates, ups], axis=1), shares.sum(axis=(0, 2))


def _inner_body(
    limit,
    experts_ref,
    rows_ref,
    gradient_ref,
    weights_ref,
    gate_up_ref,
    down_ref,
    hidden_ref,
    gates_ref,
    ups_ref,
    shares_ref,
):
    """One block of inner activations of one tile.

    prefetch: experts [tiles]. input: rows and gradients [tile, d], weights [tile, 1], gate_up
    [2, block, d], down [d, block]. output: h, da, db [tile, block], dweight [tile, 1].
    """
    del experts_ref
    rows, weights = rows_ref[...], weights_ref[...]
    gate = linear.multiply(rows, gate_up_ref[0]).astype(jnp.bfloat16).astype(jnp.float32)
    up = linear.multiply(rows, gate_up_ref[1]).astype(jnp.bfloat16).astype(jnp.float32)
    d_hidden = jnp.dot(gradient_ref[...], down_ref[...], preferred_element_type=jnp.float32)
    low, clipped = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    share = jax.nn.sigmoid(low)
    activated = portable.swiglu(gate, up, limit)
    hidden_ref[...] = (activated * weights).astype(jnp.bfloat16)
    shares_ref[...] = jnp.sum(d_hidden * activated, axis=1, keepdims=True)
    d_hidden *= weights
    slope = share * (1 + low * (1 - share))
    d_gate = jnp.where(gate < limit, d_hidden * clipped * slope, 0.0)
    d_up = jnp.where(jnp.abs(up) < limit, d_hidden * low * share, 0.0)
    gates_ref[...] = d_gate.astype(jnp.bfloat16)
    ups_ref[...] = d_up.astype(jnp.bfloat16)


def multiply_transposed(target: Target, rows_ao, weight, experts, used, *, tile):
    """Returns rows [a, o] · weight [e, o, i] of their tile's expert, rounded to bfloat16."""
    _, out, width = weight.shape
    block = min(512, width)
    return pl.pallas_call(
        _transposed_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(width // block, used),
            in_specs=[
                pl.BlockSpec((tile, out), lambda i, n, experts: (n, 0)),
                pl.BlockSpec((None, out, block), lambda i, n, experts: (experts[n], 0, i)),
            ],
            out_specs=pl.BlockSpec((tile, block), lambda i, n, experts: (n, i)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows_ao.shape[0], width), jnp.bfloat16),
        compiler_params=_parameters("parallel", "arbitrary"),
        interpret=target.interpret,
        name="grouped_matmul_input_gradient",
    )(experts, rows_ao, weight)


def _transposed_body(experts_ref, rows_ref, weight_ref, out_ref):
    """One block of columns: prefetch experts [tiles], input rows and weight, output."""
    del experts_ref
    product = jnp.dot(rows_ref[...], weight_ref[...], preferred_element_type=jnp.float32)
    out_ref[...] = product.astype(jnp.bfloat16)


def sum_products(target: Target, left_ao, right_ai, experts, used, *, count, tile):
    """Returns Σ_rows left ⊗ right of every expert [e, o, i] in bfloat16, summed in float32.

    Experts without a tile hold garbage.
    """
    out, width = left_ao.shape[1], right_ai.shape[1]
    rows, columns = _divisor(out, ROWS), _divisor(width, COLUMNS)
    # One more tile of no expert, so that the last one sees its end.
    experts = jnp.concatenate([experts, jnp.full(1, -1, jnp.int32)])
    return pl.pallas_call(
        _sum_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(out // rows, width // columns, used),
            in_specs=[
                pl.BlockSpec((tile, rows), lambda o, i, n, experts, used: (n, o)),
                pl.BlockSpec((tile, columns), lambda o, i, n, experts, used: (n, i)),
            ],
            out_specs=pl.BlockSpec(
                (None, rows, columns), lambda o, i, n, experts, used: (experts[n], o, i)
            ),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((count, out, width), jnp.bfloat16),
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        interpret=target.interpret,
        name="grouped_matmul_weight_gradient",
    )(experts, used[None], left_ao, right_ai)


def _sum_body(experts_ref, used_ref, left_ref, right_ref, out_ref, sum_ref):
    """Adds one tile's outer products.

    prefetch: experts [tiles + 1], used [1]. input: left [tile, o'], right [tile, i']. output:
    [o', i'] of the tile's expert. scratch: the sum, float32.
    """
    tile = pl.program_id(2)
    expert = experts_ref[tile]
    is_first = (tile == 0) | (experts_ref[jnp.maximum(tile - 1, 0)] != expert)
    is_last = (tile + 1 == used_ref[0]) | (experts_ref[tile + 1] != expert)
    product = jax.lax.dot_general(
        left_ref[...], right_ref[...], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )

    @pl.when(is_first)
    def _():
        sum_ref[...] = product

    @pl.when(jnp.logical_not(is_first))
    def _():
        sum_ref[...] += product

    @pl.when(is_last)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _divisor(size: int, wanted: int) -> int:
    """Returns the largest multiple of 128 up to `wanted` that divides `size`."""
    return next(n for n in range(min(wanted, size), 0, -128) if size % n == 0)


def _parameters(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)
