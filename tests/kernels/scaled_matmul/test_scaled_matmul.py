"""Linear layers on stored weights: every implementation against `reference.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantizers

from v4jax.kernels import Target, scaled_matmul
from v4jax.kernels.scaled_matmul import expand_tpu, pallas_tpu, reference, unpack_tpu
from v4jax.quant import ScaledArray, quantize_weight

from ..compare import BFLOAT16, CPU, FLOAT32, GPU, TPU, V6, V7, check

STATIC = ("target", "quantize_activations", "is_reference", "trains")


@functools.partial(jax.jit, static_argnames=STATIC)
def matmul(x, weight, slope, *, target, quantize_activations, is_reference=False, trains=False):
    """Returns the product and the gradients of x and, if it trains, of the weight."""
    module = reference if is_reference else scaled_matmul
    run = functools.partial(module.matmul, quantize_activations=quantize_activations, target=target)
    if trains:
        product, pull = jax.vjp(run, x, weight)
    else:
        product, pull = jax.vjp(lambda x: run(x, weight), x)
    return product, pull(slope)


@functools.cache
def make(shape, stored):
    """Returns a weight of published bytes, and the same in float64."""
    weight = np.random.RandomState(0).standard_normal(shape) / np.sqrt(shape[-1])
    weight *= 2.0 ** np.random.RandomState(1).randint(-3, 3, (shape[0], 1))
    if stored in ("float32", "bfloat16"):
        array = jnp.asarray(weight, stored)
        return array, np.asarray(array.astype(jnp.float32), np.float64)
    if stored == "fp8":
        values, scales = quantizers.quantize_fp8_weight(weight)
        exact, tile = quantizers.dequantize_fp8_weight(values, scales), (128, 128)
    else:
        values, scales = quantizers.quantize_fp4_weight(weight)
        exact, tile = quantizers.dequantize_fp4_weight(values, scales), (1, 32)
        values = values.view(np.uint8)
    scales = quantizers.encode_scales(scales).view(np.uint8)
    return ScaledArray(jnp.asarray(values), jnp.asarray(scales), tile), exact.astype(np.float64)


def draw(lead, columns, dtype):
    """Returns x; rows of very different sizes, one of them zero."""
    random = np.random.RandomState(1)
    sizes = np.array([1.0, 1e-3, 0.0, 1.0])[np.arange(lead[-1]) % 4]
    return jnp.asarray(random.standard_normal((*lead, columns)) * sizes[:, None], dtype)


@pytest.mark.parametrize("rounded", [False, True], ids=["", "rounded activations"])
@pytest.mark.parametrize("stored", ["float32", "fp8", "fp4"])
def test_reference(stored, rounded):
    """Exact products of what the bytes say; quantized weights see rounded inputs."""
    weight, exact = make((200, 136), stored)
    x = draw((2, 3), 136, "float32")
    seen = np.asarray(x)
    if rounded and stored != "float32":
        seen = quantizers.act_dequant(*quantizers.act_quant(seen), 128)
    found = reference.matmul(x, weight, quantize_activations=rounded)
    np.testing.assert_allclose(found, seen.astype(np.float64) @ exact.T, 0, FLOAT32)


# name: target, dtype of x, shape of x without its last axis, weight's shape and format. A tile has
# 512 rows; 128 divides neither size, one, both.
CASES = {
    "cpu, odd": (CPU, "float32", (2, 3), (200, 136), "float32"),
    "cpu, FP8": (CPU, "float32", (2, 3), (128, 256), "fp8"),
    "cpu, odd FP8": (CPU, "bfloat16", (2, 3), (200, 136), "fp8"),
    "cpu, small FP4": (CPU, "float32", (2, 3), (24, 64), "fp4"),
    "cpu, bfloat16": (CPU, "bfloat16", (2, 3), (200, 136), "bfloat16"),
    "gpu, bfloat16": (GPU, "bfloat16", (2, 3), (200, 136), "bfloat16"),
    "tpu, several tiles and a rest": (TPU, "bfloat16", (2, 300), (128, 256), "fp8"),
    "tpu, several blocks": (TPU, "bfloat16", (3,), (1152, 512), "fp4"),
    "tpu, narrow": (TPU, "bfloat16", (2, 3), (24, 40), "fp8"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matmul(case):
    target, dtype, lead, shape, stored = case
    weight = make(shape, stored)[0]
    x, trains = draw(lead, shape[1], dtype), not isinstance(weight, ScaledArray)
    slope = jnp.asarray(np.random.RandomState(3).standard_normal((*lead, shape[0])), dtype)
    for rounded in (False, True) if stored == "fp8" else (False,):
        options = {"target": target, "quantize_activations": rounded, "trains": trains}
        arguments = x, weight, slope
        found, wanted = (matmul(*arguments, **options, is_reference=r) for r in (False, True))
        check(found, wanted, FLOAT32 if dtype == "float32" else BFLOAT16)
        if dtype == "bfloat16":  # sums are of float32: few fall to the other side of a rounding
            assert np.mean(np.asarray(found[0] == wanted[0])) > 0.99


def test_no_product_of_float32_for_bfloat16():
    x, weight = jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros((8, 64), jnp.bfloat16)
    run = functools.partial(scaled_matmul.matmul, target=GPU)
    jaxpr = jax.make_jaxpr(lambda slope: jax.vjp(run, x, weight)[1](slope))(
        jnp.zeros((2, 8), x.dtype)
    )

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield {str(variable.aval.dtype) for variable in equation.invars}
            inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
            for value in inner:
                if hasattr(value, "eqns"):
                    yield from products(value)

    assert list(products(jaxpr.jaxpr)) == [{"bfloat16"}] * 3


def test_gradients_of_groups():
    """The grouped output projection in bfloat16, whose products XLA for CPUs does not have."""
    random = np.random.RandomState(3)
    arrays = [
        jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
        for shape in ((2, 32, 2, 16), (2, 8, 16), (2, 32, 2, 8))
    ]

    def differentiate(run, x, weight, slope):
        return jax.vjp(functools.partial(run, "btgk,grk->btgr"), x, weight)[1](slope)

    contract = functools.partial(scaled_matmul.contract, target=CPU)
    found, expected = (
        jax.jit(functools.partial(differentiate, run))(*arrays)
        for run in (contract, reference.contract)
    )
    check(found, expected, BFLOAT16)


@pytest.mark.parametrize("target", [CPU, GPU, Target("tpu")], ids=lambda target: target.platform)
def test_float32_product_of_bfloat16(target):
    """On GPUs and TPUs the gradients are products of bfloat16, rounded first."""
    x, weight = draw((2, 3), 136, "bfloat16"), make((200, 136), "bfloat16")[0]
    slope = jnp.asarray(np.random.RandomState(2).standard_normal((2, 3, 200)), jnp.float32)

    def differentiate(run, x, weight):
        product, pull = jax.vjp(run, x, weight)
        return product, pull(slope)

    ours = functools.partial(scaled_matmul.matmul_float32, target=target)
    (found, gradients), (expected, wanted) = (
        jax.jit(functools.partial(differentiate, run))(x, weight)
        for run in (ours, reference.matmul_float32)
    )
    check(found, expected, FLOAT32)
    check(gradients, wanted, BFLOAT16)


def test_gradients_of_several_products_are_added_in_float32():
    """A thousand small ones after a large one: in bfloat16 they would not count."""
    weight, x = jnp.ones((1, 16), jnp.bfloat16), jnp.ones((1001, 1, 16), jnp.bfloat16)
    cotangents = jnp.full(1001, 1 / 1024).at[0].set(1.0)

    def total(target, weight):
        wide = weight.astype(jnp.float32)
        product = functools.partial(scaled_matmul.matmul_float32, target=target)
        one = jax.checkpoint(lambda x: product(x, weight, wide)[0, 0])
        return (jax.lax.map(one, x) * cotangents).sum()

    for target in (CPU, GPU):
        found = jax.jit(jax.grad(functools.partial(total, target)))(weight)
        np.testing.assert_allclose(found.astype(jnp.float32), 1 + 1000 / 1024, rtol=2**-8)


def test_rounding_activations_has_the_gradient_of_the_identity():
    """Autodiff of the cast itself would round the gradient to e4m3: 1e-4 would be 0."""
    found = jax.grad(lambda x: (1e-4 * scaled_matmul.round_activations(x)).sum())(
        jnp.ones((2, 128))
    )
    np.testing.assert_allclose(found, 1e-4)


@pytest.mark.parametrize("target", [TPU, V6, V7], ids=lambda target: target.device_kind)
def test_every_code_and_scale(target):
    """A product with the identity shows every weight exactly, and the expansion as well.

    FP4: 16 codes, scales 2^−110 … 2^110. FP8: all finite codes, subnormals and −0 among them.
    """
    numbers = np.arange(256 * 256).reshape(256, 256) * 7919 // 13
    fp4 = numbers % 16
    scales = (17 + np.arange(256 * 8).reshape(256, 8) * 31 % 221).astype(np.uint8)
    packed = jnp.asarray((fp4[:, 0::2] | fp4[:, 1::2] << 4).astype(np.uint8))
    fp8 = (numbers % 256).astype(np.uint8)
    fp8[(fp8 & 0x7F) == 0x7F] = 0x80  # NaN becomes −0
    values = jax.lax.bitcast_convert_type(jnp.asarray(fp8), jnp.float8_e4m3fn)
    weights = [
        ScaledArray(packed, jnp.asarray(scales), (1, 32)),
        ScaledArray(values, jnp.array([[17, 100], [127, 237]], jnp.uint8), (128, 128)),
    ]

    @jax.jit
    def see(weights):
        identity = jnp.eye(256, dtype=jnp.bfloat16)
        products = [scaled_matmul.matmul(identity, w, target=target).T for w in weights]
        return products, [scaled_matmul.expand(w, "bfloat16", target=target) for w in weights]

    expected = [w.dequantize() for w in weights]
    for found in see(weights):
        for value, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(value.astype(jnp.float32), wanted)


@pytest.mark.parametrize("shape, kind", [((2, 3, 384, 256), "fp8"), ((2, 512, 512), "fp4")])
def test_expanded(shape, kind, monkeypatch):
    """Matrices of several blocks, in a batch of different ones."""
    monkeypatch.setattr(expand_tpu, "_LARGEST_BLOCK", 256 * 512)
    drawn = np.random.RandomState(4).standard_normal(shape)
    weight = jax.jit(quantize_weight, static_argnums=1)(jnp.asarray(drawn, jnp.float32), kind)
    found = jax.jit(functools.partial(scaled_matmul.expand, dtype="bfloat16", target=TPU))(weight)
    assert found.dtype == jnp.bfloat16 and found.shape == shape
    np.testing.assert_array_equal(found.astype(jnp.float32), reference.expand(weight))


def test_which_expansion():
    """The kernel where it can, and no gradient wherever it is: a stored weight is a constant."""
    weight, narrow = make((256, 256), "fp8")[0], make((24, 64), "fp8")[0]
    for stored, dtype, calls in (
        (weight, jnp.bfloat16, True),
        (weight, "bfloat16", True),
        (weight, jnp.float32, False),
        (narrow, jnp.bfloat16, False),
    ):
        run = functools.partial(scaled_matmul.expand, dtype=dtype, target=Target("tpu"))
        assert ("pallas_call" in str(jax.make_jaxpr(run)(stored))) == calls

    def total(x, weight):
        return (x * scaled_matmul.expand(weight, target=CPU)).sum()

    of_x, of_weight = jax.jit(jax.grad(total, (0, 1), allow_int=True))(jnp.float32(2), weight)
    np.testing.assert_allclose(of_x, reference.expand(weight).sum(), 1e-4)
    assert not of_weight.values.astype(jnp.float32).any()


def test_split_order():
    x = jnp.arange(512)[None]
    split = unpack_tpu.split(x)[0]
    assert split[:3].tolist() == [0, 2, 4] and split[128:131].tolist() == [1, 3, 5]
    assert split[256:259].tolist() == [256, 258, 260]
    matrix = unpack_tpu.split_matrix(jnp.float32)
    np.testing.assert_array_equal(x[:, :256] @ matrix, split[None, :256])


def test_refused():
    weight, narrow = make((256, 256), "fp8")[0], make((24, 64), "fp8")[0]
    x = jnp.zeros((4, 256), jnp.bfloat16)
    assert pallas_tpu.supported(x, weight) is None
    assert "not quantized" in pallas_tpu.supported(x, jnp.zeros((256, 256)))
    assert "bfloat16" in pallas_tpu.supported(x.astype(jnp.float32), weight)
    assert "divide" in pallas_tpu.supported(x, narrow)
