"""Rotations: golden frequencies, pairing, placement, and the float32 angles of the release."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from oracle import checkpoints, released_numpy

from v4jax.config import LayerKind, Rope
from v4jax.config.model import YarnScaling
from v4jax.kernels.rotation import rotate
from v4jax.model.rope import frequencies, rotation

PLAIN = Rope(10000.0, None, 64)
YARN = Rope(160000.0, YarnScaling(), 64)
# Frequencies are float32: three roundings.
FREQUENCY = 3e-7
# One product and one sum of values of size 1 in float32.
FLOAT32 = 1e-6

# Spec B.5: pairs up to 15 as they are, from 25 on divided by 16, a ramp between.
GOLDEN = {
    0: 1,
    8: 0.05,
    15: 3.635538584e-3,
    16: 2.265625e-3,
    20: 2.969777783e-4,
    24: 1.953125e-5,
    25: 5.372312671e-6,
    31: 5.680529037e-7,
}


def test_golden_frequencies():
    found = frequencies(YARN)
    assert found.dtype == np.float32 and found.shape == (32,)
    for pair, value in GOLDEN.items():
        assert found[pair] == pytest.approx(value, rel=FREQUENCY)
    np.testing.assert_allclose(frequencies(PLAIN), 1e4 ** (-np.arange(32) / 32), FREQUENCY)


@pytest.mark.parametrize("dims", [2, 12, 16, 20, 64])
def test_frequencies_of_other_sizes(dims):
    config = dict(checkpoints.FLASH_TINY, qk_rope_head_dim=dims)
    for rope, compressed in (
        (Rope(160000.0, YarnScaling(), dims), True),
        (Rope(1e4, None, dims), False),
    ):
        expected = released_numpy.rope_frequencies(config, compressed)
        np.testing.assert_allclose(frequencies(rope), expected, FREQUENCY)


def test_each_layer_has_the_rope_of_its_kind():
    """Window layers and MTP plain with θ = 10⁴; compressed layers YaRN with θ = 1.6·10⁵."""
    config = small_models.golden_model("flash").config
    for layer in (*config.layers, *config.mtp_layers):
        plain = layer.kind is LayerKind.WINDOW
        assert layer.rope.theta == (10000 if plain else 160000)
        assert (layer.rope.scaling is None) == plain


@jax.jit
def turn(x, positions):
    cosine, sine = rotation(YARN, positions)
    turned = rotate(x, cosine, sine, target=small_models.CPU)
    return turned, rotate(turned, cosine, sine, inverse=True, target=small_models.CPU)


def test_pairs_are_interleaved_and_trailing():
    """Channels (2i, 2i+1) of the last 64 form one complex number; the others stay; no factor."""
    x = np.random.RandomState(0).standard_normal((1, 5, 100)).astype(np.float32)
    positions = np.array([[0, 1, 7, 130, 4097]])
    turned, back = turn(x, positions)
    np.testing.assert_array_equal(turned[..., :36], x[..., :36])
    pairs = x[..., 36::2] + 1j * x[..., 37::2].astype(complex)
    angle = positions[..., None].astype(np.float32) * frequencies(YARN)
    expected = pairs * np.exp(1j * angle.astype(float))
    np.testing.assert_allclose(turned[..., 36::2], expected.real, 0, FLOAT32)
    np.testing.assert_allclose(turned[..., 37::2], expected.imag, 0, FLOAT32)
    np.testing.assert_allclose(back, x, 0, FLOAT32)


def test_angles_are_float32_products():
    """At a million tokens the product's rounding is visible, and part of the model."""
    positions = jnp.array([[999_999, 1_048_575]])
    cosine, sine = rotation(YARN, positions)
    angle = np.asarray(positions, np.float32)[..., None] * frequencies(YARN)
    for channel in (0, 1):  # of each pair
        np.testing.assert_allclose(cosine[..., channel::2], np.cos(angle.astype(float)), 0, FLOAT32)
        np.testing.assert_allclose(sine[..., channel::2], np.sin(angle.astype(float)), 0, FLOAT32)


def test_products_depend_on_the_distance_only():
    x, y = np.random.RandomState(0).standard_normal((2, 1, 1, 64)).astype(np.float32)
    products = []
    for shift in (0, 128, 1280):
        (a, _), (b, _) = (turn(v, np.array([[p + shift]])) for v, p in ((x, 50), (y, 9)))
        products.append(float((a * b).sum()))
    np.testing.assert_allclose(products, products[0], 0, 1e-3)  # angles up to 1,330 in float32
