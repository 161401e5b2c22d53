"""The optimizer: Muon for matrices, AdamW for the rest, as an optax transformation.

Under AdamW: embedding, head, norms, sinks, the static parts of the hyper-connections (`base`,
`scale`) and the compressor's `position_bias`, which is added and multiplies nothing. Every other
weight is a stack of independent matrices [out, in] under Muon: each expert's three, and each group
of the grouped output projection. One update of Muon has the root mean square `update_rms`, so both
share a learning rate.

Source: spec G.2. The report does not name sinks and `position_bias`; a vector cannot be
orthogonalized, and a bias is none of the maps that Muon is for.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from v4jax.config import ModelConfig
from v4jax.config.run import OptimizerConfig

# Two phases (report): eight steps that converge fast, two that polish.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
_ADAMW = ("embed", "head", "position_bias", "base", "scale", "sink")

Weights = Mapping[str, jax.Array]


def uses_muon(name: str) -> bool:
    """Says whether the weight of this name is trained by Muon."""
    parts = name.split(".")
    return parts[-1] not in _ADAMW and not (len(parts) > 1 and parts[-2].endswith("norm"))


def build_optimizer(
    config: OptimizerConfig, model: ModelConfig, steps: int
) -> optax.GradientTransformation:
    """Returns the transformation of gradients of weights by name into their updates."""
    rate = build_schedule(config, steps)

    def decays(weights: Weights) -> dict[str, bool]:
        return {name: not any(part in name for part in config.undecayed) for name in weights}

    def finish(scale: float) -> tuple[optax.GradientTransformation, ...]:
        return (
            optax.add_decayed_weights(config.weight_decay, mask=decays),
            optax.scale_by_learning_rate(lambda step: scale * rate(step)),
        )

    moments = jnp.dtype(config.moments)
    adamw = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=moments),
        *finish(config.adamw_rate),
    )
    if config.kind == "adamw":
        return adamw
    muon = optax.chain(
        in_matrices(
            contrib.scale_by_muon(
                NEWTON_SCHULZ,
                len(NEWTON_SCHULZ),
                config.momentum,
                mu_dtype=moments,
                weight_dimension_numbers=_dimensions,
            ),
            model,
            config.update_rms,
        ),
        *finish(1.0),
    )

    def labels(weights: Weights) -> dict[str, str]:
        return {name: "muon" if uses_muon(name) else "adamw" for name in weights}

    return optax.multi_transform({"muon": muon, "adamw": adamw}, labels)


def build_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear rise, plateau, cosine fall (spec G.3)."""
    rise = optax.linear_schedule(0.0, config.rate, config.warmup_steps)
    if not config.decay_steps:
        fall = optax.constant_schedule(config.rate)
    else:
        last = config.last_rate / config.rate
        fall = optax.cosine_decay_schedule(config.rate, config.decay_steps, last)
    plateau = optax.constant_schedule(config.rate)
    first_fall = steps - config.decay_steps
    # Step 0 already moves: the rise counts from 1.
    schedule = optax.join_schedules([rise, plateau, fall], [config.warmup_steps, first_fall + 1])
    return lambda step: schedule(step + 1)


def in_matrices(
    inner: optax.GradientTransformation, model: ModelConfig, update_rms: float
) -> optax.GradientTransformation:
    """Returns Muon's `inner` on stacks of independent matrices, with updates of `update_rms`.

    An orthogonalized n × m matrix has root mean square 1/√max(n, m).
    """

    def split(name, x):
        if name.endswith("attention.output_down"):  # […, g·r, k] → [… g, r, k]
            return x.reshape(*x.shape[:-2], model.o_groups, -1, x.shape[-1])
        return x

    def split_all(weights):
        return {name: split(name, x) for name, x in weights.items() if _is_array(x)}

    def init(weights):
        return inner.init(split_all(weights))

    def update(gradients, state, weights=None):
        del weights
        updates, state = inner.update(split_all(gradients), state)

        def join(name, gradient):
            if not _is_array(gradient):
                return gradient
            scale = update_rms * math.sqrt(max(updates[name].shape[-2:]))
            return (updates[name] * scale).reshape(gradient.shape).astype(gradient.dtype)

        return {name: join(name, x) for name, x in gradients.items()}, state

    return optax.GradientTransformation(init, update)


def _dimensions(weights: Weights) -> dict[str, contrib.MuonDimensionNumbers]:
    return {name: contrib.MuonDimensionNumbers(-1, -2) for name in weights}


def _is_array(x) -> bool:
    return not isinstance(x, optax.MaskedNode)
