"""Hyper-connections: golden values for `reference.py`, every implementation against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import hyper_connections
from v4jax.kernels.hyper_connections import Mix, pallas_tpu, portable, reference, sinkhorn_gpu
from v4jax.kernels.hyper_connections.call import Call

from ..compare import BFLOAT16, CPU, GPU, TPU, check

STREAMS, EPS = 4, 1e-6
OPTIONS = {"norm_eps": 1e-6, "eps": EPS, "iterations": 20}
# Float32 through 39 normalizations of values up to 1, sums in another order.
FLOAT32 = 3e-6
# J.2 prints nine digits; float32 has seven.
GOLDEN = 5e-7


def test_golden_values():
    """J.2: one token whose normalized projection is exactly the given mix."""
    i = np.arange(24)
    golden_mix, base = 0.1 * ((7 * i) % 11 - 5), 0.05 * ((5 * i) % 9 - 4)
    # Four streams of width 4 with 2 on the diagonal: the root mean square is 1, and the collapse
    # shows every pre weight in a channel of its own.
    streams = jnp.float32(2 * np.eye(4)[None, None])
    fn = np.zeros((24, 16))
    fn[:, 0] = golden_mix / 2
    options = OPTIONS | {"norm_eps": 0.0}
    site = (jnp.float32(x) for x in (fn, base, [0.5, 1.5, 2.0]))
    collapsed, found = reference.mix(streams, *site, **options)
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


def test_expand_sums_over_the_source_stream():
    random = np.random.RandomState(0)
    output, streams = random.standard_normal((2, 5, 12)), random.standard_normal((2, 5, 4, 12))
    post, matrix = random.standard_normal((2, 5, 4)), random.standard_normal((2, 5, 4, 4))
    expected = post[..., None] * output[:, :, None] + np.einsum("btjk,btjd->btkd", matrix, streams)
    found = reference.expand(*map(jnp.float32, (output, streams)), Mix(post, jnp.float32(matrix)))
    np.testing.assert_allclose(found, expected, 0, 1e-5)


def draw(batch, tokens, width, dtype, size=1.0, steep=1.0):
    """Returns output, streams, mixing, fn, base, scale."""
    random = np.random.RandomState(0)
    n, outputs = STREAMS, (2 + STREAMS) * STREAMS
    residual = random.uniform(0, 1, (batch, tokens, n, n))
    return (
        jnp.asarray(random.standard_normal((batch, tokens, width)) * size, dtype),
        jnp.asarray(random.standard_normal((batch, tokens, n, width)) * size, dtype),
        Mix(
            jnp.asarray(random.uniform(0, 2, (batch, tokens, n)), jnp.float32),
            jnp.asarray(residual / residual.sum(-2, keepdims=True), jnp.float32),
        ),
        jnp.asarray(random.standard_normal((outputs, n * width)) / np.sqrt(n * width), jnp.float32),
        jnp.asarray(steep * random.standard_normal(outputs), jnp.float32),
        jnp.asarray(1 + 0.1 * random.standard_normal(3), jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("name", "target"))
def run(name, arguments, cotangents, *, target):
    """Returns results and gradients of an operation; without a target by the reference."""
    module = reference if target is None else hyper_connections
    options = OPTIONS | {"target": target}
    if name == "collapse":
        del options["iterations"]
    results, pull = jax.vjp(functools.partial(getattr(module, name), **options), *arguments)
    return results, pull(cotangents(results) if callable(cotangents) else cotangents)


def slopes(shapes):
    random = np.random.RandomState(1)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), shapes)


# name: target, dtype, batch, tokens, width. A tile of the kernel has 128 tokens.
CASES = {
    "cpu float32": (CPU, "float32", 2, 5, 12),
    "cpu": (CPU, "bfloat16", 2, 5, 12),
    "gpu float32": (GPU, "float32", 2, 70, 12),
    "gpu": (GPU, "bfloat16", 2, 70, 12),
    "tpu, one token": (TPU, "bfloat16", 1, 1, 512),
    "tpu, a tile and a rest": (TPU, "bfloat16", 2, 66, 512),
}


def compare(name, arguments, target, error):
    shapes = (
        jax.eval_shape(functools.partial(getattr(reference, name), **OPTIONS), *arguments)
        if name != "collapse"
        else arguments[0][:, :, 0]
    )
    cotangents = slopes(shapes)
    found, gradients = run(name, arguments, cotangents, target=target)
    expected, wanted = run(name, arguments, cotangents, target=None)
    check(found, expected, error, name)
    # Float32 gradients of the biases are sums over all tokens.
    check(gradients, wanted, max(error, 10 * FLOAT32), name)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_expand_mix(case):
    """`mix` of what `expand` makes. In bfloat16 streams differ in single roundings."""
    target, dtype, *sizes = case
    wide = dtype == "float32"
    # usual; rms_norm_eps is visible; large; Sinkhorn of nearly zero entries: its maximum and eps
    for size, steep in ((1, 1), (1e-3, 1), (1e4, 1), (1, 20)) if wide else ((1, 1), (1, 20)):
        arguments = draw(*sizes, dtype, size, steep)
        # The gradient of a large matrix through the softmax of steep biases cancels.
        error = (FLOAT32 if wide else 2 * BFLOAT16) * (steep if wide else 1)
        found = compare("expand_mix", arguments, target, error)
    assert found[0].dtype == dtype and found[2].post.dtype == jnp.float32


@pytest.mark.parametrize("case", ["cpu float32", "gpu", "tpu, a tile and a rest"])
def test_mix(case):
    """From the same streams the weights are those of float32, whatever the dtype."""
    target, dtype, *sizes = CASES[case]
    _, streams, _, *site = draw(*sizes, dtype)
    collapsed, mixing = compare(
        "mix", (streams, *site), target, FLOAT32 if dtype == "float32" else 2 * BFLOAT16
    )
    (wanted, expected), _ = run("mix", (streams, *site), (collapsed, mixing), target=None)
    check(mixing, expected, FLOAT32)
    assert np.mean(np.asarray(collapsed == wanted)) > (0 if dtype == "float32" else 0.99)


@pytest.mark.parametrize("case", ["cpu float32", "gpu"])
def test_collapse(case):
    target, dtype, *sizes = CASES[case]
    _, streams, _, fn, base, scale = draw(*sizes, dtype)
    arguments = streams, fn[:4], base[:4], scale[:1]
    compare("collapse", arguments, target, FLOAT32 if dtype == "float32" else 2 * BFLOAT16)


def test_doubly_stochastic_and_finite():
    _, streams, _, fn, base, scale = draw(2, 5, 12, "float32", steep=0.5)
    call = Call(**OPTIONS, target=CPU)
    residual = portable.mix(call, streams, fn, base, scale)[1].residual
    np.testing.assert_allclose(residual.sum(-1), 1, 0, 1e-5)
    np.testing.assert_allclose(residual.sum(-2), 1, 0, 1e-5)
    found = portable.mix(call, streams, fn, base * 1e3, scale)[1]
    assert np.isfinite(found.post).all() and np.isfinite(found.residual).all()


def test_projection_is_float32():
    """The parts of a weight sum to it exactly, also once a compiler has simplified the split."""
    fn = draw(1, 1, 512, "bfloat16")[3]
    split = jax.jit(pallas_tpu.split_float32, static_argnums=1)
    parts = np.asarray(split(fn, STREAMS), np.float64)
    parts = np.moveaxis(parts.reshape(STREAMS, 3, -1, 512), 0, 2).sum(0)[: len(fn)]
    np.testing.assert_array_equal(parts.reshape(fn.shape), np.asarray(fn, np.float64))
    streams = draw(1, 50, 512, "bfloat16")[1]
    found = jax.jit(portable._project_bfloat16)(streams, fn)
    exact = np.asarray(streams, np.float64).reshape(1, 50, -1) @ np.asarray(fn, np.float64).T
    assert np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()


def test_sinkhorn_on_gpu():
    logits = jax.random.normal(jax.random.key(0), (4, 4, 2, 70))
    found, expected = (
        jax.jit(functools.partial(module.normalize, Call(**OPTIONS, target=GPU)))(logits)
        for module in (sinkhorn_gpu, portable)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_refused():
    streams = draw(1, 2, 512, "bfloat16")[1]
    assert pallas_tpu.supported(streams) is None
    assert "bfloat16" in pallas_tpu.supported(streams.astype(jnp.float32))
    assert "width" in pallas_tpu.supported(streams[..., :64])
    assert "at most 128" in pallas_tpu.supported(jnp.zeros((1, 2, 12, 512), jnp.bfloat16))
