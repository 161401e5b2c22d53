"""The experts' TPU kernels: interpreted against the reference, and compiled for real chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.errors import UnsupportedError
from v4jax.kernels import dispatch
from v4jax.kernels.grouped_matmul import choose, pallas_tpu, pallas_tpu_backward, reference
from v4jax.kernels.scaled_matmul import unpack_tpu
from v4jax.kernels.stacked import Stacked
from v4jax.planning import ahead_of_time
from v4jax.quant import quantize_weight
from v4jax.quant.formats import dequantize_fp8, quantize_fp8

EXPERTS, CHOSEN, INPUT, WIDTH = 5, 3, 256, 256
LIMIT = 0.7  # about the size of the activations: both clamps are active
KINDS = ("bfloat16", "fp8", "fp4")
# Both compute the same roundings from the same float32 sums in another order: single roundings of
# an inner value or of an output fall on the other side, one unit of 8 bits at values of size 1.
ROUNDINGS = 2**-7


@functools.partial(jax.jit, static_argnames=("limit", "quantize_activations"))
def run(*arguments, limit, quantize_activations=False):
    options = {"limit": limit, "quantize_activations": quantize_activations}
    return pallas_tpu.apply_experts(*arguments, **options)


@functools.partial(jax.jit, static_argnames=("limit", "quantize_activations"))
def wanted(*arguments, limit, quantize_activations=False):
    options = {"limit": limit, "quantize_activations": quantize_activations}
    return reference.apply_experts(*arguments, **options)


def store(array, kind):
    if kind == "bfloat16":
        return jnp.asarray(array, jnp.bfloat16)
    return jax.jit(quantize_weight, static_argnums=1)(jnp.asarray(array, jnp.float32), kind)


@functools.cache
def make_weights(kind, experts=EXPERTS):
    random = np.random.RandomState(0)
    gate_up = random.standard_normal((experts, 2, WIDTH, INPUT)) / np.sqrt(INPUT)
    down = random.standard_normal((experts, INPUT, WIDTH)) / np.sqrt(WIDTH)
    # Blocks of different sizes: every scale is its own.
    gate_up *= 2.0 ** random.randint(-2, 2, (1, 1, 1, INPUT // 32)).repeat(32, -1)
    return store(gate_up, kind), store(down, kind)


def draw(tokens):
    random = np.random.RandomState(1)
    ids = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    x = jnp.asarray(random.standard_normal((tokens, INPUT)), jnp.bfloat16)
    weights = jnp.asarray(random.uniform(0.1, 1, (tokens, CHOSEN)), jnp.float32)
    return x, ids.astype(np.int32), weights


# name → expert ids; tiles (16 or 32 rows) divide none of the loads.
LOADS = {
    "mixed": draw(37)[1],
    "one token": draw(1)[1],
    "all choices on the last expert": np.full((21, CHOSEN), EXPERTS - 1, np.int32),
    "experts without tokens": np.tile(np.array([[4, 0, 2]], np.int32), (37, 1)),
}


# Every kind on mixed loads, every load with the kind that does most.
@pytest.mark.parametrize(
    ("load", "kind"), [("mixed", kind) for kind in KINDS] + [(load, "fp4") for load in [*LOADS][1:]]
)
def test_values(load, kind):
    ids = LOADS[load]
    x, _, weights = draw(len(ids))
    arguments = x, ids, weights, *make_weights(kind)
    found, expected = run(*arguments, limit=LIMIT), wanted(*arguments, limit=LIMIT)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, 0, ROUNDINGS)
    assert np.mean(np.asarray(found) == np.asarray(expected)) > 0.9


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_rounded_activations(kind):
    x, ids, weights = draw(37)
    arguments = x, ids, weights, *make_weights(kind)
    options = {"limit": LIMIT, "quantize_activations": True}
    found, expected = run(*arguments, **options), wanted(*arguments, **options)
    assert np.mean(np.asarray(found) == np.asarray(expected)) > 0.9
    assert np.mean(np.asarray(found) == np.asarray(run(*arguments, limit=LIMIT))) < 0.1


@pytest.mark.parametrize("device", ["TPU v6 lite", "TPU7x"])
def test_chips_that_cast(device, monkeypatch):
    """There FP4 rows come in their own order; what down contracts is brought into split order."""
    monkeypatch.setattr(dispatch, "device_kind", lambda: device)
    x, ids, weights = draw(37)
    arguments = x, ids, weights, *make_weights("fp4")
    for quantized in (False, True):
        options = {"limit": LIMIT, "quantize_activations": quantized}
        call = functools.partial(pallas_tpu.apply_experts, **options)
        found, expected = jax.jit(call)(*arguments), wanted(*arguments, **options)
        assert np.mean(np.asarray(found) == np.asarray(expected)) > 0.9
        if not quantized:
            np.testing.assert_allclose(found, expected, 0, ROUNDINGS)


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


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_one_layer_of_a_stack(kind):
    x, ids, weights = draw(21)
    plain = make_weights(kind)
    stacks = jax.tree.map(lambda a: Stacked(jnp.stack([a * 0, a]), jnp.int32(1)), plain)
    found = run(x, ids, weights, *stacks, limit=LIMIT)
    np.testing.assert_array_equal(found, run(x, ids, weights, *plain, limit=LIMIT))


def test_shared_expert():
    x = draw(37)[0]
    weights = jax.tree.map(lambda a: a[2], make_weights("fp8"))
    options = {"limit": LIMIT, "quantize_activations": True}
    found, expected = (
        jax.jit(functools.partial(module.apply_shared_expert, **options))(x, *weights)
        for module in (pallas_tpu, reference)
    )
    np.testing.assert_allclose(found, expected, 0, ROUNDINGS)


def test_gradients_of_a_shared_expert():
    x = draw(37)[0]
    arguments = x, *jax.tree.map(lambda a: a[2], make_weights("bfloat16"))
    slope = jnp.asarray(np.random.RandomState(2).standard_normal(x.shape), jnp.float32)
    found, expected = (
        jax.jit(
            jax.grad(
                lambda *parts, module=module: (
                    module.apply_shared_expert(*parts, limit=LIMIT, quantize_activations=False)
                    * slope
                ).sum(),
                argnums=(0, 1, 2),
            )
        )(*arguments)
        for module in (pallas_tpu, reference)
    )
    for got, want in zip(found, expected, strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_blocks_of_several_passes():
    """More outputs than a block and a pass hold, and successive tiles of one expert."""
    random = np.random.RandomState(3)
    gate_up = store(random.standard_normal((2, 2, 768, 256)) / 16, "fp4")
    down = store(random.standard_normal((2, 256, 768)) / 28, "fp4")
    x = jnp.asarray(random.standard_normal((70, 256)), jnp.bfloat16)
    ids = np.sort(random.randint(0, 2, (70, 1)).astype(np.int32), 0)
    arguments = x, ids, jnp.ones((70, 1)), gate_up, down
    found, expected = run(*arguments, limit=LIMIT), wanted(*arguments, limit=LIMIT)
    np.testing.assert_allclose(found, expected, 0, ROUNDINGS)


@pytest.mark.parametrize("kind", ["bfloat16", "fp4"])
def test_rows_in_use(kind, monkeypatch):
    """Wide matrix units compute 128 to 512 rows of a tile; the others count nowhere."""
    monkeypatch.setattr(dispatch, "device_kind", lambda: "TPU v6 lite")
    loads = {0: 640, 2: 200, 3: 257}  # tiles of 512 and 128, 200, 257 rows; expert 1 has none
    ids = np.repeat([*loads], [*loads.values()])[:, None].astype(np.int32)
    assert pallas_tpu.choose_tile(len(ids), 4) == 512 and pallas_tpu.linear.varies(512)
    random = np.random.RandomState(4)
    ids = random.permutation(ids)
    x = jnp.asarray(random.standard_normal((len(ids), INPUT)), jnp.bfloat16)
    weights = jnp.asarray(random.uniform(0.1, 1, ids.shape), jnp.float32)
    arguments = x, ids, weights, *make_weights(kind, 4)
    options = {"limit": LIMIT, "quantize_activations": False}
    found = jax.jit(lambda *x: pallas_tpu.apply_experts(*x, **options))(*arguments)
    np.testing.assert_allclose(found, wanted(*arguments, limit=LIMIT), 0, ROUNDINGS)


@pytest.mark.parametrize("name", ["mixed", "experts without tokens"])
def test_gradients(name):
    """Of inputs, routing weights and both weights; an expert without tokens gets exactly zero."""
    ids = jnp.asarray(LOADS[name])
    x, _, weights = draw(len(ids))
    weight = np.random.RandomState(2).standard_normal((len(ids), INPUT))

    def loss(module, x, weights, gate_up, down):
        options = {"limit": LIMIT, "quantize_activations": False}
        return (module.apply_experts(x, ids, weights, gate_up, down, **options) * weight).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, module), argnums=range(4)))(
            x, weights, *make_weights("bfloat16")
        )
        for module in (pallas_tpu, reference)
    )
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        value, wanted = np.asarray(value, np.float32), np.asarray(wanted, np.float32)
        # Both round inner gradients to bfloat16, in different places.
        np.testing.assert_allclose(value, wanted, 0, 0.02 * np.abs(wanted).max())
    without = np.setdiff1d(np.arange(EXPERTS), LOADS[name])
    assert not np.any(found[2][without]) and not np.any(found[3][without])


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_frozen_quantized_weights(kind):
    """Inputs and routing weights have the reference's gradient; stored weights are constants."""
    x, ids, weights = draw(37)
    ids = jnp.asarray(ids)
    gate_up, down = make_weights(kind)

    def loss(module, x, weights):
        options = {"limit": LIMIT, "quantize_activations": False}
        return module.apply_experts(x, ids, weights, gate_up, down, **options).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, module), argnums=(0, 1)))(x, weights)
        for module in (pallas_tpu, reference)
    )
    for value, wanted in zip(found, expected, strict=True):
        value, wanted = np.asarray(value, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(value, wanted, 0, 0.02 * np.abs(wanted).max())


def test_stacked_layers_do_not_train():
    x, ids, weights = draw(4)
    stacks = jax.tree.map(lambda a: Stacked(a[None], jnp.int32(0)), make_weights("bfloat16"))
    options = {"limit": LIMIT, "quantize_activations": False}
    with pytest.raises(UnsupportedError, match="only infer"):
        jax.grad(lambda x: pallas_tpu.apply_experts(x, ids, weights, *stacks, **options).sum())(x)


# What cannot run, and a word of the reason.
REFUSED = {
    "float32 activations": (jnp.float32, (256, 256), "bfloat16", "activations"),
    "narrow": (jnp.bfloat16, (256, 64), "fp4", "divide"),
    "float32 weights": (jnp.bfloat16, (256, 256), "float32", "quantized"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused(case):
    dtype, (width, inner), kind, word = case
    shapes = (2, 2, inner, width), (2, width, inner)
    if kind == "float32":
        weights = [jnp.zeros(shape) for shape in shapes]
    else:
        weights = [store(np.zeros(shape), kind) for shape in shapes]
    x = jnp.zeros((4, width), dtype)
    assert word in pallas_tpu.supported(x, *weights)
    with dispatch.compiling_for("tpu"):
        assert choose(x, *weights) is reference


# name: assignments, experts, rows of a tile where matrix units are 128 wide, and 256
TILES = {
    "decode": (16 * 6, 256, 16, 16),
    "a chunk over all experts of Flash": (2048 * 6, 256, 64, 64),
    "as many rows as experts have in the middle": (160 * 32, 32, 128, 256),
    "a chunk over an eighth": (2048 * 6, 32, 128, 512),
    "a long chunk": (65536 * 6, 256, 128, 512),
}


@pytest.mark.parametrize("case", TILES.values(), ids=TILES.keys())
def test_tile(case, monkeypatch):
    """An expert's mean load fits into one tile, up to 512 rows, of wide units."""
    assignments, experts, narrow, wide = case
    for device, tile in (("TPU v5", narrow), ("TPU v6 lite", wide)):
        monkeypatch.setattr(dispatch, "device_kind", lambda device=device: device)
        assert pallas_tpu.choose_tile(assignments, experts) == tile


def test_cpu_keeps_the_reference():
    assert choose(draw(4)[0], *make_weights("fp4")) is reference


def abstract(shape, kind):
    return jax.eval_shape(lambda: store(jnp.zeros(shape), kind))


# Hidden size, expert width, experts.
FLASH, PRO = (4096, 2048, 256), (7168, 3072, 384)
# name → (size, stored, rows per tile)
COMPILED = {
    "Flash decodes": (FLASH, "fp4", 16),
    "Pro prefills on many chips": (PRO, "fp4", 512),
    "an eighth of Flash in bfloat16": ((4096, 2048, 32), "bfloat16", 512),
    "an eighth of Flash in FP8": ((4096, 2048, 32), "fp8", 64),
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TOPOLOGIES.values())
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_compiles(case, topology):
    (width, inner, experts), kind, tile = case
    tiles = 8

    def both(rows, weights, gate_up, down, places, used, loads):
        options = {"limit": 10.0, "quantized": kind != "bfloat16", "loads": loads}
        hidden = pallas_tpu.multiply_gated(rows, weights, gate_up, down, places, used, **options)
        return pallas_tpu.linear.multiply_tiles(hidden, down, places, used, tile=tile, loads=loads)

    compiled = ahead_of_time.compile_for(
        topology,
        both,
        jax.ShapeDtypeStruct((tiles * tile, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((tiles, tile), jnp.float32),
        abstract((experts, 2, inner, width), kind),
        abstract((experts, width, inner), kind),
        jax.ShapeDtypeStruct((tiles,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((tiles,), jnp.int32),
    )
    assert compiled.as_text().count("tpu_custom_call") >= 2


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TOPOLOGIES.values())
def test_gradients_compile(topology):
    """Pro, an eighth of the experts, as training on eight chips has them."""
    width, inner, experts = PRO[0], PRO[1], PRO[2] // 8
    tile, tiles = pallas_tpu_backward.LARGEST_TILE, 8
    shape = jax.ShapeDtypeStruct

    def gradients(rows, weights, gate_up, down, places, used):
        options = {"tile": tile}
        hidden, both, _ = pallas_tpu_backward.inner(
            rows, rows, weights, gate_up, down, places, used, limit=10.0, **options
        )
        flat = gate_up.reshape(experts, 2 * inner, width)
        d_rows = pallas_tpu_backward.multiply_transposed(both, flat, places, used, **options)
        sums = [
            pallas_tpu_backward.sum_products(left, right, places, used, count=experts, **options)
            for left, right in ((both, rows), (rows, hidden))
        ]
        return d_rows, sums

    compiled = ahead_of_time.compile_for(
        topology,
        gradients,
        shape((tiles * tile, width), jnp.bfloat16),
        shape((tiles * tile, 1), jnp.float32),
        shape((experts, 2, inner, width), jnp.bfloat16),
        shape((experts, width, inner), jnp.bfloat16),
        shape((tiles,), jnp.int32),
        shape((), jnp.int32),
    )
    assert compiled.as_text().count("tpu_custom_call") >= 4
