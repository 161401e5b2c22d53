"""One update of the weights: gradients of one or several batches, clipping, optimizer, biases.

frozen, weights, biases = split_trained(model, config)         # `trainable.py`
state = init_state(frozen, weights, biases, optimizer)         # `state.py`
step = build_step(config.loss, optimizer, rate, mode, clip_norm)
state, metrics = step(frozen, state, batches)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from v4jax.config.run import DraftTraining, LossConfig
from v4jax.training.batch import Batch
from v4jax.training.draft import compute_draft_losses, count_rows, place_anchors
from v4jax.training.forward import Mode
from v4jax.training.losses import compute_losses, count_totals
from v4jax.training.state import Frozen, TrainState, join_model


def build_step(
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    mode: Mode,
    clip_norm: float,
    draft: DraftTraining | None = None,
) -> Callable[[Frozen, TrainState, Batch], tuple[TrainState, dict]]:
    """Returns the step for its caller to compile; the state may be donated.

    The step takes stacked batches, arrays [n, b, t], one after the other. It sums their gradients,
    which equal those of one batch of n·b rows. If the loss or a gradient is not finite, weights,
    biases and optimizer stay as they are, and `skipped` counts the step. The rate goes on by
    `TrainState.step`, which counts these as well.

    Its metrics are the parts of `compute_losses`, or with `draft` of `compute_draft_losses`;
    `grad_norm` before clipping, `finite`, the `rate` of the update, and `load`: the assignments per
    expert of every router.

    Args:
      optimizer: gives updates at rate 1.
      rate: of the step that follows so many.
    """

    def step(frozen, state, batches):
        if draft is None:
            given, totals = (batches,), count_totals(batches, frozen.config)
        else:
            rows = frozen.config.draft.block_size
            key = jax.random.fold_in(jax.random.key(0), state.step)
            anchors = place_anchors(batches, draft.anchors, rows, key)
            given, totals = (batches, anchors), count_rows(anchors, draft.decay)

        def differentiate(given):
            def run(weights):
                model = join_model(frozen, dataclasses.replace(state, weights=weights))
                if draft is None:
                    return compute_losses(model, *given, totals, loss, mode)
                return compute_draft_losses(model, *given, totals, draft, mode)

            return jax.grad(run, has_aux=True)(state.weights)

        if batches.tokens.shape[0] == 1:
            gradients, parts = differentiate(jax.tree.map(lambda x: x[0], given))
        else:
            gradients, parts = _sum_over_batches(differentiate, given)
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
        now = jnp.asarray(rate(state.step), jnp.float32)
        updates = jax.tree.map(lambda update: now * update, updates)
        weights = keep(optax.apply_updates(state.weights, updates), state.weights)
        # The moments are updated after the weights. XLA would otherwise copy the old moments of the
        # largest weights, because both updates read them and either could be written first.
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
        return kept, parts | {"grad_norm": norm, "finite": finite, "rate": now, "load": load}

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

    Experts with less than the mean load become easier to choose, those with more become harder. No
    gradient is involved.
    """

    def move(name, bias):
        path = name.removesuffix(".moe.router.bias")
        if path not in reports:  # the MTP block, where its loss is switched off
            return bias
        load = reports[path]["load"]
        return bias + speed * jnp.sign(load.mean(axis=-1, keepdims=True) - load)

    return {name: move(name, bias) for name, bias in biases.items()}
