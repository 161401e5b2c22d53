"""Linear layers on stored weights as the formula says them: x · (value × scale)ᵀ in float32.

The specification. A stored weight is a constant: it has no gradient.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.scaled_matmul import round_activations
from v4jax.quant import ScaledArray
from v4jax.quant.formats import round_to


def matmul(x, weight, *, quantize_activations=False, target=None):
    """See `v4jax.kernels.scaled_matmul.matmul`."""
    del target
    if isinstance(weight, ScaledArray):
        x, weight = round_activations(x) if quantize_activations else x, expand(weight)
    return round_to(matmul_float32(x, weight.astype(x.dtype)), x.dtype)


def expand(weight, dtype=jnp.float32, *, target=None):
    """See `v4jax.kernels.scaled_matmul.expand`."""
    del target
    return jax.lax.stop_gradient(weight).dequantize(dtype)


def matmul_float32(x, weight):
    """See `v4jax.kernels.scaled_matmul.matmul_float32`."""
    return contract("...i,oi->...o", x.astype(jnp.float32), weight.astype(jnp.float32))


def contract(subscripts, x, weight, *, target=None):
    """See `v4jax.kernels.scaled_matmul.contract`."""
    del target
    product = jnp.einsum(
        subscripts, x.astype(jnp.float32), weight.astype(jnp.float32), precision="highest"
    )
    return round_to(product, x.dtype)
