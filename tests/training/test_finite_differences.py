"""Gradients of mHC, compressor and router against finite differences of the float64 transcription.

A random direction of all inputs at once: (f(x + εv) − f(x − εv)) / 2ε of the specification's NumPy
program is compared with the product of our float32 gradient and v.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import numpy_oracle
from small_models import CPU

from v4jax.config import RouterKind
from v4jax.config.loading import load_model_config
from v4jax.kernels import compressor, hyper_connections
from v4jax.model.parameters import Declare
from v4jax.model.router import Router
from v4jax.model.weights import write_weights

STEP = 1e-5  # truncation 1e-10, rounding of float64 1e-11
RELATIVE = 2e-5  # float32 sums of some hundred terms
TINY = load_model_config("tiny")


def check(ours, plain, inputs, seed=0):
    """Compares gradients of two scalar functions of {name: float64 array} in three directions."""
    random = np.random.RandomState(seed)
    gradients = jax.jit(jax.grad(ours))({k: jnp.asarray(x, jnp.float32) for k, x in inputs.items()})
    for name in inputs:  # every input gets some
        assert np.abs(gradients[name]).max() > 1e-4, name
    for name in [*inputs, None]:
        moved = inputs if name is None else [name]
        direction = {k: random.standard_normal(inputs[k].shape) for k in moved}
        ahead, back = (
            plain(inputs | {k: inputs[k] + sign * STEP * v for k, v in direction.items()})
            for sign in (1, -1)
        )
        slope = (ahead - back) / (2 * STEP)
        found = sum((np.asarray(gradients[k], float) * v).sum() for k, v in direction.items())
        size = sum(np.linalg.norm(gradients[k]) for k in direction)
        assert abs(found - slope) <= RELATIVE * max(abs(slope), size), (name, found, slope)


@pytest.mark.parametrize("sharp", [1.0, 6.0], ids=["mild", "sharp"])
def test_hyper_connections(sharp, monkeypatch):
    """One site around a tanh, through all 39 normalizations; also with a mix of nearly 0 and 1."""
    random, width = np.random.RandomState(1), 6
    inputs = {
        "streams": random.standard_normal((5, 4, width)),
        "fn": sharp * random.standard_normal((24, 4 * width)) / np.sqrt(4 * width),
        "base": random.standard_normal(24),
        "scale": 1 + 0.1 * random.standard_normal(3),
    }
    pull = random.standard_normal((5, 4, width))

    def ours(x):
        streams = x["streams"][None]
        collapsed, mix = hyper_connections.mix(
            *(streams, x["fn"], x["base"], x["scale"]),
            **{"norm_eps": 1e-6, "eps": 1e-6, "iterations": 20, "target": CPU},
        )
        return (hyper_connections.expand(jnp.tanh(collapsed), streams, mix)[0] * pull).sum()

    def plain(x):
        for name in ("fn", "base", "scale"):
            monkeypatch.setitem(numpy_oracle.W, f"site.{name}", x[name])
        return (numpy_oracle.site(x["streams"], "site.", np.tanh) * pull).sum()

    check(ours, plain, inputs)


@pytest.mark.parametrize("ratio, overlaps", [(4, True), (16, False)], ids=["CSA", "HCA"])
def test_compressor(ratio, overlaps, monkeypatch):
    random, channels, width, windows = np.random.RandomState(2), numpy_oracle.R, 10, 3
    rows = 2 * channels if overlaps else channels
    inputs = {
        "x": random.standard_normal((windows * ratio, width)),
        "key_value": random.standard_normal((rows, width)) / np.sqrt(width),
        "gate": random.standard_normal((rows, width)),
        "bias": random.standard_normal((ratio, rows)),
    }
    pull = random.standard_normal((windows, channels))

    def ours(x):
        before = ratio if overlaps else 0  # rows of a window before the first; nothing pools them
        values, gates = (
            jnp.pad(x["x"] @ x[name].T, [(before, 0), (0, 0)])[None]
            for name in ("key_value", "gate")
        )
        first = jnp.zeros(1, jnp.int32)
        pooled = compressor.pool(values, gates, x["bias"], first, overlaps=overlaps)[0]
        normed = pooled / jnp.sqrt((pooled**2).mean(-1, keepdims=True) + 1e-6)
        return (normed * pull).sum()

    def plain(x):
        names = {"wkv.weight": "key_value", "wgate.weight": "gate", "ape": "bias"}
        for name, ours in names.items():
            monkeypatch.setitem(numpy_oracle.W, "c." + name, x[ours])
        monkeypatch.setitem(numpy_oracle.W, "c.norm.weight", np.ones(channels))
        still = np.zeros(channels // 2)  # no rotation
        return (numpy_oracle.compress(x["x"], "c.", ratio, channels, still) * pull).sum()

    check(ours, plain, inputs)


@pytest.mark.parametrize("kind", RouterKind)
def test_router(kind):
    """The weights of the chosen experts; the choice itself has no gradient."""
    random, count = np.random.RandomState(3), 9
    router = Router(Declare(TINY, "float32", nnx.Rngs(0)), TINY, kind)
    inputs = {
        "x": random.standard_normal((count, TINY.hidden_size)),
        "weight": 0.3 * random.standard_normal((TINY.n_routed_experts, TINY.hidden_size)),
    }
    tokens = random.randint(0, TINY.vocab_size, count)
    pull = random.standard_normal((count, TINY.num_experts_per_tok))

    def scores(x):
        return np.sqrt(numpy_oracle.softplus(x["x"] @ x["weight"].T))

    ids = np.argsort(-scores(inputs), 1)[:, : TINY.num_experts_per_tok]
    if kind is RouterKind.HASH:
        ids = np.asarray(router.table[...])[tokens]

    def ours(x):
        module = write_weights(router, {"weight": x["weight"]})
        _, weights, _ = module(x["x"], jnp.asarray(tokens), CPU)
        return (weights * pull).sum()

    def plain(x):
        chosen = np.take_along_axis(scores(x), ids, 1)
        weights = chosen / chosen.sum(1, keepdims=True) * TINY.routed_scaling_factor
        return (weights * pull).sum()

    check(ours, plain, inputs)
