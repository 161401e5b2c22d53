"""The number formats of the release, bit for bit: FP8 e4m3, FP4 e2m1 packed in bytes, e8m0 scales.

A block of values shares one power-of-two scale that multiplies the stored values. Scales are kept
as e8m0 bytes b ↦ 2^(b−127) (255 is NaN). Everything here is elementwise jnp, so it runs under jit
and on numpy arrays alike.

Source: spec B.0 (activation quantizers), D.3 (encodings).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from v4jax.shapes import round_up

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4  # the published quantizer's: an all-zero block gets a normal scale
FP4_AMAX_FLOOR = 6.0 * 2.0**-126  # the same idea: the scale is then the smallest normal float32
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Midpoints between neighbouring FP4 values; ">=" where the tie goes up to the even code, ">" where
# it stays.
FP4_MIDPOINTS = (
    (0.25, ">"),
    (0.75, ">="),
    (1.25, ">"),
    (1.75, ">="),
    (2.5, ">"),
    (3.5, ">="),
    (5.0, ">"),
)


def round_to(x: Float[Array, "..."], dtype) -> Float[Array, "..."]:
    """Returns x rounded to `dtype` for good.

    XLA may leave out a float32 → bfloat16 → float32 round trip around an operation that it computes
    in float32 (`xla_allow_excess_precision`, on by default): a plain `astype` is then no rounding.
    It never leaves out `reduce_precision`.
    """
    if jnp.dtype(dtype) == jnp.bfloat16 and x.dtype != jnp.bfloat16:
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def scale_byte(amax: Float[Array, "..."], largest: float, floor: float) -> UInt8[Array, "..."]:
    """Returns the e8m0 byte of 2^⌈log2(max(amax, floor) / largest)⌉, from the float32's bits.

    Args:
      amax: largest magnitude of each block.
      largest: largest representable value of the format, FP8_MAX or FP4_MAX.
      floor: lower bound of amax.
    """
    ratio = jnp.maximum(amax.astype(jnp.float32), jnp.float32(floor)) * jnp.float32(1.0 / largest)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    exponent = (bits >> 23) & 255
    return jnp.clip(exponent + ((bits & 0x7FFFFF) != 0), 0, 254).astype(jnp.uint8)


def decode_e8m0(scales: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Returns 2^(b−127) as float32; 255 gives NaN.

    The bit pattern of the exponent is the value, except for b = 0, whose 2^−127 is a denormal.
    """
    wide = scales.astype(jnp.int32)
    bits = jnp.where(wide == 0, 0x00400000, jnp.where(wide == 255, 0x7FC00000, wide << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def encode_e8m0(scales: np.ndarray) -> np.ndarray:
    """Returns the bytes of float32 power-of-two scales (host side, exact).

    Raises:
      ValueError: a scale is not a power of two.
    """
    mantissa, exponent = np.frexp(np.asarray(scales, np.float32))
    if not np.all(mantissa == 0.5):
        raise ValueError("a scale is not a positive power of two, so e8m0 cannot hold it")
    return (exponent - 1 + 127).astype(np.uint8)


def round_fp4(scaled: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Returns the code of the nearest e2m1 value; ties to even, beyond 6 saturates."""
    magnitude = jnp.abs(scaled)
    code = jnp.zeros(scaled.shape, jnp.uint8)
    for midpoint, relation in FP4_MIDPOINTS:
        above = magnitude >= midpoint if relation == ">=" else magnitude > midpoint
        code = code + above.astype(jnp.uint8)
    return code | (jnp.signbit(scaled).astype(jnp.uint8) << 3)


def decode_fp4(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Returns the float32 value of 4-bit codes: bit 3 sign, bits 2–1 exponent, bit 0 mantissa."""
    wide = codes.astype(jnp.int32)
    exponent, mantissa = (wide >> 1) & 3, wide & 1
    normal = ((exponent + 126) << 23) | (mantissa << 22)
    half = jnp.where(mantissa == 1, 0x3F000000, 0)  # 0.5 is the only subnormal of e2m1
    bits = jnp.where(exponent == 0, half, normal) | ((wide & 8) << 28)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def pack_fp4(codes: UInt8[Array, "... i"]) -> UInt8[Array, "... p"]:
    """Packs codes of columns 2p and 2p+1 into the low and high half of byte p."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_fp4(packed: UInt8[Array, "... p"]) -> UInt8[Array, "... i"]:
    """Undoes `pack_fp4`."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def split_blocks(x: Float[Array, "... c"], block: int) -> Float[Array, "... n block"]:
    """Cuts the last axis into blocks, zero-padding the last one."""
    padding = round_up(x.shape[-1], block) - x.shape[-1]
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, block)


def join_blocks(blocks: Float[Array, "... n block"], channels: int) -> Float[Array, "... c"]:
    """Undoes `split_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :channels]


def quantize_fp8(x: Float[Array, "... c"], block: int) -> tuple[Array, UInt8[Array, "... n"]]:
    """Rounds to e4m3 in blocks of the last axis, as the published activation quantizer.

    Returns:
      values: float8_e4m3fn [..., c].
      scales: e8m0 bytes [..., ⌈c/block⌉].
    """
    blocks = split_blocks(x.astype(jnp.float32), block)
    scales = scale_byte(jnp.max(jnp.abs(blocks), axis=-1), FP8_MAX, FP8_AMAX_FLOOR)
    scaled = jnp.clip(blocks / decode_e8m0(scales)[..., None], -FP8_MAX, FP8_MAX)
    return join_blocks(scaled, x.shape[-1]).astype(jnp.float8_e4m3fn), scales


def dequantize_fp8(
    values: Array, scales: UInt8[Array, "... n"], block: int
) -> Float[Array, "... c"]:
    """Returns value × scale in float32; exact."""
    blocks = split_blocks(values.astype(jnp.float32), block)
    return join_blocks(blocks * decode_e8m0(scales)[..., None], values.shape[-1])


def quantize_fp4(
    x: Float[Array, "... c"], block: int = 32
) -> tuple[UInt8[Array, "... p"], UInt8[Array, "... n"]]:
    """Rounds to packed e2m1 in blocks of the last axis, as the published quantizer of index keys.

    Returns:
      packed: uint8 [..., c/2].
      scales: e8m0 bytes [..., ⌈c/block⌉].
    """
    blocks = split_blocks(x.astype(jnp.float32), block)
    scales = scale_byte(jnp.max(jnp.abs(blocks), axis=-1), FP4_MAX, FP4_AMAX_FLOOR)
    scaled = blocks / decode_e8m0(scales)[..., None]
    return pack_fp4(round_fp4(join_blocks(scaled, x.shape[-1]))), scales


def dequantize_fp4(
    packed: UInt8[Array, "... p"], scales: UInt8[Array, "... n"], block: int = 32
) -> Float[Array, "... c"]:
    """Returns value × scale in float32; exact."""
    values = decode_fp4(unpack_fp4(packed))
    blocks = split_blocks(values, block) * decode_e8m0(scales)[..., None]
    return join_blocks(blocks, values.shape[-1])


def hadamard(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Rotates the last axis by the Walsh–Hadamard matrix in natural order, scaled to be orthogonal.

    Computed in float32 by log2(c) butterflies and rounded once to x's dtype; c is a power of two.
    """
    channels = x.shape[-1]
    y = x.astype(jnp.float32)
    width = 1
    while width < channels:
        pairs = y.reshape(*x.shape[:-1], channels // (2 * width), 2, width)
        y = jnp.stack(
            [pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2
        )
        y = y.reshape(x.shape)
        width *= 2
    return round_to(y * jnp.float32(channels**-0.5), x.dtype)
