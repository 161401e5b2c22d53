"""Root-mean-square normalization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4jax.model.parameters import Declare


class RMSNorm(nnx.Module):
    """Normalizes the last axis and multiplies by a learned weight, in float32, rounded once.

    Source: spec B.0.
    """

    def __init__(self, declare: Declare, width: int, axis: str, eps: float):
        self.eps = eps
        self.weight = declare.constant("bfloat16", 1.0, (width,), (axis,))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return (rescale(x, self.eps) * self.weight[...].astype(jnp.float32)).astype(x.dtype)


def rescale(x: Float[Array, "... c"], eps: float) -> Float[Array, "... c"]:
    """Returns x / rms(x) over the last axis in float32; eps stands inside the root."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
