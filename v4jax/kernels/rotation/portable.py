"""Rotation in plain jnp."""

import jax.numpy as jnp

from v4jax.quant.formats import round_to


def rotate(x, cosine, sine, *, inverse, target):
    """See `v4jax.kernels.rotation.rotate`."""
    del target
    rotated = cosine.shape[-1]
    # One of the two equal neighbours; heads share it.
    lead = (*cosine.shape[:2], *(1,) * (x.ndim - 3), rotated // 2)
    cosine, sine = (angle[..., ::2].reshape(lead) for angle in (cosine, sine))
    plain, turned = x[..., :-rotated], x[..., -rotated:].astype(jnp.float32)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    sine = -sine if inverse else sine
    turned = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    turned = round_to(turned.reshape(*x.shape[:-1], rotated), x.dtype)
    return jnp.concatenate([plain, turned], axis=-1)
