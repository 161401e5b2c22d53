"""A model without mathematics: the next token is a hash of all tokens before.

It keeps the contract of `v4jax.load(...)` and compiles in no time. A single token too many, too few
or of another sequence changes everything that follows. A donated cache is really gone.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.errors import CacheError
from v4jax.inference import Engine, EngineOptions
from v4jax.model.speculation import GREEDY, Drafts, Verified
from v4jax.tokenizer import ByteTokenizer

_SCALE = 6.0  # of the logits: some tokens are likely, none is certain


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """What the engine asks of a model's config."""

    vocab_size: int = 320
    max_position_embeddings: int = 4096
    bos_token_id: int = 256
    eos_token_id: int = 257
    profile: str = "preview"
    tokenizer: str = "byte"

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """As of a model's config."""
        return (self.eos_token_id,)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["hashes", "lengths"], meta_fields=["capacity"]
)
@dataclasses.dataclass(frozen=True)
class FakeCache:
    """The hash of each sequence, and its length."""

    hashes: jax.Array  # uint32 [slots]
    lengths: jax.Array  # int32 [slots]
    capacity: int

    def take(self, indices):
        """Returns a cache whose slot i is a copy of slot `indices[i]`."""
        return dataclasses.replace(self, hashes=self.hashes[indices], lengths=self.lengths[indices])

    def repeat(self, count):
        """Returns a cache with `count` copies of every slot side by side."""
        return dataclasses.replace(
            self, hashes=jnp.repeat(self.hashes, count), lengths=jnp.repeat(self.lengths, count)
        )

    def reset(self, slots):
        """Returns the cache with the slots of a mask emptied."""
        return dataclasses.replace(
            self,
            hashes=jnp.where(slots, jnp.uint32(1), self.hashes),
            lengths=jnp.where(slots, 0, self.lengths),
        )

    def bytes(self) -> int:
        """Returns the bytes of its arrays."""
        return self.hashes.nbytes + self.lengths.nbytes


class FakeModel:
    """A model with a hash for mathematics.

    Args:
      step_seconds: what every call costs, to make a job slow enough to be killed.
      drafts: tokens that it drafts; a draft is mostly right.
    """

    folder = None
    layout = None

    def __init__(
        self, config: FakeConfig = FakeConfig(), step_seconds: float = 0.0, drafts: int = 0
    ):
        self.config, self.step_seconds, self.draft_tokens = config, step_seconds, drafts
        self.calls: list[tuple[int, int, int]] = []  # (slots, tokens, tokens that were real)

    def init_cache(self, batch: int, max_tokens: int) -> FakeCache:
        """Returns an empty cache."""
        return FakeCache(jnp.ones(batch, jnp.uint32), jnp.zeros(batch, jnp.int32), max_tokens)

    def flatten(self):
        """Returns the model for loops over `extend`; see the contract."""
        return self

    def count_reading(self):
        """Returns the operations of reading: one for each token."""
        return lambda first, end: (float(end - first), 0.0)

    def extend(self, tokens, cache, lengths=None, logits="all", *, donate=False, trusted=False):
        """Appends tokens; see the contract."""
        assert logits in ("all", "last")
        assert tokens.shape[1] <= cache.capacity
        if lengths is None:
            lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        self.calls.append((*tokens.shape, int(jnp.sum(lengths))))
        if int(jnp.max(cache.lengths + lengths)) > cache.capacity:
            raise CacheError("the sequence is longer than its cache")
        time.sleep(self.step_seconds)
        hashes, all_bt = _hash(tokens, cache.hashes, lengths)
        extended = FakeCache(hashes, cache.lengths + lengths, cache.capacity)
        if donate:
            cache.hashes.delete()
            cache.lengths.delete()
        # Without new tokens there is nothing to predict from: the logits mean nothing.
        chosen = all_bt if logits == "all" else jnp.where(lengths > 0, hashes, ~hashes)
        return _logits(chosen, self.config.vocab_size), extended

    def draft(self, last, cache, choice=GREEDY, *, count=None, trusted=False):
        """Drafts from the true logits, somewhat changed; see the contract."""
        assert 1 <= (count or self.draft_tokens) <= self.draft_tokens
        hashes, ones = cache.hashes, jnp.ones(len(last), jnp.int32)
        tokens, logits = [], []
        for row in range(count or self.draft_tokens):
            hashes, _ = _hash(last[:, None], hashes, ones)
            true = _logits(hashes, self.config.vocab_size)
            logits.append(true + _logits(~hashes, self.config.vocab_size) / 32)
            last = _choose(choice, logits[-1], row)
            tokens.append(last)
        drafts = jnp.stack(tokens, 1), jnp.stack(logits, 1), jnp.zeros((len(last), len(tokens)))
        return Drafts(*drafts)

    def verify(
        self, last, drafts, cache, choice=GREEDY, lengths=None, *, donate=False, trusted=False
    ):
        """Accepts drafts; see the contract."""
        tokens = jnp.concatenate([last[:, None], drafts.tokens], axis=1)
        assert drafts.tokens.shape[1] <= self.draft_tokens
        lengths = jnp.full(len(last), tokens.shape[1]) if lengths is None else lengths
        _, all_bt = _hash(tokens, cache.hashes, lengths)
        before, hashes = cache.lengths + 0, cache.hashes + 0
        logits, longer = self.extend(tokens, cache, lengths, donate=donate, trusted=trusted)
        accepted, following = _accept(choice, drafts, logits, jnp.maximum(lengths - 1, 0))
        taken = all_bt[jnp.arange(len(last)), accepted]
        cache = FakeCache(
            jnp.where(lengths > 0, taken, hashes),
            before + jnp.minimum(lengths, accepted + 1),
            longer.capacity,
        )
        return Verified(logits, accepted, following), cache


@jax.jit
def _hash(tokens_bt, hashes, lengths):
    def step(hashes, inputs):
        token, position = inputs
        mixed = (hashes ^ token.astype(jnp.uint32)) * jnp.uint32(2654435761) + jnp.uint32(97)
        hashes = jnp.where(position < lengths, mixed ^ (mixed >> 15), hashes)
        return hashes, hashes

    positions = jnp.arange(tokens_bt.shape[1])
    hashes, all_tb = jax.lax.scan(step, hashes, (tokens_bt.T, positions))
    return hashes, all_tb.T


_choose = jax.jit(lambda choice, logits, row: choice.choose(logits, row), static_argnums=2)
_accept = jax.jit(lambda choice, *arguments: choice.accept(*arguments))


@functools.partial(jax.jit, static_argnums=1)
def _logits(hashes, vocab_size):
    mixed = (hashes[..., None] + jnp.arange(vocab_size, dtype=jnp.uint32)) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(3266489917)
    return (mixed >> 8).astype(jnp.float32) * (_SCALE / 2**24)


def make_engine(model: FakeModel | None = None, **options) -> Engine:
    """Returns an engine with small chunks, so that short texts need several."""
    sizes = {"chunk_tokens": 64, "short_tokens": 16, "questions_at_once": 2}
    return Engine(model or FakeModel(), EngineOptions(**(sizes | options)), ByteTokenizer())


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """Returns what greedy decoding gives after `prompt`, computed without any of the package."""
    value, tokens = 1, []

    def push(value: int, token: int) -> int:
        mixed = ((value ^ token) * 2654435761 + 97) % 2**32
        return mixed ^ (mixed >> 15)

    for token in prompt:
        value = push(value, token)
    vocabulary = np.arange(FakeConfig.vocab_size, dtype=np.uint32)
    for _ in range(count):
        mixed = (np.uint32(value) + vocabulary) * np.uint32(2246822519)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(3266489917)
        tokens.append(int(np.argmax(mixed >> 8)))
        if tokens[-1] == FakeConfig.eos_token_id:
            break
        value = push(value, tokens[-1])
    return tokens
