"""The compressor's TPU kernel: interpreted against the reference, compiled for chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import compressor, dispatch
from v4jax.kernels.compressor import pallas_tpu, reference
from v4jax.planning import ahead_of_time

WIDTH, CHANNELS = 128, 128
# Float32 sums in another order.
FLOAT32 = 1e-5


def draw(batch, windows, ratio, overlaps):
    """Returns x, key_value, gate, position bias, before."""
    random = np.random.RandomState(0)
    width = CHANNELS * (1 + overlaps)
    x = random.standard_normal((batch, windows * ratio, WIDTH))
    projections = random.standard_normal((2, width, WIDTH)) / np.sqrt(WIDTH)
    return (
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(projections[0], jnp.bfloat16),
        jnp.asarray(3 * projections[1], jnp.bfloat16),
        jnp.asarray(random.standard_normal((ratio, width)), jnp.float32),
        jnp.asarray(random.standard_normal((2, batch, ratio, width)), jnp.float32),
    )


# name: windows, ratio, overlaps, first window of two sequences. A tile has 512 tokens.
CASES = {
    "CSA, one window": (1, 4, True, (0, 3)),
    "CSA, begins": (5, 4, True, (0, 0)),
    "CSA, several tiles and a rest": (300, 4, True, (7, 0)),
    "HCA, one window": (1, 128, False, (0, 2)),
    "HCA, several tiles and a rest": (9, 128, False, (0, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values(case):
    windows, ratio, overlaps, first = case
    arguments = *draw(2, windows, ratio, overlaps), jnp.asarray(first, jnp.int32)
    found, expected = (
        jax.jit(functools.partial(module.compress, overlaps=overlaps))(*arguments)
        for module in (pallas_tpu, reference)
    )
    assert found.dtype == jnp.float32 and found.shape == (2, windows, CHANNELS)
    np.testing.assert_allclose(found, expected, 0, FLOAT32)


def test_rows_before_the_first_window_do_not_matter():
    *arguments, before = draw(2, 5, 4, True)
    first = jnp.array([0, 4])
    run = jax.jit(functools.partial(pallas_tpu.compress, overlaps=True))
    expected = run(*arguments, before, first)
    np.testing.assert_array_equal(run(*arguments, before.at[:, 0].set(1e30), first), expected)


@pytest.mark.parametrize("overlaps", [False, True], ids=["HCA", "CSA"])
def test_gradients(overlaps):
    arguments = draw(2, 3, 4 if overlaps else 8, overlaps)
    first = jnp.array([0, 4])

    def loss(module, *arguments):
        pooled = module.compress(*arguments, first, overlaps=overlaps)
        return (pooled * jnp.cos(jnp.arange(pooled.size)).reshape(pooled.shape)).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, module), argnums=range(5)))(*arguments)
        for module in (pallas_tpu, reference)
    )
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(value, np.float32), np.asarray(wanted, np.float32), 1e-2, 1e-4
        )


def test_cpu_keeps_the_reference():
    x, key_value, _, bias, _ = draw(1, 2, 4, True)
    assert compressor.choose(x, key_value, bias, True) is reference
    assert "bfloat16" in pallas_tpu.supported(x.astype(jnp.float32), key_value, bias, True)
    with dispatch.compiling_for("tpu"):
        assert compressor.choose(x, key_value, bias, True) is pallas_tpu
        assert compressor.choose(x, key_value, bias[:, :192], True) is reference


# name: batch, tokens, hidden size, channels, ratio
COMPILED = {
    "Flash, CSA": (1, 2048, 4096, 512, 4),
    "Pro, CSA": (1, 2048, 7168, 512, 4),
    "Pro, index keys": (2, 2048, 7168, 128, 4),
    "Pro, HCA": (1, 2048, 7168, 512, 128),
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TOPOLOGIES.values())
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_compiles(case, topology):
    batch, tokens, hidden, channels, ratio = case
    overlaps = ratio == 4
    width = channels * (1 + overlaps)
    shape = jax.ShapeDtypeStruct
    compiled = ahead_of_time.compile_for(
        topology,
        functools.partial(compressor.compress, overlaps=overlaps),
        shape((batch, tokens, hidden), jnp.bfloat16),
        shape((width, hidden), jnp.bfloat16),
        shape((width, hidden), jnp.bfloat16),
        shape((ratio, width), jnp.float32),
        shape((2, batch, ratio, width), jnp.float32),
        shape((batch,), jnp.int32),
    )
    assert "tpu_custom_call" in compiled.as_text()
