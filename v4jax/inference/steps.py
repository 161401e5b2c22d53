"""The two loops around the model's calls: reading tokens in chunks, and writing them.

A loop consumes its cache: each step reuses the buffers. While writing, a step of the model is
dispatched before the host looks at the tokens that it reads; the device need not wait for the host.
A step writes one token of every sequence or, where the model drafts, as many as it accepts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v4jax.errors import CacheError, NonFiniteError
from v4jax.inference.answer import explain_not_finite
from v4jax.inference.request import SamplingOptions
from v4jax.inference.sampling import (
    NOT_FINITE,
    Sampled,
    SamplerState,
    are_finite,
    init_sampler,
    sample,
    take_block,
)
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
    drafts: int = 0,
) -> Iterator[list[list[int]]]:
    """Writes tokens of each sequence a step, until every sequence has ended.

    Args:
      logits_bv: the model's logits after the last token of each slot.
      cache: consumed.
      options: for the first slots; further slots write nothing.
      choices: as of `sample`: the ids that have text.
      drafts: tokens that the model drafts and verifies in a step; 0: a step writes one token.

    Yields:
      The tokens that each sequence wrote in the step, the end token included; none for a sequence
      that has ended. The first step writes one token of each. `NOT_FINITE` ends a sequence whose
      logits are not finite, and harms no other.

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
    ends = {"end_tokens": end_tokens, "choices": choices, "layout": model.layout}
    blocks = _blocks(model.flatten(), logits_bv, cache, state, drafts, ends)
    ahead = next(blocks)
    while any(left):
        # Each block has at least one token of every sequence that goes on.
        block, ahead = ahead, next(blocks) if max(left) > 1 else None
        chosen: list[list[int]] = [
            row[:count].tolist() if remaining else []
            for row, count, remaining in zip(*map(np.asarray, block), left, strict=False)
        ]
        left = [
            0 if not tokens or tokens[-1] in (NOT_FINITE, *end_tokens) else remaining - len(tokens)
            for tokens, remaining in zip(chosen, left, strict=True)
        ]
        yield chosen


def _blocks(
    model: Any, logits_bv, cache: Cache, state: SamplerState, drafts: int, ends: dict[str, Any]
) -> Iterator[tuple[Array, Array]]:
    """Yields tokens [b, s] and how many of them were written [b], without waiting for them."""
    tokens, active, state = sample(logits_bv, state, **ends)
    one_b = np.ones(tokens.shape[0], np.int32)
    yield tokens[:, None], one_b
    while True:
        if drafts:
            written, counts, tokens, state, cache = write_block(
                model, tokens, cache, state, drafts, **ends
            )
            yield written, counts
        else:
            lengths = active.astype(jnp.int32)
            logits_bv, cache = model.extend(
                tokens[:, None], cache, lengths, logits="last", donate=True, trusted=True
            )
            tokens, active, state = sample(logits_bv, state, **ends)
            yield tokens[:, None], one_b


def write_block(
    model: Any, last: Int[Array, "b"], cache: Cache, state: SamplerState, drafts: int, **ends: Any
) -> tuple[Array, Array, Array, SamplerState, Cache]:
    """Drafts tokens behind `last` and verifies them in one pass; returns as `take_block`.

    No sequence verifies drafts that it may not write; the cache therefore needs no more room than
    without drafts.
    """
    choice = Sampled(state, ends["choices"])
    drafted = model.draft(last, cache, choice, count=drafts, trusted=True)
    lengths = jnp.minimum(state.remaining, drafts + 1)
    verified, cache = model.verify(last, drafted, cache, choice, lengths, donate=True, trusted=True)
    return *take_block(drafted, verified, state, **ends), cache
