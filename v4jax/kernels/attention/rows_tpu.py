"""Entries rewritten as rows that a kernel can fetch one by one.

A table stores entries in tiles, from which no single row can be copied. A call that gathers many
entries therefore first decodes those in use, once, to words of two bfloat16 whose entry axis is not
tiled. The grid ends with the last entry in use: the cost follows the actual length, not the
capacity.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.table import EntryTable
from v4jax.kernels.tpu import LANES, VMEM_BYTES
from v4jax.quant.entry_format import ENTRY_BLOCK
from v4jax.shapes import ceil_div, round_up

# Channels of a row of 32-bit words.
WORD_CHANNELS = 2 * LANES
# Entries of one step.
BLOCK = 512
HIGH_HALF = -0x10000


def pack(entries: EntryTable, needed, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Returns (words, known): the first `needed` entries as rows.

    Args:
      needed: number of entries, int32; at least one step of them is written.

    Returns:
      words: int32 [b, ≥ capacity, planes, 128], channels 256i + j and 256i + 128 + j in one word;
        rows from `known` on are arbitrary.
      known: how many of its rows are entries.
    """
    capacity, channels = entries.capacity, entries.format.channels
    size = min(BLOCK, round_up(capacity, LANES))
    turned = entries.format.kind == "fp8"
    names = ("values", "rope", "scales") if turned else ("values",)
    arrays = [entries.stored[name] for name in names]
    if turned:
        arrays = [jnp.swapaxes(x, 2, 3) for x in arrays]  # as they lie in memory
    batch, planes = arrays[0].shape[1], channels // WORD_CHANNELS
    steps = jnp.maximum(ceil_div(needed, size), 1)

    def spec(array):
        if turned:
            return pl.BlockSpec((1, 1, array.shape[2], size), lambda b, i, at: (at[0], b, 0, i))
        return pl.BlockSpec((1, 1, size, channels), lambda b, i, at: (at[0], b, i, 0))

    words = pl.pallas_call(
        functools.partial(_body, turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, steps),
            in_specs=[spec(x) for x in arrays],
            out_specs=pl.BlockSpec((1, size, planes, LANES), lambda b, i, at: (b, i, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, round_up(capacity, BLOCK), planes, LANES), jnp.int32
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="sparse_attention_rows",
    )(jnp.asarray(entries.layer, jnp.int32)[None], *arrays)
    return words, jnp.minimum(steps * size, capacity)


def _body(turned, layer_ref, *refs):
    """One block of entries of one sequence.

    prefetch: layer [1]. input: values, rope, scales [1, 1, …, w], or values [1, 1, w, c]. output:
    words [1, w, planes, 128].
    """
    *stored, words_ref = refs
    for plane in range(words_ref.shape[2]):
        # Values of eight bits, and bfloat16, fill no more than the high half of a float32.
        low, high = (_half(turned, 2 * plane + i, *stored) for i in range(2))
        words = jax.lax.shift_right_logical(low, jnp.int32(16)) | (high & jnp.int32(HIGH_HALF))
        words_ref[0, :, plane, :] = words.T if turned else words


def _half(turned, index, values_ref, *others):
    """Returns the float32 bits of channels 128 · index …, turned as they are stored."""
    channels = slice(index * LANES, (index + 1) * LANES)
    if not turned:
        return _bits(values_ref[0, 0, :, channels].astype(jnp.float32))
    rope_ref, scales_ref = others
    plain = values_ref.shape[2]
    # A power of two from its exponent; the padding rows are not read.
    scales = jax.lax.bitcast_convert_type(scales_ref[0, 0].astype(jnp.int32) << 23, jnp.float32)
    pieces = []
    for first in range(channels.start, channels.stop, ENTRY_BLOCK):
        if first < plain:
            values = values_ref[0, 0, first : first + ENTRY_BLOCK].astype(jnp.float32)
            block = first // ENTRY_BLOCK
            pieces.append(values * scales[block : block + 1])
        else:
            first -= plain
            pieces.append(rope_ref[0, 0, first : first + ENTRY_BLOCK].astype(jnp.float32))
    return _bits(jnp.concatenate(pieces, axis=0))


def _bits(values):
    return jax.lax.bitcast_convert_type(values, jnp.int32)
