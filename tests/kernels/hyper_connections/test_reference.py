"""Hyper-connections: golden values of the specification, invariants, and a naive transcription."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import hyper_connections as kernel

from .. import naive

STREAMS, WIDTH, TOKENS = 4, 12, 5
EPS, NORM_EPS, ITERATIONS = 1e-6, 1e-6, 20
# Float32 against float64 through 39 normalizations of values up to 1 (measured 4e-7).
FLOAT32 = 3e-6
# J.2 prints nine digits; float32 has seven.
GOLDEN = 5e-7

mix = jax.jit(
    functools.partial(kernel.mix, eps=EPS, iterations=ITERATIONS), static_argnames="norm_eps"
)


def draw(shape=(2, TOKENS, STREAMS, WIDTH)):
    """Returns streams, fn, base, scale as float64 arrays."""
    random = np.random.RandomState(0)
    outputs, inputs = (2 + STREAMS) * STREAMS, shape[-2] * shape[-1]
    return (
        random.standard_normal(shape),
        random.standard_normal((outputs, inputs)) / np.sqrt(inputs),
        random.standard_normal(outputs),
        1 + 0.1 * random.standard_normal(3),
    )


def naive_mix(streams, fn, base, scale):
    """Spec B.2, steps 1 to 7; returns (collapsed, post, residual matrix, pre)."""
    flat = streams.reshape(*streams.shape[:2], -1)
    logits = flat @ fn.T / np.sqrt((flat**2).mean(-1, keepdims=True) + NORM_EPS)
    pre = 1 / (1 + np.exp(-(logits[..., :4] * scale[0] + base[:4]))) + EPS
    post = 2 / (1 + np.exp(-(logits[..., 4:8] * scale[1] + base[4:8])))
    matrix = (logits[..., 8:] * scale[2] + base[8:]).reshape(*streams.shape[:2], 4, 4)
    matrix = np.exp(matrix - matrix.max(-1, keepdims=True))
    matrix = matrix / matrix.sum(-1, keepdims=True) + EPS
    matrix = matrix / (matrix.sum(-2, keepdims=True) + EPS)
    for _ in range(ITERATIONS - 1):
        matrix = matrix / (matrix.sum(-1, keepdims=True) + EPS)
        matrix = matrix / (matrix.sum(-2, keepdims=True) + EPS)
    return (pre[..., None] * streams).sum(-2), post, matrix, pre


def test_golden_values():
    """J.2: one token whose normalized projection is exactly the given mix."""
    i = np.arange(24)
    golden_mix, base = 0.1 * ((7 * i) % 11 - 5), 0.05 * ((5 * i) % 9 - 4)
    # Four streams of width 4 with 2 on the diagonal: the root mean square is 1, and the collapse
    # shows every pre weight in a channel of its own.
    streams = 2 * np.eye(4)[None, None]
    fn = np.zeros((24, 16))
    fn[:, 0] = golden_mix / 2
    collapsed, found = mix(streams, fn, base, np.array([0.5, 1.5, 2.0]), norm_eps=0.0)
    pre = np.asarray(collapsed)[0, 0] / 2
    np.testing.assert_allclose(pre, [0.389361766, 0.537430845, 0.437824499, 0.586618579], 0, GOLDEN)
    np.testing.assert_allclose(
        found.post[0, 0], [1.024994793, 0.851114966, 1.268271182, 1.099667995], 0, GOLDEN
    )
    rows = [
        [0.179079589, 0.380976425, 0.290569722, 0.149373264],
        [0.270824977, 0.063840746, 0.439433940, 0.225899338],
        [0.200154641, 0.425811993, 0.207080100, 0.166952267],
        [0.349939794, 0.129369837, 0.062915238, 0.457774131],
    ]
    np.testing.assert_allclose(found.residual[0, 0], rows, 0, GOLDEN)
    np.testing.assert_allclose(found.residual[0, 0].sum(0), 0.999999, 0, GOLDEN)


# name: what to multiply (streams, base) by.
CASES = {
    "usual": (1, 1),
    "small streams": (1e-3, 1),  # rms_norm_eps is visible
    "large streams": (1e4, 1),
    "no bias": (1, 0),
    "steep": (1, 20),  # Sinkhorn of a nearly zero matrix entry: maximum subtraction, eps
}


@pytest.mark.parametrize("factors", CASES.values(), ids=CASES.keys())
def test_values(factors):
    streams, fn, base, scale = draw()
    streams, base = streams * factors[0], base * factors[1]
    collapsed, found = mix(streams, fn, base, scale, norm_eps=NORM_EPS)
    expected, post, matrix, _ = naive_mix(streams, fn, base, scale)
    np.testing.assert_allclose(collapsed / factors[0], expected / factors[0], 0, FLOAT32)
    np.testing.assert_allclose(found.post, post, 0, FLOAT32)
    np.testing.assert_allclose(found.residual, matrix, 0, FLOAT32 * max(1, factors[1]))


def test_doubly_stochastic():
    streams, fn, base, scale = draw()
    residual = mix(streams, fn, base, scale, norm_eps=NORM_EPS)[1].residual
    np.testing.assert_allclose(residual.sum(-1), 1, 0, 1e-5)
    np.testing.assert_allclose(residual.sum(-2), 1, 0, 1e-5)


def test_without_projection():
    """fn = 0 and base = 0 give pre ½ + eps, post 1 and a uniform matrix."""
    streams, fn, base, scale = draw()
    collapsed, found = mix(streams, 0 * fn, 0 * base, scale, norm_eps=NORM_EPS)
    np.testing.assert_allclose(collapsed, (0.5 + EPS) * streams.sum(2), 0, FLOAT32)
    np.testing.assert_allclose(found.post, 1, 0, FLOAT32)
    np.testing.assert_allclose(found.residual, 0.25, 0, FLOAT32)


def test_extreme_logits_stay_finite():
    streams, fn, base, scale = draw()
    found = mix(streams, fn, base * 1e3, scale, norm_eps=NORM_EPS)[1]
    assert np.isfinite(found.post).all() and np.isfinite(found.residual).all()


def test_expand_sums_over_the_source_stream():
    streams, fn, base, scale = draw()
    _, found = mix(streams, fn, base, scale, norm_eps=NORM_EPS)
    output = np.random.RandomState(1).standard_normal((2, TOKENS, WIDTH))
    post, matrix = np.asarray(found.post, float), np.asarray(found.residual, float)
    expected = post[..., None] * output[:, :, None]
    expected = expected + np.einsum("btjk,btjd->btkd", matrix, streams)
    next_streams = kernel.expand(jnp.float32(output), jnp.float32(streams), found)
    np.testing.assert_allclose(next_streams, expected, 0, FLOAT32)
    transposed = np.einsum("btkj,btjd->btkd", matrix, streams)
    assert np.abs(np.einsum("btjk,btjd->btkd", matrix, streams) - transposed).max() > 0.1


def test_collapse():
    streams, fn, base, scale = draw()
    found = kernel.collapse(
        *map(jnp.float32, (streams, fn[:4], base[:4], scale[:1])), norm_eps=NORM_EPS, eps=EPS
    )
    expected = naive_mix(streams, fn, base, scale)[0]
    np.testing.assert_allclose(found, expected, 0, FLOAT32)


def test_bfloat16_streams_are_mixed_in_float32():
    streams, fn, base, scale = draw()
    rounded = jnp.asarray(streams, jnp.bfloat16)
    collapsed, found = mix(rounded, fn, base, scale, norm_eps=NORM_EPS)
    exact = np.asarray(rounded.astype(jnp.float32), float)
    expected, post, matrix, _ = naive_mix(exact, fn, base, scale)
    np.testing.assert_allclose(found.post, post, 0, FLOAT32)
    np.testing.assert_allclose(found.residual, matrix, 0, FLOAT32)
    assert collapsed.dtype == jnp.bfloat16
    # Rounded once, at the end: half a unit in the last place of eight bits, and float32 noise.
    collapsed = np.asarray(collapsed.astype(jnp.float32))
    np.testing.assert_allclose(collapsed, expected, 2**-8, FLOAT32)
    assert np.mean(collapsed == expected.astype(jnp.bfloat16).astype(np.float32)) > 0.99
    output = jnp.asarray(np.random.RandomState(1).standard_normal((2, TOKENS, WIDTH)), jnp.bfloat16)
    next_streams = np.asarray(kernel.expand(output, rounded, found).astype(jnp.float32))
    expected = post[..., None] * np.asarray(output.astype(jnp.float32), float)[:, :, None]
    expected = expected + np.einsum("btjk,btjd->btkd", matrix, exact)
    assert np.mean(next_streams == expected.astype(jnp.bfloat16).astype(np.float32)) > 0.99


def test_gradients():
    """Through all 39 normalizations, of streams, projection, biases and factors."""
    inputs = tuple(jnp.asarray(x, jnp.float32) for x in draw((1, 2, STREAMS, 3)))
    random = np.random.RandomState(2)
    weights = [random.standard_normal(shape) for shape in ((1, 2, 3), (1, 2, 4), (1, 2, 4, 4))]

    def ours(*inputs):
        collapsed, found = mix(*inputs, norm_eps=NORM_EPS)
        parts = (collapsed, found.post, found.residual)
        return sum((w * part).sum() for w, part in zip(weights, parts, strict=True))

    def joined(*inputs):
        return np.concatenate([part.ravel() for part in naive_mix(*inputs)[:3]])

    weight = np.concatenate([w.ravel() for w in weights])
    expected = naive.numeric_gradients(joined, inputs, weight)
    found = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*inputs)
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, 0, 10 * FLOAT32)
