"""Held-out text: loss by position in the document, and the recall of the indexers.

The recall compares with full attention: layers attend to every visible entry, and it is the share
of this attention that goes to the indexer's `index_topk` best entries. Where the draft module is
trained, its drafts are measured instead; nothing else changes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import log
from v4jax.config.run import DraftTraining
from v4jax.model import Transformer
from v4jax.parallel import Layout
from v4jax.training.batch import Batch, put_batch
from v4jax.training.draft import (
    DraftTotals,
    compute_draft_losses,
    count_rows,
    place_anchors,
)
from v4jax.training.forward import Mode, read_normed, run_rows
from v4jax.training.losses import indexer_parts, score_targets, shift, target_weights
from v4jax.training.state import TrainState

# First position of each group in which losses are counted.
POSITION_GROUPS = (0, 256, 1024, 4096, 16_384, 65_536, 262_144)
_FULL = Mode(remat="none", dense=True, distill=True)


@dataclasses.dataclass
class TextScore:
    """Sums over held-out text; `report` gives the means.

    loss, weight: of targets by position group. recall: of the indexers, summed over batches.
    """

    loss: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(POSITION_GROUPS)))
    weight: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(POSITION_GROUPS)))
    recall: float = 0.0
    batches: int = 0

    def report(self) -> dict:
        """Returns `eval_loss` in nats, perplexities by position, and `eval_recall`."""
        found = {"eval_loss": float(self.loss.sum() / max(self.weight.sum(), 1e-9))}
        found["eval_perplexity"] = {
            f"from {start}": round(float(np.exp(loss / weight)), 4)
            for start, loss, weight in zip(POSITION_GROUPS, self.loss, self.weight, strict=True)
            if weight > 0
        }
        if self.batches and self.recall:
            found["eval_recall"] = self.recall / self.batches
        return found


def score_batch(model: Transformer, batch: Batch):
    """Returns sums of loss and weight by position group [2, g], and the indexers' recall."""
    streams, _ = run_rows(model, batch.tokens, batch.begin, Mode(remat="none"), batch.skipped)
    nll, _ = score_targets(model, read_normed(model, streams), shift(batch.tokens, 1))
    weights = target_weights(batch, 1)
    _, reports = run_rows(model, batch.tokens, batch.begin, _FULL, batch.skipped)
    begin = 0 if batch.begin is None else jnp.maximum(batch.begin, 0)
    positions = jnp.arange(batch.tokens.shape[1]) - begin + jnp.zeros_like(batch.tokens)
    group = jnp.searchsorted(jnp.asarray(POSITION_GROUPS), positions, side="right") - 1
    member = jax.nn.one_hot(group, len(POSITION_GROUPS))
    sums = jnp.einsum("btg,nbt->ng", member, jnp.stack([nll * weights, weights]))
    return sums, indexer_parts(reports)


def evaluate_text(
    score: Callable, state: TrainState, batches: Iterable[Batch], layout: Layout | None = None
) -> dict:
    """Returns `TextScore.report` of host batches; warns of batches that are not finite.

    They leave the means NaN: a mean of the others would be that of another text.

    Args:
      score: `score_batch`, compiled by `compile_forward`.
    """
    total, bad = TextScore(), []
    for batch in batches:
        sums, compared = score(state, put_batch(batch, layout))
        total.loss += np.asarray(sums[0], np.float64)
        total.weight += np.asarray(sums[1], np.float64)
        total.recall += float(compared.get("recall", 0.0))
        total.batches += 1
        if not (np.isfinite(sums).all() and math.isfinite(compared.get("recall", 0.0))):
            bad.append(total.batches)
    if bad:
        log.warning(
            f"evaluation: the model computed NaN or infinity in {len(bad)} of {total.batches} "
            f"batches of held-out text, first in number {bad[0]}; the result is no number. Look "
            "at the text of that batch, or compare with numerics float32"
        )
    return total.report()


def score_drafts(model: Transformer, batch: Batch, *, training: DraftTraining):
    """Returns sums of the parts of `compute_draft_losses`, and what they are divided by.

    The anchors of a batch are the same every time.
    """
    rows = model.config.draft.block_size
    anchors = place_anchors(batch, training.anchors, rows, jax.random.key(0))
    one = DraftTotals(jnp.float32(1), jnp.ones(rows), jnp.float32(1))
    mode = Mode(remat="none")
    _, sums = compute_draft_losses(model, batch, anchors, one, training, mode)
    del sums["reports"]
    return sums, count_rows(anchors, training.decay)


def evaluate_drafts(
    score: Callable, state: TrainState, batches: Iterable[Batch], layout: Layout | None = None
) -> dict:
    """Returns `eval_loss`, `eval_acceptance` and the other parts of the loss, of host batches.

    Args:
      score: `score_drafts`, compiled by `compile_forward`.
    """
    scored = [jax.device_get(score(state, put_batch(batch, layout))) for batch in batches]
    if not scored:
        return {"eval_loss": float("nan")}
    sums, totals = jax.tree.map(lambda *found: np.sum(found, axis=0), *scored)
    by_row = dict.fromkeys(("acceptance", "agreement"), totals.rows)
    dividers = by_row | {"accepted_length": totals.blocks}
    means = {name: value / dividers.get(name, totals.weight) for name, value in sums.items()}
    return {f"eval_{name}": np.asarray(mean, np.float64).tolist() for name, mean in means.items()}
