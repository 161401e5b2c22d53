"""Recipes: what they expand to, to the bit, and where their gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.quant import LowRank, Master, ScaledArray, quantize_weight

DECODE = ScaledArray.dequantize
random = np.random.RandomState(0)
# Odd sizes: the last tile of FP8 is cut, columns are whole blocks of FP4.
SHAPE = (3, 2, 136, 160)
WEIGHT = random.standard_normal(SHAPE).astype(np.float32)
DOWN = random.standard_normal((3, 2, 4, 160)).astype(np.float32)
UP = random.standard_normal((3, 2, 136, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", ["fp4", "fp8", "bfloat16"])
def test_master_computes_as_stored(fmt, dtype):
    """Under jit, where conversions might be fused away, with and without rounded inputs."""
    plain, quantized = (
        Master(WEIGHT, fmt, dtype, rounds_inputs=rounds) for rounds in (False, True)
    )

    @jax.jit
    def run(plain, quantized):
        expanded = quantized.expand(DECODE)
        if isinstance(expanded, ScaledArray):
            assert not expanded.is_fp4 and expanded.shape == SHAPE
            expanded = expanded.dequantize(dtype)
        gradient = jax.grad(lambda master: (master.expand(DECODE) * DOWN.mean()).sum())(plain)
        return plain.expand(DECODE), expanded, gradient.values

    stored = jax.jit(Master.store)(plain)
    if fmt == "bfloat16":
        expected = stored.astype(dtype)
    else:
        again = quantize_weight(WEIGHT, fmt)
        np.testing.assert_array_equal(stored.values, again.values)
        np.testing.assert_array_equal(stored.scales, again.scales)
        assert plain.block == stored.block
        expected = stored.dequantize(dtype)
    *expanded, gradient = run(plain, quantized)
    for weight in expanded:
        assert weight.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(weight, expected)
    assert not np.array_equal(expected.astype(jnp.float32), WEIGHT)
    # Straight through: the gradient of a sum is the same everywhere.
    np.testing.assert_array_equal(gradient, np.float32(jnp.asarray(DOWN.mean(), dtype)))


@pytest.mark.parametrize("fmt", ["fp4", "fp8", None])
def test_low_rank(fmt):
    base = quantize_weight(WEIGHT, fmt) if fmt else jnp.asarray(WEIGHT, jnp.bfloat16)
    value = LowRank(base, DOWN, UP, 0.5, "float32", rounds_inputs=True)
    dense = base.dequantize() if fmt else base.astype(jnp.float32)
    expected = dense + 0.5 * np.einsum("...or,...ri->...oi", UP, DOWN)

    def expand(down, up):
        expanded = LowRank(base, down, up, 0.5, "float32", rounds_inputs=True).expand(DECODE)
        assert isinstance(expanded, ScaledArray) == bool(fmt)
        return expanded.dequantize() if fmt else expanded

    weight, pull = jax.vjp(jax.jit(expand), DOWN, UP)
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-5)
    assert (value.shape, value.block) == (SHAPE, base.block if fmt else None)
    cotangent = random.standard_normal(SHAPE).astype(np.float32)
    d_down, d_up = pull(jnp.asarray(cotangent))
    np.testing.assert_allclose(
        d_down, 0.5 * np.einsum("...or,...oi->...ri", UP, cotangent), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        d_up, 0.5 * np.einsum("...oi,...ri->...or", cotangent, DOWN), rtol=1e-4, atol=1e-4
    )


def test_adapters_that_start_at_zero_change_nothing():
    """Not a bit, whatever the base: FP4 and FP8 are exact in bfloat16."""
    for base in (quantize_weight(WEIGHT, "fp4"), quantize_weight(WEIGHT, "fp8")):
        value = LowRank(base, DOWN, jnp.zeros_like(UP), 2.0, "bfloat16", rounds_inputs=False)
        expected = base.dequantize(jnp.bfloat16)
        np.testing.assert_array_equal(
            jax.jit(LowRank.expand, static_argnums=1)(value, DECODE), expected
        )


def test_what_is_trained_may_be_elsewhere():
    """The structure says what is missing, so that a program is never taken for another."""
    base = quantize_weight(WEIGHT, "fp4")
    empty = LowRank(base, None, None, 0.5, "bfloat16", rounds_inputs=True)
    assert empty.shape == SHAPE and len(jax.tree.leaves(empty)) == 2
    assert jax.tree.structure(empty) != jax.tree.structure(LowRank(base, DOWN, UP, 0.5, "x", True))
    assert not jax.tree.leaves(Master(None, "fp4", "bfloat16", rounds_inputs=False))
