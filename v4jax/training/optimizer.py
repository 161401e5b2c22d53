"""The optimizer: Muon for matrices, AdamW for the rest, as an optax transformation; and its rate.

AdamW trains embeddings, heads, norms, sinks, the static parts of the hyper-connections (`base`,
`scale`) and the compressor's `position_bias`, which is added and multiplies nothing. Muon trains
every other weight as a stack of independent matrices [out, in], such as the three of each expert
and the groups of the grouped output projection. An update of Muon has the root mean square
`update_rms`, and both can share a learning rate.

Source: spec G.2. The report does not name sinks and `position_bias`. A vector cannot be
orthogonalized, and a bias is not a linear map. optax has a Muon too, but its momentum is a
bias-corrected average, which weighs the newest gradient more than G.2 does in the first steps.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from v4jax.config import ModelConfig
from v4jax.config.run import OptimizerConfig
from v4jax.training.patterns import find_named

# Coefficients of the two phases (report): eight fast iterations, two that polish.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
# Summand of a gradient's norm: zeros stay 0, and gradients whose square underflows stay below 1.
SMALLEST_NORM = 1e-12
_ADAMW = ("embed", "head", "position_bias", "base", "scale", "sink")
_ADAMW += ("markov_embed", "markov_head", "confidence_head")

# What a square in the second moments, float32 whatever `moments` is, must reach not to be flushed.
SMALLEST_SQUARE = float(jnp.finfo(jnp.float32).tiny)

Weights = Mapping[str, jax.Array]


def uses_muon(name: str) -> bool:
    """Returns whether Muon trains the weight of this name."""
    parts = name.split(".")
    return parts[-1] not in _ADAMW and not (len(parts) > 1 and parts[-2].endswith("norm"))


def build_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    """Returns the transformation from gradients, by name of their weight, to updates at rate 1.

    A step multiplies them by its rate (`build_schedule`). The optimizer itself counts updates for
    the bias of AdamW's moments alone.
    """

    def decays(weights: Weights) -> dict[str, bool]:
        kept = {name for pattern in config.undecayed for name in find_named(pattern, weights)}
        return {name: name not in kept for name in weights}

    def finish(scale: float) -> tuple[optax.GradientTransformation, ...]:
        return (
            optax.add_decayed_weights(config.weight_decay, mask=decays),
            optax.scale(-scale),
        )

    moments = jnp.dtype(config.moments)
    adamw = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, adam_epsilon(config), mu_dtype=moments),
        *finish(config.adamw_rate),
    )
    if config.kind == "adamw":
        return adamw
    muon = optax.chain(
        optax.trace(config.momentum, nesterov=True, accumulator_dtype=moments),
        optax.stateless(lambda gradients, _: orthogonalize(gradients, model, config.update_rms)),
        *finish(1.0),
    )

    def labels(weights: Weights) -> dict[str, str]:
        return {name: "muon" if uses_muon(name) else "adamw" for name in weights}

    return optax.multi_transform({"muon": muon, "adamw": adamw}, labels)


def adam_epsilon(config: OptimizerConfig) -> float:
    """Returns AdamW's epsilon: the configured one, unless it is below what float32 can bear.

    An update is at most √((1−β₁)² / (1−β₂) / (1−β₁²/β₂)) rates (Cauchy–Schwarz; 1.17 for the
    default betas), provided that the root of the second moment plus epsilon is not below that of
    the exact second moment. A step flushes at most two terms below `SMALLEST_SQUARE`, so the
    unbiased moment lacks less than 2·SMALLEST_SQUARE/(1−β₂). The root of this is enough: 6.9e-19
    for the default. With the report's 1e-20, gradients near 4e-19 had a second moment of 0 and
    moved weights by 40 rates.
    """
    return max(config.epsilon, math.sqrt(2 * SMALLEST_SQUARE / (1 - config.beta2)))


def build_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by `TrainState.step`: linear rise, plateau, cosine fall (G.3)."""
    rising, falling = config.spans(steps)
    rise = optax.linear_schedule(0.0, config.rate, rising)
    if not falling:
        fall = optax.constant_schedule(config.rate)
    else:
        fall = optax.cosine_decay_schedule(config.rate, falling, config.decay_to)
    plateau = optax.constant_schedule(config.rate)
    # Steps count from 1 here: step 0 already moves, and the last step has the last rate.
    schedule = optax.join_schedules([rise, plateau, fall], [rising, steps - falling])
    return lambda step: schedule(step + 1)


def orthogonalize(gradients: Weights, model: ModelConfig, update_rms: float) -> dict:
    """Returns the orthogonalized gradients, each matrix with root mean square `update_rms`.

    An orthogonal n × m matrix has root mean square 1/√max(n, m).
    """

    def change(path, x):
        if not path[0].key.endswith("attention.output_down"):
            return _orthogonalize(x, update_rms)
        groups_grk = x.reshape(*x.shape[:-2], model.o_groups, -1, x.shape[-1])
        return _orthogonalize(groups_grk, update_rms).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(change, gradients)


def _orthogonalize(x_nm, update_rms):
    """Orthogonalizes a stack of matrices […, n, m].

    The leading axes stay as they are, and experts therefore stay on their devices. Products have
    the platform's default precision, because bfloat16 is enough here (report).
    """
    tall = x_nm.shape[-2] > x_nm.shape[-1]
    x = jnp.swapaxes(x_nm, -1, -2) if tall else x_nm
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + SMALLEST_NORM)

    def iterate(x, factors):
        a, b, c = factors
        gram = x @ jnp.swapaxes(x, -1, -2)
        return a * x + (b * gram + c * (gram @ gram)) @ x, None

    x = jax.lax.scan(iterate, x, jnp.array(NEWTON_SCHULZ, x.dtype))[0]
    x = x * (update_rms * math.sqrt(x.shape[-1]))
    return jnp.swapaxes(x, -1, -2) if tall else x
