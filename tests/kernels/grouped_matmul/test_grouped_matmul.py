"""Routed experts: every implementation against `reference.py`, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.errors import UnsupportedError
from v4jax.kernels import grouped_matmul
from v4jax.kernels.grouped_matmul import pallas_tpu, portable, reference
from v4jax.kernels.scaled_matmul import unpack_tpu
from v4jax.kernels.stacked import Stacked
from v4jax.kernels.tpu import chip_of
from v4jax.quant import quantize_weight
from v4jax.quant.formats import dequantize_fp8, quantize_fp8

from ..compare import BFLOAT16, CPU, FLOAT32, GPU, TPU, V6, V7

EXPERTS, CHOSEN, INPUT, WIDTH = 5, 3, 256, 256
TOKENS = 37  # tiles of 8, 16 or 32 rows do not divide 111 assignments
LIMIT = 0.7  # about the size of the activations: both clamps are active
WAYS = {"cpu": CPU, "gpu": GPU, "tpu": TPU, "v6": V6, "v7": V7}
STATIC = ("kind", "target", "quantized", "shared")


def store(array, kind):
    if kind in ("float32", "bfloat16"):
        return jnp.asarray(array, kind)
    return jax.jit(quantize_weight, static_argnums=1)(jnp.asarray(array, jnp.float32), kind)


@functools.cache
def make_weights(kind, experts=EXPERTS):
    random = np.random.RandomState(0)
    gate_up = random.standard_normal((experts, 2, WIDTH, INPUT)) / np.sqrt(INPUT)
    down = random.standard_normal((experts, INPUT, WIDTH)) / np.sqrt(WIDTH)
    # Blocks of different sizes: every scale is its own.
    gate_up *= 2.0 ** random.randint(-2, 2, (1, 1, 1, INPUT // 32)).repeat(32, -1)
    return store(gate_up, kind), store(down, kind)


def draw(tokens, dtype):
    """Returns x, expert ids (distinct per token), positive weights."""
    random = np.random.RandomState(1)
    ids = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    x = jnp.asarray(random.standard_normal((tokens, INPUT)), dtype)
    weights = jnp.asarray(random.uniform(0.1, 1, (tokens, CHOSEN)), jnp.float32)
    return x, ids.astype(np.int32), weights


@functools.partial(jax.jit, static_argnames=("target", "quantized", "shared", "trains"))
def run(x, ids, weights, stored, cotangent, *, target, quantized=False, shared=False, trains=False):
    """Returns outputs and gradients: of x, routing weights and, if it trains, the stored weights.

    Without a target by the reference; without a cotangent no gradients.
    """
    module = reference if target is None else grouped_matmul
    options = {"limit": LIMIT, "quantize_activations": quantized, "target": target}

    def apply(x, weights, stored):
        if shared:
            return module.apply_shared_expert(x, *stored, **options)
        return module.apply_experts(x, ids, weights, *stored, **options)

    if cotangent is None:
        return apply(x, weights, stored), None
    if trains:
        outputs, pull = jax.vjp(apply, x, weights, stored)
    else:
        outputs, pull = jax.vjp(lambda x, weights: apply(x, weights, stored), x, weights)
    return outputs, pull(cotangent)


def compare(name, x, ids, weights, stored, *, gradients=False, **options):
    """Both round the same float32 sums in another order: single roundings fall on other sides."""
    cotangent = None
    if gradients:
        random = np.random.RandomState(2)
        cotangent = jnp.asarray(random.standard_normal(x.shape), jnp.float32)
    arguments = x, ids, weights, stored, cotangent
    found, gradient = run(*arguments, target=WAYS[name], **options)
    expected, wanted = run(*arguments, target=None, **options)
    assert found.dtype == jnp.float32
    wide = x.dtype == jnp.float32
    difference = np.abs(found - expected)
    if options.get("quantized"):  # a few inner values fall to the neighbouring code of FP8
        assert np.mean(difference <= FLOAT32) > (0.5 if wide else 0.9)
        assert difference.max() < 0.1
    else:
        assert difference.max() < (FLOAT32 if wide else BFLOAT16)
        assert wide or np.mean(difference == 0) > 0.9
    for value, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        assert value.dtype == expected.dtype
        value, expected = (np.asarray(x, np.float32) for x in (value, expected))
        # In bfloat16 both round inner gradients, in different places.
        limit = 10 * FLOAT32 if wide else 0.02
        np.testing.assert_allclose(value, expected, 0, limit * max(np.abs(expected).max(), 1))
    return found, gradient


# name → expert ids
LOADS = {
    "mixed": draw(TOKENS, "float32")[1],
    "three experts have all tokens": np.tile(np.array([[4, 0, 2]], np.int32), (TOKENS, 1)),
    "all choices on the last expert": np.full((TOKENS, CHOSEN), EXPERTS - 1, np.int32),
    "last expert only once": np.array([[0, 1, 2]] * (TOKENS - 1) + [[0, 1, 4]], np.int32),
}


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_training(name):
    """All gradients, for every load; an expert without tokens gets exactly zero."""
    dtype = "bfloat16" if name == "tpu" else "float32"
    x, _, weights = draw(TOKENS, dtype)
    stored = make_weights(dtype)
    for ids in LOADS.values():
        found = compare(name, x, ids, weights, stored, gradients=True, trains=True)
        for gradient in found[1][2]:
            assert not np.any(gradient[np.setdiff1d(np.arange(EXPERTS), ids)])


@pytest.mark.parametrize(
    "name, kind, quantized",
    [
        ("cpu", "fp8", True),
        ("cpu", "fp4", False),
        ("tpu", "fp8", True),
        ("tpu", "fp4", False),
        ("v6", "fp4", True),
        ("v7", "fp4", False),
    ],
)
def test_stored_weights(name, kind, quantized):
    """Inputs and routing weights have gradients; stored weights are constants."""
    dtype = "float32" if name == "cpu" else "bfloat16"
    x, _, weights = draw(TOKENS, dtype)
    stored = make_weights(kind)
    for ids in (LOADS["mixed"], LOADS["three experts have all tokens"]):
        options = {"quantized": quantized, "gradients": not quantized}
        found, _ = compare(name, x, ids, weights, stored, **options)
    if quantized:
        plain = run(x, ids, weights, stored, None, target=None)[0]
        assert np.mean(found == plain) < 0.1, "roundings of activations show"


@pytest.mark.parametrize("name, kind", [("cpu", "float32"), ("cpu", "fp4"), ("tpu", "fp4")])
def test_one_token(name, kind):
    arrays = draw(1, "bfloat16" if name == "tpu" else "float32")
    compare(name, *arrays, make_weights(kind), quantized=kind == "fp4" and name == "cpu")


@pytest.mark.parametrize("name, kind", [("cpu", "float32"), ("cpu", "fp8"), ("tpu", "bfloat16")])
def test_shared_expert(name, kind):
    x, ids, weights = draw(TOKENS, "bfloat16" if name == "tpu" else "float32")
    stored = jax.tree.map(lambda a: a[2], make_weights(kind))
    trains = kind != "fp8"
    options = {"shared": True, "gradients": trains, "trains": trains}
    compare(name, x, ids, weights, stored, **options)


@pytest.mark.parametrize("name, kind", [("cpu", "fp4"), ("tpu", "fp8")])
def test_one_layer_of_a_stack(name, kind):
    x, ids, weights = draw(TOKENS, "bfloat16" if name == "tpu" else "float32")
    plain = make_weights(kind)
    stacks = jax.tree.map(lambda a: Stacked(jnp.stack([a * 0, a]), jnp.int32(1)), plain)
    options = {"target": WAYS[name], "quantized": kind == "fp8"}
    found, expected = (run(x, ids, weights, w, None, **options)[0] for w in (stacks, plain))
    np.testing.assert_array_equal(found, expected)


def test_stacked_layers_do_not_train():
    x, ids, weights = draw(4, "bfloat16")
    stacks = jax.tree.map(lambda a: Stacked(a[None], jnp.int32(0)), make_weights("bfloat16"))
    with pytest.raises(UnsupportedError, match="only infer"):
        run(x, ids, weights, stacks, jnp.zeros(x.shape), target=TPU)


def test_plain_weights_see_plain_activations():
    arrays, stored = draw(TOKENS, "float32"), make_weights("float32")
    rounded, plain = (run(*arrays, stored, None, target=CPU, quantized=q)[0] for q in (True, False))
    np.testing.assert_array_equal(rounded, plain)


def test_clamps_come_before_the_product():
    """Gate: an upper bound only. Up: both. A huge input saturates instead of growing."""
    gate_up = np.zeros((1, 2, 4, 4), np.float32)
    gate_up[0, :] = np.eye(4)
    gate_up[0, 1, 2:, 2:] = [[-1, 0], [0, -1]]
    x = jnp.asarray([[0.1, 50.0, 50.0, -50.0]], jnp.float32)
    one = np.zeros((1, 1), np.int32), jnp.ones((1, 1))
    output = reference.apply_experts(x, *one, gate_up, np.eye(4)[None] * 1.0, limit=LIMIT)
    a = np.array([0.1, LIMIT, LIMIT, -50.0])
    b = np.array([0.1, LIMIT, -LIMIT, LIMIT])
    np.testing.assert_allclose(output[0], a / (1 + np.exp(-a)) * b, 0, FLOAT32)


def test_rounding_to_fp8_is_the_published_one():
    """Every size of value and block: subnormals of e4m3, ties, zeros, saturation."""
    random = np.random.RandomState(0)
    x = random.standard_normal((64, 256)) * 2.0 ** random.randint(-12, 4, (64, 256))
    x[0], x[1, :16] = 0, np.arange(16) / 16 + 1
    x[2] *= 1e-5
    x = jnp.asarray(x, jnp.float32)
    expected = dequantize_fp8(*quantize_fp8(x, 128), 128)
    np.testing.assert_array_equal(jax.jit(pallas_tpu.round_fp8)(x), expected)
    found = jax.jit(functools.partial(pallas_tpu.round_fp8, splits=True))(unpack_tpu.split(x))
    np.testing.assert_array_equal(found, unpack_tpu.split(expected))


def test_blocks_of_several_passes():
    """More outputs than a block and a pass hold, and successive tiles of one expert."""
    random = np.random.RandomState(3)
    gate_up = store(random.standard_normal((2, 2, 768, 256)) / 16, "fp4")
    down = store(random.standard_normal((2, 256, 768)) / 28, "fp4")
    x = jnp.asarray(random.standard_normal((70, 256)), jnp.bfloat16)
    ids = np.sort(random.randint(0, 2, (70, 1)).astype(np.int32), 0)
    compare("tpu", x, ids, jnp.ones((70, 1)), (gate_up, down))


def test_rows_in_use():
    """Wide matrix units compute 128 to 512 rows of a tile; the others count nowhere."""
    chip = chip_of(V6)
    loads = {0: 640, 2: 200, 3: 257}  # tiles of 512 and 128, 200, 257 rows; expert 1 has none
    ids = np.repeat([*loads], [*loads.values()])[:, None].astype(np.int32)
    assert pallas_tpu.choose_tile(chip, len(ids), 4) == 512
    assert pallas_tpu.linear.varies(chip, 512)
    random = np.random.RandomState(4)
    x = jnp.asarray(random.standard_normal((len(ids), INPUT)), jnp.bfloat16)
    weights = jnp.asarray(random.uniform(0.1, 1, ids.shape), jnp.float32)
    compare("v6", x, random.permutation(ids), weights, make_weights("fp4", 4))


# What cannot run, and a word of the reason.
REFUSED = {
    "float32 activations": (jnp.float32, (256, 256), "bfloat16", "activations"),
    "narrow": (jnp.bfloat16, (256, 64), "fp4", "divide"),
    "float32 weights": (jnp.bfloat16, (256, 256), "float32", "quantized"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused(case):
    dtype, (width, inner), kind, word = case
    weights = [store(np.zeros(shape), kind) for shape in ((2, 2, inner, width), (2, width, inner))]
    assert word in pallas_tpu.supported(jnp.zeros((4, width), dtype), *weights)


# name: assignments, experts, rows of a tile where matrix units are 128 wide, and 256
TILES = {
    "decode": (16 * 6, 256, 16, 16),
    "a chunk over all experts of Flash": (2048 * 6, 256, 64, 64),
    "as many rows as experts have in the middle": (160 * 32, 32, 128, 256),
    "a chunk over an eighth": (2048 * 6, 32, 128, 512),
    "a long chunk": (65536 * 6, 256, 128, 512),
}


@pytest.mark.parametrize("case", TILES.values(), ids=TILES.keys())
def test_tile(case):
    """An expert's mean load fits into one tile, up to 512 rows, of wide units."""
    assignments, experts, narrow, wide = case
    found = [pallas_tpu.choose_tile(chip_of(x), assignments, experts) for x in (TPU, V6)]
    assert found == [narrow, wide]
    assert portable.choose_tile(GPU, assignments, experts) >= portable.choose_tile(
        CPU, assignments, experts
    )
