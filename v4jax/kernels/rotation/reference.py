"""Rotation as the formula says it: products of complex numbers. The specification."""

import jax
import jax.numpy as jnp

from v4jax.quant.formats import round_to


def rotate(x, cosine, sine, *, inverse=False, target=None):
    """See `v4jax.kernels.rotation.rotate`."""
    del target
    rotated = cosine.shape[-1]
    plain, pairs = x[..., :-rotated], x[..., -rotated:].astype(jnp.float32)
    numbers = jax.lax.complex(pairs[..., 0::2], pairs[..., 1::2])
    turns = jax.lax.complex(cosine[..., ::2], sine[..., ::2])
    if x.ndim == 4:  # heads share an angle
        turns = turns[:, :, None]
    numbers *= turns.conj() if inverse else turns
    turned = jnp.stack([numbers.real, numbers.imag], axis=-1).reshape(pairs.shape)
    return jnp.concatenate([plain, round_to(turned, x.dtype)], axis=-1)
