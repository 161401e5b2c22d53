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
from v4jax.cache.hybrid import (
    cache_axes,
    draft_keys,
    store_draft_keys,
    store_streams,
    streams_before,
)
from v4jax.config import Numerics
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.model.context import Context, make_context
from v4jax.model.speculation import Choice, Drafts, Verified
from v4jax.model.stack import Stack, full_sequence
from v4jax.model.weights import materialize
from v4jax.parallel import WEIGHTS, on_shards
from v4jax.parallel.context_parallel import divide_tokens, plan_call, rows_before, take_last
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
    serial = cache is not None and model.drafter is None and model.draft_tokens
    weights = model.embed, model.stack, model.drafter, model.mtp[0] if serial else None
    streams, cache = run(weights, call.pad(tokens), start, end, cache)
    if cache is None:
        return call.cut(streams), None
    return call.cut(streams), dataclasses.replace(cache, lengths=end.astype(jnp.int32))


def _run_layers(axes, weights, tokens, start, end, cache, target):
    embedding, stack, drafter, mtp = weights
    start = start + axes.offset("tokens", tokens.shape[1])
    config = stack.config
    ropes = {layer.rope for layer in (*config.layers, *config.draft_layers)}
    context = make_context(tokens, start, end, ropes, target, axes=axes)
    streams = open_streams(context, embedding, stack)
    embedded = streams[:, :, 0]
    if cache is None:
        return stack(streams, context)[0], None
    if drafter is None:
        streams, cache, _ = stack.extend(streams, context, cache)
        if mtp is not None:
            cache = _keep_pairs(context, mtp, streams, embedded, cache)
        return streams, cache
    shape = (*tokens.shape, len(config.draft.target_layer_ids), config.hidden_size)
    streams, cache, taps = stack.extend(streams, context, cache, jnp.zeros(shape, streams.dtype))
    keys = materialize(axes, drafter, target).context_keys(taps, context)
    return streams, store_draft_keys(axes, cache, keys, start, end)


def _keep_pairs(context: Context, mtp, streams, embedded, cache: HybridCache) -> HybridCache:
    """Returns the cache with the MTP block's keys of positions start−1 … end−2.

    A position pairs its streams with the token that follows; that of the last one is not there yet.
    """
    axes, start, end = context.axes, context.start - 1, context.end - 1
    before = rows_before(axes, streams, streams_before(cache, context.start))
    before = jnp.concatenate([before, streams[:, :-1]], axis=1)
    pairs = make_context(context.tokens, start, end, {mtp.layer.rope}, context.target, axes=axes)
    keys = materialize(axes, mtp, context.target).context_keys(before, embedded, pairs)
    cache = store_draft_keys(axes, cache, [keys], start, end)
    return store_streams(axes, cache, streams, context.start, context.end)


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
    axes, rows = cache_axes(cache), P("batch", None, "vocab")
    inputs = WEIGHTS, P("batch"), axes
    if model.drafter is None:
        body = partial(_draft_serial, target=model.target)
        run = on_shards(body, model.layout, "whole", inputs, rows)
        logits = run((model.embed, model.mtp[0], model.head), last, cache)
        logits, choice = replicate((logits, choice), model.layout)
        return Drafts(choice.choose(logits[:, 0], 0)[:, None], logits, None)
    body = partial(_draft, count=count, target=model.target)
    run = on_shards(body, model.layout, "whole", inputs, (P("batch"), rows))
    x, logits = run((model.embed, model.drafter, model.head), last, cache)
    x, logits, choice = replicate((x, logits, choice), model.layout)
    return model.drafter.choose_tokens(x, logits, last, choice, model.target)


def _draft_serial(axes, weights, last, cache, target):
    embedding, *others = weights
    mtp, head = materialize(axes, others, target)
    tokens, end = last[:, None].astype(jnp.int32), cache.lengths
    context = make_context(tokens, end - 1, end, {mtp.layer.rope}, target, axes=axes)
    (keys,), seen = draft_keys(cache, end - 1, mtp.config.sliding_window - 1)
    embedded = embed(context, embedding, mtp.numerics)
    normed = mtp.draft(streams_before(cache, end), embedded, keys, seen, context)
    return matmul_float32(normed, head[...], target=target)


def _draft(axes, weights, last, cache, count: int, target):
    embedding, *others = weights
    module, head = materialize(axes, others, target)
    config = module.config
    rows, start = config.draft.block_size, cache.lengths
    noise = jnp.full((last.shape[0], rows - 1), config.draft.noise_token_id, jnp.int32)
    tokens = jnp.concatenate([last[:, None].astype(jnp.int32), noise], axis=1)
    ropes = {layer.rope for layer in config.draft_layers}
    context = make_context(tokens, start, start + rows, ropes, target, axes=axes)
    keys, seen = draft_keys(cache, start, config.sliding_window)
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
