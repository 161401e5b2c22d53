"""Routed experts against a loop over tokens and choices, for every load and stored format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantizers

from v4jax.kernels import grouped_matmul
from v4jax.kernels.stacked import Stacked
from v4jax.quant import ScaledArray, quantize_weight

from .. import naive

EXPERTS, CHOSEN, INPUT, WIDTH = 5, 3, 64, 32
TOKENS = 37  # tiles of 8 rows do not divide 111 assignments
LIMIT = 0.7  # about the size of the activations: both clamps are active
FORMATS = ("float32", "fp8", "fp4")

apply = functools.partial(
    jax.jit(grouped_matmul.apply_experts, static_argnames=("limit", "quantize_activations")),
    limit=LIMIT,
)


@functools.cache
def make_weights(stored):
    """Returns (gate_up, down) in a stored format, and both as exact float64 arrays."""
    random = np.random.RandomState(0)
    gate_up = random.standard_normal((EXPERTS, 2, WIDTH, INPUT)) * 1.5 / np.sqrt(INPUT)
    down = random.standard_normal((EXPERTS, INPUT, WIDTH)) / np.sqrt(WIDTH)
    arrays = [jnp.asarray(x, jnp.float32) for x in (gate_up, down)]
    if stored != "float32":
        arrays = [jax.jit(quantize_weight, static_argnums=1)(x, stored) for x in arrays]
    return arrays, [np.asarray(plain(x), np.float64) for x in arrays]


def plain(weight):
    return jax.jit(ScaledArray.dequantize)(weight) if isinstance(weight, ScaledArray) else weight


def draw(tokens, seed=1):
    """Returns x, expert ids (distinct per token) and positive weights."""
    random = np.random.RandomState(seed)
    ids = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    weights = random.uniform(0.1, 1, (tokens, CHOSEN))
    x = jnp.asarray(random.standard_normal((tokens, INPUT)), jnp.float32)
    return x, ids.astype(np.int32), weights


def expert(x, gate_up, down, weight=1.0, round_input=lambda x: x):
    """One expert on one token, as spec B.13 words it."""
    x = round_input(x)
    gate = np.minimum(gate_up[0] @ x, LIMIT)
    up = np.clip(gate_up[1] @ x, -LIMIT, LIMIT)
    return down @ round_input(weight * (gate / (1 + np.exp(-gate)) * up))


def naive_experts(x, ids, weights, gate_up, down, **options):
    output = np.zeros((len(x), down.shape[1]))
    for token, choice in np.ndindex(*ids.shape):
        e = ids[token, choice]
        output[token] += expert(x[token], gate_up[e], down[e], weights[token, choice], **options)
    return output


def fp8(x):
    """Rounds one vector to FP8 in blocks of 128, as the inputs of quantized weights."""
    return quantizers.act_dequant(*quantizers.act_quant(x), 128).astype(np.float64)


# name → expert ids of TOKENS tokens.
LOADS = {
    "mixed": draw(TOKENS)[1],
    "all tokens on three experts": np.tile([4, 0, 2], (TOKENS, 1)),
    "all choices on one expert": np.full((TOKENS, CHOSEN), 3),
    "last expert only once": np.vstack([np.tile([0, 1, 2], (TOKENS - 1, 1)), [[0, 1, 4]]]),
}


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_values(load, stored):
    (gate_up, down), exact = make_weights(stored)
    x, _, weights = draw(TOKENS)
    output = apply(x, load.astype(np.int32), weights, gate_up, down)
    assert output.dtype == jnp.float32
    expected = naive_experts(np.asarray(x, float), load, weights, *exact)
    np.testing.assert_allclose(output, expected, 0, naive.FLOAT32)


@pytest.mark.parametrize("stored", FORMATS)
def test_one_token(stored):
    (gate_up, down), exact = make_weights(stored)
    x, ids, weights = draw(1)
    expected = naive_experts(np.asarray(x, float), ids, weights, *exact)
    np.testing.assert_allclose(apply(x, ids, weights, gate_up, down), expected, 0, naive.FLOAT32)


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("stored", ["fp8", "fp4"])
def test_rounded_activations(stored, tokens):
    """Inputs and inner activations round to FP8; the routing weight comes before the rounding."""
    (gate_up, down), exact = make_weights(stored)
    x, ids, weights = draw(tokens)
    output = apply(x, ids, weights, gate_up, down, quantize_activations=True)
    expected = naive_experts(np.asarray(x, float), ids, weights, *exact, round_input=fp8)
    difference = np.abs(output - expected)
    # Float32 noise moves a few inner values to the neighbouring FP8 code.
    assert np.median(difference) < naive.FLOAT32
    assert difference.max() < 0.05
    unrounded = naive_experts(np.asarray(x, float), ids, weights, *exact)
    assert np.median(np.abs(expected - unrounded)) > 100 * naive.FLOAT32


def test_plain_weights_see_plain_activations():
    (gate_up, down), _ = make_weights("float32")
    x, ids, weights = draw(TOKENS)
    rounded = apply(x, ids, weights, gate_up, down, quantize_activations=True)
    np.testing.assert_array_equal(rounded, apply(x, ids, weights, gate_up, down))


@pytest.mark.parametrize("stored", ["float32", "fp4"])
def test_one_layer_of_a_stack(stored):
    (gate_up, down), _ = make_weights(stored)
    x, ids, weights = draw(TOKENS)
    stacks = jax.tree.map(lambda a: jnp.stack([a * 0, a]), (gate_up, down))
    layer = jax.tree.map(lambda a: Stacked(a, jnp.int32(1)), stacks)
    found = apply(x, ids, weights, *layer)
    np.testing.assert_array_equal(found, apply(x, ids, weights, gate_up, down))


def test_clamps_stand_before_the_product():
    """Gate: an upper bound only. Up: both. A huge input saturates instead of growing."""
    gate_up = np.zeros((1, 2, 4, 4), np.float32)
    gate_up[0, :] = np.eye(4)
    gate_up[0, 1, 2:, 2:] = [[-1, 0], [0, -1]]
    x = jnp.asarray([[0.1, 50.0, 50.0, -50.0]], jnp.float32)
    output = apply(x, np.zeros((1, 1), np.int32), np.ones((1, 1)), gate_up, np.eye(4)[None] * 1.0)
    a = np.array([0.1, LIMIT, LIMIT, -50.0])
    b = np.array([0.1, LIMIT, -LIMIT, LIMIT])
    np.testing.assert_allclose(output[0], a / (1 + np.exp(-a)) * b, 0, naive.FLOAT32)


@pytest.mark.parametrize("stored", FORMATS)
def test_shared_expert(stored):
    (gate_up, down), exact = make_weights(stored)
    x = draw(TOKENS)[0]
    gate_up, down = jax.tree.map(lambda a: a[2], (gate_up, down))
    shared = jax.jit(functools.partial(grouped_matmul.apply_shared_expert, limit=LIMIT))
    expected = [expert(row, exact[0][2], exact[1][2]) for row in np.asarray(x, float)]
    np.testing.assert_allclose(shared(x, gate_up, down), expected, 0, naive.FLOAT32)


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_gradients(tokens):
    """Of inputs, routing weights and both weights; an expert without tokens gets exactly zero."""
    (gate_up, down), _ = make_weights("float32")
    x, ids, weights = draw(tokens)
    ids = np.where(ids == 1, 0, ids)
    weight = np.random.RandomState(2).standard_normal((tokens, INPUT))
    inputs = x, jnp.asarray(weights, jnp.float32), gate_up, down

    def ours(x, weights, gate_up, down):
        return (apply(x, ids, weights, gate_up, down) * weight).sum()

    def theirs(x, weights, gate_up, down):
        a, b = jnp.moveaxis(jnp.einsum("td,epfd->etpf", x, gate_up), 2, 0)
        hidden = jax.nn.silu(jnp.minimum(a, LIMIT)) * jnp.clip(b, -LIMIT, LIMIT)
        share = jnp.zeros((tokens, EXPERTS)).at[np.arange(tokens)[:, None], ids].add(weights)
        return (jnp.einsum("te,etf,edf->td", share, hidden, down) * weight).sum()

    found = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*inputs)
    wanted = jax.jit(jax.grad(theirs, argnums=(0, 1, 2, 3)))(*inputs)
    for value, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, expected, 1e-5, 10 * naive.FLOAT32)
    assert not np.any(found[2][1]) and not np.any(found[3][1])
