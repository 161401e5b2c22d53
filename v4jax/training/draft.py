"""The draft module in training: blocks drafted behind tokens of a text, and their loss.

    anchors = place_anchors(batch, 512, key)      where blocks are drafted, and what counts of them
    totals = count_rows(anchors, decay)
    loss, parts = compute_draft_losses(model, batch, anchors, totals, config, mode)

The target runs once over the rows, as in inference and without gradients: its backward pass is
never made. A block behind token a, at place p+1, sees the context up to p and predicts p+2 onward,
as `model.draft` does; the tokens before its rows are those of the text.

Source: spec dspark 2, Training; DeepSpec. UNVERIFIED: how the released modules were trained.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from v4jax.cache.formats import entry_format
from v4jax.config.run import DraftTraining
from v4jax.kernels import Target
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.kernels.tiles import map_query_tiles
from v4jax.model import Transformer
from v4jax.model.context import Context, make_context
from v4jax.model.draft import Drafter
from v4jax.model.passes import embed, open_streams
from v4jax.model.weights import materialize
from v4jax.parallel import Axes
from v4jax.parallel.context_parallel import divide_tokens, plan_call
from v4jax.parallel.shard import WEIGHTS, look_up, on_shards
from v4jax.training.batch import Batch
from v4jax.training.forward import (
    Mode,
    find_places,
    find_window_begin,
    make_row_context,
    rematerialize,
)
from v4jax.training.losses import GPU_LOGITS, LOGIT_ELEMENTS, shift


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """Where blocks are drafted.

    places [..., a]: index in the row of the token before each block's first prediction.
    weights [..., a, r]: how much row i of a block counts, which predicts the token at place
      + 1 + i; 0 from the first row on whose target is none.
    """

    places: Int[Array, "... a"]
    weights: Float[Array, "... a r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftTotals:
    """What the sums over a batch are divided by.

    weight: of all rows that count, decay included. rows [r]: how many count, by their place in the
    block. blocks: those with a row that counts.
    """

    weight: Float[Array, ""]
    rows: Float[Array, "r"]
    blocks: Float[Array, ""]


def place_anchors(batch: Batch, count: int, rows: int, key: Array) -> Anchors:
    """Returns up to `count` anchors for every row of a batch [b, t], or of stacked ones [n, b, t].

    They are drawn without replacement from the places where the token and the next one are targets
    of the same document, with at least one token of it before them.
    """
    weights, tokens = batch.weights, batch.tokens.shape[-1]
    count, index = min(count, tokens), jnp.arange(tokens)
    first = first_in_sight(batch)

    def counts(i):  # whether token t + i is a target that a block at t may predict
        return (shift(weights, i) > 0) & (shift(first, i, -1) == first)

    eligible = (weights > 0) & counts(1) & (first >= 0) & (index > first)
    drawn = jnp.where(eligible, jax.random.uniform(key, weights.shape), -1.0)
    drawn, places = jax.lax.top_k(drawn, count)
    kept, found = drawn >= 0, []
    for i in range(1, rows + 1):
        kept = kept & jnp.take_along_axis(counts(i), places, axis=-1)
        goal = jnp.take_along_axis(shift(weights, i), places, axis=-1)
        found.append(jnp.where(kept, goal, 0.0))
    return Anchors(places.astype(jnp.int32), jnp.stack(found, axis=-1))


def first_in_sight(batch: Batch) -> Int[Array, "... t"]:
    """Returns the first place of a row that each token may see: of its document, or behind a gap.

    Padding has a negative one.
    """
    if batch.begin is None:
        return jnp.zeros_like(batch.tokens)
    if batch.skipped is None:
        return batch.begin
    return jnp.where(batch.begin < 0, batch.begin, find_window_begin(batch.begin, batch.skipped))


def count_rows(anchors: Anchors, decay: float) -> DraftTotals:
    """Returns the totals of the anchors of a batch, or of several stacked ones."""
    weights = anchors.weights.reshape(-1, anchors.weights.shape[-1])
    real = (weights > 0).astype(jnp.float32)
    return DraftTotals(
        jnp.maximum((weights * fade(weights.shape[-1], decay)).sum(), 1e-9),
        jnp.maximum(real.sum(axis=0), 1.0),
        jnp.maximum(real[:, 0].sum(), 1.0),
    )


def fade(rows: int, decay: float) -> Float[Array, "r"]:
    """Returns how much the rows of a block weigh: exp(−i / decay)."""
    return jnp.exp(-jnp.arange(rows, dtype=jnp.float32) / decay)


def compute_draft_losses(
    model: Transformer,
    batch: Batch,
    anchors: Anchors,
    totals: DraftTotals,
    config: DraftTraining,
    mode: Mode,
) -> tuple[Float[Array, ""], dict]:
    """Returns the loss to minimize and its parts.

    Returns:
      A dictionary: `loss`, the weighted sum of `cross_entropy`, `distance` and `confidence_loss`;
      `acceptance` [r], the probability by row that a sampled token is accepted, 1 − ½·Σ|P − Q|;
      `agreement` [r], the share by row of equal greedy choices; `accepted_length`, tokens that a
      pass of the target gives with greedy choices, from 1 on (without drafts) to r + 1; `reports`,
      of every stage by its path, with `load` [e], the assignments per expert.
    """
    found, reports = draft_blocks(model, batch, anchors, mode)
    real = (anchors.weights > 0).astype(jnp.float32)
    weights = anchors.weights * fade(real.shape[-1], config.decay)
    names = ("cross_entropy", "distance", "confidence_loss")
    parts = {name: (found[name] * weights).sum() / totals.weight for name in names}
    factors = config.cross_entropy_weight, config.distance_weight, config.confidence_weight
    total = sum(factor * parts[name] for factor, name in zip(factors, names, strict=True))
    accepted, agreed = real * (1 - found["distance"] / 2), real * found["agreement"]
    parts |= {
        "loss": total,
        "acceptance": accepted.sum(axis=(0, 1)) / totals.rows,
        "agreement": agreed.sum(axis=(0, 1)) / totals.rows,
        "accepted_length": (real[..., 0] + jnp.cumprod(agreed, axis=-1).sum(axis=-1)).sum()
        / totals.blocks,
    }
    return total, jax.lax.stop_gradient(parts) | {"reports": reports}


def draft_blocks(
    model: Transformer, batch: Batch, anchors: Anchors, mode: Mode
) -> tuple[dict[str, Float[Array, "b a r"]], dict]:
    """Returns of every row of every block what its loss is made of, and the stages' reports.

    Returns:
      `cross_entropy` with the text, `distance` of the distributions, `confidence_loss`, and
      `agreement`, 1 where both choose the same token greedily.
    """
    normed, keys, positions = run_target(model, batch, mode)
    blocks = P("batch", "tokens")
    split = divide_tokens(model.layout, anchors.places.shape[1])
    rows = P("batch")
    inputs = (WEIGHTS, rows, rows, rows, rows, rows, blocks, blocks)
    body = functools.partial(_draft_blocks, mode=mode, target=model.target)
    run = on_shards(body, model.layout, split, inputs, (blocks, P()))
    weights, first = (model.embed, model.drafter, model.head), first_in_sight(batch)
    used = anchors.weights[..., 0] > 0
    return run(weights, batch.tokens, normed, keys, positions, first, anchors.places, used)


def run_target(
    model: Transformer, batch: Batch, mode: Mode
) -> tuple[Float[Array, "b t d"], list[Float[Array, "b t c"]], Int[Array, "b t"]]:
    """Returns what the target's head takes, the context keys of every stage, and positions."""
    count = batch.tokens.shape[1]
    call = plan_call(model.layout, model.config, batch.tokens.shape[0], count, extends=False)
    rows = P("batch", "tokens")
    inputs = (WEIGHTS, rows, P("batch"), rows)
    body = functools.partial(_run_target, mode=mode, target=model.target)
    run = on_shards(body, model.layout, call.tokens, inputs, rows)
    end = jnp.full(batch.tokens.shape[0], count, jnp.int32)
    weights = model.embed, model.stack, model.collapse, model.norm, model.drafter
    places = find_places(call, batch.begin, batch.skipped)
    return jax.tree.map(call.cut, run(weights, call.pad(batch.tokens), end, places))


def _run_target(axes, weights, tokens, end, places, mode, target):
    embedding, stack, collapse, norm, draft = weights
    config = stack.config
    ropes = {layer.rope for layer in (*config.layers, *config.draft_layers)}
    context = make_row_context(axes, tokens, end, places, ropes, mode, target)
    streams = open_streams(context, embedding, stack)
    shape = (*tokens.shape, len(config.draft.target_layer_ids), config.hidden_size)
    found = stack(streams, context, jnp.zeros(shape, streams.dtype))
    streams, taps = jax.lax.stop_gradient(found)
    collapse, norm, draft = materialize(axes, (collapse, norm, draft), target)
    stored = entry_format(config, stack.numerics)
    keys = [stored.round(k) for k in draft.context_keys(taps, context)]
    return jax.lax.stop_gradient(norm(collapse(streams, target))), keys, context.positions


def _draft_blocks(
    axes, weights, tokens, normed, keys, positions, first, places, used, mode, target
):
    embedding, module, head = weights
    heads = materialize(axes, module, target)
    config, window = module.config, module.config.sliding_window
    rows, noise = config.draft.block_size, config.draft.noise_token_id
    batch, count = places.shape

    def take(array_bt, index_ban):  # → [b, a, n, …]
        picked = jax.vmap(lambda row, index: row[index])(
            array_bt, jnp.clip(index_ban, 0, array_bt.shape[1] - 1)
        )
        return picked.reshape(batch, count, -1, *array_bt.shape[2:])

    def join(array_ba):  # → [b·a, …]: every block is a sequence of its own
        return array_ba.reshape(-1, *array_ba.shape[2:])

    here = places[..., None] + jnp.arange(rows)
    before = places[..., None] - window + jnp.arange(window)
    seen = join(before >= take(first, places[..., None]))
    ids = jnp.full((batch, count, rows), noise, jnp.int32)
    ids = join(ids.at[..., :1].set(take(tokens, places[..., None])))
    start = jnp.zeros(batch * count, jnp.int32)
    context = make_context(
        ids,
        start,
        jnp.where(join(used), rows, 0),
        {layer.rope for layer in config.draft_layers},
        target,
        positions=join(take(positions, places[..., None]) + jnp.arange(rows)),
        axes=axes,
    )
    embedded = jax.lax.stop_gradient(embed(context, embedding, module.numerics))
    streams = heads.open_streams(embedded)
    reports = {}
    for number, (stage, stage_keys) in enumerate(zip(module.stages, keys, strict=True)):

        def run(stage, streams, stage_keys):
            observed, shown = context.observe()
            window_keys = join(take(stage_keys, before))
            streams = module.run_stage(
                materialize(axes, stage, target), streams, window_keys, seen, observed
            )
            return streams, count_load(shown["router_ids"], config.n_routed_experts, context)

        streams, load = rematerialize(run, mode)(stage, streams, stage_keys)
        reports[f"drafter.stages.{number}"] = {"load": load}
    x = heads.collapse(streams, target).reshape(batch, count * rows, -1)
    flat = here.reshape(batch, -1)
    arrays = (tokens, tokens, normed), (flat, flat + 1, flat)
    previous, goals, normed = (
        take(array, index.reshape(here.shape)).reshape(batch, count * rows, *array.shape[2:])
        for array, index in zip(*arrays, strict=True)
    )
    head_vd = jax.lax.stop_gradient(materialize(axes, head, target)[...])
    found = score_rows(axes, target, heads, head_vd, x, previous, goals, normed)
    return {k: v.reshape(here.shape) for k, v in found.items()}, reports


def count_load(ids_tk: Int[Array, "t k"], experts: int, context: Context) -> Float[Array, "e"]:
    """Returns how often each expert was chosen, on all devices together."""
    chosen_te = jax.nn.one_hot(ids_tk, experts, dtype=jnp.float32).sum(axis=1)
    load = jnp.where(context.real.reshape(-1, 1), chosen_te, 0.0).sum(axis=0)
    return context.axes.psum(context.axes.psum(load, "tokens"), "batch")


def score_rows(
    axes: Axes,
    target: Target,
    module: Drafter,
    head_vd: Array,
    x: Float[Array, "b t d"],
    previous: Int[Array, "b t"],
    goals: Int[Array, "b t"],
    normed: Float[Array, "b t d"],
) -> dict[str, Float[Array, "b t"]]:
    """Returns what the losses of rows are made of (`draft_blocks`).

    Logits of draft and target are made for a tile of rows at a time, and again in the backward
    pass; with a split vocabulary each device makes its own share of them.

    Args:
      head_vd: the target's head.
      x: the module's vectors.
      previous, goals: ids of the token before a row's prediction, and of its target.
      normed: what the target's head takes where it predicts the same token.
    """
    before_btk = look_up(axes, module.markov_embed[...], previous)
    wide_vk = module.markov_head[...].astype(jnp.float32)  # for the sum of the tiles' gradients
    offset = axes.offset("vocab", head_vd.shape[0])

    def normalize(logits):
        largest = axes.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), "vocab")
        mass = axes.psum(jnp.exp(logits - largest[..., None]).sum(axis=-1), "vocab")
        return logits - (jnp.log(mass) + largest)[..., None]

    def choose(logits):  # the lowest id of the largest logit
        top = logits.max(axis=-1)
        ids = jnp.where(top >= axes.pmax(top, "vocab"), logits.argmax(axis=-1) + offset, 1 << 30)
        return -axes.pmax(-ids, "vocab")

    def score_tile(_, x, before, goals, normed):
        drafted = module.correct(module.read_logits(x, head_vd, target), before, target, wide_vk)
        wanted = matmul_float32(normed, head_vd, target=target)
        log_q, log_p = normalize(drafted), normalize(wanted)
        distance = axes.psum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(axis=-1), "vocab")
        local = goals - offset
        inside = (local >= 0) & (local < log_q.shape[-1])
        local = jnp.clip(local, 0, log_q.shape[-1] - 1)
        picked = jnp.take_along_axis(log_q, local[..., None], axis=-1)[..., 0]
        picked = axes.psum(jnp.where(inside, picked, 0.0), "vocab")
        agreement = choose(jax.lax.stop_gradient(drafted)) == choose(wanted)
        return jnp.stack([-picked, distance, agreement.astype(jnp.float32)], axis=-1)

    elements = target.sized(LOGIT_ELEMENTS, gpu=GPU_LOGITS)
    tile = max(elements // (2 * x.shape[0] * head_vd.shape[0]), 1)
    found = map_query_tiles(score_tile, min(tile, x.shape[1]), x, before_btk, goals, normed)
    cross_entropy, distance, agreement = jnp.moveaxis(found, -1, 0)
    accepted = jax.lax.stop_gradient(1 - distance / 2)
    confidence = module.estimate(x, before_btk, target)
    return {
        "cross_entropy": cross_entropy,
        "distance": distance,
        # Of the logit c and the share y: log(1 + e^c) − y·c.
        "confidence_loss": jax.nn.softplus(confidence) - accepted * confidence,
        "agreement": agreement,
    }
