"""Partial softmax results, merged exactly: attention can read its keys in blocks.

A partial is (maximum, mass, weighted) over some of the keys: mass = Σ exp(z − maximum), weighted =
Σ exp(z − maximum)·value. Merging two partials gives the partial of their union, in any order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Replaces −∞ in masked scores. It is finite: a row without keys has mass 0, and no NaN in its
# gradient.
MASKED = -1e30


class Partial(NamedTuple):
    """Softmax over some keys, for queries […], float32."""

    maximum: Float[Array, "..."]
    mass: Float[Array, "..."]
    weighted: Float[Array, "... c"]


def partial_weights(scores: Float[Array, "... k"]) -> tuple[Array, Array, Array]:
    """Returns maximum, mass and exp(z − maximum) of masked scores; masked keys weigh exactly 0."""
    maximum = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.where(scores > MASKED, jnp.exp(scores - maximum[..., None]), 0.0)
    return maximum, weights.sum(axis=-1), weights


def merge(a: Partial, b: Partial) -> Partial:
    """Returns the partial over the keys of both."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    scale_a, scale_b = jnp.exp(a.maximum - maximum), jnp.exp(b.maximum - maximum)
    return Partial(
        maximum,
        a.mass * scale_a + b.mass * scale_b,
        a.weighted * scale_a[..., None] + b.weighted * scale_b[..., None],
    )


def finish(partial: Partial, sink: Float[Array, "h"]) -> tuple[Array, Array]:
    """Closes a softmax with its sink, a logit without a value.

    Returns:
      attended [..., h, c]: weighted / (mass + exp(sink − maximum)).
      log_mass [..., h]: log-sum-exp over keys and sink, float32.

    Source: spec B.10. The maximum includes the sink, so a large sink cannot overflow.
    """
    maximum = jnp.maximum(partial.maximum, sink)
    scale = jnp.exp(partial.maximum - maximum)
    total = partial.mass * scale + jnp.exp(sink - maximum)
    return partial.weighted * (scale / total)[..., None], jnp.log(total) + maximum
