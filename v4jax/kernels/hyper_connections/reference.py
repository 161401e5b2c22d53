"""Hyper-connections in plain jnp, float32 throughout, whatever the dtype of the streams.

The token axes come last while the n×n matrices are normalized: n is 4, and vector units want a long
axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax.quant.formats import round_to


class Mix(NamedTuple):
    """What one site does to the streams of a token.

    post [b, t, n]: weight of the sublayer's output in each stream.
    residual [b, t, j, k]: doubly stochastic; destination stream k receives Σ_j residual[j, k] ·
      X_j.
    """

    post: Float[Array, "b t n"]
    residual: Float[Array, "b t j k"]


def mix(
    streams: Float[Array, "b t n d"],
    fn: Float[Array, "o nd"],
    base: Float[Array, "o"],
    scale: Float[Array, "3"],
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Float[Array, "b t d"], Mix]:
    """Returns the sublayer's input Σ_j pre_j · X_j, and how to merge its output back.

    pre = σ(·)+eps, post = 2σ(·), residual = Sinkhorn(softmax(·)) of three slices of one projection
    of the RMS-normalized, flattened streams.

    Args:
      fn: projection; rows: n for pre, n for post, n·n for the residual matrix, source stream major.
      base: static biases, in the same order.
      scale: gating factors of pre, post and residual.
      norm_eps: inside the root mean square (rms_norm_eps).
      eps: floor of pre and of every Sinkhorn denominator (hc_eps).
      iterations: Sinkhorn iterations (hc_sinkhorn_iters); the last operation normalizes columns.

    Source: spec B.2.
    """
    n = streams.shape[2]
    logits_obt = project_streams(streams, fn, norm_eps)
    base = base.astype(jnp.float32)[:, None, None]
    scale = scale.astype(jnp.float32)
    pre_nbt = jax.nn.sigmoid(logits_obt[:n] * scale[0] + base[:n]) + eps
    post_nbt = 2.0 * jax.nn.sigmoid(logits_obt[n : 2 * n] * scale[1] + base[n : 2 * n])
    residual = logits_obt[2 * n :] * scale[2] + base[2 * n :]
    residual_jkbt = sinkhorn(residual.reshape(n, n, *residual.shape[1:]), eps, iterations)
    collapsed = weigh_streams(streams, jnp.moveaxis(pre_nbt, 0, -1))
    return collapsed, Mix(
        jnp.moveaxis(post_nbt, 0, -1), jnp.moveaxis(residual_jkbt, (0, 1), (-2, -1))
    )


def expand(
    output: Float[Array, "b t d"], streams: Float[Array, "b t n d"], mixing: Mix
) -> Float[Array, "b t n d"]:
    """Returns the next streams X'_k = post_k · output + Σ_j residual[j, k] · X_j, rounded once."""
    n = streams.shape[2]
    sources = [streams[:, :, j].astype(jnp.float32) for j in range(n)]
    output = output.astype(jnp.float32)
    mixed = [
        sum(
            (mixing.residual[:, :, j, k, None] * sources[j] for j in range(n)),
            mixing.post[:, :, k, None] * output,
        )
        for k in range(n)
    ]
    return round_to(jnp.stack(mixed, axis=2), streams.dtype)


def expand_mix(output, streams, mixing, fn, base, scale, **options):
    """See `v4jax.kernels.hyper_connections.expand_mix`."""
    streams = expand(output, streams, mixing)
    return streams, *mix(streams, fn, base, scale, **options)


def collapse(
    streams: Float[Array, "b t n d"],
    fn: Float[Array, "n nd"],
    base: Float[Array, "n"],
    scale: Float[Array, "1"],
    *,
    norm_eps: float,
    eps: float,
) -> Float[Array, "b t d"]:
    """Returns Σ_j pre_j · X_j after the last layer; pre = σ(projection · scale + base) + eps.

    Source: spec B.3.
    """
    logits_nbt = project_streams(streams, fn, norm_eps)
    base = base.astype(jnp.float32)[:, None, None]
    pre_nbt = jax.nn.sigmoid(logits_nbt * scale.astype(jnp.float32) + base) + eps
    return weigh_streams(streams, jnp.moveaxis(pre_nbt, 0, -1))


def project_streams(streams, fn, norm_eps):
    """Returns (fn · v) / rms(v) for the flattened streams v, float32 [o, b, t]."""
    flat = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(flat * flat, axis=-1) + norm_eps)
    projected = jnp.einsum("btz,oz->bto", flat, fn.astype(jnp.float32), precision="highest")
    # The barrier keeps the transposition behind the product: XLA on CPU would rather transpose the
    # streams, at the price of the rest of the site.
    return jnp.moveaxis(jax.lax.optimization_barrier(projected), -1, 0) * inverse_rms


def weigh_streams(streams, weights_btn):
    """Returns Σ_j weights_j · X_j, summed in float32 and rounded to the streams' dtype."""
    total = sum(
        weights_btn[..., j, None] * streams[:, :, j].astype(jnp.float32)
        for j in range(streams.shape[2])
    )
    return round_to(total, streams.dtype)


def sinkhorn(logits_jkbt, eps, iterations):
    """Returns softmax rows, then alternating column and row normalization, ending on columns."""

    def columns(matrix):
        return matrix / (matrix.sum(axis=0, keepdims=True) + eps)

    def rows(matrix):
        return matrix / (matrix.sum(axis=1, keepdims=True) + eps)

    matrix = columns(jax.nn.softmax(logits_jkbt, axis=1) + eps)
    return jax.lax.fori_loop(0, iterations - 1, lambda _, m: columns(rows(m)), matrix)
