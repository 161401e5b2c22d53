"""The losses of a batch: next tokens, tokens after next, balance of experts, the indexer's scores.

All are sums over a batch, divided by totals that the caller gives: so the losses and gradients of
the parts of a batch add up to the whole's, whichever way it is cut or packed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from v4jax.config import LayerKind, ModelConfig
from v4jax.config.run import LossConfig
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.kernels.tiles import map_query_tiles
from v4jax.model import Transformer
from v4jax.model.weights import materialize, write_weights
from v4jax.parallel.context_parallel import divide_tokens
from v4jax.parallel.shard import WEIGHTS, on_shards
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode, read_normed, run_drafts, run_rows

# Logits held at once: 64 MiB in float32; on a GPU 256 MiB, as each tile reads the whole head.
LOGIT_ELEMENTS = 1 << 24
GPU_LOGITS = 1 << 26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """What the sums over a batch are divided by.

    targets, drafts: weight of all targets of the main head and of the MTP block. tokens: real ones.
    queries: those that see a compressed entry of a CSA layer.
    """

    targets: Float[Array, ""]
    drafts: Float[Array, ""]
    tokens: Float[Array, ""]
    queries: Float[Array, ""]


def count_totals(batch: Batch, config: ModelConfig) -> Totals:
    """Returns the totals of a batch [b, t], or of several stacked ones [n, b, t]."""
    begin = jnp.zeros_like(batch.tokens) if batch.begin is None else batch.begin
    seen = jnp.arange(begin.shape[-1]) - begin + 1
    ratios = {layer.ratio for layer in config.layers if layer.kind is LayerKind.CSA}

    def count(real):
        # A batch without any has sums of 0, whatever they are divided by.
        return jnp.maximum(real.sum(dtype=jnp.float32), 1.0)

    return Totals(
        jnp.maximum(target_weights(batch, 1).sum(), 1e-9),
        jnp.maximum(target_weights(batch, 2).sum(), 1e-9),
        count(begin >= 0),
        count((begin >= 0) & (seen >= max(ratios, default=1))),
    )


def target_weights(batch: Batch, ahead: int) -> Float[Array, "... t"]:
    """Returns how much row i counts that predicts token i + `ahead` of its own document."""
    weights = shift(batch.weights, ahead)
    if batch.begin is None:
        return weights
    return jnp.where(shift(batch.begin, ahead, -1) == batch.begin, weights, 0.0)


def shift(x: Array, ahead: int, fill: int = 0) -> Array:
    """Returns what stands `ahead` tokens further in the row; `fill` behind its end."""
    moved = jnp.roll(x, -ahead, axis=-1)
    return jnp.where(jnp.arange(x.shape[-1]) < x.shape[-1] - ahead, moved, fill)


def compute_losses(
    model: Transformer, batch: Batch, totals: Totals, config: LossConfig, mode: Mode
) -> tuple[Float[Array, ""], dict]:
    """Returns the loss to minimize and its parts.

    Returns:
      A dictionary: `loss`, cross-entropy per weighted target in nats; `accuracy` of the greedy
      choice, weighted alike; `mtp_loss`; `balance`, the mean of all routers that choose by score, 1
      for an even load; with `mode.distill`, `divergence` and `recall`, means over queries and CSA
      layers; `reports`, one per block (see `forward.run_rows`).
    """
    streams, reports = run_rows(model, batch.tokens, batch.begin, mode, batch.skipped)
    model, streams = finish_head_first(model, streams)
    normed = read_normed(model, streams)
    nll, right = score_targets(model, normed, shift(batch.tokens, 1))
    weights = target_weights(batch, 1)
    parts = {
        "loss": (nll * weights).sum() / totals.targets,
        "accuracy": (right * weights).sum() / totals.targets,
    }
    total = parts["loss"]
    if config.mtp_weight and model.mtp:
        drafts, draft_report = run_drafts(
            model, streams, batch.tokens, batch.begin, mode, batch.skipped
        )
        reports |= draft_report
        nll, _ = score_targets(model, drafts, shift(batch.tokens, 2))
        parts["mtp_loss"] = (nll * target_weights(batch, 2)).sum() / totals.drafts
        total += config.mtp_weight * parts["mtp_loss"]
    balance = [report["balance"].reshape(-1) for report in reports.values() if "balance" in report]
    if balance:
        per_router = jnp.concatenate(balance) / totals.tokens
        parts["balance"] = per_router.mean()
        total += config.balance_weight * per_router.sum()
    if mode.distill and (compared := indexer_parts(reports, totals.queries)):
        parts |= compared
        total += config.distill_weight * parts["divergence"]
    return total, parts | {"reports": reports}


def finish_head_first(model: Transformer, streams: Array) -> tuple[Transformer, Array]:
    """Returns both as they are; in the backward pass the head is done before the layers begin.

    Its gradients are as large as the whole vocabulary until they have been scattered. XLA would
    keep them through the backward pass of the layers, which is when memory is fullest.
    """
    leaves, tree = jax.tree.flatten(model.head.get_value())
    # Stored codes and their scales get no gradient.
    trained = [i for i, leaf in enumerate(leaves) if leaf.dtype in (jnp.float32, jnp.bfloat16)]
    *settled, streams = _settle(*(leaves[i] for i in trained), streams)
    for i, leaf in zip(trained, settled, strict=True):
        leaves[i] = leaf
    return write_weights(model, {"head": jax.tree.unflatten(tree, leaves)}), streams


@jax.custom_vjp
def _settle(*values):
    return values


def _settle_forward(*values):
    return values, None


def _settle_backward(_, gradients):
    return jax.lax.optimization_barrier(gradients)


_settle.defvjp(_settle_forward, _settle_backward)


def indexer_parts(reports: dict, queries: Float[Array, ""] | None = None) -> dict:
    """Returns the means over queries that see an entry, of all CSA layers; {} where none is.

    Args:
      queries: what a layer's sums are divided by; None: the queries of these reports.
    """
    found = [report for report in reports.values() if "queries" in report]
    if not found:
        return {}
    layers = jnp.concatenate([report["queries"].reshape(-1) for report in found])
    total = jnp.maximum(layers.sum(), 1.0) if queries is None else queries * layers.size
    return {
        name: sum(report[name].sum() for report in found) / total
        for name in ("divergence", "recall")
    }


def score_targets(
    model: Transformer, normed: Float[Array, "b t d"], targets: Int[Array, "b t"]
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Returns each target's negative log-likelihood, and 1 where it is the most probable token.

    Logits are made for a tile of tokens at a time, and again in the backward pass; with a split
    vocabulary each device makes its own share of them.
    """
    split = divide_tokens(model.layout, normed.shape[1])
    rows = P("batch", "tokens")
    body = functools.partial(_score_targets, target=model.target)
    run = on_shards(body, model.layout, split, (WEIGHTS, rows, rows), (rows, rows))
    return run(model.head, normed, targets)


def _score_targets(axes, head, normed, targets, target):
    weight_vd = materialize(axes, head, target)[...]
    wide_vd = weight_vd.astype(jnp.float32)  # for the sum of the tiles' gradients
    first = axes.offset("vocab", weight_vd.shape[0])

    def score_tile(_, normed, targets):
        logits = matmul_float32(normed, weight_vd, wide_vd, target=target)
        largest = axes.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), "vocab")
        mass = axes.psum(jnp.exp(logits - largest[..., None]).sum(axis=-1), "vocab")
        local = targets - first
        here = (local >= 0) & (local < logits.shape[-1])
        local = jnp.clip(local, 0, logits.shape[-1] - 1)
        picked = jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0]
        picked = axes.psum(jnp.where(here, picked, 0.0), "vocab")
        right = (jax.lax.stop_gradient(picked) >= largest).astype(jnp.float32)
        return jnp.stack([jnp.log(mass) + largest - picked, right], axis=-1)

    elements = target.sized(LOGIT_ELEMENTS, gpu=GPU_LOGITS)
    tile = max(elements // (normed.shape[0] * weight_vd.shape[0]), 1)
    found = map_query_tiles(score_tile, min(tile, normed.shape[1]), normed, targets)
    return found[..., 0], found[..., 1]
