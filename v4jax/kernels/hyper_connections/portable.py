"""Hyper-connections in plain jnp, float32 throughout, whatever the dtype of the streams.

The token axes come last while the n×n matrices are normalized: n is 4, and vector units want a long
axis.

What touches whole streams has its gradient written out. Autodiff would give it in one padded array
per stream, and XLA on CPU would compute their sum anew, transposed, for every product it goes into:
the barriers make it an array first.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels import dispatch
from v4jax.kernels.hyper_connections.call import Call, Mix
from v4jax.quant.formats import round_to


def mix(call: Call, streams, fn, base, scale):
    """See `v4jax.kernels.hyper_connections.mix`."""
    n = streams.shape[2]
    logits_obt = project_streams(call, streams, fn)
    base = base.astype(jnp.float32)[:, None, None]
    scale = scale.astype(jnp.float32)
    pre_nbt = jax.nn.sigmoid(logits_obt[:n] * scale[0] + base[:n]) + call.eps
    post_nbt = 2.0 * jax.nn.sigmoid(logits_obt[n : 2 * n] * scale[1] + base[n : 2 * n])
    residual = logits_obt[2 * n :] * scale[2] + base[2 * n :]
    residual_jkbt = sinkhorn(call, residual.reshape(n, n, *residual.shape[1:]))
    collapsed = weigh_streams(streams, jnp.moveaxis(pre_nbt, 0, -1))
    return collapsed, Mix(
        jnp.moveaxis(post_nbt, 0, -1), jnp.moveaxis(residual_jkbt, (0, 1), (-2, -1))
    )


def expand(output, streams, mixing: Mix):
    """See `v4jax.kernels.hyper_connections.expand`."""
    return _expand(output, streams, mixing.post, mixing.residual)


@jax.custom_vjp
def _expand(output, streams, post_btn, residual_btjk):
    n = streams.shape[2]
    sources = [streams[:, :, j].astype(jnp.float32) for j in range(n)]
    output = output.astype(jnp.float32)
    mixed = [
        sum(
            (residual_btjk[:, :, j, k, None] * sources[j] for j in range(n)),
            post_btn[:, :, k, None] * output,
        )
        for k in range(n)
    ]
    return round_to(jnp.stack(mixed, axis=2), streams.dtype)


def _expand_forward(output, streams, post_btn, residual_btjk):
    kept = output, streams, post_btn, residual_btjk
    return _expand(*kept), kept


def _expand_backward(kept, grad_btnd):
    output, streams, post_btn, residual_btjk = kept
    n = streams.shape[2]
    grad_btnd = jax.lax.optimization_barrier(grad_btnd)
    grads = [grad_btnd[:, :, k].astype(jnp.float32) for k in range(n)]
    to_output = sum(post_btn[:, :, k, None] * grads[k] for k in range(n))
    to_streams = [
        sum(residual_btjk[:, :, j, k, None] * grads[k] for k in range(n)) for j in range(n)
    ]
    to_streams = round_to(jnp.stack(to_streams, axis=2), streams.dtype)
    to_post = _inner("btd,btkd->btk", output, grad_btnd)
    to_residual = _inner("btjd,btkd->btjk", streams, grad_btnd)
    return jax.lax.optimization_barrier(
        (round_to(to_output, output.dtype), to_streams, to_post, to_residual)
    )


_expand.defvjp(_expand_forward, _expand_backward)


def expand_mix(call: Call, output, streams, mixing: Mix, fn, base, scale):
    """See `v4jax.kernels.hyper_connections.expand_mix`."""
    streams = expand(output, streams, mixing)
    return streams, *mix(call, streams, fn, base, scale)


def collapse(call: Call, streams, fn, base, scale):
    """See `v4jax.kernels.hyper_connections.collapse`."""
    logits_nbt = project_streams(call, streams, fn)
    base = base.astype(jnp.float32)[:, None, None]
    pre_nbt = jax.nn.sigmoid(logits_nbt * scale.astype(jnp.float32) + base) + call.eps
    return weigh_streams(streams, jnp.moveaxis(pre_nbt, 0, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_streams(call: Call, streams, fn):
    """Returns (fn · v) / rms(v) for the flattened streams v, float32 [o, b, t]."""
    projected_bto, inverse_rms_bt = _project(call, streams, fn)
    return jnp.moveaxis(projected_bto, -1, 0) * inverse_rms_bt


def _project(call, streams, fn):
    flat = _flatten(streams)
    inverse_rms = jax.lax.rsqrt(jnp.mean(flat * flat, axis=-1) + call.norm_eps)
    if call.target.multiplies_float32_slowly and streams.dtype == jnp.bfloat16:
        return _project_bfloat16(streams, fn), inverse_rms
    # The barrier keeps the transposition behind the product: XLA on CPU would rather transpose the
    # streams, at the price of the rest of the site.
    return jax.lax.optimization_barrier(_inner("btz,oz->bto", flat, fn)), inverse_rms


def _project_bfloat16(streams, fn):
    """Returns streams · fnᵀ in float32, which GPUs multiply slowly: fn is a sum of three bfloat16.

    Streams are bfloat16, so that every product is exact and only fn's last bit or so is lost.
    """
    parts, rest = [], fn.astype(jnp.float32)
    for _ in range(3):
        parts.append(round_to(rest, jnp.bfloat16))
        rest = rest - parts[-1].astype(jnp.float32)
    flat = streams.reshape(*streams.shape[:2], -1)
    options = {"preferred_element_type": jnp.float32, "precision": "highest"}
    products = jnp.einsum("btz,oz->bto", flat, jnp.concatenate(parts), **options)
    return sum(jnp.split(products, 3, axis=-1)[::-1])


def _project_forward(call, streams, fn):
    projected_bto, inverse_rms_bt = _project(call, streams, fn)
    logits_obt = jnp.moveaxis(projected_bto, -1, 0) * inverse_rms_bt
    return logits_obt, (streams, fn, projected_bto, inverse_rms_bt)


def _project_backward(call, kept, grad_obt):
    streams, fn, projected_bto, inverse_rms_bt = kept
    flat = _flatten(streams)
    grad_bto = jax.lax.optimization_barrier(jnp.moveaxis(grad_obt, 0, -1))
    slope_bt = (grad_bto * projected_bto).sum(-1) * inverse_rms_bt**3 / flat.shape[-1]
    grad_bto = grad_bto * inverse_rms_bt[..., None]
    to_flat = _inner("bto,oz->btz", grad_bto, fn) - slope_bt[..., None] * flat
    to_streams = round_to(to_flat.reshape(streams.shape), streams.dtype)
    to_fn = _inner("bto,btz->oz", grad_bto, flat).astype(fn.dtype)
    return jax.lax.optimization_barrier((to_streams, to_fn))


project_streams.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def weigh_streams(streams, weights_btn):
    """Returns Σ_j weights_j · X_j, summed in float32 and rounded to the streams' dtype."""
    total = sum(
        weights_btn[..., j, None] * streams[:, :, j].astype(jnp.float32)
        for j in range(streams.shape[2])
    )
    return round_to(total, streams.dtype)


def _weigh_forward(streams, weights_btn):
    return weigh_streams(streams, weights_btn), (streams, weights_btn)


def _weigh_backward(kept, grad_btd):
    streams, weights_btn = kept
    grad_btd = jax.lax.optimization_barrier(grad_btd)
    to_streams = weights_btn[..., None] * grad_btd[:, :, None].astype(jnp.float32)
    to_weights = _inner("btjd,btd->btj", streams, grad_btd)
    return jax.lax.optimization_barrier((round_to(to_streams, streams.dtype), to_weights))


weigh_streams.defvjp(_weigh_forward, _weigh_backward)


def _flatten(streams):
    return streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)


def _inner(subscripts, left, right):
    """Returns a product of float32."""
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(subscripts, left, right, precision="highest")


def sinkhorn(call: Call, logits_jkbt):
    """Returns softmax rows, then alternating column and row normalization, ending on columns."""
    names = ("sinkhorn_gpu", "portable")
    implementation = dispatch.pick(call.target, "sinkhorn", __package__, logits_jkbt, names=names)
    return implementation.normalize(call, logits_jkbt)


def normalize(call: Call, logits_jkbt):
    """Returns what `sinkhorn` does."""
    eps = call.eps

    def columns(matrix):
        return matrix / (matrix.sum(axis=0, keepdims=True) + eps)

    def rows(matrix):
        return matrix / (matrix.sum(axis=1, keepdims=True) + eps)

    matrix = columns(jax.nn.softmax(logits_jkbt, axis=1) + eps)
    return jax.lax.fori_loop(0, call.iterations - 1, lambda _, m: columns(rows(m)), matrix)
