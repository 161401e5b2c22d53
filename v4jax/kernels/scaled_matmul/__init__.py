"""Linear layers on weights in their stored format."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax.kernels import dispatch
from v4jax.quant import ScaledArray, formats
from v4jax.quant.scaled_array import FP8_BLOCK


def matmul(
    x: Float[Array, "... i"], weight: jax.Array | ScaledArray, *, quantize_activations: bool = False
) -> Float[Array, "... o"]:
    """Returns x · weightᵀ in x's dtype, accumulated in float32.

    A quantized weight is expanded here, exactly, and nowhere else. With `quantize_activations` the
    input of a quantized weight is rounded to e4m3 in blocks of 128 first, as the published
    inference code does; all scales are powers of two, so expanding both sides equals scaling block
    sums.

    Source: spec B.0, FP8 linear.
    """
    if isinstance(weight, ScaledArray):
        if quantize_activations:
            x = round_activations(x)
        if _choose(x, weight) == "pallas_tpu":
            from v4jax.kernels.scaled_matmul import pallas_tpu

            return pallas_tpu.matmul(x, weight)
        weight = weight.dequantize(x.dtype)
    return formats.round_to(product(x, weight.astype(x.dtype)), x.dtype)


def _choose(x, weight) -> str:
    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.scaled_matmul import pallas_tpu

        return pallas_tpu.supported(x, weight)

    return dispatch.choose("scaled_matmul", {"pallas_tpu": check_tpu, "reference": lambda: None})


def matmul_float32(x: Float[Array, "... i"], weight: jax.Array) -> Float[Array, "... o"]:
    """Returns x · weightᵀ, both in float32: router scores, compressor projections, logits."""
    return product(x.astype(jnp.float32), weight.astype(jnp.float32))


@jax.custom_jvp
def round_activations(x: Float[Array, "... i"]) -> Float[Array, "... i"]:
    """Rounds the input of a quantized linear layer to e4m3 in blocks of 128 channels.

    Its gradient is the identity's: the rounding has none, and autodiff of the cast would round the
    gradient to e4m3 without a scale.
    """
    block = FP8_BLOCK[1]
    return formats.dequantize_fp8(*formats.quantize_fp8(x, block), block).astype(x.dtype)


round_activations.defjvps(lambda tangent, rounded, x: tangent)


def product(x, weight):
    """Returns x · weightᵀ in float32."""
    return jnp.einsum(
        "...i,oi->...o", x, weight, preferred_element_type=jnp.float32, precision="highest"
    )
