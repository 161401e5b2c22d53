"""The two loops around the model's call: reading tokens in chunks, and writing them one by one.

A loop consumes its cache: each step reuses the buffers. While writing, a step of the model is
dispatched before the host looks at the token that it reads; the device need not wait for the host.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from v4jax.errors import CacheError, NonFiniteError
from v4jax.inference.answer import explain_not_finite
from v4jax.inference.request import SamplingOptions
from v4jax.inference.sampling import NOT_FINITE, are_finite, init_sampler, sample
from v4jax.parallel.global_arrays import values_of

Cache = Any  # what model.init_cache gives


def prefill(
    model: Any,
    sequences: Sequence[Sequence[int]],
    cache: Cache,
    *,
    chunk_tokens: int,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Appends to every slot of `cache` its sequence of tokens, `chunk_tokens` at a time.

    Every chunk has the shape [slots, chunk_tokens], the last one with padding. One compilation
    therefore serves all of them.

    Args:
      sequences: the tokens of the first slots; further slots are left as they are.
      cache: consumed.
      on_chunk: is called after each chunk with its number of tokens.

    Returns:
      The logits after the last token of each sequence, and the cache. Logits are NaN where the
      model computed a number that is not finite anywhere in the sequence.

    Raises:
      NonFiniteError: that is so in all sequences. Reading ends at the first such chunk.
    """
    slots = cache.lengths.shape[0]
    counts = np.zeros(slots, np.int64)
    counts[: len(sequences)] = [len(sequence) for sequence in sequences]
    bad = counts == 0
    last_bv, layout, model = None, model.layout, model.flatten()
    for start in range(0, int(counts.max()), chunk_tokens):
        tokens_bt = np.zeros((slots, chunk_tokens), np.int32)
        lengths = np.clip(counts - start, 0, chunk_tokens).astype(np.int32)
        for row, sequence in zip(tokens_bt, sequences, strict=False):
            piece = sequence[start : start + chunk_tokens]
            row[: len(piece)] = piece
        logits_bv, cache = model.extend(
            jnp.asarray(tokens_bt), cache, jnp.asarray(lengths), logits="last", donate=True
        )
        # A sequence that ended in an earlier chunk keeps the logits of its own last token.
        last_bv = (
            logits_bv if last_bv is None else jnp.where(lengths[:, None] > 0, logits_bv, last_bv)
        )
        # One chunk at a time bounds memory and makes the times true.
        bad |= (lengths > 0) & ~np.asarray(are_finite(logits_bv, layout=layout))
        if bad.all():
            end = min(start + chunk_tokens, int(counts.max()))
            raise NonFiniteError(explain_not_finite(f"in tokens {start + 1:,} to {end:,}"))
        on_chunk(int(lengths.sum()))
    return jnp.where((bad & (counts > 0))[:, None], jnp.nan, last_bv), cache


def decode(
    model: Any,
    logits_bv: Float[Array, "b v"],
    cache: Cache,
    options: Sequence[SamplingOptions],
    *,
    end_tokens: tuple[int, ...],
    choices: int | None = None,
) -> Iterator[list[int | None]]:
    """Writes one token of each sequence a step, until every sequence has ended.

    Args:
      logits_bv: the model's logits after the last token of each slot.
      cache: consumed.
      options: for the first slots; further slots write nothing.
      choices: as of `sample`: the ids that have text.

    Yields:
      One token of each sequence, the end token included; None for a sequence that has ended.
      `NOT_FINITE` ends a sequence whose logits are not finite, and harms no other.

    Raises:
      CacheError: the cache has no room for an answer (whose last token needs no room).
    """
    state = init_sampler(options, slots=logits_bv.shape[0])
    left = [option.max_new_tokens for option in options]
    for used, room in zip(values_of(cache.lengths).tolist(), left, strict=False):
        if used + room - 1 > cache.capacity:
            raise CacheError(
                f"a sequence of {used} tokens and an answer of up to {room} do not fit a cache "
                f"made for {cache.capacity}; make it larger or lower max_new_tokens"
            )
    layout, model = model.layout, model.flatten()
    while any(left):
        tokens, active, state = sample(
            logits_bv, state, end_tokens=end_tokens, choices=choices, layout=layout
        )
        if max(left) > 1:  # the model never reads the last token of an answer
            lengths = active.astype(jnp.int32)
            logits_bv, cache = model.extend(
                tokens[:, None], cache, lengths, logits="last", donate=True, trusted=True
            )
        chosen: list[int | None] = [
            int(token) if remaining else None
            for token, remaining in zip(np.asarray(tokens), left, strict=False)
        ]
        left = [
            0 if token in (None, NOT_FINITE, *end_tokens) else remaining - 1
            for token, remaining in zip(chosen, left, strict=True)
        ]
        yield chosen
