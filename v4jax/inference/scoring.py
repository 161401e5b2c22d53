"""Log-probabilities of given tokens: the model reads them, and is asked at each for the next."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from v4jax.errors import NonFiniteError
from v4jax.inference.answer import explain_not_finite
from v4jax.inference.steps import Cache
from v4jax.parallel import Layout, replicate

AT_ONCE = 1024  # tokens whose logits are in memory at once: 0.5 GiB with V4's vocabulary


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Attributes:
      tokens: ids of the text.
      log_probabilities: natural logarithm of the probability of each, given all before it.
      greedy: whether greedy decoding would have written the text.
      bytes: bytes of the text in UTF-8.
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    greedy: bool
    bytes: int

    @property
    def log_probability(self) -> float:
        """Of the whole text."""
        return math.fsum(self.log_probabilities)

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(-self.log_probability / len(self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with other tokenizers."""
        return -self.log_probability / math.log(2) / self.bytes


def score_tokens(
    model: Any,
    sequences: Sequence[Sequence[int]],
    cache: Cache,
    *,
    chunk_tokens: int,
    choices: int | None = None,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the log-probabilities of each sequence's tokens but the first, and which are greedy.

    Args:
      sequences: tokens of the first slots, behind what `cache` holds; further slots are left as
        they are.
      cache: consumed.
      choices: as of `sampling.sample`: the ids that have text. Others have no probability.
      on_chunk: is called after each chunk with its number of tokens.

    Raises:
      NonFiniteError: the model computed NaN or infinity.
    """
    slots = cache.lengths.shape[0]
    counts = np.zeros(slots, np.int64)  # the last token of a sequence is scored and not read
    counts[: len(sequences)] = [max(len(sequence) - 1, 0) for sequence in sequences]
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in sequences]
    layout, model = model.layout, model.flatten()
    for start in range(0, int(counts.max()), chunk_tokens):
        read_bt, asked_bt = np.zeros((2, slots, chunk_tokens), np.int32)
        lengths = np.clip(counts - start, 0, chunk_tokens).astype(np.int32)
        for slot, sequence in enumerate(sequences):
            end = start + lengths[slot]
            read_bt[slot, : lengths[slot]] = sequence[start:end]
            asked_bt[slot, : lengths[slot]] = sequence[start + 1 : end + 1]
        scores, cache = _step(model, read_bt, asked_bt, cache, lengths, choices, layout)
        scores_bt, best_bt = map(np.asarray, scores)
        for slot, chunks in enumerate(found):
            own = scores_bt[slot, : lengths[slot]]
            if not np.isfinite(own).all():
                first = start + int(np.argmin(np.isfinite(own)))
                raise NonFiniteError(explain_not_finite(f"at token {first + 1:,}"))
            chunks.append((own, best_bt[slot, : lengths[slot]]))
        on_chunk(int(lengths.sum()))
    nothing = np.zeros(0, np.float32), np.zeros(0, bool)
    return [tuple(map(np.concatenate, zip(*x, nothing, strict=True))) for x in found]


def compile_scoring(model: Any, cache: Cache, chunk_tokens: int, choices: int | None) -> None:
    """Runs one step of `score_tokens` that appends nothing; consumes `cache`."""
    slots = cache.lengths.shape[0]
    nothing, zeros = np.zeros((slots, chunk_tokens), np.int32), np.zeros(slots, np.int32)
    scores, _ = _step(model.flatten(), nothing, nothing, cache, zeros, choices, model.layout)
    jax.block_until_ready(scores)


def _step(model, read_bt, asked_bt, cache, lengths, choices, layout):
    logits_btv, cache = model.extend(
        jnp.asarray(read_bt), cache, jnp.asarray(lengths), logits="all", donate=True
    )
    return _score(logits_btv, jnp.asarray(asked_bt), choices=choices, layout=layout), cache


@functools.partial(jax.jit, static_argnames=("choices", "layout"))
def _score(
    logits_btv: Float[Array, "b t v"],
    tokens_bt: Int[Array, "b t"],
    *,
    choices: int | None,
    layout: Layout | None,
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """Returns the log-probability of each token, and whether it is the most probable one."""
    logits_btv = logits_btv[..., :choices]
    own_bt = jnp.take_along_axis(logits_btv, tokens_bt[..., None], axis=-1)[..., 0]
    scores_bt = own_bt - jax.nn.logsumexp(logits_btv, axis=-1)
    return replicate((scores_bt, jnp.argmax(logits_btv, axis=-1) == tokens_bt), layout)
