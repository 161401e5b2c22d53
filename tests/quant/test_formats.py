"""FP8, FP4 and scale bytes against the NumPy quantizers of the tests, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantizers

from v4jax.quant import formats

CHANNELS = 200  # no block size divides it

quantize_fp8 = jax.jit(formats.quantize_fp8, static_argnums=1)
quantize_fp4 = jax.jit(formats.quantize_fp4, static_argnums=1)
dequantize_fp8 = jax.jit(formats.dequantize_fp8, static_argnums=2)
dequantize_fp4 = jax.jit(formats.dequantize_fp4, static_argnums=2)
round_fp4, decode_fp4, pack_fp4, unpack_fp4, decode_e8m0, hadamard = map(
    jax.jit,
    (
        formats.round_fp4,
        formats.decode_fp4,
        formats.pack_fp4,
        formats.unpack_fp4,
        formats.decode_e8m0,
        formats.hadamard,
    ),
)


@functools.cache
def rows(channels=CHANNELS):
    """Returns one row per kind of value, with names; every row in float32."""
    random = np.random.RandomState(0)
    normal = random.standard_normal(channels).astype(np.float32)
    powers = np.exp2(random.randint(-30, 30, channels)).astype(np.float32)
    grid = np.tile(quantizers.E2M1_VALUES, channels // 16 + 1)[:channels]
    middles = (quantizers.E2M1_MAGNITUDES[1:] + quantizers.E2M1_MAGNITUDES[:-1]) / 2
    ties = np.tile(np.concatenate([[6], middles, -middles]), channels // 15 + 1)[:channels]
    steps = np.nextafter(ties.astype(np.float32), np.float32(100))
    found = {
        "normal": normal,
        "zeros": 0 * normal,
        "negative zeros": -np.zeros(channels),
        "one value": np.where(np.arange(channels) == 77, 3.0, 0),
        "mixed sizes": normal * powers,
        "huge": normal * 1e37,
        "tiny": normal * 1e-37,
        "denormal": normal * 1e-41,
        "below the floor": normal * 1e-6,
        "at the limit of FP8": np.where(np.arange(channels) % 7, normal, 448),
        "one step above it": np.where(
            np.arange(channels) % 7, normal, np.nextafter(np.float32(448), np.float32(500))
        ),
        "FP4 values": grid,
        "FP4 ties": ties,
        "just above FP4 ties": steps,
        "FP8 subnormals": np.where(np.arange(channels) % 64, normal * 2.0**-14, 448),
        "bfloat16": quantizers.to_bf16(normal),
    }
    return tuple(found), np.stack([row.astype(np.float32) for row in found.values()])


def assert_same_bits(a, b, names):
    """Compares two float arrays [kinds, …] bit for bit, signs of zero included."""
    a, b = (np.ascontiguousarray(x) for x in (a, b))
    assert a.dtype == b.dtype and a.shape == b.shape
    equal = (a.view(np.uint8) == b.view(np.uint8)).reshape(len(a), -1).all(1)
    assert equal.all(), [name for name, same in zip(names, equal, strict=True) if not same]


@pytest.mark.parametrize("block", [32, 64, 128])
def test_fp8_codes_and_scales(block):
    names, x = rows()
    values, scales = quantize_fp8(x, block)
    expected, expected_scales = quantizers.act_quant(x, block)
    assert_same_bits(np.asarray(values), expected, names)
    assert_same_bits(
        np.asarray(scales), quantizers.encode_scales(expected_scales).view(np.uint8), names
    )
    decoded = dequantize_fp8(values, scales, block)
    assert_same_bits(
        np.asarray(decoded), quantizers.act_dequant(values, expected_scales, block), names
    )


@pytest.mark.parametrize("block", [32, 64])
def test_fp4_codes_and_scales(block):
    names, x = rows()
    packed, scales = quantize_fp4(x, block)
    expected, expected_scales = quantizers.fp4_act_quant(x, block)
    wide = quantizers.expand_blocks(expected_scales, block, CHANNELS)
    codes = quantizers.round_e2m1(np.clip(x / wide, -6, 6))
    assert_same_bits(np.asarray(packed), quantizers.pack_fp4(codes).view(np.uint8), names)
    assert_same_bits(
        np.asarray(scales), quantizers.encode_scales(expected_scales).view(np.uint8), names
    )
    decoded = dequantize_fp4(packed, scales, block)
    assert_same_bits(np.asarray(decoded), (expected * wide).astype(np.float32), names)


@pytest.mark.parametrize(
    "quantize, dequantize, block",
    [
        (quantize_fp8, dequantize_fp8, 64),
        (quantize_fp8, dequantize_fp8, 128),
        (quantize_fp4, dequantize_fp4, 32),
    ],
    ids=["fp8/64", "fp8/128", "fp4/32"],
)
def test_what_was_rounded_stays(quantize, dequantize, block):
    """Rounding twice is rounding once, bit for bit; and bfloat16 holds every result exactly."""
    names, x = rows()
    once = dequantize(*quantize(x, block), block)
    assert_same_bits(np.asarray(dequantize(*quantize(once, block), block)), np.asarray(once), names)
    normal = np.abs(once) >= 2.0**-126  # of denormals bfloat16 has fewer bits
    exact = quantizers.to_bf16(once)
    np.testing.assert_array_equal(exact[normal], np.asarray(once)[normal])


@pytest.mark.parametrize(
    "value, nearest",
    [
        (0.25, 0),
        (0.75, 1),
        (1.25, 1),
        (1.75, 2),
        (2.5, 2),
        (3.5, 4),
        (5, 4),
        (6, 6),
        (7, 6),
        (0.26, 0.5),
        (0, 0),
    ],
)
def test_fp4_ties_go_to_even(value, nearest):
    x = np.array([value, -float(value)], np.float32)
    codes = np.asarray(round_fp4(x))
    assert codes.tolist() == [codes[0], codes[0] | 8], "the sign is bit 3, of zero too"
    decoded = np.asarray(decode_fp4(codes))
    np.testing.assert_array_equal(decoded, [nearest, -nearest])
    assert np.signbit(decoded).tolist() == [False, True]


def test_golden_fp8():
    """J.2: block 64."""
    x = 0.03 * (np.arange(64) - 31.5)
    x[5] = 3.3
    values, scales = quantize_fp8(x.astype(np.float32), 64)
    assert scales.tolist() == [127 - 7]
    first = [-0.9375, -0.9375, -0.875, -0.875, -0.8125, 3.25, -0.75, -0.75]
    np.testing.assert_array_equal(dequantize_fp8(values, scales, 64)[:8], first)


def test_golden_fp4():
    """J.2: block 32, the scale ½; and a byte's nibbles, low column first."""
    packed, scales = quantize_fp4(np.float32(0.11 * (np.arange(32) - 15.5)), 32)
    assert scales.tolist() == [126]
    decoded = np.asarray(dequantize_fp4(packed, scales, 32))
    np.testing.assert_array_equal(decoded[:6], [-1.5, -1.5, -1.5, -1.5, -1.5, -1.0])
    np.testing.assert_array_equal(decoded[-6:], [1.0, 1.5, 1.5, 1.5, 1.5, 1.5])
    one_byte = decode_fp4(unpack_fp4(jnp.array([0x2F], jnp.uint8)))
    np.testing.assert_array_equal(one_byte, [-6, 1])


def test_packing_order():
    codes = np.arange(16, dtype=np.uint8)
    packed = np.asarray(pack_fp4(codes))
    assert packed.tolist() == [low | (low + 1) << 4 for low in range(0, 16, 2)]
    np.testing.assert_array_equal(unpack_fp4(packed), codes)
    np.testing.assert_array_equal(decode_fp4(codes), quantizers.E2M1_VALUES)


def test_scale_bytes():
    """J.2: 127 is 1, 120 is 2⁻⁷; 0 is the denormal 2⁻¹²⁷ and 255 is no number."""
    every = np.arange(255, dtype=np.uint8)
    decoded = np.asarray(decode_e8m0(every))
    np.testing.assert_array_equal(decoded, np.ldexp(np.float32(1), every.astype(int) - 127))
    assert decoded[127] == 1 and decoded[120] == 2.0**-7
    assert np.isnan(np.asarray(decode_e8m0(np.array([255], np.uint8))))
    np.testing.assert_array_equal(formats.encode_e8m0(decoded), every)
    for bad in (3.0, 0.0, -2.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="power of two"):
            formats.encode_e8m0(np.array([1.0, bad], np.float32))


def test_scales_round_up():
    """448·2 needs scale 2 exactly, one step more needs 4; an empty block gets the floor's scale."""
    x = np.float32([896, np.nextafter(np.float32(896), np.float32(1000)), 0])[:, None]
    np.testing.assert_array_equal(quantize_fp8(x, 1)[1][:, 0], [128, 129, 127 - 22])


def test_fp4_values_are_fp8_values():
    """D.3: an FP4 weight becomes FP8 of a wider tile without loss.

    A tile's scale is its largest over 2⁶, so 6 becomes at most 384; the smallest value, ½, stays
    representable while scales within a tile differ by no more than 2¹⁴.
    """
    codes = np.tile(np.arange(16, dtype=np.uint8), (15, 1))
    exponents = np.arange(-14, 1)[:, None]  # of a row's scale, relative to the largest
    values = np.asarray(decode_fp4(codes))
    in_fp8 = jnp.asarray(values * np.exp2(exponents + 6.0), jnp.float32).astype(jnp.float8_e4m3fn)
    back = np.asarray(in_fp8.astype(jnp.float32)) * np.exp2(-6.0)
    np.testing.assert_array_equal(back, values * np.exp2(exponents))


def test_hadamard():
    np.testing.assert_array_equal(hadamard(jnp.array([1.0, 2, 3, 4])), [5, -1, -2, 0])
    x = np.random.RandomState(0).standard_normal((3, 128)).astype(np.float32)
    rotated = hadamard(x)
    # Seven additions of values of size up to ten, in float32.
    np.testing.assert_allclose(rotated, quantizers.hadamard(x.astype(np.float64)), 0, 2e-6)
    np.testing.assert_allclose(hadamard(rotated), x, 0, 2e-6)


def test_hadamard_rounds_once():
    """Of bfloat16 the sums are float32 and the result is rounded at the end, not in between."""
    x = quantizers.to_bf16(np.random.RandomState(0).standard_normal((64, 128)))
    rotated = hadamard(jnp.asarray(x, jnp.bfloat16))
    assert rotated.dtype == jnp.bfloat16
    expected = quantizers.to_bf16(quantizers.hadamard(x.astype(np.float64)))
    assert np.mean(np.asarray(rotated.astype(jnp.float32)) == expected) > 0.99


def test_rounding():
    """Nearest even, between operations of float32; `model/test_released.py` shows it in context."""
    x = np.random.RandomState(0).standard_normal((2, 4096)).astype(np.float32)

    @jax.jit
    def rounded_product(a, b):
        a, b = (formats.round_to(v, jnp.bfloat16).astype(jnp.float32) for v in (a, b))
        product = formats.round_to(a * b, jnp.bfloat16)
        return jnp.where(a > 0, product, -product).astype(jnp.float32) * 3.0

    a, b = quantizers.to_bf16(x)
    expected = np.where(a > 0, 1, -1) * quantizers.to_bf16(a * b) * np.float32(3)
    np.testing.assert_array_equal(rounded_product(*x), expected)
    same = formats.round_to(jnp.asarray(x), jnp.float32)
    np.testing.assert_array_equal(same, x)
