"""Chooses the next tokens of each sequence of a batch, and says which sequences go on.

Every sequence has its own options and its own seed. The noise of its n-th token depends on the seed
and on n only. An answer is therefore the same in any batch, in any slot and after a restart.

`sample` chooses one token. `Sampled` chooses and accepts drafted ones, by rejection, so that they
have the same distribution; `take_block` takes what was accepted.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from v4jax.inference.request import SamplingOptions
from v4jax.model.speculation import GREEDY, Drafts, Verified, accept_by_rejection
from v4jax.parallel import Layout, replicate

NOT_FINITE = -1  # in place of a token: the logits hold NaN or infinity
_COLDEST = 1e-6  # smallest temperature; below it sampling is greedy in float32
# Uses of noise, independent of each other at the same token.
_WRITTEN, _DRAFTED, _ACCEPTED = 0, 1, 2


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
    tokens = _choose(logits_bv, state, _WRITTEN)
    tokens = jnp.where(jnp.all(jnp.isfinite(logits_bv), axis=-1), tokens, NOT_FINITE)
    ended = jnp.isin(tokens, jnp.array([*end_tokens, NOT_FINITE], jnp.int32))
    remaining = jnp.where(ended, 0, jnp.maximum(state.remaining - 1, 0))
    state = state._replace(step=state.step + 1, remaining=remaining)
    return replicate((tokens, remaining > 0, state), layout)


@functools.partial(jax.jit, static_argnames="layout")
def are_finite(logits_bv: Float[Array, "b v"], *, layout: Layout | None = None) -> Bool[Array, "b"]:
    """Returns which rows hold finite numbers only; every host can read it."""
    return replicate(jnp.all(jnp.isfinite(logits_bv), axis=-1), layout)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """The `model.speculation.Choice` by each sequence's own options; greedy at temperature 0.

    choices: as of `sample`.
    """

    state: SamplerState
    choices: int | None = dataclasses.field(default=None, metadata={"static": True})

    def choose(self, logits, row):
        """See `Choice.choose`."""
        drafted = self.state._replace(step=self.state.step + row)
        return _choose(logits[:, : self.choices], drafted, _DRAFTED)

    def accept(self, drafts, logits, counts):
        """See `Choice.accept`."""
        drafts = drafts._replace(logits=drafts.logits[..., : self.choices])
        arguments = drafts, logits[..., : self.choices], counts
        return jax.lax.cond(_any_sampled(self.state), self._reject, GREEDY.accept, *arguments)

    def _reject(self, drafts, logits, counts):
        state = self.state

        def accept(tokens_r, drafted_rv, logits_sv, count, temperature, top_p, top_k, seed, step):
            keep = functools.partial(_keep, temperature=temperature, top_p=top_p, top_k=top_k)
            q_rv = jax.nn.softmax(jax.vmap(keep)(drafted_rv))
            p_sv = jax.nn.softmax(jax.vmap(keep)(logits_sv))
            steps_r = step + jnp.arange(tokens_r.shape[0])
            keys_r = jax.vmap(lambda step: _key(seed, step, _ACCEPTED))(steps_r)
            uniform_r = jax.vmap(jax.random.uniform)(keys_r)
            one = (x[None] for x in (tokens_r, q_rv, p_sv, uniform_r, count))
            accepted_1, left_1v = accept_by_rejection(*one)
            key = _key(seed, step + accepted_1[0], _WRITTEN)
            return accepted_1[0], _draw_one(jnp.log(left_1v[0]), key)

        options = state.temperature, state.top_p, state.top_k, state.seed, state.step
        sampled = jax.vmap(accept)(drafts.tokens, drafts.logits, logits, counts, *options)
        greedy = GREEDY.accept(drafts, logits, counts)
        return tuple(
            jnp.where(state.temperature > 0, ours, theirs).astype(jnp.int32)
            for ours, theirs in zip(sampled, greedy, strict=True)
        )


@functools.partial(jax.jit, static_argnames=("end_tokens", "choices", "layout"))
def take_block(
    drafts: Drafts,
    verified: Verified,
    state: SamplerState,
    *,
    end_tokens: tuple[int, ...],
    choices: int | None = None,
    layout: Layout | None = None,
) -> tuple[Int[Array, "b s"], Int[Array, "b"], Int[Array, "b"], SamplerState]:
    """Takes the accepted drafts and the token after them, up to the first end token.

    Returns:
      The tokens and how many of them were written, 0 for sequences that had ended; the last ones
      [b], which the model has not read; the new state. `NOT_FINITE` stands for a token as in
      `sample`.
    """
    drafts, verified, state = replicate((drafts, verified, state), layout)
    accepted_b1, places_s = verified.accepted[:, None], jnp.arange(drafts.tokens.shape[1] + 1)
    tokens_bs = jnp.pad(drafts.tokens, [(0, 0), (0, 1)])
    tokens_bs = jnp.where(places_s == accepted_b1, verified.following[:, None], tokens_bs)
    finite_bs = jnp.all(jnp.isfinite(verified.logits[..., :choices]), axis=-1)
    tokens_bs = jnp.where(finite_bs, tokens_bs, NOT_FINITE)
    ends_bs = jnp.isin(tokens_bs, jnp.array([*end_tokens, NOT_FINITE], jnp.int32))
    ends_bs &= places_s <= accepted_b1
    ended_b = ends_bs.any(axis=1)
    counts_b = jnp.where(ended_b, jnp.argmax(ends_bs, axis=1), verified.accepted) + 1
    counts_b = jnp.minimum(counts_b, state.remaining)
    last_b = tokens_bs[jnp.arange(len(counts_b)), jnp.maximum(counts_b - 1, 0)]
    remaining = jnp.where(ended_b, 0, state.remaining - counts_b)
    state = state._replace(step=state.step + counts_b, remaining=remaining)
    return replicate((tokens_bs, counts_b, last_b, state), layout)


def _any_sampled(state: SamplerState) -> Bool[Array, ""]:
    # Sorting a vocabulary costs far more than an argmax, and most jobs are greedy.
    return jnp.any((state.temperature > 0) & (state.remaining > 0))


def _choose(logits_bv: Float[Array, "b v"], state: SamplerState, use: int) -> Int[Array, "b"]:
    """Returns the token of every sequence's step."""

    def draw(logits_v, temperature, top_p, top_k, seed, step):
        return _draw_one(_keep(logits_v, temperature, top_p, top_k), _key(seed, step, use))

    def draw_all():
        options = state.temperature, state.top_p, state.top_k, state.seed, state.step
        drawn_b = jax.vmap(draw)(logits_bv, *options)
        return jnp.where(state.temperature > 0, drawn_b, best()).astype(jnp.int32)

    def best():
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)

    return jax.lax.cond(_any_sampled(state), draw_all, best)


def _key(seed: UInt[Array, ""], step: Int[Array, ""], use: int) -> jax.Array:
    # threefry by name, because the environment may set another default generator.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.random.fold_in(key, use) if use else key


def _draw_one(kept_v: Float[Array, "v"], key: jax.Array) -> Int[Array, ""]:
    """Returns a token drawn from the distribution of these logits."""
    return jnp.argmax(kept_v + jax.random.gumbel(key, kept_v.shape)).astype(jnp.int32)


def _keep(
    logits_v: Float[Array, "v"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    top_k: Int[Array, ""],
) -> Float[Array, "v"]:
    """Returns the logits that tokens are drawn from; −∞ for those that are left out."""
    # Relative to the best logit: no temperature, however small, subtracts infinities.
    scaled_v = (logits_v - jnp.max(logits_v)) / jnp.maximum(temperature, _COLDEST)
    return jnp.where(scaled_v >= _threshold(scaled_v, top_p, top_k), scaled_v, -jnp.inf)


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
