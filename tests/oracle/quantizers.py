"""The number formats of the released checkpoints and activations, bit for bit, in NumPy.

Everything is computed on float32 values, as the published kernels do. Blocks run along the last
axis; a last block that is shorter than the others is quantised alone (released sizes have none).

Source: specification sections B.0, D.2, D.3 and D.6.
"""

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# Smallest block maximum that the activation quantisers see; keeps the scale finite and normal.
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126

# Nibble → value. Bit 3 is the sign, bits 2..1 the exponent (bias 1), bit 0 the mantissa.
E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_VALUES = np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES])


def to_bf16(x):
    """Rounds to bfloat16 (nearest even) and returns the value as float32."""
    return np.asarray(x, np.float32).astype(BF16).astype(np.float32)


def ceil_power_of_two(x):
    """Returns 2^ceil(log2(x)) of positive normal float32, read from the bits: no log is taken."""
    bits = np.asarray(x, np.float32).view(np.int32)
    exponent = ((bits >> 23) & 0xFF) - 127 + ((bits & 0x7FFFFF) != 0)
    return np.ldexp(np.float32(1), exponent).astype(np.float32)


def block_scales(amax, largest, floor):
    """Returns the power-of-two scale of blocks whose largest magnitudes are `amax`.

    The quotient is a float32 product with the float32 reciprocal, as in the published kernels.
    """
    amax = np.maximum(np.asarray(amax, np.float32), np.float32(floor))
    return ceil_power_of_two(amax * np.float32(1.0 / largest))


def _block_amax(x, block):
    """[..., n] → [..., ceil(n/block)]: largest magnitude per block."""
    short = -x.shape[-1] % block
    x = np.pad(np.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, block).max(-1)


def expand_blocks(scales, block, size, axis=-1):
    """Repeats each scale over its block and cuts the axis to `size`."""
    wide = np.repeat(scales, block, axis)
    return np.take(wide, np.arange(size), axis)


def act_quant(x, block=128):
    """Quantises activations to FP8 with one power-of-two scale per block of the last axis.

    Returns (q e4m3 of the shape of x, s float32 [..., ceil(n/block)]); x ≈ q·s.
    """
    x = np.asarray(x, np.float32)
    s = block_scales(_block_amax(x, block), E4M3_MAX, FP8_AMAX_FLOOR)
    scaled = x / expand_blocks(s, block, x.shape[-1])
    return np.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(E4M3), s


def act_dequant(q, s, block=128):
    """Returns q·s as float32 (exact: the scale is a power of two)."""
    q = np.asarray(q).astype(np.float32)
    return q * expand_blocks(s, block, q.shape[-1])


def round_e2m1(x):
    """Returns the nearest FP4 nibble (uint8 0..15) of float32 in [-6, 6]; ties to even mantissa."""
    x = np.asarray(x, np.float32)
    middle = (E2M1_MAGNITUDES[1:] + E2M1_MAGNITUDES[:-1]) / 2
    size = np.abs(x)[..., None]
    # The codes 0..7 are in order, so a tie between codes i and i+1 goes to the even one.
    ties_up = np.arange(7) % 2 == 1
    code = ((size > middle) | ((size == middle) & ties_up)).sum(-1).astype(np.uint8)
    return code | (np.signbit(x).astype(np.uint8) << 3)


def fp4_act_quant(x, block=32):
    """Quantises to FP4 with one power-of-two scale per block of the last axis.

    Returns (q float32 on the E2M1 grid, of the shape of x, s float32 [..., ceil(n/block)]).
    """
    x = np.asarray(x, np.float32)
    s = block_scales(_block_amax(x, block), E2M1_MAX, FP4_AMAX_FLOOR)
    scaled = np.clip(x / expand_blocks(s, block, x.shape[-1]), -E2M1_MAX, E2M1_MAX)
    return E2M1_VALUES[round_e2m1(scaled)], s


def quantize_fp8_weight(weight, block=128):
    """Returns (e4m3 [o, i], scales float32 [ceil(o/128), ceil(i/128)]) of a matrix."""
    weight = np.asarray(weight, np.float32)
    rows, columns = weight.shape
    amax = _block_amax(_block_amax(weight, block).T, block).T
    s = block_scales(amax, E4M3_MAX, FP8_AMAX_FLOOR)
    wide = expand_blocks(expand_blocks(s, block, rows, 0), block, columns, 1)
    return np.clip(weight / wide, -E4M3_MAX, E4M3_MAX).astype(E4M3), s


def dequantize_fp8_weight(values, scales, block=128):
    """Returns the float32 matrix; `scales` may be E8M0, float32 or the exponent bytes as uint8."""
    rows, columns = values.shape
    wide = expand_blocks(expand_blocks(decode_scales(scales), block, rows, 0), block, columns, 1)
    return values.astype(np.float32) * wide


def pack_fp4(codes):
    """[..., n] nibbles → [..., n/2] int8; byte j holds column 2j low and column 2j+1 high."""
    codes = np.asarray(codes, np.uint8)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(np.int8)


def unpack_fp4(packed):
    """[..., n/2] int8 → [..., n] float32 values."""
    raw = np.asarray(packed).view(np.uint8)
    return E2M1_VALUES[np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1)]


def quantize_fp4_weight(weight, block=32):
    """Returns (packed int8 [o, i/2], scales float32 [o, ceil(i/32)]) of a matrix."""
    weight = np.asarray(weight, np.float32)
    s = block_scales(_block_amax(weight, block), E2M1_MAX, FP4_AMAX_FLOOR)
    scaled = np.clip(weight / expand_blocks(s, block, weight.shape[-1]), -E2M1_MAX, E2M1_MAX)
    return pack_fp4(round_e2m1(scaled)), s


def dequantize_fp4_weight(packed, scales, block=32):
    """Returns the float32 matrix [o, i] of packed nibbles [o, i/2]."""
    values = unpack_fp4(packed)
    return values * expand_blocks(decode_scales(scales), block, values.shape[-1])


def encode_scales(scales):
    """Returns powers of two as E8M0 (byte b means 2^(b-127))."""
    exponent = np.frexp(np.asarray(scales, np.float32))[1] - 1
    return (exponent + 127).astype(np.uint8).view(E8M0)


def decode_scales(scales):
    """Returns scales as float32 from E8M0, exponent bytes (uint8) or floats."""
    scales = np.asarray(scales)
    if scales.dtype in (np.dtype(E8M0), np.dtype(np.uint8)):
        return np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - 127)
    return scales.astype(np.float32)


def hadamard(x):
    """Rotates the last axis by the normalised Walsh-Hadamard matrix in natural order."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"the Hadamard rotation needs a power of two, got {n} channels")
    matrix = np.ones((1, 1), x.dtype)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x @ matrix) * x.dtype.type(n**-0.5)
