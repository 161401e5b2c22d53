"""Routed experts: each token passes its few chosen experts, and only these are computed."""

import jax
from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.dispatch import Target
from v4jax.kernels.stacked import Stacked
from v4jax.quant import ScaledArray
from v4jax.shapes import check_shape

Weight = jax.Array | ScaledArray | Stacked


def apply_experts(
    x: Float[Array, "t d"],
    expert_ids: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    gate_up: Weight,
    down: Weight,
    *,
    limit: float,
    quantize_activations: bool = False,
    target: Target,
) -> Float[Array, "t d"]:
    """Returns Σ_k down_e · (weight_k · SwiGLU(gate_up_e · x)) over the chosen experts, float32.

    SwiGLU(a, b) = silu(min(a, limit)) · clip(b, −limit, limit); the routing weight multiplies
    before `down`. No token is dropped, whatever the load.

    Args:
      gate_up: [e, 2, f, d], the gate (w1) and the linear part (w3).
      down: [e, d, f] (w2).
      limit: swiglu_limit.
      quantize_activations: rounds the inputs of quantized weights as the published code does.
      target: the devices the program is made for.

    Source: spec B.13.
    """
    tokens, chosen = expert_ids.shape
    experts, _, _, width = gate_up.shape
    check_shape("x", x, (tokens, width))
    check_shape("weights", weights, (tokens, chosen))
    assert down.shape[:2] == (experts, width), (gate_up.shape, down.shape)
    run = dispatch.pick(target, "grouped_matmul", __name__, x, gate_up, down).apply_experts
    options = {"limit": limit, "quantize_activations": quantize_activations, "target": target}
    return run(x, expert_ids, weights, gate_up, down, **options)


def apply_shared_expert(
    x: Float[Array, "t d"],
    gate_up: Weight,
    down: Weight,
    *,
    limit: float,
    quantize_activations: bool = False,
    target: Target,
) -> Float[Array, "t d"]:
    """Returns down · SwiGLU(gate_up · x) in float32: one expert for every token, unweighted.

    Args:
      gate_up: [2, f, d].
      down: [d, f].
    """
    run = dispatch.pick(target, "grouped_matmul", __name__, x, gate_up, down).apply_shared_expert
    options = {"limit": limit, "quantize_activations": quantize_activations, "target": target}
    return run(x, gate_up, down, **options)
