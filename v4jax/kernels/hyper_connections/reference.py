"""Hyper-connections as the formulas say them, in float32. The specification."""

import jax
import jax.numpy as jnp

from v4jax.kernels.hyper_connections.call import Mix
from v4jax.quant.formats import round_to


def mix(streams, fn, base, scale, *, norm_eps, eps, iterations, target=None):
    """See `v4jax.kernels.hyper_connections.mix`."""
    del target
    n = streams.shape[2]
    logits = _project(streams, fn, norm_eps)
    pre = jax.nn.sigmoid(logits[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * jax.nn.sigmoid(logits[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    matrix = logits[..., 2 * n :] * scale[2] + base[2 * n :]
    matrix = jax.nn.softmax(matrix.reshape(*matrix.shape[:2], n, n), axis=-1) + eps
    matrix /= matrix.sum(axis=-2, keepdims=True) + eps
    for _ in range(iterations - 1):
        matrix /= matrix.sum(axis=-1, keepdims=True) + eps
        matrix /= matrix.sum(axis=-2, keepdims=True) + eps
    return _weigh(streams, pre), Mix(post, matrix)


def expand(output, streams, mixing):
    """See `v4jax.kernels.hyper_connections.expand`."""
    product = mixing.post[..., None] * output.astype(jnp.float32)[:, :, None]
    mixed = jnp.einsum(
        "btjk,btjd->btkd", mixing.residual, streams.astype(jnp.float32), precision="highest"
    )
    return round_to(product + mixed, streams.dtype)


def expand_mix(output, streams, mixing, fn, base, scale, **options):
    """See `v4jax.kernels.hyper_connections.expand_mix`."""
    streams = expand(output, streams, mixing)
    return streams, *mix(streams, fn, base, scale, **options)


def collapse(streams, fn, base, scale, *, norm_eps, eps, target=None):
    """See `v4jax.kernels.hyper_connections.collapse`."""
    del target
    pre = jax.nn.sigmoid(_project(streams, fn, norm_eps) * scale + base) + eps
    return _weigh(streams, pre)


def _project(streams, fn, norm_eps):
    """Returns the projection of the RMS-normalized, flattened streams, [b, t, o]."""
    flat = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    projected = jnp.einsum("btz,oz->bto", flat, fn, precision="highest")
    return projected * jax.lax.rsqrt((flat**2).mean(axis=-1, keepdims=True) + norm_eps)


def _weigh(streams, weights):
    """Returns Σ_j weights_j · X_j, rounded once."""
    total = (weights[..., None] * streams.astype(jnp.float32)).sum(axis=2)
    return round_to(total, streams.dtype)
