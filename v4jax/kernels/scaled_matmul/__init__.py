"""Linear layers on weights in their stored format."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax.kernels import dispatch
from v4jax.kernels.dispatch import Target
from v4jax.kernels.scaled_matmul import portable
from v4jax.quant import ScaledArray, formats
from v4jax.quant.scaled_array import FP8_BLOCK


def matmul(
    x: Float[Array, "... i"],
    weight: jax.Array | ScaledArray,
    *,
    quantize_activations: bool = False,
    target: Target,
) -> Float[Array, "... o"]:
    """Returns x · weightᵀ in x's dtype, accumulated in float32.

    A quantized weight is expanded here, exactly, and nowhere else. With `quantize_activations` the
    input of a quantized weight is first rounded to e4m3 in blocks of 128, as in the published
    inference code. All scales are powers of two; expanding both sides therefore equals scaling
    block sums.

    Source: spec B.0, FP8 linear.
    """
    if not isinstance(weight, ScaledArray):
        return portable.matmul(x, weight, target=target)
    if quantize_activations:
        x = round_activations(x)
    return dispatch.pick(target, "scaled_matmul", __name__, x, weight).matmul(
        x, weight, target=target
    )


def expand(weight: ScaledArray, dtype=jnp.float32, *, target: Target) -> jax.Array:
    """Returns value × scale [..., out, in], exactly; a stored weight is a constant: no gradient."""
    weight = jax.lax.stop_gradient(weight)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return weight.dequantize(dtype)
    names = ("expand_tpu", "portable")
    return dispatch.pick(target, "expand", __name__, weight, names=names).expand(
        weight, target=target
    )


def contract(subscripts: str, x: jax.Array, weight: jax.Array, *, target: Target) -> jax.Array:
    """Returns an einsum of two arrays of one dtype, accumulated in float32, in that dtype.

    The gradients are products of that dtype as well. Autodiff would hand the rounded gradient on as
    float32, which a unit for bfloat16 multiplies in several passes, for the same result.

    Args:
      subscripts: such as "ni,oi->no", each letter in at least two of the three.
    """
    return portable.contract(target, subscripts, x, weight)


def matmul_float32(
    x: Float[Array, "... i"],
    weight: jax.Array,
    wide: jax.Array | None = None,
    *,
    target: Target,
) -> Float[Array, "... o"]:
    """Returns x · weightᵀ as of float32: router scores, compressor projections, logits.

    Two bfloat16 arrays are multiplied as they are, except on CPUs, where float32 is faster. Their
    products are exact in float32; a unit for bfloat16 multiplies float32 in several passes, or not
    at all. Gradients are then rounded to bfloat16 first, as those of `contract` are.

    Args:
      wide: the same weight in float32, which gets its gradient in place of `weight`: the gradients
        of several calls are then added in float32.
    """
    if x.dtype == weight.dtype == jnp.bfloat16 and target.multiplies_bfloat16:
        differentiated = weight if wide is None else wide
        return portable.multiply_bfloat16(x, jax.lax.stop_gradient(weight), differentiated)
    weight = weight.astype(jnp.float32) if wide is None else wide
    return portable.product(x.astype(jnp.float32), weight)


@jax.custom_jvp
def round_activations(x: Float[Array, "... i"]) -> Float[Array, "... i"]:
    """Rounds the input of a quantized linear layer to e4m3 in blocks of 128 channels.

    Its gradient is the identity's: the rounding has none, and autodiff of the cast would round the
    gradient to e4m3 without a scale.
    """
    block = FP8_BLOCK[1]
    return formats.dequantize_fp8(*formats.quantize_fp8(x, block), block).astype(x.dtype)


round_activations.defjvps(lambda tangent, rounded, x: tangent)
