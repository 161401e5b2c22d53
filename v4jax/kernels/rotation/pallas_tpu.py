"""Rotation on TPU: in place, a whole register at a time.

XLA takes pairs of lanes apart and stacks them again, in arrays padded to sixteen times their size.
This kernel rotates a register of 128 channels as it is: each channel's partner comes from rolling
the lanes by one, to the left for even channels and to the right for odd ones. Only the last 128
channels are read and written; those that do not rotate keep their value.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.tpu import LANES, PACKED_ROWS
from v4jax.shapes import ceil_div, round_up

BLOCK_ROWS = 2048  # of a program: 1 MiB in float32
MOST_HEADS = BLOCK_ROWS // PACKED_ROWS


def supported(x: jax.Array, cosine: jax.Array) -> str | None:
    """Returns why the kernel cannot rotate these, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"values must be bfloat16 or float32, got {x.dtype}"
    if x.shape[-1] % LANES or cosine.shape[-1] > LANES:
        return (
            f"channels must divide by {LANES} and at most {LANES} rotate, got {x.shape[-1]} and "
            f"{cosine.shape[-1]}"
        )
    if x.ndim > 4 or (x.ndim > 3 and (x.shape[2] % PACKED_ROWS or x.shape[2] > MOST_HEADS)):
        return f"heads must be a multiple of {PACKED_ROWS} up to {MOST_HEADS}, got {x.shape[2:-1]}"
    if not x.size:
        return f"there is nothing to rotate in {x.shape}"
    return None


def rotate(x, cosine, sine, *, inverse, target):
    """See `v4jax.kernels.rotation.rotate`."""
    rotated = cosine.shape[-1]
    tokens = cosine.shape[0] * cosine.shape[1]
    fill = [(0, 0), (LANES - rotated, 0)]
    # (even, odd) → (even · cosine − odd · sine, odd · cosine + even · sine)
    signs = jnp.where(jnp.arange(rotated) % 2 == 0, -1.0, 1.0)
    cosine = jnp.pad(cosine.reshape(tokens, rotated), fill)
    sine = jnp.pad((sine * signs).reshape(tokens, rotated), fill)
    flat = x.reshape(tokens, *x.shape[2:])
    return _rotate(rotated, inverse, target.interpret, flat, cosine, sine).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rotate(rotated, inverse, interpret, x, cosine, sine):
    tokens, *heads, channels = x.shape
    tile = max(BLOCK_ROWS // (heads[0] if heads else 1), PACKED_ROWS)
    tile = min(tile, round_up(tokens, PACKED_ROWS))
    last = channels // LANES - 1
    block = pl.BlockSpec((tile, *heads, LANES), lambda i: (i, *(0 for _ in heads), last))
    angles = pl.BlockSpec((tile, LANES), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(_rotate_block, rotated, inverse),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(ceil_div(tokens, tile),),
        in_specs=[block, angles, angles],
        out_specs=block,
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="rotation",
    )(x, cosine, sine)


def _rotate_block(rotated, inverse, x_ref, cosine_ref, sine_ref, out_ref):
    x = x_ref[...]
    cosine, sine = cosine_ref[...], sine_ref[...]
    if x.ndim == 3:
        cosine, sine = cosine[:, None], sine[:, None]
    wide, axis = x.astype(jnp.float32), x.ndim - 1
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    left, right = (pltpu.roll(wide, shift, axis) for shift in (LANES - 1, 1))
    partner = jnp.where(lane % 2 == 0, left, right)
    turned = wide * cosine + partner * (-sine if inverse else sine)
    turned = jnp.where(lane >= LANES - rotated, turned, wide)
    out_ref[...] = turned.astype(x.dtype)


def _forward(rotated, inverse, interpret, x, cosine, sine):
    return _rotate(rotated, inverse, interpret, x, cosine, sine), (cosine, sine)


def _backward(rotated, inverse, interpret, angles, gradient):
    """The angles have no gradient; that of a rotation is the one back."""
    return _rotate(rotated, not inverse, interpret, gradient, *angles), None, None


_rotate.defvjp(_forward, _backward)
