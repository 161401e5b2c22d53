"""Expanding stored weights inside a TPU kernel: FP8 with 128×128 scales, packed FP4 with 1×32.

Both are exact: a scale is a power of two, and bfloat16 holds every e4m3 and e2m1 value (spec D.3).

FP4 byte p holds columns 2p and 2p+1. Instead of interleaving lanes, the contraction runs in *split
order*: in every group of 256 columns the even ones come first. The low halves of 128 bytes are then
128 neighbouring columns, and the high halves the next 128. `split` brings the other operand into
this order.

Where a chip casts e4m3 to bfloat16, a code becomes such a number. Elsewhere it is unpacked with
integer operations. A word holds four bytes of one column (rows 4i … 4i+3), or two bfloat16 of one
column; words are therefore rearranged in place, two weights per operation, without movement between
lanes. Bytes two apart become halves of a word without a shift, which leaves rows 4i … 4i+3 in the
order 4i, 4i+2, 4i+1, 4i+3; `restore` reorders the outputs. Where outputs are wanted in split order,
the words of even rows come before those of odd ones, and nothing is left to reorder.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.tpu import LANES, Chip
from v4jax.quant import ScaledArray
from v4jax.quant.scaled_array import FP4_BLOCK, FP8_BLOCK

Kind = Literal["bfloat16", "fp8", "fp4"]

ONES = 0x11111111  # bit 0 of eight codes
MAGNITUDES = 0x77777777  # their other bits than the signs
CAST_MAGNITUDES = 0x1C1C1C1C  # those of one code, placed in each of four e4m3 numbers
SIGNS = np.int32(-0x7F7F7F80)  # bit 7 of four bytes
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
    """Returns the permutation [256, 256] to split order."""
    source = jax.lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    wanted = jnp.where(place < LANES, 2 * place, 2 * (place - LANES) + 1)
    return (source == wanted).astype(dtype)


def row_matrix(dtype):
    """Returns the permutation [128, 128] that brings expanded FP4 rows into their own order."""
    place = jax.lax.broadcasted_iota(jnp.int32, (UNPACK_ROWS, UNPACK_ROWS), 0)
    source = jax.lax.broadcasted_iota(jnp.int32, (UNPACK_ROWS, UNPACK_ROWS), 1)
    inner = place & 3
    wanted = jnp.where(inner == 1, place + 1, jnp.where(inner == 2, place - 1, place))
    return (source == wanted).astype(dtype)


def restore(chip: Chip, kind: Kind, outputs):
    """Returns outputs [rows, o], o a multiple of 128, in their own order.

    Expanded FP4 rows 4i … 4i+3 lie as 4i, 4i+2, 4i+1, 4i+3: the outputs in the middle swap.
    """
    if kind != "fp4" or not mixes_rows(chip):
        return outputs
    blocks = []
    for first in range(0, outputs.shape[1], LANES):
        block = outputs[:, first : first + LANES]
        place = jax.lax.broadcasted_iota(jnp.int32, block.shape, 1) & 3
        right, left = pltpu.roll(block, LANES - 1, 1), pltpu.roll(block, 1, 1)
        blocks.append(jnp.where(place == 1, right, jnp.where(place == 2, left, block)))
    return jnp.concatenate(blocks, axis=1)


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


def mixes_rows(chip: Chip) -> bool:
    """Returns whether expanded FP4 rows need `restore`, or come in split order if asked to."""
    return chip.cast is None


def unpack(
    chip: Chip, kind: Kind, values_ref, scales_ref, scratch_ref, first_tile, *, splits=False
) -> None:
    """Expands a block into `scratch_ref`, for `read`.

    Args:
      values_ref: [rows, columns] e4m3, or [rows, columns/2] bytes.
      scales_ref: FP8: [out/128, columns/128] float32 of the whole matrix; FP4: [rows, columns/32].
      scratch_ref: `scratch_shape`.
      first_tile: FP8: the block's first row of 128 in `scales_ref`.
      splits: FP4: the rows come in split order, and need no `restore`; only if `mixes_rows`.
    """

    @pl.loop(0, values_ref.shape[0] // UNPACK_ROWS)
    def _(step):
        refs = values_ref, scales_ref, scratch_ref
        if kind == "fp8":
            _unpack_fp8(chip, *refs, step, first_tile)
        elif mixes_rows(chip):
            _unpack_fp4(chip, *refs, step, splits)
        else:
            _cast_fp4(chip, *refs, step)


def _unpack_fp8(chip, values_ref, scales_ref, scratch_ref, step, first_tile):
    rows, half = pl.ds(step * UNPACK_ROWS, UNPACK_ROWS), UNPACK_ROWS // 2
    scales = scales_ref[pl.ds(first_tile + step, 1), :]
    for tile in range(values_ref.shape[1] // LANES):
        lanes = slice(tile * LANES, (tile + 1) * LANES)
        scale = scales[:, tile : tile + 1]
        if chip.cast is not None:
            expanded = _cast_fp8(chip, values_ref[rows, lanes], scale)
        else:
            values = values_ref[rows, lanes].astype(jnp.float32)
            expanded = (values * scale).astype(jnp.bfloat16)
        words = pltpu.bitcast(expanded, jnp.int32)
        scratch_ref.at[tile][pl.ds(step * half, half), :] = words


def _cast_fp8(chip, values, scale):
    """Returns e4m3fn values · scale in bfloat16.

    (Where bias 11 is read, the two NaN of e4m3fn are ±480: no weight is NaN.)
    """
    fmt = chip.cast
    if fmt == jnp.float8_e4m3b11fnuz:
        codes = pltpu.bitcast(values, jnp.int32)
        # The highest bit of each byte that is neither 0 nor −0: the latter becomes +0.
        some = (codes & 0x7F7F7F7F) + 0x7F7F7F7F
        values = pltpu.bitcast(codes & (some | 0x7F7F7F7F), fmt)
    return values.astype(jnp.bfloat16) * (scale * 2.0 ** (chip.cast_bias - 7)).astype(jnp.bfloat16)


def _cast_fp4(chip, values_ref, scales_ref, scratch_ref, step):
    """Expands rows in their own order, by a chip's cast of e4m3.

    A code's exponent and mantissa become the lowest bits of the exponent and the highest of the
    mantissa of such a number. Code 1 (½) is a subnormal in both, so that the number is the code's
    value times 2^(1 − bias). Scales of 2^118 and more are too large for what makes up for it.
    """
    fmt = chip.cast
    rows, half = pl.ds(step * UNPACK_ROWS, UNPACK_ROWS), UNPACK_ROWS // 2
    exponents = pltpu.bitcast(scales_ref[rows, :].astype(jnp.int16), jnp.int32)
    scales = (exponents << 7) + _both((chip.cast_bias - 1) << 7)  # two bfloat16 in a word
    lane = jax.lax.broadcasted_iota(jnp.int32, (half, LANES), 1)
    for group in range(values_ref.shape[1] // LANES):
        scale = pltpu.bitcast(_spread_scales(scales, group, lane), jnp.bfloat16)
        words = pltpu.bitcast(values_ref[rows, group * LANES : (group + 1) * LANES], jnp.int32)
        signs = words
        if fmt == jnp.float8_e4m3b11fnuz:  # bit 3 of each code's sum says that it is not ±0
            signs &= (words & MAGNITUDES) + MAGNITUDES
        low = ((words << 2) & CAST_MAGNITUDES) | ((signs << 4) & SIGNS)
        high = ((words >> 2) & CAST_MAGNITUDES) | (signs & SIGNS)
        for plane, codes in enumerate((low, high)):
            values = pltpu.bitcast(codes, fmt).astype(jnp.bfloat16)
            expanded = pltpu.bitcast(values * scale, jnp.int32)
            scratch_ref.at[2 * group + plane][pl.ds(step * half, half), :] = expanded


def _spread_scales(scales, group: int, lane):
    """Returns the scales of each byte of a group: of its 128 bytes every 16 have one."""
    first = group * 8 // LANES * LANES
    source = scales[:, first : first + LANES]
    if source.shape[1] < LANES:
        source = jnp.pad(source, [(0, 0), (0, LANES - source.shape[1])])
    index = group * 8 % LANES + (lane >> 4)
    return jnp.take_along_axis(source, index, axis=1, mode="promise_in_bounds")


def _unpack_fp4(chip, values_ref, scales_ref, scratch_ref, step, splits):
    rows, words = pl.ds(step * UNPACK_ROWS, UNPACK_ROWS), UNPACK_ROWS // 4
    if splits:
        # A group of 256 rows is 128 words, the even rows' before the odd ones'; a step is half one.
        first = (step >> 1) * LANES + (step & 1) * words
        place = [pl.ds(pl.multiple_of(first + half, words), words) for half in (0, LANES // 2)]
    else:
        place = [pl.ds(step * (UNPACK_ROWS // 2) + pair, words, stride=2) for pair in range(2)]
    scales = _decrement(pltpu.bitcast(scales_ref[rows, :], jnp.int32))
    lane = jax.lax.broadcasted_iota(jnp.int32, (words, LANES), 1)
    for group in range(values_ref.shape[1] // LANES):
        scale = _spread_scales(scales, group, lane)
        four = pltpu.bitcast(values_ref[rows, group * LANES : (group + 1) * LANES], jnp.int32)
        low, high = scratch_ref.at[2 * group], scratch_ref.at[2 * group + 1]
        # Bytes 0 and 2 of a word, then 1 and 3: their codes stand 16 bits apart already.
        exponents = (scale << 7) & 0x7F807F80, (scale >> 1) & 0x7F807F80
        found = decode_codes(chip, four, exponents)
        low[place[0], :], high[place[0], :], low[place[1], :], high[place[1], :] = found


def decode_codes(chip: Chip, words, exponents):
    """Returns four words of two bfloat16 each: of the codes at bits 0, 4, 8, 12 and 16 above.

    Args:
      words: int32, eight FP4 codes each.
      exponents: two arrays of words, of the codes of even and of odd bytes: in both halves, at bits
        14–7, the scale's exponent less one. (With the scale's own, all values come out doubled.)
    """
    return (_by_bfloat16 if chip.modern else _by_integers)(words, exponents)


def _by_bfloat16(four, exponents):
    """As `decode_codes`, by one subtraction and one minimum.

    A code's exponent and mantissa and the scale's exponent less one, added, are a normal number
    v = scale · (½, ¾, 1, 1½, 2, 3, 4, 6), right but for codes 0 and 1. And min(v, 2v − scale) is
    scale · (0, ½, 1, 1½, 2, 3, 4, 6), without rounding.
    """
    found = []
    for bit in (0, 4, 8, 12):
        exponent = exponents[bit // 8]
        scale = exponent + _both(0x80)
        magnitude = _at(four, 7, bit, 6)
        low, high, unit = (
            pltpu.bitcast(x, jnp.bfloat16) for x in (magnitude + exponent, magnitude + scale, scale)
        )
        right = pltpu.bitcast(jnp.minimum(low, high - unit), jnp.int32)
        found.append(right | _at(four, 1, bit + 3, 15))
    return found


def _by_integers(four, exponents):
    """As `decode_codes`, without arithmetic of halves."""
    # All eight codes of a word at once: bit 0 of each becomes what a code needs to know.
    normal = ((four >> 2) | (four >> 1)) & ONES  # codes of 2 and more
    some = (four & ONES) | normal  # not 0
    four &= normal | ~ONES  # code 1 is the only subnormal, ½: no mantissa
    return [_place(four, some, exponents[bit // 8], bit) for bit in (0, 4, 8, 12)]


def _at(x, mask: int, source: int, target: int):
    """Moves the bits of `mask` in both halves from `source` to `target`."""
    shift = target - source
    if shift >= 0:
        return (x & _both(mask << source)) << shift
    return (x >> -shift) & _both(mask << target)


def _place(codes, some, exponent, bit: int):
    """Returns the two bfloat16 of the codes at `bit` and `bit` + 16, in the halves of a word.

    A code of 2 or more is a normal number: its exponent and mantissa, at bits 8–7 and 6, and the
    scale's exponent less one are added. Code 1 is left with the scale's exponent, code 0 with 0.
    """
    one = some & _both(1 << bit)
    lowest = one << (7 - bit) if bit <= 7 else one >> (bit - 7)
    mask = (one << (15 - bit)) - lowest  # bits 14–7 where the code is not 0
    magnitude = _at(codes, 7, bit, 6)
    return (magnitude + (exponent & mask)) | _at(codes, 1, bit + 3, 15)


def _both(bits: int):
    """Returns an int32 with these 16 bits in both halves."""
    return jnp.int32(np.array(bits << 16 | bits, np.uint32).view(np.int32))


def _decrement(scales):
    """Returns every byte less one; 0 stays 0, so the denormal scale 2^−127 reads as 2^−126."""
    some = (((scales & 0x7F7F7F7F) + 0x7F7F7F7F) | scales) & SIGNS
    return scales - ((some >> 7) & 0x01010101)
