"""Routing: scores, the part of the bias, tables, and gradients at extreme logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from v4jax.model.router import softplus

from .test_pieces import block

FLOAT32 = 1e-6
# J.2 prints eight digits after the point, of which the last two of −1 are float32 noise.
GOLDEN = {-5: 0.08194723, -1: 0.55969788, 0: 0.83255461, 1: 1.14597630, 5: 2.23756907, 25: 5.0}


@pytest.fixture(scope="module")
def model():
    return small_models.golden_model("flash")


def inputs(model, tokens=40):
    random = np.random.RandomState(3)
    x = random.standard_normal((tokens, model.config.hidden_size)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(random.randint(0, model.config.vocab_size, tokens))


@jax.jit
def route(router, x, tokens):
    return router(x, tokens, small_models.CPU)[:2]


def scores_of(router, x):
    logits = np.asarray(x, float) @ np.asarray(router.weight[...].astype(jnp.float32), float).T
    return np.sqrt(np.log1p(np.exp(logits)))


def test_golden_scores():
    found = jnp.sqrt(softplus(jnp.array(list(GOLDEN), jnp.float32)))
    np.testing.assert_allclose(found, list(GOLDEN.values()), 0, 3e-7)


def test_choice_by_score_and_bias(model):
    """The bias takes part in the choice only; weights are the chosen scores, normalized."""
    router, (x, tokens) = block(model, 3).moe.router, inputs(model)
    ids, weights = route(router, x, tokens)
    scores, bias = scores_of(router, x), np.asarray(router.bias[...], float)
    expected = np.argsort(-(scores + bias), 1, kind="stable")[:, : ids.shape[1]]
    np.testing.assert_array_equal(np.sort(ids), np.sort(expected))
    assert not np.array_equal(np.sort(expected), np.sort(np.argsort(-scores)[:, : ids.shape[1]]))
    chosen = np.take_along_axis(scores, np.asarray(ids), 1)
    wanted = chosen / chosen.sum(1, keepdims=True) * model.config.routed_scaling_factor
    np.testing.assert_allclose(weights, wanted, 0, FLOAT32)
    np.testing.assert_allclose(weights.sum(1), model.config.routed_scaling_factor, 0, FLOAT32)


def test_choice_by_table(model):
    """The table gives the ids; the learned gate still gives the weights."""
    router, (x, tokens) = block(model, 0).moe.router, inputs(model)
    ids, weights = route(router, x, tokens)
    np.testing.assert_array_equal(ids, np.asarray(router.table[...])[np.asarray(tokens)])
    chosen = np.take_along_axis(scores_of(router, x), np.asarray(ids), 1)
    wanted = chosen / chosen.sum(1, keepdims=True) * model.config.routed_scaling_factor
    np.testing.assert_allclose(weights, wanted, 0, FLOAT32)


def test_ties_go_to_the_smaller_expert(model):
    router, (x, tokens) = block(model, 3).moe.router, inputs(model)
    flat = jax.tree.map(jnp.zeros_like, router)
    ids, weights = route(flat, x, tokens)
    count = model.config.num_experts_per_tok
    np.testing.assert_array_equal(ids, np.tile(np.arange(count), (len(x), 1)))
    np.testing.assert_allclose(weights, model.config.routed_scaling_factor / count, 0, FLOAT32)


@pytest.mark.parametrize("logit", [-1e4, -200.0, -100.0, -80.0, -30.0, 0.0, 19.9, 20.1, 1e4])
def test_gradients_stay_finite(logit):
    """√softplus underflows far below zero, where its gradient would be 0/0 (spec H.28)."""
    value, slope = jax.value_and_grad(lambda x: jnp.sqrt(softplus(x)))(jnp.float32(logit))
    assert np.isfinite(value) and np.isfinite(slope) and value >= 0
    if abs(logit) < 50:
        wanted = 1 / (1 + np.exp(-logit)) / (2 * np.sqrt(np.log1p(np.exp(logit))))
        np.testing.assert_allclose(slope, wanted, 1e-5)
