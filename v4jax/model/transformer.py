"""`Transformer`: the whole model and the calls a user makes."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from v4jax.cache import HybridCache, init_cache
from v4jax.cache.hybrid import cache_axes
from v4jax.config import ModelConfig, Numerics
from v4jax.errors import CacheError, ConfigError, ShapeError
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.model.context import make_context
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.mtp import MTP
from v4jax.model.norm import RMSNorm
from v4jax.model.parameters import Declare, Storage
from v4jax.model.stack import Stack, full_sequence
from v4jax.model.weights import whole
from v4jax.parallel.context_parallel import divide_tokens, own_start, plan_call, take_token
from v4jax.parallel.global_arrays import values_of
from v4jax.parallel.shard import (
    WEIGHTS,
    check_batch,
    entry_shares,
    look_up,
    make_arrays,
    on_shards,
)
from v4jax.shapes import as_integers, check_shape


class Transformer(nnx.Module):
    """DeepSeek-V4: embedding, layers over residual streams, collapse, head, and the MTP blocks.

    The module is a pytree: pass it through `jax.jit` like any other argument. `__call__` and
      `extend` are compiled
    for each new shape; inside a transformation use them as they are.

    >>> logits = model(tokens)
    >>> cache = model.init_cache(batch=1, max_tokens=65536)
    >>> logits, cache = model.extend(tokens, cache, logits="last")
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        *,
        storage: Storage = "float32",
        rngs: nnx.Rngs | None,
    ):
        declare = Declare(config, storage, rngs)
        self.config, self.numerics, self.folder = config, numerics, None
        self.layout = None  # on a mesh: where the weights lie, `parallel.Layout`
        vocab = (config.vocab_size, config.hidden_size)
        self.embed = declare.matrix("bfloat16", vocab, ("vocab", "embed"))
        self.stack = Stack(config, numerics, storage, rngs)
        self.collapse = HyperHead(declare, config)
        self.norm = RMSNorm(declare, config.hidden_size, "embed", config.rms_norm_eps)
        self.head = declare.matrix("bfloat16", vocab, ("vocab", "embed"))
        self.mtp = nnx.List(MTP(declare, config, layer, numerics) for layer in config.mtp_layers)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Returns the next token's logits at every position of sequences that start at 0.

        Raises:
          ShapeError: tokens are no integers [batch, tokens], empty, or outside the vocabulary.
        """
        return _forward(self, self._check_tokens(tokens))

    def predict_ahead(self, tokens: Int[Array, "b t"]) -> Float[Array, "b u v"]:
        """Returns the first MTP block's logits [b, t−1, v]: row u predicts token u+2.

        Raises:
          ConfigError: the model has no MTP block.
          ShapeError: as `__call__`, or fewer than two tokens.
        """
        tokens = self._check_tokens(tokens)
        if not self.mtp:
            raise ConfigError(
                "model.num_nextn_predict_layers is 0: this model has no MTP block; "
                "load a checkpoint that has one"
            )
        if tokens.shape[1] < 2:
            raise ShapeError(f"tokens must hold at least 2 tokens for MTP, got {tokens.shape[1]}")
        return _forward_mtp(self, tokens)

    def init_cache(self, batch: int, max_tokens: int) -> HybridCache:
        """Returns empty caches for `batch` sequences of up to `max_tokens` tokens each.

        Raises:
          CacheError: a size is out of range.
        """
        sizes = batch, max_tokens, entry_shares(self.layout)
        check_batch(self.layout, batch)
        return make_arrays(
            lambda: init_cache(self.config, self.numerics, *sizes), cache_axes, self.layout
        )

    def extend(
        self,
        tokens: Int[Array, "b t"],
        cache: HybridCache,
        lengths: Int[Array, "b"] | None = None,
        logits: Literal["all", "last"] = "all",
        *,
        donate: bool = False,
        trusted: bool = False,
    ) -> tuple[Array, HybridCache]:
        """Appends tokens to every sequence; returns their logits and the new cache.

        One token is decode, many are prefill; any chunking gives the same result.

        Args:
          lengths: how many of the t tokens are real, per sequence (0 … t); the rest is padding on
            the right, and its logits mean nothing. None: all.
          logits: "all" returns [b, t, v]; "last" returns [b, v], of the last real token (of the
            first token where there is none: discard it).
          donate: reuses the buffers of `cache`, which must not be used afterwards; for loops.
          trusted: leaves the values of tokens and lengths unchecked. Checking them waits for the
            device; a loop that made them itself can so dispatch ahead.

        Raises:
          ShapeError: an argument has the wrong shape, dtype or values.
          CacheError: a sequence would exceed its capacity, or the cache belongs to another model.
        """
        tokens, lengths = self.check_extend(tokens, cache, lengths, logits, trusted)
        step = _extend_donating if donate else _extend
        return step(self, tokens, cache, lengths, logits)

    def check_extend(self, tokens, cache, lengths, logits, trusted: bool) -> tuple[Array, Array]:
        """Returns the tokens and lengths of `extend` as arrays, or raises what it raises."""
        tokens = self._check_tokens(tokens, trusted)
        if logits not in ("all", "last"):
            raise ShapeError(f"logits must be 'all' or 'last', got {logits!r}")
        if not isinstance(cache, HybridCache):
            raise CacheError(
                f"cache must be a HybridCache, got {type(cache).__name__}; make it with "
                "this model's init_cache"
            )
        batch, count = tokens.shape
        if cache.batch != batch:
            raise CacheError(
                f"tokens have batch {batch} but the cache holds {cache.batch} sequences; "
                f"make it with init_cache({batch}, …)"
            )
        cache.check_fits(self.config, self.numerics, entry_shares(self.layout))
        lengths = np.full(batch, count, np.int32) if lengths is None else lengths
        lengths = as_integers("lengths", lengths)
        check_shape("lengths", lengths, (batch,))
        if not trusted:
            self._check_room(cache, lengths, count)
        return tokens, jnp.asarray(lengths, jnp.int32)

    def held(self) -> "HeldTransformer":  # noqa: F821
        """Returns the model as it is now, for loops over `extend`.

        >>> extend = model.held().extend
        >>> while ...:
        ...     logits, cache = extend(tokens, cache, logits="last", donate=True)
        """
        from v4jax.model.held import HeldTransformer

        return HeldTransformer(self)

    def _check_tokens(self, tokens, trusted: bool = False) -> Array:
        tokens = as_integers("tokens", tokens)
        check_shape("tokens", tokens, (None, None))
        if 0 in tokens.shape:
            raise ShapeError(f"tokens must hold at least one token, got shape {list(tokens.shape)}")
        if not (trusted or isinstance(tokens, jax.core.Tracer)):
            host = np.asarray(tokens)
            bad = host[(host < 0) | (host >= self.config.vocab_size)]
            if bad.size:
                raise ShapeError(
                    f"tokens must be ids 0 … {self.config.vocab_size - 1}, got {bad[0]}; "
                    "was the text encoded with another tokenizer?"
                )
        return jnp.asarray(tokens, jnp.int32)

    def _check_room(self, cache: HybridCache, lengths, count: int):
        if any(isinstance(x, jax.core.Tracer) for x in (cache.lengths, lengths)):
            return  # values are unknown under a transformation; its caller checks
        lengths, used = np.asarray(lengths), values_of(cache.lengths)
        if lengths.min() < 0 or lengths.max() > count:
            raise ShapeError(
                f"lengths must be 0 … {count} (the tokens given), got {lengths.tolist()}"
            )
        over = np.flatnonzero(used + lengths > cache.capacity)
        if over.size:
            slot = over[0]
            raise CacheError(
                f"sequence {slot} holds {used[slot]} tokens and gets {lengths[slot]} more, "
                f"but the cache was made for {cache.capacity}; "
                "make it larger with init_cache(batch, max_tokens)"
            )


def abstract_transformer(
    config: ModelConfig, numerics: Numerics, *, storage: Storage = "released"
) -> Transformer:
    """Returns the model with shapes in place of arrays: nothing is allocated."""
    return Transformer(config, numerics, storage=storage, rngs=None)


@jax.jit
def _forward(model: Transformer, tokens):
    streams, _ = run_layers(model, tokens)
    return read_logits(model, streams)


@jax.jit
def _forward_mtp(model: Transformer, tokens):
    streams, _ = run_layers(model, tokens)
    return read_drafts(model, streams, tokens)


def extend_step(model: Transformer, tokens, cache: HybridCache, lengths, logits):
    """What `Transformer.extend` and `HeldTransformer.extend` compile; arguments are checked."""
    start, end = cache.lengths, cache.lengths + lengths
    streams, cache = run_layers(model, tokens, start, end, cache)
    if logits == "last":
        last_b = jnp.maximum(lengths - 1, 0)
        regime = divide_tokens(model.layout, streams.shape[1])
        inputs = (P("batch", "tokens"), P("batch"))
        streams = on_shards(take_token, model.layout, regime, inputs, P("batch"))(streams, last_b)
        return read_logits(model, streams[:, None])[:, 0], cache
    return read_logits(model, streams), cache


_extend = partial(jax.jit, static_argnames="logits")(extend_step)
_extend_donating = partial(jax.jit, static_argnames="logits", donate_argnames="cache")(extend_step)


def run_layers(model: Transformer, tokens, start=None, end=None, cache: HybridCache | None = None):
    """Returns the streams after the last layer, and the extended cache (None without one)."""
    batch, count = tokens.shape
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    end = start + count if end is None else end
    call = plan_call(model.layout, model.config, batch, count, decodes=cache is not None)
    axes = None if cache is None else cache_axes(cache)
    inputs = (WEIGHTS, P("batch", "tokens"), P("batch"), P("batch"), axes)
    run = on_shards(_run_layers, model.layout, call.regime, inputs, (P("batch", "tokens"), axes))
    streams, cache = run((model.embed, model.stack), call.pad(tokens), start, end, cache)
    if cache is None:
        return call.cut(streams), None
    return call.cut(streams), dataclasses.replace(cache, lengths=end.astype(jnp.int32))


def _run_layers(weights, tokens, start, end, cache):
    embedding, stack = weights
    start = own_start(start, tokens.shape[1])
    context = make_context(tokens, start, end, {layer.rope for layer in stack.config.layers})
    streams = open_streams(embedding, tokens, stack)
    if cache is None:
        return stack(streams, context), None
    return stack.extend(streams, context, cache)


def embed(embedding: nnx.Param, tokens, numerics: Numerics) -> Float[Array, "b t d"]:
    """Returns the embeddings of tokens in the activation dtype (spec B.1)."""
    return look_up(whole(embedding)[...], tokens).astype(numerics.activation_dtype)


def open_streams(embedding: nnx.Param, tokens, stack: Stack) -> Float[Array, "b t n d"]:
    """Returns the residual streams before the first layer: the embeddings, once for each."""
    x = embed(embedding, tokens, stack.numerics)
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], stack.config.hc_mult, x.shape[-1]))


def read_logits(model: Transformer, streams) -> Float[Array, "b t v"]:
    """Returns float32 logits of streams (spec B.15)."""
    regime = divide_tokens(model.layout, streams.shape[1])
    inputs, outputs = (WEIGHTS, P("batch", "tokens")), P("batch", "tokens", "vocab")
    read = on_shards(_read_logits, model.layout, regime, inputs, outputs)
    return read((model.collapse, model.norm, model.head), streams)


def _read_logits(weights, streams):
    collapse, norm, head = whole(weights)
    return matmul_float32(norm(collapse(streams)), head[...])


def read_drafts(model: Transformer, streams, tokens) -> Float[Array, "b u v"]:
    """Returns the first MTP block's logits of streams and tokens at positions 0 … t−1 (spec B.15).

    Row u pairs the streams of token u with token u+1; the last streams have no pair.
    """
    following, streams = tokens[:, 1:], streams[:, :-1]
    batch, count = following.shape
    call = plan_call(model.layout, model.config, batch, count, decodes=False)
    inputs = (WEIGHTS, P("batch", "tokens"), P("batch", "tokens"), P("batch"))
    outputs = P("batch", "tokens", "vocab")
    read = on_shards(_read_drafts, model.layout, call.regime, inputs, outputs)
    end = jnp.full(batch, count, jnp.int32)
    weights = (model.embed, model.mtp[0], model.head)
    return call.cut(read(weights, call.pad(streams), call.pad(following), end))


def _read_drafts(weights, streams, following, end):
    embedding, mtp, head = weights
    mtp, head, layer = whole(mtp), whole(head), mtp.layer
    start = own_start(jnp.zeros_like(end), following.shape[1])
    context = make_context(following, start, end, {layer.rope})
    memory = full_sequence(mtp.config, mtp.numerics, layer, context)
    normed, _, _ = mtp(streams, embed(embedding, following, mtp.numerics), context, memory)
    return matmul_float32(normed, head[...])
