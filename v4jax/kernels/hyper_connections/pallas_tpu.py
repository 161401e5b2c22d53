"""Hyper-connections on TPU: merge one site's output and collapse for the next, in one pass.

A tile of tokens is read once: the next streams are mixed in float32 and rounded, their projection
and root mean square are taken from the rounded values while these are in VMEM, the n×n matrices are
normalized with the tokens along lanes, and the collapse is written beside the streams. Streams move
as [n, tokens, d], so that a register holds tokens of one stream.

The projection is a float32 product on a unit for bfloat16: the streams are bfloat16 already, and
the float32 weights are three bfloat16 parts, whose products are exact and summed in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.hyper_connections import portable
from v4jax.kernels.hyper_connections.call import Call, Mix
from v4jax.kernels.tpu import LANES, PACKED_ROWS, VMEM_BYTES
from v4jax.quant.formats import round_to
from v4jax.shapes import ceil_div, round_up

TILE = 128  # tokens of one step: the lanes of the Sinkhorn part
CHUNK = 512  # channels mixed by one pass of the inner loop
PARTS = 3  # bfloat16 parts that hold the 24 bits of a float32


def supported(streams) -> str | None:
    """Returns why the kernel cannot run on these streams [b, t, n, d], or None."""
    if streams.dtype != jnp.bfloat16:
        return f"streams must be bfloat16, got {streams.dtype}"
    if streams.shape[-1] % CHUNK:
        return f"the width must divide by {CHUNK}, got {streams.shape[-1]}"
    if (2 + streams.shape[-2]) * streams.shape[-2] > LANES:
        return f"at most {LANES} mixing weights, got {streams.shape[-2]} streams"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix(call: Call, streams, fn, base, scale):
    """See `v4jax.kernels.hyper_connections.mix`."""
    return _run(call, None, streams, None, fn, base, scale)[1:]


def _mix_forward(call, *arguments):
    return mix(call, *arguments), arguments


def _mix_backward(call, arguments, gradients):
    """Computes the weights again, in plain jnp."""
    return jax.vjp(functools.partial(portable.mix, call), *arguments)[1](gradients)


mix.defvjp(_mix_forward, _mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand_mix(call: Call, output, streams, mixing: Mix, fn, base, scale):
    """See `v4jax.kernels.hyper_connections.expand_mix`."""
    return _run(call, output, streams, mixing, fn, base, scale)


def _expand_mix_forward(call, output, streams, mixing, *site):
    results = expand_mix(call, output, streams, mixing, *site)
    return results, (output, streams, mixing, (results[0], *site))


def _expand_mix_backward(call, kept, gradients):
    """The gradient of `mix` at the next streams, then that of `expand`."""
    *merged, site = kept
    streams_gradient, *gradients = gradients
    through_mix, *site_gradients = _mix_backward(call, site, tuple(gradients))
    pull = jax.vjp(portable.expand, *merged)[1]
    return *pull(streams_gradient + through_mix), *site_gradients


expand_mix.defvjp(_expand_mix_forward, _expand_mix_backward)


def _run(call: Call, output, streams, mixing, fn, base, scale):
    """Returns (next streams or None, collapsed, Mix)."""
    batch, length, n, width = streams.shape
    tokens, count = batch * length, (2 + n) * n
    merges = output is not None
    tile = min(TILE, round_up(tokens, PACKED_ROWS))
    streams_nad = jnp.moveaxis(streams, 2, 0).reshape(n, tokens, width)
    operands = [base.astype(jnp.float32), scale.astype(jnp.float32)]
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    block = pl.BlockSpec((n, tile, width), lambda i: (0, i, 0))
    row = pl.BlockSpec((tile, width), lambda i: (i, 0))
    specs = [smem, smem]
    if merges:
        weights = jnp.concatenate(
            [mixing.post, mixing.residual.reshape(batch, length, -1)], axis=-1
        )
        operands += [output.reshape(tokens, width), weights.reshape(tokens, -1)]
        specs += [row, pl.BlockSpec((tile, n + n * n), lambda i: (i, 0))]
    operands += [streams_nad, split_float32(fn, n)]
    parts_shape = operands[-1].shape
    specs += [block, pl.BlockSpec(parts_shape, lambda i: (0, 0, 0))]
    shapes = [
        jax.ShapeDtypeStruct((tokens, width), streams.dtype),
        jax.ShapeDtypeStruct((tokens, count), jnp.float32),
    ]
    out_specs = [row, pl.BlockSpec((tile, count), lambda i: (i, 0))]
    if merges:
        shapes.insert(0, jax.ShapeDtypeStruct(streams_nad.shape, streams.dtype))
        out_specs.insert(0, block)
    results = pl.pallas_call(
        functools.partial(_body, merges, call.norm_eps, call.eps, call.iterations),
        grid=(ceil_div(tokens, tile),),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM((TILE, LANES), jnp.float32),
            pltpu.VMEM((TILE, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=call.target.interpret,
        name="hyper_connections",
    )(*operands)
    *merged, collapsed, found = results
    found = found.reshape(batch, length, count)
    residual = found[..., 2 * n :].reshape(batch, length, n, n)
    next_streams = None
    if merges:
        next_streams = jnp.moveaxis(merged[0].reshape(n, batch, length, width), 0, 2)
    mixed = Mix(found[..., n : 2 * n], residual)
    return next_streams, collapsed.reshape(batch, length, width), mixed


def split_float32(fn, n: int):
    """Returns fn [o, n·d] as bfloat16 parts [n, 3·o', d] that sum to it; o' is o padded to 32."""
    outputs = fn.shape[0]
    rest = jnp.pad(fn.astype(jnp.float32), [(0, _part_rows(outputs) - outputs), (0, 0)])
    parts = []
    for _ in range(PARTS):
        parts.append(round_to(rest, jnp.bfloat16))
        rest = rest - parts[-1].astype(jnp.float32)
    parts = jnp.concatenate(parts)
    return jnp.moveaxis(parts.reshape(parts.shape[0], n, -1), 1, 0)


def _part_rows(outputs: int) -> int:
    return round_up(outputs, 32)


def _body(merges, norm_eps, eps, iterations, base_ref, scale_ref, *refs):
    """One tile of tokens.

    input: base [o], scale [3] (SMEM); when merging output [tile, d] and weights [tile, n + n·n];
    streams [n, tile, d]; fn parts [n, 3·o', d]. output: next streams [n, tile, d] when merging,
    collapsed [tile, d], mixing weights [tile, o]. scratch: squares and logits [128, 128] float32.
    """
    if merges:
        output_ref, weights_ref, old_ref, fn_ref, streams_ref, *refs = refs
        collapsed_ref, found_ref, squares_ref, logits_ref = refs
        _merge(output_ref, weights_ref, old_ref, streams_ref)
    else:
        streams_ref, fn_ref, collapsed_ref, found_ref, squares_ref, logits_ref = refs
    n, tile, width = streams_ref.shape
    count = found_ref.shape[1]
    _sum_squares(streams_ref, squares_ref)

    def add_chunk(i, total):
        channels = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
        for j in range(n):
            total += jax.lax.dot_general(
                streams_ref[j, :, channels],
                fn_ref[j, :, channels],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        return total

    zeros = jnp.zeros((tile, fn_ref.shape[1]), jnp.float32)
    parts = jax.lax.fori_loop(0, width // CHUNK, add_chunk, zeros)
    rows = fn_ref.shape[1] // PARTS
    # The small parts first: their sum is not lost in the large one.
    logits = parts[:, 2 * rows :] + parts[:, rows : 2 * rows] + parts[:, :rows]
    mean = jnp.sum(squares_ref[:tile, :], axis=1, keepdims=True) / (n * width)
    logits_ref[:tile, :rows] = logits * jax.lax.rsqrt(mean + norm_eps)
    # [tokens, o] → [o, tokens]: every weight is a row with the tokens along lanes.
    by_weight = logits_ref[...].T
    weights = _mixing_weights(by_weight, base_ref, scale_ref, n, eps, iterations)
    padding = jnp.zeros((LANES - count, TILE), jnp.float32)
    found = jnp.concatenate([*weights, padding], axis=0).T
    found_ref[...] = found[:tile, :count]
    logits_ref[...] = found

    @pl.loop(0, tile // PACKED_ROWS)
    def _(r):
        tokens = pl.ds(pl.multiple_of(r * PACKED_ROWS, PACKED_ROWS), PACKED_ROWS)
        pre = logits_ref[tokens, :]

        @pl.loop(0, width // CHUNK)
        def _(i):
            channels = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
            total = sum(
                pre[:, j : j + 1] * streams_ref[j, tokens, channels].astype(jnp.float32)
                for j in range(n)
            )
            collapsed_ref[tokens, channels] = total.astype(collapsed_ref.dtype)


def _merge(output_ref, weights_ref, old_ref, streams_ref):
    """Writes X'_k = post_k · output + Σ_j residual[j, k] · X_j, rounded once."""
    n, tile, width = old_ref.shape

    @pl.loop(0, tile // PACKED_ROWS)
    def _(r):
        tokens = pl.ds(pl.multiple_of(r * PACKED_ROWS, PACKED_ROWS), PACKED_ROWS)
        weights = weights_ref[tokens, :]

        @pl.loop(0, width // CHUNK)
        def _(i):
            channels = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
            output = output_ref[tokens, channels].astype(jnp.float32)
            sources = [old_ref[j, tokens, channels].astype(jnp.float32) for j in range(n)]
            for k in range(n):
                total = weights[:, k : k + 1] * output
                for j in range(n):
                    place = n + n * j + k
                    total += weights[:, place : place + 1] * sources[j]
                streams_ref[k, tokens, channels] = total.astype(streams_ref.dtype)


def _sum_squares(streams_ref, squares_ref):
    """Adds up the squares of all streams of a token in 128 lanes."""
    n, tile, width = streams_ref.shape

    @pl.loop(0, tile // PACKED_ROWS)
    def _(r):
        tokens = pl.ds(pl.multiple_of(r * PACKED_ROWS, PACKED_ROWS), PACKED_ROWS)

        def add_chunk(i, total):
            channels = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
            for j in range(n):
                values = streams_ref[j, tokens, channels].astype(jnp.float32)
                squares = values * values
                for first in range(0, CHUNK, LANES):
                    total += squares[:, first : first + LANES]
            return total

        zeros = jnp.zeros((PACKED_ROWS, LANES), jnp.float32)
        squares_ref[tokens, :] = jax.lax.fori_loop(0, width // CHUNK, add_chunk, zeros)


def _mixing_weights(logits, base_ref, scale_ref, n, eps, iterations):
    """Returns rows [1, tokens]: n of pre, n of post, n·n of the residual matrix, as the logits."""

    def affine(o, kind):
        return logits[o : o + 1, :] * scale_ref[kind] + base_ref[o]

    pre = [jax.nn.sigmoid(affine(j, 0)) + eps for j in range(n)]
    post = [2.0 * jax.nn.sigmoid(affine(n + k, 1)) for k in range(n)]
    matrix = [[affine(2 * n + n * j + k, 2) for k in range(n)] for j in range(n)]

    def normalize_columns(matrix):
        inverse = [1.0 / (sum(matrix[j][k] for j in range(n)) + eps) for k in range(n)]
        return [[matrix[j][k] * inverse[k] for k in range(n)] for j in range(n)]

    def normalize_rows(matrix):
        inverse = [1.0 / (sum(row) + eps) for row in matrix]
        return [[x * inverse[j] for x in row] for j, row in enumerate(matrix)]

    def softmax(row):
        highest = functools.reduce(jnp.maximum, row)
        masses = [jnp.exp(x - highest) for x in row]
        inverse = 1.0 / sum(masses)
        return [mass * inverse + eps for mass in masses]

    matrix = normalize_columns([softmax(row) for row in matrix])
    matrix = jax.lax.fori_loop(
        0, iterations - 1, lambda _, m: normalize_columns(normalize_rows(m)), matrix
    )
    return [*pre, *post, *(x for row in matrix for x in row)]
