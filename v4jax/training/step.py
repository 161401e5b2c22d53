"""One update of the weights: gradients of one or several batches, clipping, optimizer, biases.

    frozen, weights, biases = split_model(model, trained_names)   # `trainable.py`
    state = init_state(weights, biases, optimizer)
    step = build_step(loss_config, optimizer, mode, clip_norm)
    state, metrics = step(frozen, state, batches)

The state holds what changes: the trained weights in float32, the routers' biases, the optimizer's
moments. `frozen` is the model without them: weights that stay as they are stored.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from v4jax.config.run import LossConfig
from v4jax.model import Transformer
from v4jax.model.weights import write_weights
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.losses import compute_losses, count_totals
from v4jax.training.trainable import as_float32, join_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, and a checkpoint keeps.

    step: updates done or skipped. weights: trained ones by name, float32. biases: of the routers
    that choose by score. optimizer: optax's state. skipped: steps in a row that were skipped.
    """

    step: Int[Array, ""]
    weights: dict[str, Array]
    biases: dict[str, Array]
    optimizer: optax.OptState
    skipped: Int[Array, ""]


def init_state(weights: dict, biases: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; works under `jax.eval_shape` too."""
    # Copies, because a step may reuse the buffers of its state.
    masters = {name: as_float32(value) for name, value in weights.items()}
    biases = jax.tree.map(lambda x: jnp.array(x, copy=True), biases)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, masters, biases, optimizer.init(masters), skipped)


def join_model(frozen: Transformer, state: TrainState) -> Transformer:
    """Returns the whole model, the trained weights as the computation uses them."""
    return write_weights(frozen, join_weights(frozen, state.weights) | state.biases)


def build_step(
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    mode: Mode,
    clip_norm: float,
) -> Callable[[Transformer, TrainState, Batch], tuple[TrainState, dict]]:
    """Returns the step, to be compiled by its caller (the state may be donated).

    The step takes stacked batches, every array [n, b, t]: gradients are summed over the n, one
    after the other, and equal those of one batch of n·b rows. If the loss or a gradient is not
    finite, weights, biases and optimizer stay as they are and `skipped` counts.

    Its metrics: the parts of `compute_losses`, `grad_norm` before clipping, `finite`, and `load`,
    assignments per expert of every router.
    """

    def step(frozen, state, batches):
        totals = count_totals(batches, frozen.config)

        def differentiate(batch):
            def run(weights):
                held = dataclasses.replace(state, weights=weights)
                return compute_losses(join_model(frozen, held), batch, totals, loss, mode)

            return jax.grad(run, has_aux=True)(state.weights)

        if batches.tokens.shape[0] == 1:
            gradients, parts = differentiate(jax.tree.map(lambda x: x[0], batches))
        else:
            gradients, parts = _sum_over_batches(differentiate, batches)
        return finish_step(state, gradients, parts)

    def finish_step(state, gradients, parts):
        reports = parts.pop("reports")
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(parts["loss"])
        clip = jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
        gradients = jax.tree.map(lambda g: g * clip, gradients)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        updates, _ = optimizer.update(gradients, state.optimizer, state.weights)
        weights = keep(optax.apply_updates(state.weights, updates), state.weights)
        # The moments move when the weights have been written: XLA makes both of the old moments,
        # and would copy those of the largest weights, to write either first.
        weights, moments = jax.lax.optimization_barrier((weights, state.optimizer))
        _, moved = optimizer.update(gradients, moments, state.weights)
        kept = dataclasses.replace(
            state,
            step=state.step + 1,
            weights=weights,
            biases=keep(move_biases(state.biases, reports, loss.bias_speed), state.biases),
            optimizer=keep(moved, moments),
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        load = {path: report["load"] for path, report in reports.items()}
        return kept, parts | {"grad_norm": norm, "finite": finite, "load": load}

    return step


def _sum_over_batches(differentiate, batches):
    """Returns the sums of gradients and of parts."""
    one = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, one))

    def add(sums, batch):
        return jax.tree.map(jnp.add, sums, differentiate(batch)), None

    return jax.lax.scan(add, zeros, batches)[0]


def move_biases(biases: dict, reports: dict, speed: float) -> dict:
    """Returns router biases moved by `speed` toward an even load (spec G.3).

    An expert with less than the mean load becomes easier to choose, one with more harder. No
    gradient is involved.
    """

    def move(name, bias):
        path = name.removesuffix(".moe.router.bias")
        if path not in reports:  # the MTP block, where its loss is switched off
            return bias
        load = reports[path]["load"]
        return bias + speed * jnp.sign(load.mean(axis=-1, keepdims=True) - load)

    return {name: move(name, bias) for name, bias in biases.items()}
