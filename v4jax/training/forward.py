"""The model as training runs it: streams and normed vectors of whole rows, and what layers report.

The modules are those of inference. Here the layers are computed again in the backward pass as
`Mode.remat` says, and routers and indexers are measured while they run.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from v4jax.config import LayerKind, ModelConfig, RouterKind
from v4jax.kernels.table import DOCUMENT_UNIT
from v4jax.model import Transformer
from v4jax.model.context import make_context
from v4jax.model.passes import embed, open_streams
from v4jax.model.stack import full_sequence
from v4jax.model.weights import materialize
from v4jax.parallel.context_parallel import divide_tokens, plan_call
from v4jax.parallel.shard import WEIGHTS, on_shards
from v4jax.training.indexer_loss import Shown, compare_selected, compare_visible


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a training pass runs the layers.

    remat: "layers" computes every layer again in the backward pass and keeps its input; "none"
      keeps everything.
    keep, offload: names of `config.run.BLOCK_TAGS` to keep on the device, or in the host's memory,
      instead of computing them again.
    dense: CSA layers attend to every visible entry, as before sparsity is introduced.
    distill: compares index scores with attention: on all visible entries when `dense`, else on the
      selected ones.
    count_gaps: where positions are left out, HCA entries count for those left out too, so that
      they weigh as much as in a document of that length.
    """

    remat: Literal["layers", "none"] = "layers"
    keep: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    dense: bool = False
    distill: bool = False
    count_gaps: bool = False


def run_rows(
    model: Transformer,
    tokens: Int[Array, "b t"],
    begin: Int[Array, "b t"] | None = None,
    mode: Mode = Mode(),
    skipped: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t n d"], dict]:
    """Returns the streams after the last layer, and the report of every block by its path.

    A report has, summed over the batch: `load` [e], assignments per expert; where the router
    chooses by score, `balance`, the sequence-wise balance term of every document times its tokens;
    with `distill` on CSA layers `divergence` and `recall`, summed over the `queries` that see an
    entry.

    Args:
      begin, skipped: see `training.Batch`; None: each row is one document, without gaps.
    """
    batch, count = tokens.shape
    call = plan_call(model.layout, model.config, batch, count, extends=False)
    rows = P("batch", "tokens")
    inputs = (WEIGHTS, rows, P("batch"), rows)
    body = functools.partial(_run_rows, mode=mode, target=model.target)
    run = on_shards(body, model.layout, call.tokens, inputs, (rows, P()))
    end = jnp.full(batch, count, jnp.int32)
    weights = model.embed, model.stack
    places = find_places(call, begin, skipped)
    streams, reports = run(weights, call.pad(tokens), end, places)
    return call.cut(streams), reports


def _run_rows(axes, weights, tokens, end, places, mode, target):
    embedding, stack = weights
    ropes = {layer.rope for layer in stack.config.layers}
    context = make_row_context(axes, tokens, end, places, ropes, mode, target)
    streams = open_streams(context, embedding, stack)

    def run_layer(block, streams, layer):
        def run(block, streams):
            memory = full_sequence(stack.config, stack.numerics, layer, context)
            observed, seen = context.observe()
            streams, _ = materialize(axes, block, target)(streams, observed, memory)
            return streams, measure(seen, stack.config, layer, context, mode)

        return rematerialize(run, mode)(block, streams)

    return stack.run(streams, run_layer)


def read_normed(model: Transformer, streams: Float[Array, "b t n d"]) -> Float[Array, "b t d"]:
    """Returns what the head takes: the collapsed and normalized streams (spec B.15)."""
    split = divide_tokens(model.layout, streams.shape[1])
    inputs, outputs = (WEIGHTS, P("batch", "tokens")), P("batch", "tokens")

    def read(axes, weights, streams):
        collapse, norm = materialize(axes, weights, model.target)
        return norm(collapse(streams, model.target))

    return on_shards(read, model.layout, split, inputs, outputs)(
        (model.collapse, model.norm), streams
    )


def run_drafts(
    model: Transformer,
    streams: Float[Array, "b t n d"],
    tokens: Int[Array, "b t"],
    begin: Int[Array, "b t"] | None = None,
    mode: Mode = Mode(),
    skipped: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t d"], dict]:
    """Returns the first MTP block's vectors for the head, of which row i predicts token i+2.

    Row i pairs the streams of token i with token i+1; the last row of a document has no pair: what
    stands there means nothing, and the report leaves it out.
    """
    batch, count = tokens.shape
    following = jnp.roll(tokens, -1, axis=1)
    paired = None
    if begin is not None:
        paired = jnp.where(jnp.roll(begin, -1, axis=1) == begin, begin, -1)
    call = plan_call(model.layout, model.config, batch, count, extends=False)
    rows = P("batch", "tokens")
    run = on_shards(
        functools.partial(_run_drafts, mode=mode, target=model.target),
        model.layout,
        call.tokens,
        (WEIGHTS, rows, rows, P("batch"), rows, rows),
        (rows, P()),
    )
    end = jnp.full(batch, count, jnp.int32)
    weights = model.embed, model.mtp[0]
    places = find_places(call, begin, skipped), _pad_begin(call, paired)
    normed, report = run(weights, call.pad(streams), call.pad(following), end, *places)
    return call.cut(normed), {"mtp.0.block": report}


def _run_drafts(axes, weights, streams, following, end, places, paired, mode, target):
    embedding, mtp = weights
    layer = mtp.layer
    context = make_row_context(axes, following, end, places, {layer.rope}, mode, target)
    counted = dataclasses.replace(context, document_begin=paired, end=end - 1)
    embedded = embed(context, embedding, mtp.numerics)

    def run(mtp, streams, embedded):
        memory = full_sequence(mtp.config, mtp.numerics, layer, context)
        observed, seen = context.observe()
        mtp = materialize(axes, mtp, target)
        normed, _, _ = mtp(streams, embedded, observed, memory)
        return normed, measure(seen, mtp.config, layer, counted, mode)

    return rematerialize(run, mode)(mtp, streams, embedded)


def find_places(call, begin, skipped) -> dict[str, Array]:
    """Returns the fields of `Context` that say where tokens are; those without a value left out."""
    if begin is None:
        assert skipped is None
        return {}
    if skipped is None:
        return {"document_begin": _pad_begin(call, begin)}
    return {
        "document_begin": _pad_begin(call, begin),
        "window_begin": call.pad(find_window_begin(begin, skipped)),
        "positions": call.pad(jnp.arange(skipped.shape[1]) - jnp.maximum(begin, 0) + skipped),
    }


def find_window_begin(begin: Int[Array, "... t"], skipped: Int[Array, "... t"]) -> Array:
    """Returns the index in the row from which on no position is left out up to each token."""
    before = tuple(jnp.roll(x, 1, axis=-1) for x in (skipped, begin))
    changes = (before[0] != skipped) | (before[1] != begin)
    row = jnp.arange(skipped.shape[-1])
    return jax.lax.cummax(jnp.where(changes, row, 0), axis=skipped.ndim - 1)


def make_row_context(axes, tokens, end, places, ropes, mode, target):
    start = jnp.zeros_like(end) + axes.offset("tokens", tokens.shape[1])
    fields = {"dense": mode.dense, "axes": axes} | places
    if mode.count_gaps and "window_begin" in places:
        fields["entry_weight"] = weigh_entries(start, places["document_begin"], places["positions"])
    return make_context(tokens, start, end, ropes, target, **fields)


def weigh_entries(start, document_begin, positions) -> Float[Array, "b t"]:
    """Returns how often an HCA entry counts so that all of them stand for skipped positions too.

    A token at position p of its document that has n tokens of it up to itself in the row counts
    entries (p + 1) / n times. The arguments are fields of `Context`.
    """
    rows = start[:, None] + jnp.arange(positions.shape[1])
    return (positions + 1) / (rows - jnp.maximum(document_begin, 0) + 1)


def _pad_begin(call, begin):
    """Pads as `Call.pad`; added tokens belong to no document."""
    return None if begin is None else call.pad(begin + 1) - 1


def rematerialize(function, mode: Mode):
    """Returns the function, computed again in the backward pass as the mode says."""
    if mode.remat == "none":
        return function
    policy = checkpoint_policies.save_only_these_names(*mode.keep)
    if mode.offload:
        policy = checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(mode.keep),
            names_which_can_be_offloaded=list(mode.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
    # Layers outside the scan need `prevent_cse`, its default: XLA would merge what is computed
    # again with the first time, and so keep it.
    return jax.checkpoint(function, policy=policy)


def measure(seen: dict, config: ModelConfig, layer, context, mode: Mode) -> dict:
    """Returns the report of one layer, equal on all devices."""
    report = measure_router(
        seen["router_ids"], seen["router_scores"], config.n_routed_experts, context
    )
    if layer.router is RouterKind.HASH:
        del report["balance"]  # the load is the table's, no gradient of the scores changes it
    if mode.distill and layer.kind is LayerKind.CSA:
        report |= measure_indexer(seen, config, layer, context, mode)
    return report


def measure_router(ids_tk, scores_te, experts: int, context) -> dict:
    """Returns `load` and `balance` of a router (spec G.3).

    For a document of T tokens, with counts c_e of assignments and normalized scores s, the balance
    term is Σ_e E/(K·T)·c_e · mean_t s_e; times T it is summed over documents.
    """
    batch, tokens = context.tokens.shape
    real_bt = context.real
    ids_btk = ids_tk.reshape(batch, tokens, -1)
    chosen_bte = jax.nn.one_hot(ids_btk, experts, dtype=jnp.float32).sum(axis=2)
    chosen_bte = jnp.where(real_bt[..., None], chosen_bte, 0.0)
    shares_bte = scores_te.reshape(batch, tokens, -1)
    shares_bte = shares_bte / shares_bte.sum(axis=-1, keepdims=True)
    shares_bte = jnp.where(real_bt[..., None], shares_bte, 0.0)
    # A document is known by its first unit of the row; a row that is one document by unit 0.
    units = 1
    document_bt = jnp.zeros((batch, tokens), jnp.int32)
    if context.document_begin is not None:
        units = -(-tokens * context.axes.size("tokens") // DOCUMENT_UNIT)
        document_bt = jnp.maximum(context.document_begin, 0) // DOCUMENT_UNIT

    def per_document(values_bte):
        add = functools.partial(jax.ops.segment_sum, num_segments=units)
        return context.axes.psum(jax.vmap(add)(values_bte, document_bt), "tokens")

    count_bse = per_document(jax.lax.stop_gradient(chosen_bte))
    share_bse = per_document(shares_bte)
    tokens_bs = jnp.maximum(count_bse.sum(axis=-1) / ids_btk.shape[-1], 1.0)
    balance = (count_bse * share_bse).sum(axis=-1) / tokens_bs * (experts / ids_btk.shape[-1])
    return {
        "load": context.axes.psum(count_bse.sum(axis=(0, 1)), "batch"),
        "balance": context.axes.psum(balance.sum(), "batch"),
    }


def measure_indexer(seen: dict, config: ModelConfig, layer, context, mode: Mode) -> dict:
    """Returns `divergence`, `recall` and `queries` of a CSA layer's indexer."""
    shown = Shown(*(seen[name] for name in Shown._fields))
    arguments = context.axes, context.target, shown
    rows_bt = context.start[:, None] + jnp.arange(context.tokens.shape[1])
    begin_bt = jnp.zeros_like(rows_bt) if context.document_begin is None else context.document_begin
    if mode.dense:
        found = compare_visible(
            *arguments,
            rows_bt,
            begin_bt // layer.ratio,
            ratio=layer.ratio,
            count=layer.adjust(config).index_topk,
        )
    else:
        found = compare_selected(*arguments, seen["selected"])
    sees_bt = context.real & (rows_bt + 1 - begin_bt >= layer.ratio)

    def add(values_bt):
        total = jnp.where(sees_bt, values_bt, 0.0).sum()
        return context.axes.psum(context.axes.psum(total, "tokens"), "batch")

    return {
        "divergence": add(found.divergence),
        "recall": add(found.recall),
        "queries": add(jnp.ones_like(found.recall)),
    }
