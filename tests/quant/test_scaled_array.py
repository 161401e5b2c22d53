"""Quantized weights as pytrees: what they hold, what they expand to, how they are indexed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantizers

from v4jax.quant import ScaledArray, abstract_weight, quantize_weight

SHAPES = {"tiles": (128, 256), "odd": (200, 136), "narrow": (3, 40)}

quantize = jax.jit(quantize_weight, static_argnums=1)
dequantize = jax.jit(ScaledArray.dequantize, static_argnums=1)


def draw(shape):
    """Returns a weight with rows of very different sizes and an empty tile in its corner."""
    random = np.random.RandomState(0)
    weight = random.standard_normal(shape) * np.exp2(random.randint(-20, 20, (shape[0], 1)))
    weight[:100, :32] = 0
    return weight.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fp8(shape):
    weight = draw(shape)
    held = quantize(weight, "fp8")
    values, scales = quantizers.quantize_fp8_weight(weight)
    assert np.asarray(held.values).tobytes() == values.tobytes()
    assert np.asarray(held.scales).tobytes() == quantizers.encode_scales(scales).tobytes()
    expected = quantizers.dequantize_fp8_weight(values, scales)
    np.testing.assert_array_equal(dequantize(held), expected)
    assert (held.shape, held.block, held.is_fp4) == (shape, (128, 128), False)
    assert held.nbytes == values.nbytes + scales.size


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fp4(shape):
    weight = draw(shape)
    held = quantize(weight, "fp4")
    packed, scales = quantizers.quantize_fp4_weight(weight)
    assert np.asarray(held.values).tobytes() == packed.tobytes()
    assert np.asarray(held.scales).tobytes() == quantizers.encode_scales(scales).tobytes()
    expected = quantizers.dequantize_fp4_weight(packed, scales)
    np.testing.assert_array_equal(dequantize(held), expected)
    assert (held.shape, held.block, held.is_fp4) == (shape, (1, 32), True)
    assert held.nbytes == packed.nbytes + scales.size


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_expansion_is_exact_and_stable(fmt):
    """Bfloat16 holds every value; quantizing the expansion gives the same bytes again."""
    held = quantize(draw((200, 136)), fmt)
    exact = dequantize(held)
    np.testing.assert_array_equal(dequantize(held, jnp.bfloat16).astype(jnp.float32), exact)
    again = dequantize(quantize(exact, fmt))
    np.testing.assert_array_equal(again, exact)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_float32_scales(fmt):
    """The Base checkpoints store powers of two as float32."""
    held = quantize(draw((200, 136)), fmt)
    scales = quantizers.decode_scales(np.asarray(held.scales))
    as_float = ScaledArray(held.values, jnp.asarray(scales), held.block)
    np.testing.assert_array_equal(dequantize(as_float), dequantize(held))


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_leading_axes_are_batch(fmt):
    """Stacked layers, experts and pairs quantize and expand as each matrix alone."""
    stack = np.stack([[draw((200, 136)), draw((200, 136)).T.reshape(200, 136) * 3]] * 2)
    held = quantize(stack, fmt)
    assert held.shape == (2, 2, 200, 136)
    one = quantize(stack[1, 1], fmt)
    for found in (held[1, 1], held[1][1], jax.tree.map(lambda x: x[1, 1], held)):
        assert (found.shape, found.block) == (one.shape, one.block)
        np.testing.assert_array_equal(
            found.values.astype(jnp.float32), one.values.astype(jnp.float32)
        )
        np.testing.assert_array_equal(found.scales, one.scales)
    np.testing.assert_array_equal(dequantize(held)[1, 1], dequantize(one))


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
@pytest.mark.parametrize("shape", [(128, 256), (200, 136), (3, 40), (2, 5, 130, 192)])
def test_abstract_weight_has_the_shapes_of_a_quantized_one(shape, fmt):
    if fmt == "fp4" and shape[-1] % 32:
        pytest.skip("FP4 needs whole blocks of 32")
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    expected = jax.eval_shape(lambda w: quantize_weight(w, fmt), weight)
    assert abstract_weight(shape, fmt) == expected
