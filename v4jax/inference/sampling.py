"""Chooses the next token of each sequence of a batch, and says which sequences go on.

Every sequence has its own options and its own seed. The noise of its n-th token depends on the seed
and on n only. An answer is therefore the same in any batch, in any slot and after a restart.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from v4jax.inference.request import SamplingOptions
from v4jax.parallel import Layout, replicate

NOT_FINITE = -1  # in place of a token: the logits hold NaN or infinity
_COLDEST = 1e-6  # smallest temperature; below it sampling is greedy in float32


class SamplerState(NamedTuple):
    """Options and progress of each sequence of a batch, on the device."""

    temperature: Float[Array, "b"]
    top_p: Float[Array, "b"]
    top_k: Int[Array, "b"]
    seed: UInt[Array, "b"]
    step: Int[Array, "b"]  # tokens chosen so far
    remaining: Int[Array, "b"]  # tokens that may still be chosen; 0 once a sequence has ended


def init_sampler(options: Sequence[SamplingOptions], slots: int) -> SamplerState:
    """Returns the state before the first token; slots beyond `options` are never active."""
    padding = [SamplingOptions()] * (slots - len(options))
    remaining = [o.max_new_tokens for o in options] + [0] * len(padding)
    options = [*options, *padding]
    return SamplerState(
        temperature=jnp.array([o.temperature for o in options], jnp.float32),
        top_p=jnp.array([o.top_p for o in options], jnp.float32),
        top_k=jnp.array([min(o.top_k, 2**31 - 1) for o in options], jnp.int32),
        seed=jnp.array(np.array([o.seed for o in options], np.uint32)),
        step=jnp.zeros(slots, jnp.int32),
        remaining=jnp.array([min(r, 2**31 - 1) for r in remaining], jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("end_tokens", "choices", "layout"))
def sample(
    logits_bv: Float[Array, "b v"],
    state: SamplerState,
    *,
    end_tokens: tuple[int, ...],
    choices: int | None = None,
    layout: Layout | None = None,
) -> tuple[Int[Array, "b"], Bool[Array, "b"], SamplerState]:
    """Chooses one token per sequence.

    On a mesh every device has all logits and chooses for all sequences, as a single device would.
    Logits are small, and every host can thereby read the tokens.

    Args:
      choices: ids from this one on are never chosen. Embeddings are often padded to a round number
        of rows, and what follows the tokenizer's ids has no text.

    Returns:
      The tokens, `NOT_FINITE` for logits that are not finite; which sequences go on after them (no
      end token, and tokens remaining); the new state. Ignore the values of sequences that had ended
      before.
    """
    logits_bv, state = replicate((logits_bv[:, :choices], state), layout)
    # Sorting a vocabulary costs far more than an argmax, and most jobs are greedy.
    tokens = jax.lax.cond(
        jnp.any((state.temperature > 0) & (state.remaining > 0)), _draw, _greedy, logits_bv, state
    )
    tokens = jnp.where(jnp.all(jnp.isfinite(logits_bv), axis=-1), tokens, NOT_FINITE)
    ended = jnp.isin(tokens, jnp.array([*end_tokens, NOT_FINITE], jnp.int32))
    remaining = jnp.where(ended, 0, jnp.maximum(state.remaining - 1, 0))
    state = state._replace(step=state.step + 1, remaining=remaining)
    return replicate((tokens, remaining > 0, state), layout)


@functools.partial(jax.jit, static_argnames="layout")
def are_finite(logits_bv: Float[Array, "b v"], *, layout: Layout | None = None) -> Bool[Array, "b"]:
    """Returns which rows hold finite numbers only; every host can read it."""
    return replicate(jnp.all(jnp.isfinite(logits_bv), axis=-1), layout)


def _greedy(logits_bv: Float[Array, "b v"], state: SamplerState) -> Int[Array, "b"]:
    del state
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)


def _draw(logits_bv: Float[Array, "b v"], state: SamplerState) -> Int[Array, "b"]:
    def draw(logits_v, temperature, top_p, top_k, seed, step):
        # Relative to the best logit: no temperature, however small, subtracts infinities.
        scaled_v = (logits_v - jnp.max(logits_v)) / jnp.maximum(temperature, _COLDEST)
        kept_v = scaled_v >= _threshold(scaled_v, top_p, top_k)
        # threefry by name, because the environment may set another default generator.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        noise_v = jax.random.gumbel(key, scaled_v.shape)
        return jnp.argmax(jnp.where(kept_v, scaled_v + noise_v, -jnp.inf))

    drawn = jax.vmap(draw)(
        logits_bv, state.temperature, state.top_p, state.top_k, state.seed, state.step
    )
    return jnp.where(state.temperature > 0, drawn, jnp.argmax(logits_bv, axis=-1)).astype(jnp.int32)


def _threshold(
    scaled_v: Float[Array, "v"], top_p: Float[Array, ""], top_k: Int[Array, ""]
) -> Float[Array, ""]:
    """Returns the smallest logit that is kept by top-k, and then by top-p of what top-k keeps.

    Tokens with the same logit as the last one kept are kept as well: their order is not a property
    of the distribution.
    """
    sorted_v = -jnp.sort(-scaled_v)
    ranks_v = jnp.arange(sorted_v.shape[0])
    in_top_k_v = (top_k == 0) | (ranks_v < top_k)
    probabilities_v = jax.nn.softmax(jnp.where(in_top_k_v, sorted_v, -jnp.inf))
    # A token is kept while those before it have not reached top_p: the first one always is.
    before_v = jnp.cumsum(probabilities_v) - probabilities_v
    kept_v = in_top_k_v & ((before_v < top_p) | (top_p >= 1.0) | (ranks_v == 0))
    return jnp.min(jnp.where(kept_v, sorted_v, jnp.inf))
