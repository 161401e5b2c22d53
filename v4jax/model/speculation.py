"""Speculative decoding: what drafts and their verification are, and how their tokens are chosen.

    drafts = model.draft(last, cache)                          # cheap guesses of the next tokens
    verified, cache = model.verify(last, drafts, cache)        # one pass of the model over them all
    tokens = [*drafts.tokens[b][: verified.accepted[b]], verified.following[b]]

A `Choice` chooses tokens of drafts and accepts them. It is a pytree: its arrays are arguments of
what is compiled.

Source: spec dspark 2.6–2.8.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Drafts(NamedTuple):
    """Tokens proposed for the places after the last token of each sequence.

    logits: those each token was chosen from. confidence: logit of the estimate that a token is
    accepted, given that those before it are; None of an MTP block.
    """

    tokens: Int[Array, "b r"]
    logits: Float[Array, "b r v"]
    confidence: Float[Array, "b r"] | None


class Verified(NamedTuple):
    """What a pass over the last token and r drafts says about each sequence.

    logits: after the last token and after each draft. accepted: how many drafts are confirmed,
    0 … r. following: the token after the last confirmed one; the model's own, and not consumed yet.
    """

    logits: Float[Array, "b s v"]
    accepted: Int[Array, "b"]
    following: Int[Array, "b"]


class Choice(Protocol):
    """How drafted tokens are chosen and accepted; any pytree with these two methods."""

    def choose(self, logits: Float[Array, "b v"], row: int) -> Int[Array, "b"]:
        """Returns the tokens of a draft's row, counted from 0."""

    def accept(
        self, drafts: Drafts, logits: Float[Array, "b s v"], counts: Int[Array, "b"]
    ) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
        """Returns how many drafts of each sequence are accepted, and the token after those.

        Args:
          logits: the model's, after the last token and after each draft.
          counts: how many drafts of each sequence may be accepted.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most probable token everywhere: what is written is what greedy decoding writes."""

    def choose(self, logits, row):
        """See `Choice.choose`."""
        del row
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def accept(self, drafts, logits, counts):
        """See `Choice.accept`: the drafts that are the model's own choice."""
        best_bs = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        accepted_b = count_accepted(drafts.tokens == best_bs[:, :-1], counts)
        return accepted_b, best_bs[jnp.arange(len(accepted_b)), accepted_b]


GREEDY = Greedy()


def count_accepted(right_br: Array, counts: Int[Array, "b"]) -> Int[Array, "b"]:
    """Returns how many of the first `counts` drafts of each sequence are right without a gap."""
    counted_br = right_br & (jnp.arange(right_br.shape[1]) < counts[:, None])
    return jnp.cumprod(counted_br, axis=1, dtype=jnp.int32).sum(axis=1)


def accept_by_rejection(
    tokens: Int[Array, "b r"],
    drafted: Float[Array, "b r v"],
    wanted: Float[Array, "b s v"],
    uniform: Float[Array, "b r"],
    counts: Int[Array, "b"],
) -> tuple[Int[Array, "b"], Float[Array, "b v"]]:
    """Accepts drafts such that the tokens written have exactly the distribution `wanted`.

    A draft t is accepted with probability min(1, P(t) / Q(t)). At the first rejection the next
    token comes from the positive part of P − Q, and from P behind the last draft.

    Args:
      drafted: Q, the distributions that `tokens` were drawn from.
      wanted: P after the last token and after each of the r drafts.
      uniform: numbers of [0, 1), independent of those that drew the tokens.
      counts: how many drafts of each sequence may be accepted.

    Returns:
      How many are accepted, and the distribution of the token after those.
    """
    batch_b, drafts = jnp.arange(tokens.shape[0]), tokens.shape[1]
    chosen_br1 = tokens[..., None]
    p_br = jnp.take_along_axis(wanted[:, :-1], chosen_br1, axis=-1)[..., 0]
    q_br = jnp.take_along_axis(drafted, chosen_br1, axis=-1)[..., 0]
    accepted_b = count_accepted(uniform * q_br < p_br, counts)
    p_bv = wanted[batch_b, accepted_b]
    q_bv = drafted[batch_b, jnp.minimum(accepted_b, drafts - 1)]
    rejected_b1 = (accepted_b < counts)[:, None]
    left_bv = jnp.where(rejected_b1, jnp.maximum(p_bv - q_bv, 0), p_bv)
    mass_b1 = left_bv.sum(axis=-1, keepdims=True)
    # Rounding may leave nothing of P − Q where both are equal.
    return accepted_b, jnp.where(mass_b1 > 0, left_bv / mass_b1, p_bv)
