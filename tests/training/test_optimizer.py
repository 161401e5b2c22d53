"""Muon and AdamW against a plain NumPy transcription of the specification (G.2), and the schedule.

NumPy computes in float64, the optimizer in float32. Newton–Schulz multiplies small singular values
by up to 3.4⁸, and their rounding with them, so updates are compared relative to their RMS.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.config.loading import load_model_config
from v4jax.config.numerics import FLOAT32
from v4jax.config.run import OptimizerConfig
from v4jax.errors import ConfigError
from v4jax.model import abstract_transformer
from v4jax.model.weights import read_weights
from v4jax.training.optimizer import (
    adam_epsilon,
    build_optimizer,
    build_schedule,
    orthogonalize,
    uses_muon,
)

MODEL = load_model_config("tiny")
CONFIG = OptimizerConfig(rate=1e-2, decay_to=0.1, warmup_steps=2, decay_steps=3)
STEPS = 8
# Of the update's root mean square, after ten iterations in float32; measured 2e-4.
NEWTON_SCHULZ_ERROR = 1e-3


def hybrid_newton_schulz(x):
    """Spec G.2: X ← aX + b(XXᵀ)X + c(XXᵀ)²X, eight times fast, twice to polish."""
    if len(x) > len(x.T):
        return hybrid_newton_schulz(x.T).T
    x = x / np.sqrt((x**2).sum())
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


def independent(name, x, change):
    """Applies `change` to every independent matrix of a weight, in plain loops."""
    if x.ndim > 2:
        return np.stack([independent(name, part, change) for part in x])
    if name.endswith("attention.output_down"):
        return np.concatenate([change(part) for part in np.split(x, MODEL.o_groups)])
    return change(x)


def muon(name, w, gradients, config, rate):
    momentum = np.zeros_like(w)
    for step, gradient in enumerate(gradients):
        momentum = config.momentum * momentum + gradient
        nesterov = config.momentum * momentum + gradient

        def change(x):
            return hybrid_newton_schulz(x) * np.sqrt(max(x.shape)) * config.update_rms

        update = independent(name, nesterov, change)
        decay = 0 if "router" in name or "indexer" in name else config.weight_decay
        w = w * (1 - rate(step) * decay) - rate(step) * update
    return w


def adamw(name, w, gradients, config, rate):
    first, second = np.zeros_like(w), np.zeros_like(w)
    for step, gradient in enumerate(gradients):
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        unbiased = second / (1 - config.beta2 ** (step + 1))
        update = first / (1 - config.beta1 ** (step + 1)) / (np.sqrt(unbiased) + config.epsilon)
        decay = 0 if "router" in name or "indexer" in name else config.weight_decay
        w = w * (1 - rate(step) * decay) - rate(step) * update
    return w


def expected_rate(step):
    """Rise over two steps, plateau for three, cosine over the last three to the last rate."""
    low, high = CONFIG.decay_to * CONFIG.rate, CONFIG.rate
    fall = [low + (high - low) * (1 + np.cos(np.pi * n / 3)) / 2 for n in (1, 2, 3)]
    return [high / 2, high, high, high, high, *fall][step]


# Every kind of weight once: tall, wide, stacked, in groups, vectors, tables.
SHAPES = {
    "stack.suffix.0.attention.query_up": (24, 8),
    "stack.period.0.attention.output_down": (3, 12, 20),
    "stack.period.0.moe.experts.gate_up": (2, 4, 2, 6, 10),
    "stack.suffix.0.moe.router.weight": (5, 16),
    "stack.suffix.0.attention.indexer.query_up": (12, 8),
    "embed": (12, 6),
    "stack.suffix.0.attention.compressor.position_bias": (4, 6),
    "stack.period.0.attention_norm.weight": (3, 16),
    "stack.suffix.0.attention.sink": (4,),
    "stack.suffix.0.attention_hyper.base": (24,),
}


@functools.cache
def example():
    """Returns weights and the gradients of four steps; sizes of gradients differ widely."""
    random = np.random.RandomState(0)

    def draw(shape):
        return random.standard_normal(shape).astype(np.float32)

    weights = {name: draw(shape) for name, shape in SHAPES.items()}
    return weights, [
        {name: 10.0**-n * draw(shape) for n, (name, shape) in enumerate(SHAPES.items())}
        for _ in range(4)
    ]


@functools.cache
def trained(config):
    """Returns the weights after the example's steps, and the optimizer's state."""
    optimizer, rate = build_optimizer(config, MODEL), build_schedule(config, STEPS)
    weights, gradients = example()

    @jax.jit
    def update(weights, state, gradients, rate):
        updates, state = optimizer.update(gradients, state, weights)
        return jax.tree.map(lambda weight, update: weight + rate * update, weights, updates), state

    state = optimizer.init(weights)
    for step, given in enumerate(gradients):
        weights, state = update(weights, state, given, rate(step))
    return jax.tree.map(np.asarray, weights), state


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_specification(name):
    weights, gradients = example()
    rule = muon if uses_muon(name) else adamw
    series = [np.asarray(step[name], float) for step in gradients]
    wanted = rule(name, np.asarray(weights[name], float), series, CONFIG, expected_rate)
    error = NEWTON_SCHULZ_ERROR * CONFIG.update_rms if uses_muon(name) else 2e-6
    total = 4 * CONFIG.rate * error + 1e-6  # weights of size 1 in float32
    np.testing.assert_allclose(trained(CONFIG)[0][name], wanted, 0, total)


def test_adamw_for_all():
    config = dataclasses.replace(CONFIG, kind="adamw", adamw_rate=0.5)
    weights, gradients = example()
    for name in SHAPES:
        series = [np.asarray(step[name], float) for step in gradients]
        wanted = adamw(
            name, np.asarray(weights[name], float), series, config,
            lambda step: 0.5 * expected_rate(step),
        )  # fmt: skip
        np.testing.assert_allclose(trained(config)[0][name], wanted, 0, 2e-6)


def test_updates_have_the_rms_of_adamw():
    """0.18 for every independent matrix, whatever the size of its gradient; zeros stay zero."""
    random = np.random.RandomState(1)
    gradients = {
        "stack.prefix.0.moe.experts.down": random.standard_normal((6, 20, 32)).astype(np.float32),
        "stack.prefix.0.attention.output_down": random.standard_normal((16, 24)).astype(np.float32),
    }
    # One expert got hardly anything, one so little that float32 squares it to 0, one nothing.
    gradients["stack.prefix.0.moe.experts.down"] *= np.array([1, 1e6, 1e-6, 1, 1e-25, 0])[
        :, None, None
    ].astype(np.float32)
    gradients["stack.prefix.0.attention.output_down"][:8] *= 1e-4
    found = jax.jit(lambda x: orthogonalize(x, MODEL, 0.18))(gradients)
    down = np.asarray(found["stack.prefix.0.moe.experts.down"])
    rms = np.sqrt((down**2).mean((1, 2)))
    np.testing.assert_allclose(rms[:4], 0.18, 1e-3)
    assert rms[4] < 1e-3 and rms[5] == 0
    groups = np.split(np.asarray(found["stack.prefix.0.attention.output_down"]), 2)
    np.testing.assert_allclose([np.sqrt((g**2).mean()) for g in groups], 0.18, 1e-3)


def test_moments_in_bfloat16():
    config = dataclasses.replace(CONFIG, moments="bfloat16")
    weights, state = trained(config)
    exact = trained(CONFIG)[0]
    for name, weight in weights.items():
        # Four roundings of 2⁻⁹ in a direction of RMS 0.18 or 1.
        np.testing.assert_allclose(weight, exact[name], 0, 4 * CONFIG.rate * 0.05, err_msg=name)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert kinds == {"bfloat16", "float32"}  # the second moments of AdamW stay float32


# First steps, sign changes, silence before a gradient, and silence after it.
TINY_GRADIENTS = {
    "constant": lambda random: np.ones(40),
    "noise": lambda random: random.standard_normal(40),
    "rare": lambda random: np.arange(40) % 13 == 12,
    "growing": lambda random: 1.3 ** np.arange(-39, 1),
}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_tiny_gradients_never_exceed_the_bound(moments):
    """Squares below the smallest float32 are 0: without a bound, updates reached 45 rates."""
    config = OptimizerConfig("adamw", 1.0, warmup_steps=0, weight_decay=0.0, moments=moments)
    one, two = config.beta1, config.beta2
    bound = np.sqrt((1 - one) ** 2 / (1 - two) / (1 - one**2 / two))
    # A step rounds the first moment by 2⁻⁹ of it, and keeps the errors of ten steps.
    bound *= 1 + (2**-9 / (1 - one) if moments == "bfloat16" else 1e-5)
    random, sizes = np.random.RandomState(0), np.logspace(-24, -15, 181)
    shapes = np.stack([make(random) for make in TINY_GRADIENTS.values()])
    gradients = (shapes[:, None] * sizes[:, None]).astype(np.float32)  # [case, size, step]
    optimizer = build_optimizer(config, MODEL)
    weights = {"norm.weight": jnp.zeros(gradients.shape[:2])}

    def step(state, gradient):
        updates, state = optimizer.update({"norm.weight": gradient}, state, weights)
        return state, updates["norm.weight"]

    run = jax.jit(lambda series: jax.lax.scan(step, optimizer.init(weights), series)[1])
    largest = np.abs(run(jnp.moveaxis(jnp.asarray(gradients), -1, 0))).max((0, 2))
    assert (largest <= bound).all(), dict(zip(TINY_GRADIENTS, largest, strict=True))
    assert (largest[:2] > 0.99).all()  # those that float32 can square move by the rate


def test_epsilon_is_the_configured_one_where_it_can_be():
    assert adam_epsilon(OptimizerConfig()) == pytest.approx(6.86e-19, rel=1e-3)
    assert adam_epsilon(OptimizerConfig(epsilon=1e-8)) == 1e-8


# ---- which weight is trained by what ----


@functools.cache
def names():
    return read_weights(abstract_transformer(MODEL, FLOAT32, storage="float32"))


def test_assignment_of_every_weight():
    """The endings of all weights of the tiny model, as the report assigns them (spec G.2)."""
    by_muon = {name for name in names() if uses_muon(name)}
    assert {_ending(name) for name in by_muon} == {
        "attention.query_down", "attention.query_up", "attention.key_value",
        "attention.output_down", "attention.output_up", "attention.compressor.key_value",
        "attention.compressor.gate", "attention.indexer.query_up",
        "attention.indexer.head_weights", "attention.indexer.compressor.key_value",
        "attention.indexer.compressor.gate", "attention_hyper.fn", "moe_hyper.fn", "collapse.fn",
        "moe.router.weight", "moe.experts.gate_up", "moe.experts.down", "moe.shared.gate_up",
        "moe.shared.down", "embed_projection", "stream_projection",
    }  # fmt: skip
    assert {_ending(name) for name in names().keys() - by_muon} == {
        "embed", "head", "norm.weight", "attention_norm.weight", "moe_norm.weight",
        "attention.query_norm.weight", "attention.key_value_norm.weight",
        "attention.compressor.norm.weight", "attention.indexer.compressor.norm.weight",
        "embed_norm.weight", "stream_norm.weight", "attention.sink",
        "attention.compressor.position_bias", "attention.indexer.compressor.position_bias",
        "attention_hyper.base", "attention_hyper.scale", "moe_hyper.base", "moe_hyper.scale",
        "collapse.base", "collapse.scale",
    }  # fmt: skip
    assert all(names()[name].ndim >= 2 for name in by_muon)


def _ending(name):
    """Drops the place of a block: "stack.period.0.attention.sink" → "attention.sink"."""
    parts = name.split(".")
    if parts[0] == "stack":
        parts = parts[3:]
    elif parts[0] == "mtp":
        parts = parts[3:] if parts[2] == "block" else parts[2:]
    return ".".join(parts)


def test_what_does_not_decay():
    """With gradients of zero only decay moves a weight."""
    weights = {name: jnp.ones((2,) * x.ndim) for name, x in names().items()}
    optimizer = build_optimizer(dataclasses.replace(CONFIG, kind="adamw"), MODEL)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(weights), weights)
    still = {_ending(name) for name, update in updates.items() if not np.asarray(update).any()}
    assert still == {
        "moe.router.weight", "attention.indexer.query_up", "attention.indexer.head_weights",
        "attention.indexer.compressor.key_value", "attention.indexer.compressor.gate",
        "attention.indexer.compressor.norm.weight",
        "attention.indexer.compressor.position_bias",
    }  # fmt: skip
    moved = {float(np.ravel(u)[0]) for n, u in updates.items() if _ending(n) not in still}
    np.testing.assert_allclose(list(moved), -0.1, 1e-6)  # at rate 1


# ---- the learning rate ----


def test_schedule():
    rate = build_schedule(CONFIG, STEPS)
    found = [float(rate(step)) for step in range(STEPS)]
    np.testing.assert_allclose(found, [expected_rate(step) for step in range(STEPS)], 1e-6)


# Name: (changes of the configuration, steps, rate of every step in units of `rate`).
SCHEDULES = {
    "no rise, no fall": ({"warmup_steps": 0, "decay_steps": 0}, 3, [1, 1, 1]),
    "no rise": ({"warmup_steps": 0, "decay_steps": 2}, 3, [1, 0.55, 0.1]),
    "rise meets fall": ({"warmup_steps": 2, "decay_steps": 2}, 4, [0.5, 1, 0.55, 0.1]),
    "all fall": ({"warmup_steps": 0, "decay_steps": 2}, 2, [0.55, 0.1]),
    "to zero": ({"warmup_steps": 0, "decay_steps": 1, "decay_to": 0.0}, 2, [1, 0]),
    "another rate": ({"rate": 1e-5}, 5, [1e-3 / 2, 1e-3, 1e-3 * 0.775, 1e-3 * 0.325, 1e-4]),
    "shares of the run": ({"warmup_steps": 0.5, "decay_steps": 0.25}, 4, [0.5, 1, 1, 0.1]),
    "shares of a short run": ({"warmup_steps": 0.3, "decay_steps": 0.7}, 1, [1]),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedule_edges(case):
    changes, steps, wanted = SCHEDULES[case]
    rate = build_schedule(dataclasses.replace(CONFIG, **changes), steps)
    found = [float(rate(step)) / CONFIG.rate for step in range(steps)]
    np.testing.assert_allclose(found, wanted, 1e-6, 1e-8)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rate", 0),
        ("clip_norm", -1),
        ("momentum", 1),
        ("accumulate", 0),
        ("decay_to", 2.7e3),
        ("warmup_steps", 1.5),
        ("decay_steps", -0.5),
    ],
)
def test_misuse(field, value):
    with pytest.raises(ConfigError, match=rf"train\.optimizer\.{field} must be .*{value}"):
        OptimizerConfig(**{field: value})
