"""Expanding stored weights inside a TPU kernel: FP8 with 128×128 scales, packed FP4 with 1×32.

Both are exact: a scale is a power of two, and bfloat16 holds every e4m3 and e2m1 value (spec D.3).

FP4 is unpacked by integers, since most chips have no cast. Four bytes of one column lie in a word
(rows 4i … 4i+3), two bfloat16 of one column as well (rows 2i, 2i+1), so words are taken apart and
put together in place: two weights per operation, no movement between lanes. What remains is that
byte p holds columns 2p and 2p+1, which would have to be interleaved along lanes. Instead the
contraction runs in *split order*: in every group of 256 columns the even ones come first, so the
low halves of 128 bytes make 128 neighbouring columns, and the high halves the next 128. `split`
brings the other operand into this order.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.quant import ScaledArray
from v4jax.quant.scaled_array import FP4_BLOCK, FP8_BLOCK

Kind = Literal["bfloat16", "fp8", "fp4"]

LANES = 128
GROUP = 2 * LANES  # columns of one split group
UNPACK_ROWS = 128  # rows expanded by one pass of a loop: bounds the size of the program


def kind_of(weight) -> Kind:
    """Returns how a weight is stored."""
    if isinstance(weight, ScaledArray):
        return "fp4" if weight.is_fp4 else "fp8"
    return "bfloat16"


def why_not(name: str, weight) -> str | None:
    """Returns why a TPU kernel cannot read this weight [..., out, in], or None."""
    out, width = weight.shape[-2:]
    if not isinstance(weight, ScaledArray):
        if weight.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16 or quantized, got {weight.dtype}"
        step = LANES
    elif weight.is_fp4:
        if weight.block != FP4_BLOCK or weight.scales.dtype != jnp.uint8:
            return f"{name}: packed FP4 needs e8m0 scales of 1×32"
        step = GROUP
    else:
        if weight.block != FP8_BLOCK:
            return f"{name}: FP8 needs scales of 128×128, got {weight.block}"
        step = LANES
    if out % LANES or width % step:
        return f"{name}: sizes must divide by {LANES} and {step}, got {out} and {width}"
    return None


def split(x):
    """Returns x [..., i] with the columns of every 256 in split order: even ones, then odd."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, LANES, 2)
    return jnp.swapaxes(pairs, -1, -2).reshape(x.shape)


def split_matrix(dtype):
    """Returns the permutation [256, 256] that `split` applies, for a product inside a kernel."""
    source = jax.lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    wanted = jnp.where(place < LANES, 2 * place, 2 * (place - LANES) + 1)
    return (source == wanted).astype(dtype)


def scratch_shape(rows: int, columns: int) -> tuple[int, ...]:
    """Returns the shape of an expanded block: int32 words of two rows, 128 columns a plane.

    Planes, because the compiler stores rows with a stride only where a row is one register wide.
    """
    return (columns // LANES, rows // 2, LANES)


def read(scratch_ref, step, rows: int):
    """Returns expanded rows step·rows … [rows, columns] in bfloat16."""
    words = pl.ds(pl.multiple_of(step * (rows // 2), rows // 2), rows // 2)
    planes = [
        pltpu.bitcast(scratch_ref[i, words, :], jnp.bfloat16) for i in range(scratch_ref.shape[0])
    ]
    return jnp.concatenate(planes, axis=1)


def unpack(kind: Kind, values_ref, scales_ref, scratch_ref, first_tile) -> None:
    """Expands a block into `scratch_ref`, for `read`.

    Args:
      values_ref: [rows, columns] e4m3, or [rows, columns/2] bytes.
      scales_ref: FP8: [out/128, columns/128] float32 of the whole matrix; FP4: [rows, columns/32].
      scratch_ref: `scratch_shape`.
      first_tile: FP8: the block's first row of 128 in `scales_ref`.
    """

    @pl.loop(0, values_ref.shape[0] // UNPACK_ROWS)
    def _(step):
        if kind == "fp4":
            _unpack_fp4(values_ref, scales_ref, scratch_ref, step)
        else:
            _unpack_fp8(values_ref, scales_ref, scratch_ref, step, first_tile)


def _unpack_fp8(values_ref, scales_ref, scratch_ref, step, first_tile):
    rows, half = pl.ds(step * UNPACK_ROWS, UNPACK_ROWS), UNPACK_ROWS // 2
    scales = scales_ref[pl.ds(first_tile + step, 1), :]
    for tile in range(values_ref.shape[1] // LANES):
        lanes = slice(tile * LANES, (tile + 1) * LANES)
        values = values_ref[rows, lanes].astype(jnp.float32)
        expanded = (values * scales[:, tile : tile + 1]).astype(jnp.bfloat16)
        words = pltpu.bitcast(expanded, jnp.int32)
        scratch_ref.at[tile][pl.ds(step * half, half), :] = words


def _unpack_fp4(values_ref, scales_ref, scratch_ref, step):
    rows, words = pl.ds(step * UNPACK_ROWS, UNPACK_ROWS), UNPACK_ROWS // 4
    scales = _decrement(pltpu.bitcast(scales_ref[rows, :], jnp.int32))
    lane = jax.lax.broadcasted_iota(jnp.int32, (words, LANES), 1)
    for group in range(values_ref.shape[1] // LANES):
        # The 128 bytes of a group have 8 scales; each stands for 16 bytes.
        first = group * 8 // LANES * LANES
        source = scales[:, first : first + LANES]
        if source.shape[1] < LANES:
            source = jnp.pad(source, [(0, 0), (0, LANES - source.shape[1])])
        index = group * 8 % LANES + (lane >> 4)
        scale = jnp.take_along_axis(source, index, axis=1, mode="promise_in_bounds")
        four = pltpu.bitcast(values_ref[rows, group * LANES : (group + 1) * LANES], jnp.int32)
        for pair in range(2):
            two, exponent = _spread(four, pair), _spread(scale, pair) << 7
            place = pl.ds(step * (UNPACK_ROWS // 2) + pair, words, stride=2)
            scratch_ref.at[2 * group][place, :] = _decode(
                (two & 0x00070007) << 6, (two & 0x00080008) << 12, exponent
            )
            scratch_ref.at[2 * group + 1][place, :] = _decode(
                (two & 0x00700070) << 2, (two & 0x00800080) << 8, exponent
            )


def _spread(four, pair):
    """Returns bytes 2·pair and 2·pair + 1 of each word, in the low bytes of its halves."""
    if pair:
        return ((four >> 16) & 0xFF) | ((four >> 8) & 0x00FF0000)
    return (four & 0xFF) | ((four & 0xFF00) << 8)


def _decrement(scales):
    """Returns every byte less one; 0 stays 0, so the denormal scale 2^−127 reads as 2^−126."""
    some = (((scales & 0x7F7F7F7F) + 0x7F7F7F7F) | scales) & jnp.int32(-0x7F7F7F80)
    return scales - ((some >> 7) & 0x01010101)


def _decode(magnitude, sign, exponent):
    """Returns the bits of two bfloat16 per word.

    `magnitude` holds the codes' exponent and mantissa at bits 8–7 and 6 of each half, `sign` bit
    15, `exponent` the scale's less one at bits 14–7. Codes of 2 and more are normal numbers: add
    the exponents. Code 1 is the only subnormal, ½: the scale's exponent and no mantissa. Code 0 is
    0 whatever the scale.
    """
    some = magnitude + 0x01C001C0  # bit 9: code ≥ 1
    normal = magnitude + 0x01800180  # bit 9: code ≥ 2
    magnitude -= ((some ^ normal) & 0x02000200) >> 3
    some &= 0x02000200
    mask = (some << 6) - (some >> 2)  # bits 14–7 where the code is not 0
    return (magnitude + (exponent & mask)) | sign
