"""Gradients of the training pass against transformers' autograd on the spot, float32.

Dense and sparse layers in one model of odd sizes: window, CSA whose selection truncates, HCA, hash
and learned routers. Transformers has no MTP block, so ours is switched off.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from v4jax.checkpoint import names
from v4jax.config.run import LossConfig
from v4jax.model.weights import read_weights, write_weights
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.losses import compute_losses, count_totals

from . import checkpoints
from .test_live import FLASH_LIKE, tensors_of

torch = pytest.importorskip("torch", reason="needs the [oracle] extra")
pytest.importorskip("transformers", "5.17", reason="needs the [oracle] extra")

from . import hf  # noqa: E402

pytestmark = pytest.mark.oracle

TOKENS = 300
# Of the norm of a tensor's gradient; float32 through five layers, the other order of every sum.
RELATIVE = 2e-4
# Of the norm of all gradients: what cancels, such as a gate's, is a difference of larger numbers.
ABSOLUTE = 2e-7


@functools.cache
def ids():
    return np.random.RandomState(8).randint(0, FLASH_LIKE["vocab_size"], TOKENS)


@functools.cache
def tensors():
    return checkpoints.dequantize(tensors_of(FLASH_LIKE))


@functools.cache
def ours():
    """Returns the loss, and the gradient of every tensor by its released name."""
    model = small_models.load_tensors(tensors(), FLASH_LIKE)
    batch = Batch(jnp.asarray(ids()[None], jnp.int32), jnp.ones((1, TOKENS)))

    @jax.jit
    def run(weights):
        totals = count_totals(batch, model.config)
        options = LossConfig(mtp_weight=0, balance_weight=0), Mode()
        return compute_losses(write_weights(model, weights), batch, totals, *options)[0]

    loss, gradients = jax.value_and_grad(run)(read_weights(model))
    found = {
        place.tensor: np.asarray(gradients[place.parameter])[place.index]
        for place in names.places(model.config)
        if place.parameter in gradients and not place.tensor.startswith("mtp.")
    }
    return float(loss), found


@functools.cache
def theirs():
    """Returns transformers' model after the backward pass, and its loss."""
    model = hf.build(tensors(), FLASH_LIKE)
    tokens = torch.tensor(ids()[None])
    logits = model(tokens, use_cache=False).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    loss.backward()
    return model, float(loss.detach())


def gradient_of_theirs(name):
    """Returns the gradient of a released tensor; None where nothing reached it."""
    parameters = dict(theirs()[0].named_parameters())
    if ".experts." not in name or ".shared_experts." in name:
        gradient = parameters[hf.hf_name(name)].grad
        return None if gradient is None else gradient.numpy()
    layer, expert, which = (name.split(".")[i] for i in (1, 4, 5))
    prefix = f"model.layers.{layer}.mlp.experts."
    if which == "w2":
        return parameters[prefix + "down_proj"].grad[int(expert)].numpy()
    both = parameters[prefix + "gate_up_proj"].grad[int(expert)].numpy()
    return np.split(both, 2)[which == "w3"]


def test_loss():
    assert ours()[0] == pytest.approx(theirs()[1], abs=1e-5)


def test_gradient_of_every_tensor():
    gradients = ours()[1]
    total = np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients.values()))
    compared = 0
    for name, gradient in gradients.items():
        if ".indexer." in name:
            assert not gradient.any(), name
            continue
        wanted = gradient_of_theirs(name)
        error = np.linalg.norm(gradient - wanted)
        assert error <= RELATIVE * np.linalg.norm(wanted) + ABSOLUTE * total, f"{name}: {error}"
        compared += 1
    assert compared > 150


def test_selection_truncates():
    """Otherwise sparse layers would be dense ones."""
    assert 4 * FLASH_LIKE["index_topk"] < TOKENS // 4
