"""Root-mean-square normalization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4jax.model.parameters import Declare
from v4jax.quant.formats import round_to


class RMSNorm(nnx.Module):
    """Normalizes the last axis and multiplies by a learned weight, in float32, rounded once.

    Source: spec B.0.
    """

    def __init__(self, declare: Declare, width: int, axis: str, eps: float):
        self.eps = eps
        self.weight = declare.constant("bfloat16", 1.0, (width,), (axis,))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return round_to(rescale(x, self.eps) * self.weight[...].astype(jnp.float32), x.dtype)


def rescale(x: Float[Array, "... c"], eps: float) -> Float[Array, "... c"]:
    """Returns x / rms(x) over the last axis in float32; eps stands inside the root."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rescale_stepwise(x: Float[Array, "... c"], eps: float) -> Float[Array, "... c"]:
    """Returns x / rms(x) with square, mean and factor each rounded to x's dtype.

    So the published code rescales query heads; in float32 it is `rescale`.

    Source: spec B.0, unweighted rescale.
    """
    square = round_to(jnp.square(x.astype(jnp.float32)), x.dtype).astype(jnp.float32)
    mean = round_to(jnp.mean(square, axis=-1, keepdims=True), x.dtype).astype(jnp.float32)
    factor = round_to(jax.lax.rsqrt(round_to(mean + eps, x.dtype).astype(jnp.float32)), x.dtype)
    return round_to(x.astype(jnp.float32) * factor.astype(jnp.float32), x.dtype)
