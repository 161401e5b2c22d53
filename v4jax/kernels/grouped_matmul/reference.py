"""Experts as the formula says them: each choice of each token takes a copy of its expert's weights.

The specification. What is rounded to the dtype of x, and where, is part of it.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.scaled_matmul import round_activations
from v4jax.quant import ScaledArray
from v4jax.quant.formats import round_to


def apply_experts(
    x, expert_ids, weights, gate_up, down, *, limit, quantize_activations=False, target=None
):
    """See `v4jax.kernels.grouped_matmul.apply_experts`."""
    del target
    chosen = expert_ids.shape[1]
    return sum(
        _apply(
            x,
            weights[:, k, None],
            *(_expand(weight, x)[expert_ids[:, k]] for weight in (gate_up, down)),
            limit,
            quantize_activations and isinstance(gate_up, ScaledArray),
        )
        for k in range(chosen)
    )


def apply_shared_expert(x, gate_up, down, **options):
    """See `v4jax.kernels.grouped_matmul.apply_shared_expert`."""
    one = jax.tree.map(lambda array: array[None], (gate_up, down))
    ids = jnp.zeros((len(x), 1), jnp.int32)
    return apply_experts(x, ids, jnp.ones((len(x), 1)), *one, **options)


def _apply(x_td, weights_t1, gate_up_t2fd, down_tdf, limit, quantized):
    """Returns one choice of every token, whose weights are [t, 2, f, d] and [t, d, f]."""
    dtype = x_td.dtype
    if quantized:
        x_td = round_activations(x_td)
    gate, up = jnp.moveaxis(_product("td,tpfd->tpf", x_td, gate_up_t2fd), 1, 0)
    gate, up = (round_to(x, dtype).astype(jnp.float32) for x in (gate, up))
    hidden = jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
    hidden = round_to(hidden * weights_t1, dtype)
    if quantized:
        hidden = round_activations(hidden)
    return round_to(_product("tf,tdf->td", hidden, down_tdf), dtype).astype(jnp.float32)


def _expand(weight, x):
    """Returns a weight in float32; in bfloat16's values where x is bfloat16."""
    weight = weight.dequantize() if isinstance(weight, ScaledArray) else weight
    return weight.astype(x.dtype).astype(jnp.float32)


def _product(subscripts, left, right):
    return jnp.einsum(subscripts, left.astype(jnp.float32), right, precision="highest")
