"""Floating-point operations of tokens, by component.

Products with weights are counted from the model's inventory; attention and index scores, from what
a query sees. A multiply-add is two operations.
"""

import dataclasses
import functools
from collections.abc import Callable

from v4jax.config import LayerKind, ModelConfig
from v4jax.costs.inventory import DRAFT, MTP, Inventory, count_layers

# Components without gradients: the ids of selected entries carry none, and scores only choose ids.
_FORWARD_ONLY = ("index scores", "selection")


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one component.

    fmt: format of the weights or cached vectors multiplied. unit: "matrix" for matrix products,
    "vector" for elementwise work and comparisons. layers: main layers that do it.
    """

    component: str
    flops: float
    fmt: str
    unit: str = "matrix"

    def times(self, factor: float) -> "Work":
        """Returns the same work, done `factor` times."""
        return dataclasses.replace(self, flops=self.flops * factor)


def count_tokens(
    inventory: Inventory,
    first: int,
    end: int,
    *,
    logits: int = 1,
    mtp: bool = False,
    draft_keys: bool = False,
) -> list[Work]:
    """Returns the forward work of the tokens at positions first … end−1 of one sequence.

    One token (`end = first + 1`) is a decode step; all tokens from 0 are a prefill. Where a query
    sees so few entries that all are selected, the program skips their scores; this count does not.

    Args:
      logits: tokens whose logits are computed.
      mtp: whether the MTP block runs too, as in training.
      draft_keys: whether the keys are made that drafts see, as in serving.
    """
    tokens = end - first
    assert tokens >= 1 and 0 <= logits <= tokens, (first, end, logits)
    return [
        *_weight_products(inventory, tokens, logits, mtp),
        *(_draft_keys(inventory, tokens) if draft_keys else []),
        *_attention(inventory.config, first, end),
        *_stream_mixing(inventory.config, tokens),
    ]


def reading_work(inventory: Inventory) -> Callable[[int, int], tuple[float, float]]:
    """Returns a function that gives the operations of reading tokens `first` to before `end`.

    They are two numbers: the work that every token has, and the work that depends on how much the
    tokens see. Cheap enough to be asked at every step.
    """
    every = total(_weight_products(inventory, 1, 0, False) + _stream_mixing(inventory.config, 1))
    attention = functools.partial(_attention, inventory.config)
    return lambda first, end: (every * (end - first), total(attention(first, end)))


def count_training(inventory: Inventory, tokens: int, *, remat: bool) -> list[Work]:
    """Returns the work of one training sequence: forward, both gradients, and forward again.

    Args:
      remat: whether the forward pass is recomputed in the backward pass.
    """
    forward = count_tokens(inventory, 0, tokens, logits=tokens, mtp=True)
    again = 1 if remat else 0
    # Gradients with respect to input and weight double the forward work.
    return [work.times((1 if work.component in _FORWARD_ONLY else 3) + again) for work in forward]


def count_draft_training(
    inventory: Inventory, tokens: int, blocks: int, *, remat: bool
) -> list[Work]:
    """Returns the work of training the draft module alone on one sequence.

    The target runs forward only. The module makes context keys of all tokens, and trains on
    `blocks` drafts; their logits are compared with the target's.

    Args:
      remat: whether the stages' forward pass is recomputed in the backward pass.
    """
    config, draft = inventory.config, inventory.config.draft
    rows = blocks * draft.block_size
    head = Work(DRAFT, 2.0 * config.vocab_size * config.hidden_size * rows, "bfloat16")
    keys = rows * (config.sliding_window + draft.block_size) * draft.stages
    scores = 4.0 * config.num_attention_heads * config.head_dim * keys
    work, chosen = [Work(DRAFT, scores, "bfloat16")], config.num_experts_per_tok
    for weight in inventory.weights:
        if weight.component != DRAFT or not weight.is_matrix:
            continue
        name = weight.path.rpartition(".")[2]
        count = {"context_projection": tokens, "key_value": tokens + rows}.get(name, rows)
        share = chosen / config.n_routed_experts if weight.is_routed else 1.0
        work.append(Work(DRAFT, 2.0 * weight.parameters * share * count, weight.fmt))
    target = count_tokens(inventory, 0, tokens, logits=0)
    # The head has no gradient of its own; its logits are made again with the tiles of the loss.
    logits = [head.times(3 + (2 if remat else 0))]
    return target + [w.times(4 if remat else 3) for w in work] + logits


def total(work: list[Work], *components: str) -> float:
    """Returns all operations, or those of the components named."""
    return sum(item.flops for item in work if not components or item.component in components)


def by_component(work: list[Work]) -> dict[str, float]:
    """Returns component → operations, in the order of `work`."""
    sums: dict[str, float] = {}
    for item in work:
        sums[item.component] = sums.get(item.component, 0.0) + item.flops
    return sums


def _weight_products(inventory: Inventory, tokens: int, logits: int, mtp: bool) -> list[Work]:
    config, work = inventory.config, []
    chosen = config.num_experts_per_tok / config.n_routed_experts
    for weight in inventory.weights:
        if not weight.is_matrix or (weight.drafts and not (mtp and weight.component == MTP)):
            continue
        share = chosen if weight.is_routed else 1.0
        count = logits if weight.component == "head" else tokens
        work.append(Work(weight.component, 2.0 * weight.parameters * share * count, weight.fmt))
    if mtp:  # the MTP block reads its logits through the model's own head
        head = 2.0 * config.vocab_size * config.hidden_size * logits
        work.append(Work(MTP, head * config.num_nextn_predict_layers, "bfloat16"))
    return work


def _draft_keys(inventory: Inventory, tokens: int) -> list[Work]:
    """Returns the products that make the keys of tokens for drafts of a module or an MTP block."""
    streams = {"stream_projection": inventory.config.hc_mult}  # every stream is projected
    return [
        Work(
            weight.component,
            2.0 * weight.parameters * tokens * streams.get(weight.path.rpartition(".")[2], 1),
            weight.fmt,
        )
        for weight in inventory.weights
        if weight.is_matrix and weight.makes_draft_keys
    ]


def _attention(config: ModelConfig, first: int, end: int) -> list[Work]:
    per_key = 4.0 * config.num_attention_heads * config.head_dim  # scores, then weighted sum
    per_score = 2.0 * config.index_n_heads * config.index_head_dim
    ratios = {layer.kind: layer.ratio for layer in config.layers}
    window = sum_window(config.sliding_window, first, end)
    work = []
    csa = count_layers(config, LayerKind.CSA)
    if csa:
        scored = sum_visible(ratios[LayerKind.CSA], first, end)
        chosen = sum_visible(ratios[LayerKind.CSA], first, end, limit=config.index_topk)
        work += [
            Work("index scores", csa * per_score * scored, "fp4"),
            Work("selection", float(csa * scored), "float32", "vector"),  # a comparison each
            Work("sparse attention", csa * per_key * (window + chosen), "bfloat16"),
        ]
    hca = count_layers(config, LayerKind.HCA)
    seen = sum_visible(ratios[LayerKind.HCA], first, end) if hca else 0
    keys = hca * (window + seen) + count_layers(config, LayerKind.WINDOW) * window
    return [*work, Work("dense attention", per_key * keys, "bfloat16")]


def _stream_mixing(config: ModelConfig, tokens: int) -> list[Work]:
    n, sites = config.hc_mult, 2 * config.num_hidden_layers
    collapse, expand = n, n * n + n  # multiply-adds per channel
    flops = 2.0 * sites * (collapse + expand) * config.hidden_size * tokens
    return [Work("hyper-connections", flops, "float32", "vector")]


def sum_window(window: int, first: int, end: int) -> int:
    """Returns the window keys that queries first … end−1 see together.

    >>> sum_window(4, 0, 6)  # 1 + 2 + 3 + 4 + 4 + 4
    18
    """

    def up_to(count: int) -> int:
        full = min(count, window)
        return full * (full + 1) // 2 + (count - full) * window

    return up_to(end) - up_to(first)


def sum_visible(ratio: int, first: int, end: int, limit: int | None = None) -> int:
    """Returns the compressed entries that queries first … end−1 see together, at most `limit` each.

    A query sees what `kernels.table.visible_entries` says: (p + 1) // ratio at position p.

    >>> sum_visible(4, 0, 9), sum_visible(4, 0, 17, limit=2)  # 4·1 + 2, 4·1 + 4·2 + 4·2 + 2
    (6, 22)
    """

    def up_to(count: int) -> int:
        # Σ i // ratio over i = 1 … count: 0 for ratio − 1 queries, then steps of `ratio`.
        steps, rest = divmod(count, ratio)
        return ratio * steps * (steps - 1) // 2 + steps * (rest + 1)

    def limited(count: int) -> int:
        if limit is None or count // ratio <= limit:
            return up_to(count)
        reached = limit * ratio  # queries from position reached − 1 on see `limit`
        return up_to(reached) + (count - reached) * limit

    return limited(end) - limited(first)
