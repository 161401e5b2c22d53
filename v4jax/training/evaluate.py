"""Held-out text: loss by position in the document, and how well the indexer finds what attention
looks at.

The recall compares with full attention: the layers attend to every visible entry here, and the
indexer's `index_topk` best are weighed by the attention they would have got.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.model import Transformer
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode, read_normed, run_rows
from v4jax.training.losses import indexer_parts, score_targets, shift, target_weights
from v4jax.training.placement import put_batches
from v4jax.training.step import TrainState, join_model

# Positions are counted in groups that begin at these.
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


def build_evaluation(frozen: Transformer):
    """Returns the function from a state and a batch to sums of loss and weight, and to recall."""

    def evaluate(frozen: Transformer, state: TrainState, batch: Batch):
        model = join_model(frozen, state)
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

    layout = frozen.layout
    everywhere = None if layout is None else NamedSharding(layout.mesh, P())
    compiled = jax.jit(evaluate, out_shardings=everywhere)
    return lambda state, batch: compiled(frozen, state, batch)


def evaluate_text(evaluate, state: TrainState, batches: Iterable[Batch], layout=None) -> dict:
    """Returns `TextScore.report` of host batches, given what `build_evaluation` returned."""
    score = TextScore()
    for batch in batches:
        stacked = put_batches(jax.tree.map(lambda x: np.asarray(x)[None], batch), layout)
        sums, compared = evaluate(state, jax.tree.map(lambda x: x[0], stacked))
        score.loss += np.asarray(sums[0], np.float64)
        score.weight += np.asarray(sums[1], np.float64)
        score.recall += float(compared.get("recall", 0.0))
        score.batches += 1
    return score.report()
