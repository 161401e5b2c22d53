"""The step: accumulation, clipping, steps that are skipped, and the routers' biases.

The optimizer here keeps the gradients it gets and changes nothing; what optimizers do is in
`test_optimizer.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import make_config, make_model

from v4jax.config.run import LossConfig
from v4jax.model.weights import read_weights
from v4jax.training.batch import PADDING, Batch
from v4jax.training.forward import Mode
from v4jax.training.state import init_state, split_model
from v4jax.training.step import build_step, move_biases

MODEL = make_config("window window")
CLIP = 0.5
LOSS = LossConfig(balance_weight=0.1, bias_speed=0.25)
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda weights: jax.tree.map(jnp.zeros_like, weights),
    lambda gradients, kept, weights: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)
# Sums over two batches in another order, of gradients of norm near 1.
FLOAT32 = 2e-6


@functools.cache
def begin():
    """Returns the frozen arrays and the state before the first step."""
    model = make_model(MODEL)
    frozen, weights, biases = split_model(model, read_weights(model))
    return frozen, init_state(frozen, weights, biases, KEEP_GRADIENTS)


# One program per number of batches; layers are computed again, and one of their outputs is kept.
MODE = Mode(keep=("attention_output",))
compiled = jax.jit(build_step(LOSS, KEEP_GRADIENTS, lambda step: 0.5**step, MODE, CLIP))


@functools.cache
def rows():
    """Two rows whose documents and weights differ, so that means of means would be wrong."""
    begin = np.full((2, 256), PADDING, np.int32)
    begin[0, :200], begin[1, :5], begin[1, 128:256] = 0, 0, 128
    random = np.random.RandomState(1)
    weights = np.where(begin < 0, 0, random.uniform(0.1, 1, begin.shape)).astype(np.float32)
    weights[1] *= 0.3
    return random.randint(0, 256, begin.shape).astype(np.int32), weights, begin


def batch(shape):
    return Batch(*(jnp.asarray(x.reshape(*shape, -1)) for x in rows()))


def step(batches, state=None):
    frozen, before = begin()
    return compiled(frozen, state or before, batches)


@functools.cache
def of_two_rows():
    return step(batch((1, 2)))


def test_two_batches_equal_one():
    found, metrics = step(batch((2, 1)))
    wanted, expected = of_two_rows()
    for name in ("loss", "accuracy", "balance", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], 1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, metrics["load"], expected["load"])
    jax.tree.map(np.testing.assert_array_equal, found.biases, wanted.biases)
    for name, gradient in wanted.optimizer.items():
        np.testing.assert_allclose(found.optimizer[name], gradient, 0, FLOAT32, err_msg=name)


def test_gradients_are_clipped_together_and_steps_counted():
    _, before = begin()
    state, metrics = of_two_rows()
    assert metrics["grad_norm"] > 2 * CLIP
    assert optax.tree.norm(state.optimizer) == pytest.approx(CLIP, rel=1e-5)
    assert metrics["finite"] and (state.step, state.skipped) == (1, 0)
    assert (before.step, before.skipped) == (0, 0)


def test_small_gradients_are_left_alone():
    """Without a target only the balance term pulls."""
    given = dataclasses.replace(batch((1, 2)), weights=jnp.zeros((1, 2, 256)))
    state, metrics = step(given)
    assert metrics["loss"] == 0 and 0 < metrics["grad_norm"] < CLIP
    assert optax.tree.norm(state.optimizer) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    assert not np.asarray(state.optimizer["head"]).any()
    assert np.asarray(state.optimizer["stack.period.0.moe.router.weight"]).any()


FN = "stack.period.0.attention_hyper.fn"
# What is broken: the loss, or only its gradient. An infinite factor saturates a sigmoid, whose
# slope of 0 then meets it again on the way back.
BROKEN = {
    "loss": lambda w: w | {"norm.weight": w["norm.weight"].at[0].set(jnp.nan)},
    "gradient": lambda w: w | {FN: w[FN].at[0, 0, 0].set(jnp.inf)},
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_finite_changes_nothing(case):
    _, before = begin()
    state = dataclasses.replace(before, weights=BROKEN[case](before.weights))
    for count in (1, 2):
        last = state
        state, metrics = step(batch((1, 2)), state)
        assert not metrics["finite"] and np.isfinite(metrics["loss"]) == (case == "gradient")
        assert (state.step, state.skipped) == (count, count)
        same = dataclasses.replace(state, step=last.step, skipped=last.skipped)
        jax.tree.map(np.testing.assert_array_equal, same, last)
    state, metrics = step(batch((1, 2)), dataclasses.replace(state, weights=before.weights))
    assert metrics["finite"] and (state.step, state.skipped) == (3, 0)
    assert metrics["rate"] == 0.25  # of the third step, skipped ones counted


def test_biases_move_toward_an_even_load():
    """Of every layer of the scan by its own load, counted over the whole batch (spec G.3)."""
    (_, before), (state, metrics) = begin(), of_two_rows()
    name = "stack.period.0.moe.router.bias"
    load = np.asarray(metrics["load"]["stack.period.0"])
    assert load.shape == (2, MODEL.n_routed_experts)
    # Every real token of both rows, and no padding.
    real = (rows()[2] >= 0).sum() * MODEL.num_experts_per_tok
    np.testing.assert_array_equal(load.sum(1), [real, real])
    toward = np.sign(load.mean(1, keepdims=True) - load)
    assert {-1, 1} <= set(np.unique(toward))
    np.testing.assert_array_equal(state.biases[name], before.biases[name] + 0.25 * toward)
    report = {"a": {"load": jnp.array([2.0, 4.0, 0.0])}}
    biases = {"a.moe.router.bias": jnp.ones(3), "mtp.0.block.moe.router.bias": jnp.ones(3)}
    moved = move_biases(biases, report, 0.5)
    np.testing.assert_array_equal(moved["a.moe.router.bias"], [1, 0.5, 1.5])
    np.testing.assert_array_equal(moved["mtp.0.block.moe.router.bias"], 1)  # did not run
