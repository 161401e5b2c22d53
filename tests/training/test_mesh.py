"""A step on eight simulated devices equals a step on one: losses, gradients, update, shardings.

The optimizer is AdamW, whose first moments show the gradients; Muon on a mesh is compared by
itself. Rows are packed, and split in the middle of their documents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parallel.golden import check_collectives, skip_other_versions
from small_models import PAIRS, TINY, make_config, make_model, on_mesh

from v4jax.config.run import LossConfig, OptimizerConfig
from v4jax.model.weights import read_weights
from v4jax.parallel import make_mesh
from v4jax.training.batch import Batch, put_batch
from v4jax.training.forward import Mode
from v4jax.training.optimizer import adam_epsilon, build_optimizer, build_schedule, orthogonalize
from v4jax.training.state import init_state, split_model
from v4jax.training.step import build_step

# Sums of float32 in another order, through all blocks; relative to the norm of a gradient.
GRADIENTS = 1e-4
LOSSES = 2e-6

# `parallel/test_model.py` compares the gradients of all kinds of layers. Here the losses are the
# matter, and one layer has them all but that of MTP. Fewer iterations compile sooner.
LAYER = make_config("csa", hc_sinkhorn_iters=2)
CASES = [
    pytest.param(LAYER, dict(expert=2, context=2, tensor=2), id="one layer"),
    pytest.param(
        PAIRS, dict(data=2, expert=2, context=2), id="five blocks", marks=pytest.mark.slow
    ),
]
OPTIMIZER = OptimizerConfig(kind="adamw", rate=1e-3, warmup_steps=1)


@functools.cache
def batches():
    """Rows of two documents of 256 tokens, each on two devices.

    With these ids no choice of entries or experts is a tie but for rounding. A program with another
    order of sums would choose otherwise in a tie, which moves the loss by 1e-5.
    """
    tokens = np.random.RandomState(0).randint(0, 256, (1, 2, 512)).astype(np.int32)
    begin = np.broadcast_to(np.arange(512) // 256 * 256, tokens.shape).astype(np.int32)
    return Batch(tokens, np.ones(tokens.shape, np.float32), begin)


def run(config, sizes):
    """Returns the state before and after a step, its metrics, and its text after compilation."""
    made = on_mesh(make_model(config), "train", **sizes) if sizes else make_model(config)
    optimizer = build_optimizer(OPTIMIZER, config)
    rate = build_schedule(OPTIMIZER, 10)
    frozen, weights, biases = split_model(made, read_weights(made))
    state = init_state(frozen, weights, biases, optimizer)
    step = jax.jit(build_step(LossConfig(), optimizer, rate, Mode(remat="none", distill=True), 1.0))
    batch = put_batch(batches(), made.layout)
    compiled = step.lower(frozen, state, batch).compile()
    after, metrics = compiled(frozen, state, batch)
    return state, after, jax.device_get(metrics), compiled.as_text()


@pytest.mark.parametrize("config, sizes", CASES)
def test_step_equals_one_device(config, sizes):
    wanted_start, wanted, wanted_metrics, _ = run(config, {})
    start, found, metrics, text = run(config, sizes)
    names = ["loss", "accuracy", "balance", "divergence", "recall", "grad_norm"]
    for name in names + ["mtp_loss"] * bool(config.num_nextn_predict_layers):
        assert metrics[name] == pytest.approx(wanted_metrics[name], rel=LOSSES, abs=LOSSES), name
    assert wanted_metrics["finite"] and wanted_metrics["grad_norm"] > 0.1
    # Counts of assignments and what follows from them are equal, not only close.
    jax.tree.map(np.testing.assert_array_equal, metrics["load"], wanted_metrics["load"])
    jax.tree.map(np.testing.assert_array_equal, found.biases, wanted.biases)
    gradients = find_adam(found).mu
    for name, gradient in find_adam(wanted).mu.items():
        error = np.linalg.norm(np.asarray(gradients[name]) - np.asarray(gradient))
        assert error <= GRADIENTS * np.linalg.norm(gradient), f"{name}: {error}"
    check_update(found, wanted_start.weights)
    check_shardings(start, found)
    skip_other_versions()
    check_collectives(text, f"train_{'_'.join(sizes)}")


def find_adam(state):
    parts = jax.tree.leaves(state.optimizer, is_leaf=_is_adam)
    return next(part for part in parts if _is_adam(part))


def _is_adam(node):
    return hasattr(node, "mu") and hasattr(node, "nu")


def check_update(state, weights):
    """The first update is AdamW's of the state's own moments.

    It is the sign of each gradient, and those of a first site, whose streams are all equal, are
    nothing but rounding. Weights are therefore not compared with one device's.
    """
    adam, rate = find_adam(state), OPTIMIZER.rate
    for name, weight in weights.items():
        first, second = (np.asarray(x[name]) for x in (adam.mu, adam.nu))
        update = first / (1 - OPTIMIZER.beta1)
        update /= np.sqrt(second / (1 - OPTIMIZER.beta2)) + np.float32(adam_epsilon(OPTIMIZER))
        decay = 0 if "router" in name or "indexer" in name else OPTIMIZER.weight_decay
        wanted = np.asarray(weight) - rate * (update + decay * np.asarray(weight))
        np.testing.assert_allclose(state.weights[name], wanted, 1e-6, 1e-4 * rate, err_msg=name)


def check_shardings(before, after):
    """A compiled step returns every array where it was, moments beside their weights."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        assert b.sharding.is_equivalent_to(a.sharding, a.ndim), jax.tree_util.keystr(path)
    down = next(x for name, x in after.weights.items() if name.endswith("moe.experts.down"))
    assert down.addressable_shards[0].data.size * 8 == down.size


def test_muon_on_a_mesh():
    """Split for storage or by experts, matrices are orthogonalized as on one device."""
    random = np.random.RandomState(0)
    mesh = make_mesh(data=2, expert=2, tensor=2)
    arrays = {
        "stack.period.0.moe.experts.down": ((3, 4, 12, 16), P(None, "expert", "data", "tensor")),
        "stack.period.0.attention.output_down": ((3, 8, 16), P(None, "tensor", ("data", "expert"))),
        "stack.period.0.attention.query_up": ((3, 16, 8), P(None, "tensor", ("data", "expert"))),
    }
    whole = {k: random.standard_normal(s).astype(np.float32) for k, (s, _) in arrays.items()}
    split = {k: jax.device_put(x, NamedSharding(mesh, arrays[k][1])) for k, x in whole.items()}
    run = jax.jit(lambda x: orthogonalize(x, TINY, 0.18))
    found, wanted = run(split), run(jax.tree.map(jnp.asarray, whole))
    for name, update in wanted.items():
        np.testing.assert_allclose(found[name], update, 0, 1e-3, err_msg=name)
        assert found[name].sharding.is_equivalent_to(split[name].sharding, update.ndim), name
