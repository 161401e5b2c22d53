"""Linear layers on weights in their stored format."""

import functools

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
        weight = expand(weight, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    return contract("ni,oi->no", rows, weight.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def expand(weight: ScaledArray, dtype=jnp.float32) -> jax.Array:
    """Returns value × scale [..., out, in], exactly; a stored weight is a constant: no gradient."""
    weight = jax.lax.stop_gradient(weight)
    if jnp.dtype(dtype) == jnp.bfloat16 and _choose_expansion(weight) == "pallas_tpu":
        from v4jax.kernels.scaled_matmul import expand_tpu

        return expand_tpu.expand(weight)
    return weight.dequantize(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns an einsum of two arrays of one dtype, accumulated in float32, in that dtype.

    The gradients are products of that dtype as well. Autodiff would hand the rounded gradient on as
    float32, which a unit for bfloat16 multiplies in several passes, for the same result.

    Args:
      subscripts: such as "ni,oi->no", each letter in at least two of the three.
    """
    return formats.round_to(_einsum(subscripts, x, weight), x.dtype)


def _contract_forward(subscripts, x, weight):
    return contract(subscripts, x, weight), (x, weight)


def _contract_backward(subscripts, kept, gradient):
    (x, weight), (inputs, result) = kept, subscripts.split("->")
    of_x, of_weight = inputs.split(",")
    factors = gradient, x, weight
    if dispatch.platform() == "cpu":
        # XLA for CPUs has no bfloat16 product with groups between rows and columns
        # ("btgr,grk->btgk"); in float32 it is the same.
        factors = (factor.astype(jnp.float32) for factor in factors)
    gradient, factor_x, factor_weight = factors
    to_x = _einsum(f"{result},{of_weight}->{of_x}", gradient, factor_weight)
    to_weight = _einsum(f"{result},{of_x}->{of_weight}", gradient, factor_x)
    return formats.round_to(to_x, x.dtype), formats.round_to(to_weight, weight.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def _choose(x, weight) -> str:
    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.scaled_matmul import pallas_tpu

        return pallas_tpu.supported(x, weight)

    return dispatch.choose("scaled_matmul", {"pallas_tpu": check_tpu, "reference": lambda: None})


def _choose_expansion(weight) -> str:
    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.scaled_matmul import unpack_tpu

        return unpack_tpu.why_not("weight", weight)

    return dispatch.choose("expand", {"pallas_tpu": check_tpu, "reference": lambda: None})


def matmul_float32(
    x: Float[Array, "... i"], weight: jax.Array, wide: jax.Array | None = None
) -> Float[Array, "... o"]:
    """Returns x · weightᵀ as of float32: router scores, compressor projections, logits.

    Two arrays of bfloat16 are multiplied as they are, except on CPUs, where float32 is faster:
    their products are exact in float32, which units for bfloat16 would multiply in several passes,
    or not at all. Gradients are then rounded to bfloat16 first, as those of `contract` are.

    Args:
      wide: the same weight in float32, which gets its gradient in place of `weight`: so the
        gradients of several calls are added in float32.
    """
    if x.dtype == weight.dtype == jnp.bfloat16 and dispatch.platform() != "cpu":
        return _multiply_bfloat16(
            x, jax.lax.stop_gradient(weight), weight if wide is None else wide
        )
    weight = weight.astype(jnp.float32) if wide is None else wide
    return product(x.astype(jnp.float32), weight)


@jax.custom_vjp
def _multiply_bfloat16(x, weight, differentiated):
    """Returns x · weightᵀ; the weight's gradient goes to `differentiated`, in its dtype."""
    return product(x, weight)


def _multiply_forward(x, weight, differentiated):
    return product(x, weight), (x, weight, jnp.zeros(0, differentiated.dtype))


def _multiply_backward(kept, gradient):
    x, weight, like = kept
    rows = formats.round_to(gradient, x.dtype).reshape(-1, gradient.shape[-1])
    to_x = formats.round_to(_einsum("no,oi->ni", rows, weight), x.dtype).reshape(x.shape)
    to_weight = _einsum("no,ni->oi", rows, x.reshape(-1, x.shape[-1]))
    return to_x, None, formats.round_to(to_weight, like.dtype)


_multiply_bfloat16.defvjp(_multiply_forward, _multiply_backward)


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
    return _einsum("...i,oi->...o", x, weight)


def _einsum(subscripts, left, right):
    return jnp.einsum(
        subscripts, left, right, preferred_element_type=jnp.float32, precision="highest"
    )
