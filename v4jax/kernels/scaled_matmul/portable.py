"""Products with stored weights in plain jnp: a weight is expanded, then multiplied."""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.dispatch import Target
from v4jax.quant import ScaledArray, formats


def matmul(x, weight: jax.Array | ScaledArray, *, target: Target):
    """Returns x · weightᵀ in x's dtype, accumulated in float32."""
    if isinstance(weight, ScaledArray):
        weight = jax.lax.stop_gradient(weight).dequantize(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    product = contract(target, "ni,oi->no", rows, weight.astype(x.dtype))
    return product.reshape(*x.shape[:-1], -1)


def expand(weight: ScaledArray, *, target: Target):
    """Returns value × scale in bfloat16."""
    del target
    return weight.dequantize(jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def contract(target: Target, subscripts: str, x, weight):
    """See `v4jax.kernels.scaled_matmul.contract`."""
    return formats.round_to(einsum(subscripts, x, weight), x.dtype)


def _contract_forward(target, subscripts, x, weight):
    return contract(target, subscripts, x, weight), (x, weight)


def _contract_backward(target, subscripts, kept, gradient):
    (x, weight), (inputs, result) = kept, subscripts.split("->")
    of_x, of_weight = inputs.split(",")
    factors = gradient, x, weight
    if not target.multiplies_bfloat16:
        # XLA for CPUs has no bfloat16 product with groups between rows and columns
        # ("btgr,grk->btgk"); in float32 it is the same.
        factors = (factor.astype(jnp.float32) for factor in factors)
    gradient, factor_x, factor_weight = factors
    to_x = einsum(f"{result},{of_weight}->{of_x}", gradient, factor_weight)
    to_weight = einsum(f"{result},{of_x}->{of_weight}", gradient, factor_x)
    return formats.round_to(to_x, x.dtype), formats.round_to(to_weight, weight.dtype)


contract.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def multiply_bfloat16(x, weight, differentiated):
    """Returns x · weightᵀ in float32; the weight's gradient goes to `differentiated`."""
    return product(x, weight)


def _multiply_forward(x, weight, differentiated):
    return product(x, weight), (x, weight, jnp.zeros(0, differentiated.dtype))


def _multiply_backward(kept, gradient):
    x, weight, like = kept
    rows = formats.round_to(gradient, x.dtype).reshape(-1, gradient.shape[-1])
    to_x = formats.round_to(einsum("no,oi->ni", rows, weight), x.dtype).reshape(x.shape)
    to_weight = einsum("no,ni->oi", rows, x.reshape(-1, x.shape[-1]))
    return to_x, None, formats.round_to(to_weight, like.dtype)


multiply_bfloat16.defvjp(_multiply_forward, _multiply_backward)


def product(x, weight):
    """Returns x · weightᵀ in float32."""
    return einsum("...i,oi->...o", x, weight)


def einsum(subscripts, left, right):
    """Returns an einsum in float32."""
    return jnp.einsum(
        subscripts, left, right, preferred_element_type=jnp.float32, precision="highest"
    )
