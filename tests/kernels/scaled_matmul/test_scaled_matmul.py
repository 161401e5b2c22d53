"""Linear layers on stored weights against exact products of what the bytes say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantizers

from v4jax.kernels import scaled_matmul
from v4jax.quant import ScaledArray, formats

from .. import naive

matmul = jax.jit(scaled_matmul.matmul, static_argnames="quantize_activations")

# name: (rows, columns); 128 divides neither, one, both.
SHAPES = {"tiles": (128, 256), "odd": (200, 136), "small": (24, 40)}


@functools.cache
def make(shape, stored):
    """Returns (weight as we hold it, the same as float64)."""
    weight = np.random.RandomState(0).standard_normal(shape) / np.sqrt(shape[1])
    if stored == "float32":
        return jnp.asarray(weight, jnp.float32), weight.astype(np.float32).astype(np.float64)
    if stored == "bfloat16":
        return jnp.asarray(weight, jnp.bfloat16), quantizers.to_bf16(weight).astype(np.float64)
    if stored == "fp8":
        values, scales = quantizers.quantize_fp8_weight(weight)
        exact, tile = quantizers.dequantize_fp8_weight(values, scales), (128, 128)
    else:
        values, scales = quantizers.quantize_fp4_weight(weight)
        exact, tile = quantizers.dequantize_fp4_weight(values, scales), (1, 32)
        values = values.view(np.uint8)
    scales = quantizers.encode_scales(scales).view(np.uint8)
    return ScaledArray(jnp.asarray(values), jnp.asarray(scales), tile), exact.astype(np.float64)


def draw(columns, tokens=3):
    x = np.random.RandomState(1).standard_normal((2, tokens, columns))
    # Blocks of very different sizes, one of them zero.
    return x * np.array([1.0, 1e-3, 0.0])[:tokens, None]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "fp8", "fp4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values(shape, stored):
    weight, exact = make(shape, stored)
    x = jnp.asarray(draw(shape[1]), jnp.float32)
    expected = np.asarray(x, float) @ exact.T
    np.testing.assert_allclose(matmul(x, weight), expected, 0, naive.FLOAT32)


@pytest.mark.parametrize("stored", ["fp8", "fp4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rounded_activations(shape, stored):
    """The same codes as the published quantizer, block by block; the product is exact."""
    weight, exact = make(shape, stored)
    x = jnp.asarray(draw(shape[1]), jnp.float32)
    rounded = quantizers.act_dequant(*quantizers.act_quant(np.asarray(x)), 128)
    expected = rounded.astype(np.float64) @ exact.T
    found = matmul(x, weight, quantize_activations=True)
    np.testing.assert_allclose(found, expected, 0, naive.FLOAT32)
    assert np.abs(expected - np.asarray(x, float) @ exact.T).max() > 100 * naive.FLOAT32


@pytest.mark.parametrize("stored", ["float32", "fp8", "fp4"])
def test_bfloat16_accumulates_in_float32(stored):
    weight, exact = make(SHAPES["odd"], stored)
    if stored == "float32":  # the weight is cast to the activations' dtype
        exact = quantizers.to_bf16(exact).astype(np.float64)
    x = jnp.asarray(draw(136), jnp.bfloat16)
    found = matmul(x, weight)
    assert found.dtype == jnp.bfloat16
    expected = quantizers.to_bf16(np.asarray(x.astype(jnp.float32), float) @ exact.T)
    # A sum that lies within float32 noise of a rounding boundary may fall on either side.
    assert np.mean(np.asarray(found.astype(jnp.float32)) == expected) > 0.99


def test_float32_product_of_bfloat16():
    weight, exact = make(SHAPES["odd"], "bfloat16")
    x = jnp.asarray(draw(136), jnp.bfloat16)
    found = jax.jit(scaled_matmul.matmul_float32)(x, weight)
    assert found.dtype == jnp.float32
    expected = np.asarray(x.astype(jnp.float32), float) @ exact.T
    np.testing.assert_allclose(found, expected, 0, naive.FLOAT32)


def test_plain_weights_see_plain_activations():
    weight, _ = make(SHAPES["odd"], "float32")
    x = jnp.asarray(draw(136), jnp.float32)
    np.testing.assert_array_equal(matmul(x, weight, quantize_activations=True), matmul(x, weight))


def test_rounding_activations_has_the_gradient_of_the_identity():
    """Autodiff of the cast itself would round the gradient to e4m3: 1e-4 would be 0."""
    weight, exact = make(SHAPES["odd"], "fp8")
    x, slope = jnp.asarray(draw(136), jnp.float32), 1e-4

    def loss(x):
        return slope * matmul(x, weight, quantize_activations=True).sum()

    expected = np.broadcast_to(slope * exact.sum(axis=0), x.shape)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, 0, naive.FLOAT32 * slope)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients(dtype):
    """Those of autodiff through the rounded product, without a product of float32 for bfloat16."""
    random = np.random.RandomState(2)
    x, weight, slope = (
        jnp.asarray(random.standard_normal(shape), dtype)
        for shape in ((2, 3, 64), (8, 64), (2, 3, 8))
    )

    def plain(x, weight):
        return formats.round_to(scaled_matmul.product(x, weight), x.dtype)

    found, wanted = (
        jax.jit(lambda run=run: jax.vjp(run, x, weight)[1](slope))()
        for run in (scaled_matmul.matmul, plain)
    )
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        # Sums of float32 in another order; rounded to bfloat16 they may fall to the other side.
        tolerance = naive.FLOAT32 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(got.astype(float), want.astype(float), tolerance, naive.FLOAT32)
    text = str(jax.make_jaxpr(lambda: jax.vjp(scaled_matmul.matmul, x, weight)[1](slope))())
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3


def test_gradients_of_groups():
    """The grouped output projection in bfloat16, whose products not every compiler has."""
    random = np.random.RandomState(3)
    x, weight, slope = (
        jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
        for shape in ((2, 32, 2, 16), (2, 8, 16), (2, 32, 2, 8))
    )
    contract = functools.partial(scaled_matmul.contract, "btgk,grk->btgr")
    found = jax.jit(lambda: jax.vjp(contract, x, weight)[1](slope))()
    x, weight, slope = (np.asarray(array, float) for array in (x, weight, slope))
    expected = (
        np.einsum("btgr,grk->btgk", slope, weight),
        np.einsum("btgr,btgk->grk", slope, x),
    )
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(float), want, 2**-8, naive.FLOAT32)
