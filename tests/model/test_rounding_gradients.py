"""Gradients under `released` numerics pass straight through the rounding of cached vectors.

The same layer is differentiated with roundings that hold their output and have the slope one by
construction.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import CPU

from v4jax.config import LayerKind, get_numerics
from v4jax.config.loading import load_model_config
from v4jax.model.attention import Attention
from v4jax.model.context import make_context
from v4jax.model.parameters import Declare
from v4jax.model.stack import full_sequence
from v4jax.quant import EntryFormat, formats

CONFIG = load_model_config("tiny")
NUMERICS = get_numerics("released")
LAYER = next(layer for layer in CONFIG.layers if layer.kind is LayerKind.CSA)
TOKENS = 140  # 35 entries, of which 8 are selected
# Both programs compute the same, and XLA orders sums of bfloat16 products in them as it likes.
SAME_PROGRAM = 1e-3


@pytest.fixture(scope="module")
def attention():
    """CSA rounds window, entries, index keys and queries; weights as a trainer keeps them."""
    declare = Declare(CONFIG, "float32", nnx.Rngs(0))
    random = np.random.RandomState(5)

    def enlarge(leaf):
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        return leaf + noise * (1.5 / np.sqrt(leaf.shape[-1]) if leaf.ndim > 1 else 0.3)

    return jax.tree.map(enlarge, Attention(declare, CONFIG, LAYER, NUMERICS))


def gradients(attention):
    """Returns {path: gradient} of a sum of outputs with random factors."""
    random = np.random.RandomState(7)
    shape = (1, TOKENS, CONFIG.hidden_size)
    x, factors = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for _ in range(2))
    start, ids = jnp.zeros(1, jnp.int32), jnp.zeros((1, TOKENS), jnp.int32)

    @jax.jit
    def differentiate(attention, x):
        def loss(attention, x):
            context = make_context(ids, start, start + TOKENS, {LAYER.rope}, CPU)
            memory = full_sequence(CONFIG, NUMERICS, LAYER, context)
            return (attention(x, context, memory)[0].astype(jnp.float32) * factors).sum()

        return jax.grad(loss, argnums=(0, 1))(attention, x)

    found = jax.tree_util.tree_leaves_with_path(differentiate(attention, x))
    return {jax.tree_util.keystr(k): np.asarray(v.astype(jnp.float32)) for k, v in found}


def hold_rounded(stored_as, x):
    """Returns `round(x)` with the gradient of what it rounds: r + (y − y), of which y is varied."""
    rounded = jax.lax.stop_gradient(stored_as.decode(stored_as.encode(x)))
    varied = formats.hadamard(x) if stored_as.kind == "fp4" else x
    return rounded + (varied - jax.lax.stop_gradient(varied)).astype(rounded.dtype)


def test_gradients_pass_every_rounding(attention, monkeypatch):
    found = gradients(attention)
    monkeypatch.setattr(EntryFormat, "round", hold_rounded)
    expected = gradients(attention)
    assert found.keys() == expected.keys()
    for path, gradient in found.items():
        assert np.isfinite(gradient).all(), path
        # Selection has no gradient: the indexer has a loss of its own.
        assert gradient.any() != ("indexer" in path), path
        norm = np.linalg.norm(expected[path])
        assert np.linalg.norm(gradient - expected[path]) <= SAME_PROGRAM * norm, path
