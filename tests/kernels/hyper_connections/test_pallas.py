"""The TPU kernel of hyper-connections: interpreted against the reference, compiled for chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import dispatch
from v4jax.kernels import hyper_connections as kernel
from v4jax.kernels.hyper_connections import Mix, pallas_tpu, reference
from v4jax.planning import ahead_of_time

STREAMS, WIDTH = 4, 1024
OPTIONS = {"norm_eps": 1e-6, "eps": 1e-6, "iterations": 20}
# Float32 through 39 normalizations, sums in another order.
FLOAT32 = 3e-6
# A bfloat16 value on either side of a rounding boundary, relative to itself.
ROUNDING = 2**-7


def draw(batch, tokens, steep=1.0):
    """Returns output, streams, mixing, fn, base, scale."""
    random = np.random.RandomState(0)
    n, outputs = STREAMS, (2 + STREAMS) * STREAMS
    residual = random.uniform(0, 1, (batch, tokens, n, n))
    return (
        jnp.asarray(random.standard_normal((batch, tokens, WIDTH)), jnp.bfloat16),
        jnp.asarray(random.standard_normal((batch, tokens, n, WIDTH)), jnp.bfloat16),
        Mix(
            jnp.asarray(random.uniform(0, 2, (batch, tokens, n)), jnp.float32),
            jnp.asarray(residual / residual.sum(-2, keepdims=True), jnp.float32),
        ),
        jnp.asarray(random.standard_normal((outputs, n * WIDTH)) / 64, jnp.float32),
        jnp.asarray(steep * random.standard_normal(outputs), jnp.float32),
        jnp.asarray(1 + 0.1 * random.standard_normal(3), jnp.float32),
    )


# name: batch, tokens, size of the biases. A tile has 128 tokens.
CASES = {
    "one token": (1, 1, 1.0),
    "decode": (9, 1, 1.0),
    "a tile and a rest": (1, 131, 1.0),
    "two sequences in a tile": (2, 33, 1.0),
    "steep": (1, 16, 20.0),  # nearly zero entries of the matrix: maximum subtraction, eps
}


def compare(found, expected):
    for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert value.dtype == wanted.dtype
        value, wanted = np.asarray(value, np.float32), np.asarray(wanted, np.float32)
        if value.shape[-1] == WIDTH:
            np.testing.assert_allclose(value, wanted, ROUNDING, FLOAT32)
            assert np.mean(value == wanted) > 0.99
        else:
            np.testing.assert_allclose(value, wanted, 0, FLOAT32)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_expand_mix(case):
    arguments = draw(*case)
    found = jax.jit(functools.partial(pallas_tpu.expand_mix, **OPTIONS))(*arguments)
    expected = jax.jit(functools.partial(reference.expand_mix, **OPTIONS))(*arguments)
    compare(found[0], expected[0])
    # The mixing weights of streams that differ in single roundings: from the kernel's own streams.
    compare(found[1:], reference.mix(found[0], *arguments[3:], **OPTIONS))


@pytest.mark.parametrize("case", [CASES["decode"], CASES["a tile and a rest"]])
def test_mix(case):
    _, streams, _, *rest = draw(*case)
    found = jax.jit(functools.partial(pallas_tpu.mix, **OPTIONS))(streams, *rest)
    compare(found, reference.mix(streams, *rest, **OPTIONS))


def test_projection_is_float32():
    """The parts of a weight sum to it exactly, also once a compiler has simplified the split."""
    fn = draw(1, 1)[3]
    split = jax.jit(pallas_tpu.split_float32, static_argnums=1)
    parts = np.asarray(split(fn, STREAMS), np.float64)
    parts = np.moveaxis(parts.reshape(STREAMS, 3, -1, WIDTH), 0, 2).sum(0)[: len(fn)]
    np.testing.assert_array_equal(parts.reshape(fn.shape), np.asarray(fn, np.float64))


def test_gradients():
    arguments = draw(1, 5)
    weight = np.random.RandomState(1).standard_normal((1, 5, WIDTH))

    def loss(run, *arguments):
        streams, collapsed, mixing = run(*arguments, **OPTIONS)
        parts = (collapsed * weight).sum() + (streams[:, :, 1] * weight).sum()
        return parts + (mixing.post[..., 0] + mixing.residual[..., 1, 2]).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), argnums=tuple(range(6))))(*arguments)
        for run in (pallas_tpu.expand_mix, reference.expand_mix)
    )
    for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        value, wanted = np.asarray(value, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(value, wanted, 0, 1e-2 * max(np.abs(wanted).max(), 1e-3))


def test_cpu_keeps_the_reference():
    streams = draw(1, 2)[1]
    assert kernel.choose(streams) is reference
    assert "bfloat16" in pallas_tpu.supported(streams.astype(jnp.float32))
    assert "width" in pallas_tpu.supported(streams[..., :64])
    with dispatch.compiling_for("tpu"):
        assert kernel.choose(streams) is pallas_tpu
        assert kernel.choose(streams[..., :64]) is reference


# name: batch, tokens, hidden size
COMPILED = {"Flash decodes": (64, 1, 4096), "Pro prefills": (1, 2048, 7168)}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TOPOLOGIES.values())
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_compiles(case, topology):
    batch, tokens, width = case
    n, outputs = STREAMS, (2 + STREAMS) * STREAMS
    shape, float32 = jax.ShapeDtypeStruct, jnp.float32
    compiled = ahead_of_time.compile_for(
        topology,
        functools.partial(kernel.expand_mix, **OPTIONS),
        shape((batch, tokens, width), jnp.bfloat16),
        shape((batch, tokens, n, width), jnp.bfloat16),
        Mix(shape((batch, tokens, n), float32), shape((batch, tokens, n, n), float32)),
        shape((outputs, n * width), float32),
        shape((outputs,), float32),
        shape((3,), float32),
    )
    assert "tpu_custom_call" in compiled.as_text()
