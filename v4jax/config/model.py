"""`ModelConfig`: what the model computes, with the keys of the checkpoint's `config.json`.

Layers are data: `config.layers` is a tuple of small records derived from the keys. Nothing tests a
model's name.
Read `from_hf.py` for how a released or transformers `config.json` becomes one of these.
"""

import dataclasses
import enum
from collections.abc import Hashable, Sequence
from functools import cached_property

import numpy as np

from v4jax.config.json_keys import brief
from v4jax.config.ranges import MOST_TOKENS, check_ranges, within
from v4jax.errors import ConfigError

PROFILES = ("preview", "0731")  # generations of checkpoints; `tokenizer.PROFILES` has their texts


class LayerKind(enum.Enum):
    """How a layer sees tokens older than its window."""

    WINDOW = "sliding_attention"
    CSA = "compressed_sparse_attention"
    HCA = "heavily_compressed_attention"


class RouterKind(enum.Enum):
    """How a layer chooses experts: by a fixed table of token ids, or by score."""

    HASH = "hash_moe"
    TOPK = "moe"


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Frequency interpolation of the compressed layers' rotation (spec B.5); no magnitude."""

    factor: float = within(1e-3, 1e6, 16.0)
    beta_fast: float = within(1e-6, 1e6, 32.0)
    beta_slow: float = within(1e-6, 1e6, 1.0)
    original_max_position_embeddings: int = within(1, MOST_TOKENS, 65536)

    def __post_init__(self):
        check_ranges(self, "model.rope_scaling.")
        if not self.beta_fast > self.beta_slow:
            raise ConfigError(
                f"model.rope_scaling.beta_fast must exceed beta_slow = {self.beta_slow}, "
                f"got {self.beta_fast}"
            )


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of one layer: base, optional YaRN, and how many trailing channels rotate."""

    theta: float
    scaling: YarnScaling | None
    dim: int


# What a layer may have of its own (`config.overrides`): numbers that its modules alone use.
LAYER_FIELDS = (
    "index_topk",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
    "compress_rope_theta",
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer as data: everything in which it may differ from its neighbours.

    own: values of `ModelConfig` that differ in this layer, pairs sorted by name.
    """

    kind: LayerKind
    ratio: int  # tokens per compressed entry; 0 for a window layer
    router: RouterKind
    rope: Rope
    own: tuple[tuple[str, float], ...] = ()

    def adjust(self, config: "ModelConfig") -> "ModelConfig":
        """Returns the configuration that the layer's modules are built with."""
        return dataclasses.replace(config, **dict(self.own)) if self.own else config

    @property
    def overlaps(self) -> bool:
        """Whether an entry also pools the previous window's tokens (CSA does)."""
        return self.kind is LayerKind.CSA


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """The DSpark draft module: blocks that predict the next few tokens at once, from the target's
    streams.

    stages: blocks, one after the other.
    target_layer_ids: layers of the target whose output streams the module reads, from 0.
    markov_rank: width of the embedding of the token before, which corrects each row's logits.
    block_size: rows of a draft: the last token and block_size − 1 times the noise token.

    Source: spec dspark 1.2, 2.
    """

    stages: int = within(1, 64)
    target_layer_ids: tuple[int, ...] = within(0, 1023)
    markov_rank: int = within(1, 1 << 17)
    block_size: int = within(1, 1024, 5)
    noise_token_id: int = within(0, 1 << 24, 128799)


@dataclasses.dataclass(frozen=True)
class StackPlan:
    """How the layers fold: every layer is in exactly one place.

    Layers 0 … prefix−1 are single; then `period` layers repeat `repeats` times; the rest are single
    again.
    """

    prefix: int
    period: int
    repeats: int
    suffix: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every number of the model. Defaults are the values that both released models share.

    Source: spec A.2; released `config.json` of V4-Flash and V4-Pro.
    """

    hidden_size: int = within(1, 1 << 17)
    num_hidden_layers: int = within(1, 1024)
    num_attention_heads: int = within(1, 1 << 12)
    q_lora_rank: int = within(1, 1 << 17)
    o_groups: int = within(1, 1 << 12)
    n_routed_experts: int = within(1, 1 << 14)
    moe_intermediate_size: int = within(1, 1 << 18)
    index_topk: int = within(1, 1 << 20)
    routed_scaling_factor: float = within(0, 1e6)
    # One per layer, then one per MTP block or draft stage.
    compress_ratios: tuple[int, ...] = within(0, 1 << 20)
    layer_types: tuple[LayerKind, ...]  # one per entry of compress_ratios
    mlp_layer_types: tuple[RouterKind, ...]  # one per layer; blocks behind them are always TOPK

    vocab_size: int = within(1, 1 << 24, 129280)
    head_dim: int = within(1, 1 << 13, 512)
    qk_rope_head_dim: int = within(2, 1 << 13, 64)
    o_lora_rank: int = within(1, 1 << 17, 1024)
    sliding_window: int = within(1, 1 << 20, 128)
    index_n_heads: int = within(1, 1 << 12, 64)
    index_head_dim: int = within(1, 1 << 13, 128)
    num_experts_per_tok: int = within(1, 1 << 10, 6)
    swiglu_limit: float = within(1e-6, 1e30, 10.0)
    hc_mult: int = within(1, 64, 4)
    hc_sinkhorn_iters: int = within(1, 1000, 20)
    hc_eps: float = within(1e-30, 1, 1e-6)
    rms_norm_eps: float = within(1e-30, 1, 1e-6)
    rope_theta: float = within(1e-3, 1e15, 10000.0)
    compress_rope_theta: float = within(1e-3, 1e15, 160000.0)
    rope_scaling: YarnScaling | None = YarnScaling()
    # Serial MTP blocks; 0 where there is a draft module.
    num_nextn_predict_layers: int = within(0, 64, 1)
    draft: DraftConfig | None = None
    max_position_embeddings: int = within(1, MOST_TOKENS, 1048576)
    initializer_range: float = within(0, 1e3, 0.02)
    expert_dtype: str = "fp4"  # stored format of the routed experts: fp4 | fp8
    weight_block_size: tuple[int, int] = within(1, 1 << 16, (128, 128))  # tile of one FP8 scale
    bos_token_id: int = 0
    eos_token_id: int = 1
    more_eos_token_ids: tuple[int, ...] = ()  # end an answer too; the first one is eos_token_id
    tokenizer: str = "v4"  # v4 | byte
    profile: str = (
        "preview"  # preview | 0731: the generation, which decides how effort is asked for
    )

    # (layer, its `Layer.own`) by layer, of what was overridden; not written to a checkpoint.
    layer_overrides: tuple[tuple[int, tuple[tuple[str, float], ...]], ...] = ()

    def __post_init__(self):
        check_config(self)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The main layers as data, in order."""
        return tuple(self._layer(i, router) for i, router in enumerate(self.mlp_layer_types))

    @property
    def mtp_layers(self) -> tuple[Layer, ...]:
        """The blocks that predict one token further; they route by score."""
        first = self.num_hidden_layers
        return tuple(
            self._layer(first + i, RouterKind.TOPK) for i in range(self.num_nextn_predict_layers)
        )

    @property
    def draft_layers(self) -> tuple[Layer, ...]:
        """The stages of the draft module; they route by score."""
        first, stages = self.num_hidden_layers, 0 if self.draft is None else self.draft.stages
        return tuple(self._layer(first + i, RouterKind.TOPK) for i in range(stages))

    @property
    def draft_tokens(self) -> int:
        """How many tokens the model drafts at most; 0 where nothing drafts.

        An MTP block drafts one, where it is a window layer as in the released models.
        """
        if self.draft is not None:
            return self.draft.block_size
        return int(any(layer.kind is LayerKind.WINDOW for layer in self.mtp_layers[:1]))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self.eos_token_id, *self.more_eos_token_ids)

    @cached_property
    def stack_plan(self) -> StackPlan:
        """The folding of `layers` with the fewest blocks to compile."""
        return plan_stack(self.layers)

    @property
    def group_width(self) -> int:
        """Channels of one output group: heads per group × head_dim."""
        return self.num_attention_heads // self.o_groups * self.head_dim

    def with_draft(self, draft: DraftConfig) -> "ModelConfig":
        """Returns the configuration with a draft module in place of MTP blocks or another module.

        Raises:
          ConfigError: the module contradicts the rest of the model.
        """
        layers, stages = self.num_hidden_layers, max(draft.stages, 0)
        return dataclasses.replace(
            self,
            draft=draft,
            num_nextn_predict_layers=0,
            compress_ratios=self.compress_ratios[:layers] + (0,) * stages,
            layer_types=self.layer_types[:layers] + (LayerKind.WINDOW,) * stages,
        )

    def _layer(self, index: int, router: RouterKind) -> Layer:
        kind, ratio = self.layer_types[index], self.compress_ratios[index]
        own = dict(self.layer_overrides).get(index, ())
        theta = "rope_theta" if kind is LayerKind.WINDOW else "compress_rope_theta"
        scaling = None if kind is LayerKind.WINDOW else self.rope_scaling
        base = dict(own).get(theta, getattr(self, theta))
        return Layer(kind, ratio, router, Rope(base, scaling, self.qk_rope_head_dim), own)


def plan_stack(layers: Sequence[Hashable]) -> StackPlan:
    """Finds the prefix, repeated period and suffix with the fewest distinct blocks.

    >>> plan_stack("abcbcbc")
    StackPlan(prefix=1, period=2, repeats=3, suffix=0)
    """
    count, numbers = len(layers), {}
    ids = np.array([numbers.setdefault(layer, len(numbers)) for layer in layers], np.int64)
    best, saved = StackPlan(count, 0, 0, 0), 0
    for period in range(1, count // 2 + 1):
        # run[i]: how many layers from i on equal the one a period later; a unit of `period` layers
        # at i comes run[i] // period times again, and saves as many blocks.
        differs = np.flatnonzero(ids[:-period] != ids[period:])
        starts = np.arange(count - period)
        ends = np.append(differs, count - period)
        run = ends[np.searchsorted(differs, starts)] - starts
        again = run // period
        prefix = int(np.argmax(again))  # the first of equals
        blocks = int(again[prefix]) * period
        if blocks > saved or (blocks == saved and blocks and prefix < best.prefix):
            repeats = int(again[prefix]) + 1
            saved = blocks
            best = StackPlan(prefix, period, repeats, count - prefix - repeats * period)
    return best


def check_config(config: ModelConfig) -> None:
    """Raises on the first broken invariant; the message names field, rule and value.

    Raises:
      ConfigError: a size is not positive, a division leaves a rest, or two keys contradict each
        other.
    """

    def require(field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"model.{field} {rule}, got {brief(getattr(config, field))}")

    check_ranges(config, "model.")
    require("weight_block_size", len(config.weight_block_size) == 2, "must be rows and columns")
    blocks, layers = config.num_nextn_predict_layers, config.num_hidden_layers
    if config.draft is not None:
        require("num_nextn_predict_layers", blocks == 0, "must be 0 beside a draft module")
        blocks = config.draft.stages
    rule = f"must have {layers + blocks} entries (layers, and MTP blocks or draft stages)"
    for name in ("compress_ratios", "layer_types"):
        require(name, len(getattr(config, name)) == layers + blocks, rule)
    rule = f"must have num_hidden_layers = {layers} entries"
    require("mlp_layer_types", len(config.mlp_layer_types) == layers, rule)
    schedule = list(zip(config.layer_types, config.compress_ratios, strict=True))
    for kind, ratio in schedule:
        fits = ratio == 0 if kind is LayerKind.WINDOW else ratio > 0
        rule = f"must be {'0' if ratio else 'positive'} where the layer is {kind.name}"
        require("compress_ratios", fits, rule)
    for kind in (LayerKind.CSA, LayerKind.HCA):
        ratios = {ratio for other, ratio in schedule if other is kind}
        require("compress_ratios", len(ratios) <= 1, f"must be equal on all {kind.name} layers")
    heads, groups = config.num_attention_heads, config.o_groups
    rule = f"must be a multiple of o_groups = {groups}"
    require("num_attention_heads", heads % groups == 0, rule)
    rotated, experts = config.qk_rope_head_dim, config.n_routed_experts
    require("qk_rope_head_dim", rotated % 2 == 0, "must be even")
    indexed = ("index_head_dim",) if LayerKind.CSA in config.layer_types else ()
    for name in ("head_dim", *indexed):
        rule = f"must be at least qk_rope_head_dim = {rotated}"
        require(name, getattr(config, name) >= rotated, rule)
    rule = f"must not exceed n_routed_experts = {experts}"
    require("num_experts_per_tok", config.num_experts_per_tok <= experts, rule)
    require("expert_dtype", config.expert_dtype in ("fp4", "fp8"), "must be 'fp4' or 'fp8'")
    require("tokenizer", config.tokenizer in ("v4", "byte"), "must be 'v4' or 'byte'")
    require("profile", config.profile in PROFILES, f"must be one of {', '.join(PROFILES)}")
    rule = f"must be a token id below vocab_size = {config.vocab_size}"
    for name in ("bos_token_id", "eos_token_id"):
        require(name, 0 <= getattr(config, name) < config.vocab_size, rule)
    ends = config.more_eos_token_ids
    rule = f"must be token ids below vocab_size = {config.vocab_size}"
    require("more_eos_token_ids", all(0 <= end < config.vocab_size for end in ends), rule)
    if config.draft is not None:
        check_draft(config)


def check_draft(config: ModelConfig) -> None:
    """Raises on the first broken invariant of the draft module.

    Raises:
      ConfigError: a size is out of range, or contradicts the rest of the model.
    """
    draft, layers, vocab = config.draft, config.num_hidden_layers, config.vocab_size

    def require(field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"model.draft.{field} {rule}, got {brief(getattr(draft, field))}")

    check_ranges(draft, "model.draft.")
    ids = draft.target_layer_ids
    ascend = bool(ids) and all(0 <= i < layers for i in ids) and sorted(set(ids)) == list(ids)
    require("target_layer_ids", ascend, f"must be ascending layers 0 … {layers - 1}")
    noise = draft.noise_token_id
    require("noise_token_id", 0 <= noise < vocab, f"must be an id below {vocab}")
    behind = config.compress_ratios[layers:]
    if any(behind):
        raise ConfigError(
            f"model.compress_ratios must be 0 for the draft stages, got {brief(list(behind))}"
        )
