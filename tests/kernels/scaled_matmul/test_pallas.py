"""Linear layers on stored weights, TPU kernel: interpreted, and compiled for real chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import dispatch, scaled_matmul
from v4jax.kernels.scaled_matmul import expand, expand_tpu, pallas_tpu, unpack_tpu
from v4jax.planning import ahead_of_time
from v4jax.quant import ScaledArray, quantize_weight

# A float32 sum in another order falls on the other side of a rounding of bfloat16, rarely.
ROUNDING = 2**-7


@functools.cache
def make(out, width, kind):
    """Returns a stored weight whose blocks have scales of many sizes."""
    random = np.random.RandomState(0)
    weight = random.standard_normal((out, width)) / np.sqrt(width)
    weight *= 2.0 ** random.randint(-3, 3, (1, width // 32)).repeat(32, -1)
    return jax.jit(quantize_weight, static_argnums=1)(jnp.asarray(weight, jnp.float32), kind)


# name: shape of x without its last axis, rows and columns of the weight. A tile has 512 rows.
CASES = {
    "one token": ((1, 1), 256, 256),
    "several tiles and a rest": ((2, 300), 128, 256),
    "several blocks": ((3,), 1152, 512),
}


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values(case, kind):
    lead, out, width = case
    x = jnp.asarray(np.random.RandomState(1).standard_normal((*lead, width)), jnp.bfloat16)
    weight = make(out, width, kind)
    found, expected = (
        np.asarray(jax.jit(run)(x, weight), np.float32)
        for run in (pallas_tpu.matmul, scaled_matmul.matmul)
    )
    assert found.shape == (*lead, out)
    np.testing.assert_allclose(found, expected, ROUNDING, 1e-6)
    assert np.mean(found == expected) > 0.99


@pytest.mark.parametrize("device", ["TPU v5", "TPU v6 lite", "TPU7x"])
def test_every_fp4_code_and_scale(device, monkeypatch):
    """A product with the identity shows every weight exactly: 16 codes, scales 2^−110 … 2^110."""
    monkeypatch.setattr(dispatch, "device_kind", lambda: device)
    codes = np.arange(256 * 256).reshape(256, 256) * 7919 // 13 % 16
    scales = (17 + np.arange(256 * 8).reshape(256, 8) * 31 % 221).astype(np.uint8)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    weight = ScaledArray(jnp.asarray(packed), jnp.asarray(scales), (1, 32))
    found = jax.jit(lambda *x: pallas_tpu.matmul(*x))(jnp.eye(256, dtype=jnp.bfloat16), weight)
    expected = jax.jit(ScaledArray.dequantize)(weight)
    np.testing.assert_array_equal(np.asarray(found, np.float32).T, expected)
    np.testing.assert_array_equal(jax.jit(expand_tpu.expand)(weight).astype(jnp.float32), expected)


@pytest.mark.parametrize("device", ["TPU v5", "TPU v6 lite", "TPU7x"])
def test_every_fp8_code(device, monkeypatch):
    """All finite codes, subnormals and −0 among them, with scales 2^−110 … 2^110."""
    monkeypatch.setattr(dispatch, "device_kind", lambda: device)
    codes = (np.arange(256 * 256).reshape(256, 256) * 7919 // 13 % 256).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80  # NaN becomes −0
    values = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
    scales = jnp.array([[17, 100], [127, 237]], jnp.uint8)
    weight = ScaledArray(values, scales, (128, 128))
    found = jax.jit(lambda *x: pallas_tpu.matmul(*x))(jnp.eye(256, dtype=jnp.bfloat16), weight)
    expected = jax.jit(ScaledArray.dequantize)(weight)
    np.testing.assert_array_equal(np.asarray(found, np.float32).T, expected)
    np.testing.assert_array_equal(jax.jit(expand_tpu.expand)(weight).astype(jnp.float32), expected)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize("shape", [(128, 256), (2, 3, 384, 512), (2, 1024, 2304)])
def test_expanded(shape, kind):
    """Matrices of one block and of several, alone and in a batch of different ones."""
    random = np.random.RandomState(4)
    *lead, out, width = shape
    sizes = 2.0 ** random.randint(-3, 3, (*lead, out // 128, 1, width // 32, 1))
    drawn = random.standard_normal((*lead, out // 128, 128, width // 32, 32)) * sizes
    weight = jax.jit(quantize_weight, static_argnums=1)(jnp.asarray(drawn.reshape(shape)), kind)
    found = jax.jit(expand_tpu.expand)(weight)
    assert found.dtype == jnp.bfloat16 and found.shape == shape
    np.testing.assert_array_equal(found, jax.jit(ScaledArray.dequantize)(weight))


def test_which_expansion():
    """The kernel where it can, and no gradient wherever it is: a stored weight is a constant."""
    weight, narrow = make(256, 256, "fp8"), quantize_weight(jnp.zeros((24, 40)), "fp8")
    with dispatch.compiling_for("tpu"):
        for stored, dtype, calls in (
            (weight, jnp.bfloat16, True),
            (weight, "bfloat16", True),
            (weight, jnp.float32, False),
            (narrow, jnp.bfloat16, False),
        ):
            text = str(jax.make_jaxpr(functools.partial(expand, dtype=dtype))(stored))
            assert ("pallas_call" in text) == calls
    scaled = jax.jit(jax.grad(lambda x, w: (x * expand(w)).sum(), argnums=(0, 1), allow_int=True))
    of_x, of_weight = scaled(jnp.float32(2), weight)
    np.testing.assert_allclose(of_x, jax.jit(expand)(weight).sum(), 1e-5)
    assert not of_weight.values.astype(jnp.float32).any()


def test_split_order():
    x = jnp.arange(512)[None]
    split = unpack_tpu.split(x)[0]
    assert split[:3].tolist() == [0, 2, 4] and split[128:131].tolist() == [1, 3, 5]
    assert split[256:259].tolist() == [256, 258, 260]
    matrix = unpack_tpu.split_matrix(jnp.float32)
    np.testing.assert_array_equal(x[:, :256] @ matrix, split[None, :256])


def test_gradient():
    weight = make(256, 256, "fp8")
    x = jnp.asarray(np.random.RandomState(1).standard_normal((5, 256)), jnp.bfloat16)

    def loss(run, x):
        return (run(x, weight).astype(jnp.float32) ** 2).sum()

    found, expected = (
        np.asarray(jax.jit(jax.grad(functools.partial(loss, run)))(x), np.float32)
        for run in (pallas_tpu.matmul, scaled_matmul.matmul)
    )
    np.testing.assert_allclose(found, expected, 0, ROUNDING * np.abs(expected).max())


def test_refused():
    weight = make(256, 256, "fp8")
    x = jnp.zeros((4, 256), jnp.bfloat16)
    assert "not quantized" in pallas_tpu.supported(x, jnp.zeros((256, 256)))
    assert "bfloat16" in pallas_tpu.supported(x.astype(jnp.float32), weight)
    narrow = quantize_weight(jnp.zeros((24, 40)), "fp8")
    assert "divide" in pallas_tpu.supported(x, narrow)
    with dispatch.compiling_for("tpu"):
        assert pallas_tpu.supported(x, weight) is None
        assert scaled_matmul.matmul(x[:, :40], narrow).shape == (4, 24)


# name: tokens, rows and columns of the weight
COMPILED = {
    "Flash decodes, queries up": (64, 32768, 1024),
    "Pro prefills, queries up": (2048, 65536, 1536),
    "Pro prefills, output up": (2048, 7168, 16384),
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TOPOLOGIES.values())
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_compiles(case, topology):
    tokens, out, width = case
    weight = jax.eval_shape(lambda: quantize_weight(jnp.zeros((out, width)), "fp8"))
    compiled = ahead_of_time.compile_for(
        topology,
        functools.partial(scaled_matmul.matmul, quantize_activations=True),
        jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16),
        weight,
    )
    assert "tpu_custom_call" in compiled.as_text()


EXPANDED = {
    "Flash, experts of a sixteenth": ((16, 2, 2048, 4096), "fp4"),
    "Pro, experts of a 32nd": ((12, 7168, 3072), "fp4"),
    "Flash, queries up": ((32768, 1024), "fp8"),
    "Pro, output up": ((7168, 16384), "fp8"),
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TOPOLOGIES.values())
@pytest.mark.parametrize("case", EXPANDED.values(), ids=EXPANDED.keys())
def test_expansion_compiles(case, topology):
    shape, kind = case
    weight = jax.eval_shape(lambda: quantize_weight(jnp.zeros(shape), kind))
    compiled = ahead_of_time.compile_for(
        topology, functools.partial(expand, dtype=jnp.bfloat16), weight
    )
    assert "tpu_custom_call" in compiled.as_text()
