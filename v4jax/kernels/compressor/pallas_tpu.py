"""From tokens to pooled entries on TPU: values and gates of a token never leave VMEM.

The grid runs over blocks of entry channels, sequences and, innermost, tiles of tokens; the
projections' rows for a block of channels stay in VMEM meanwhile. bfloat16 inputs multiply exactly
and are summed in float32, which is what the specification's float32 projection computes. With
overlap, slot j of all windows is read with a stride, so a register holds the same slot of many
windows, and the last window of a tile waits in front of the rows of the next.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import dispatch
from v4jax.kernels.compressor import reference
from v4jax.kernels.softmax import MASKED
from v4jax.shapes import ceil_div, round_up

LANES = 128
TOKENS = 512  # of one tile: enough rows to hide the loading of weights into the MXU
CHANNELS = 256  # entry channels of one block
FRONT = 8  # rows before a tile's own, the last of them the previous window
VMEM_BYTES = 60 * 2**20


def supported(x, key_value, position_bias, overlaps: bool) -> str | None:
    """Returns why the kernel cannot run on these arguments, or None."""
    if x.dtype != jnp.bfloat16 or key_value.dtype != jnp.bfloat16:
        return f"tokens and weights must be bfloat16, got {x.dtype} and {key_value.dtype}"
    ratio, width = position_bias.shape
    channels = width // 2 if overlaps else width
    if channels % LANES or x.shape[-1] % LANES:
        return f"channels and width must divide by {LANES}, got {channels} and {x.shape[-1]}"
    if ratio > FRONT if overlaps else ratio % FRONT or ratio > TOKENS:
        return f"no tile for windows of {ratio} tokens"
    return None


def compress(x, key_value, gate, position_bias, before, first_window, *, overlaps):
    """See `v4jax.kernels.compressor.compress`."""
    return _compress(overlaps, x, key_value, gate, position_bias, before, first_window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compress(overlaps, x, key_value, gate, position_bias, before, first_window):
    batch, length, width = x.shape
    ratio = position_bias.shape[0]
    series = 1 + overlaps
    channels = position_bias.shape[1] // series
    block = CHANNELS if channels % CHANNELS == 0 else LANES
    tile = min(TOKENS, round_up(length, ratio * (FRONT if overlaps else 1)))
    windows = tile // ratio
    weights = pl.BlockSpec((series, block, width), lambda c, b, i, first: (0, c, 0))
    operands = [
        x,
        key_value.reshape(series, channels, width),
        gate.reshape(series, channels, width),
        position_bias.astype(jnp.float32).reshape(ratio, series, channels).swapaxes(0, 1),
    ]
    specs = [
        pl.BlockSpec((None, tile, width), lambda c, b, i, first: (b, i, 0)),
        weights,
        weights,
        pl.BlockSpec((series, ratio, block), lambda c, b, i, first: (0, 0, c)),
    ]
    rows = pltpu.VMEM((block // LANES, FRONT + tile, LANES), jnp.float32)
    count = length // ratio
    if overlaps:
        operands.append(before[..., :channels].astype(jnp.float32))
        specs.append(pl.BlockSpec((2, None, ratio, block), lambda c, b, i, first: (0, b, 0, c)))
        shape, out_block = (batch, count, channels), (None, windows, block)
        out_spec = pl.BlockSpec(out_block, lambda c, b, i, first: (b, i, c))
    else:
        # A tile has few windows: their axis is not tiled.
        shape, out_block = (batch, count, 1, channels), (None, windows, 1, block)
        out_spec = pl.BlockSpec(out_block, lambda c, b, i, first: (b, i, 0, c))
    out = pl.pallas_call(
        _overlapping_body if overlaps else _single_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(channels // block, batch, ceil_div(length, tile)),
            in_specs=specs,
            out_specs=out_spec,
            scratch_shapes=[rows] * 4 if overlaps else [],
        ),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=dispatch.platform() != "tpu",
        name="compressor",
    )(first_window.astype(jnp.int32), *operands)
    return out.reshape(batch, count, channels)


def _compress_forward(overlaps, *arguments):
    return _compress(overlaps, *arguments), arguments


def _compress_backward(overlaps, arguments, gradient):
    """Recomputes by the reference."""
    *differentiable, first_window = arguments

    def run(*arguments):
        return reference.compress(*arguments, first_window, overlaps=overlaps)

    _, pull = jax.vjp(run, *differentiable)
    return *pull(gradient), np.zeros(first_window.shape, jax.dtypes.float0)


_compress.defvjp(_compress_forward, _compress_backward)


def _project(x, weight):
    return jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _single_body(first_ref, x_ref, values_ref, gates_ref, bias_ref, out_ref):
    """Windows without overlap.

    prefetch: first window [b]. input: x [tile, d], projections [1, block, d] of values and gates,
    bias [1, m, block]. output: [windows, 1, block].
    """
    del first_ref
    ratio = bias_ref.shape[1]
    x = x_ref[...]
    values, gates = _project(x, values_ref[0]), _project(x, gates_ref[0])
    for w in range(out_ref.shape[0]):
        own = slice(w * ratio, (w + 1) * ratio)
        gate = gates[own] + bias_ref[0]
        mass = jnp.exp(gate - jnp.max(gate, axis=0, keepdims=True))
        weighted = jnp.sum(mass * values[own], axis=0, keepdims=True)
        out_ref[w] = weighted / jnp.sum(mass, axis=0, keepdims=True)


def _overlapping_body(
    first_ref, x_ref, values_ref, gates_ref, bias_ref, before_ref, out_ref, *scratch
):
    """Windows that also pool the previous window's first halves.

    prefetch: first window [b]. input: x [tile, d], projections [2, block, d] of values and gates
    (first halves, second halves), bias [2, m, block], before [2, m, block] (values, gates of the
    window before the first). output: [windows, block]. scratch: values and gates of first halves,
    then of second halves, in planes [block/128, 8 + tile, 128] float32.
    """
    ratio, (tile, windows) = bias_ref.shape[1], (x_ref.shape[0], out_ref.shape[0])
    planes = out_ref.shape[1] // LANES
    begins = pl.program_id(2) == 0
    is_first = first_ref[pl.program_id(1)] == 0
    front = pl.ds(FRONT - ratio, ratio)

    @pl.when(begins)
    def _():
        for which, nothing in enumerate((0.0, MASKED)):
            for plane in range(planes):
                lanes = slice(plane * LANES, (plane + 1) * LANES)
                rows = jnp.where(is_first, nothing, before_ref[which, :, lanes])
                scratch[which].at[plane][front, :] = rows

    x = x_ref[...]
    for half in range(2):
        for which, weight_ref in enumerate((values_ref, gates_ref)):
            projected = _project(x, weight_ref[half])
            for plane in range(planes):
                lanes = slice(plane * LANES, (plane + 1) * LANES)
                rows_ref = scratch[2 * half + which].at[plane]
                rows_ref[pl.ds(FRONT, tile), :] = projected[:, lanes]

    for plane in range(planes):
        lanes = slice(plane * LANES, (plane + 1) * LANES)
        values, gates = [], []
        for half, first in enumerate((FRONT - ratio, FRONT)):
            for j in range(ratio):
                slot = pl.ds(first + j, windows, stride=ratio)
                values.append(scratch[2 * half].at[plane][slot, :])
                bias = bias_ref[half, j : j + 1, lanes]
                gates.append(scratch[2 * half + 1].at[plane][slot, :] + bias)
        highest = functools.reduce(jnp.maximum, gates)
        masses = [jnp.exp(gate - highest) for gate in gates]
        weighted = sum(mass * value for mass, value in zip(masses, values, strict=True))
        out_ref[:, lanes] = weighted / sum(masses)
        for rows_ref in scratch[:2]:
            last = rows_ref.at[plane][pl.ds(FRONT + tile - ratio, ratio), :]
            rows_ref.at[plane][front, :] = last
