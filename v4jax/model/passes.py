"""Passes of the whole model: its layers, its head and its drafts, on one device or on a mesh.

A public function takes whole arrays; on a mesh it runs the private one of the same name on every
device's shards.
"""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from v4jax.cache import HybridCache
from v4jax.cache.hybrid import cache_axes, draft_keys, store_draft_keys
from v4jax.config import Numerics
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.model.context import Context, make_context
from v4jax.model.speculation import Choice, Drafts, Verified
from v4jax.model.stack import Stack, full_sequence
from v4jax.model.weights import materialize
from v4jax.parallel import WEIGHTS, on_shards
from v4jax.parallel.context_parallel import divide_tokens, plan_call, take_last
from v4jax.parallel.shard import look_up, replicate

if TYPE_CHECKING:
    from v4jax.model.transformer import Transformer


@jax.jit
def forward(model: "Transformer", tokens) -> Float[Array, "b t v"]:
    """Returns the logits of whole sequences."""
    streams, _ = run_layers(model, tokens)
    return read_logits(model, streams)


@jax.jit
def forward_drafts(model: "Transformer", tokens) -> Float[Array, "b u v"]:
    """Returns the first MTP block's logits of whole sequences."""
    streams, _ = run_layers(model, tokens)
    return read_drafts(model, streams, tokens)


def extend_step(model: "Transformer", tokens, cache: HybridCache, lengths, logits):
    """Returns the logits of tokens that follow the cache's, and the new cache; checks nothing."""
    start, end = cache.lengths, cache.lengths + lengths
    streams, cache = run_layers(model, tokens, start, end, cache)
    if logits == "last":
        split = divide_tokens(model.layout, streams.shape[1])
        inputs = (P("batch", "tokens"), P("batch"))
        streams = on_shards(take_last, model.layout, split, inputs, P("batch"))(streams, lengths)
        return read_logits(model, streams[:, None])[:, 0], cache
    return read_logits(model, streams), cache


extend = partial(jax.jit, static_argnames="logits")(extend_step)
extend_donating = partial(jax.jit, static_argnames="logits", donate_argnames="cache")(extend_step)


def run_layers(
    model: "Transformer", tokens, start=None, end=None, cache: HybridCache | None = None
):
    """Returns the streams after the last layer, and the extended cache (None without one)."""
    batch, count = tokens.shape
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    end = start + count if end is None else end
    call = plan_call(model.layout, model.config, batch, count, extends=cache is not None)
    axes = None if cache is None else cache_axes(cache)
    inputs = (WEIGHTS, P("batch", "tokens"), P("batch"), P("batch"), axes)
    body = partial(_run_layers, target=model.target)
    run = on_shards(body, model.layout, call.tokens, inputs, (P("batch", "tokens"), axes))
    weights = model.embed, model.stack, model.drafter
    streams, cache = run(weights, call.pad(tokens), start, end, cache)
    if cache is None:
        return call.cut(streams), None
    return call.cut(streams), dataclasses.replace(cache, lengths=end.astype(jnp.int32))


def _run_layers(axes, weights, tokens, start, end, cache, target):
    embedding, stack, drafter = weights
    start = start + axes.offset("tokens", tokens.shape[1])
    config = stack.config
    ropes = {layer.rope for layer in (*config.layers, *config.draft_layers)}
    context = make_context(tokens, start, end, ropes, target, axes=axes)
    streams = open_streams(context, embedding, stack)
    if cache is None:
        return stack(streams, context)[0], None
    if drafter is None:
        streams, cache, _ = stack.extend(streams, context, cache)
        return streams, cache
    shape = (*tokens.shape, len(config.draft.target_layer_ids), config.hidden_size)
    streams, cache, taps = stack.extend(streams, context, cache, jnp.zeros(shape, streams.dtype))
    keys = materialize(axes, drafter, target).context_keys(taps, context)
    return streams, store_draft_keys(axes, cache, keys, start, end)


def embed(context: Context, embedding: nnx.Param, numerics: Numerics) -> Float[Array, "b t d"]:
    """Returns the embeddings of the call's tokens in the activation dtype (spec B.1)."""
    table_vd = materialize(context.axes, embedding, context.target)[...]
    return look_up(context.axes, table_vd, context.tokens).astype(numerics.activation_dtype)


def open_streams(context: Context, embedding: nnx.Param, stack: Stack) -> Float[Array, "b t n d"]:
    """Returns the residual streams before the first layer: the embeddings, once for each."""
    x = embed(context, embedding, stack.numerics)
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], stack.config.hc_mult, x.shape[-1]))


def read_logits(model: "Transformer", streams) -> Float[Array, "b t v"]:
    """Returns float32 logits of streams (spec B.15)."""
    split = divide_tokens(model.layout, streams.shape[1])
    inputs, outputs = (WEIGHTS, P("batch", "tokens")), P("batch", "tokens", "vocab")
    body = partial(_read_logits, target=model.target)
    read = on_shards(body, model.layout, split, inputs, outputs)
    return read((model.collapse, model.norm, model.head), streams)


def _read_logits(axes, weights, streams, target):
    collapse, norm, head = materialize(axes, weights, target)
    return matmul_float32(norm(collapse(streams, target)), head[...], target=target)


def read_drafts(model: "Transformer", streams, tokens) -> Float[Array, "b u v"]:
    """Returns the first MTP block's logits of streams and tokens at positions 0 … t−1 (spec B.15).

    Row u pairs the streams of token u with token u+1; the last streams have no pair.
    """
    following, streams = tokens[:, 1:], streams[:, :-1]
    batch, count = following.shape
    call = plan_call(model.layout, model.config, batch, count, extends=False)
    inputs = (WEIGHTS, P("batch", "tokens"), P("batch", "tokens"), P("batch"))
    outputs = P("batch", "tokens", "vocab")
    body = partial(_read_drafts, target=model.target)
    read = on_shards(body, model.layout, call.tokens, inputs, outputs)
    end = jnp.full(batch, count, jnp.int32)
    weights = (model.embed, model.mtp[0], model.head)
    return call.cut(read(weights, call.pad(streams), call.pad(following), end))


def _read_drafts(axes, weights, streams, following, end, target):
    embedding, *others = weights
    mtp, head = materialize(axes, others, target)
    layer = mtp.layer
    start = jnp.zeros_like(end) + axes.offset("tokens", following.shape[1])
    context = make_context(following, start, end, {layer.rope}, target, axes=axes)
    memory = full_sequence(mtp.config, mtp.numerics, layer, context)
    embedded = embed(context, embedding, mtp.numerics)
    normed, _, _ = mtp(streams, embedded, context, memory)
    return matmul_float32(normed, head[...], target=target)


def draft_step(
    model: "Transformer", last, cache: HybridCache, choice: Choice, count: int
) -> Drafts:
    """Returns `count` drafts that follow `last` [b], which follows what the cache holds."""
    axes = cache_axes(cache)
    inputs, outputs = (WEIGHTS, P("batch"), axes), (P("batch"), P("batch", None, "vocab"))
    body = partial(_draft, count=count, target=model.target)
    run = on_shards(body, model.layout, "whole", inputs, outputs)
    x, logits = run((model.embed, model.drafter, model.head), last, cache)
    x, logits, choice = replicate((x, logits, choice), model.layout)
    return model.drafter.choose_tokens(x, logits, last, choice, model.target)


def _draft(axes, weights, last, cache, count: int, target):
    embedding, *others = weights
    module, head = materialize(axes, others, target)
    config = module.config
    rows, start = config.draft.block_size, cache.lengths
    noise = jnp.full((last.shape[0], rows - 1), config.draft.noise_token_id, jnp.int32)
    tokens = jnp.concatenate([last[:, None].astype(jnp.int32), noise], axis=1)
    ropes = {layer.rope for layer in config.draft_layers}
    context = make_context(tokens, start, start + rows, ropes, target, axes=axes)
    keys, seen = draft_keys(cache)
    x = module(embed(context, embedding, module.numerics), keys, seen, context)[:, :count]
    return x, module.read_logits(x, head[...], target)


def verify_step(
    model: "Transformer", last, drafts: Drafts, cache: HybridCache, lengths, choice: Choice
) -> tuple[Verified, HybridCache]:
    """Returns what the model says about drafts, and the cache with those that are accepted.

    Args:
      lengths [b]: how many of [last, drafts …] are real; a sequence of 0 stays as it is.
    """
    before = cache.lengths
    tokens = jnp.concatenate([last[:, None], drafts.tokens], axis=1)
    logits, cache = extend_step(model, tokens, cache, lengths, "all")
    logits, drafts, choice = replicate((logits, drafts, choice), model.layout)
    accepted, following = choice.accept(drafts, logits, jnp.maximum(lengths - 1, 0))
    cache = cache.take_back(before + jnp.minimum(lengths, accepted + 1))
    return Verified(logits, accepted, following), cache


draft = partial(jax.jit, static_argnames="count")(draft_step)
verify, verify_donating = jax.jit(verify_step), jax.jit(verify_step, donate_argnames="cache")
