"""A training run as data: what files under `configs/train/` and `configs/finetune/` fill.

A file states what differs from these defaults; `config.loading.build(TrainConfig, …)` makes one.
"""

import dataclasses
from typing import ClassVar, Literal

from v4jax.config.data import DataConfig
from v4jax.config.model import DraftConfig, ModelConfig
from v4jax.config.ranges import MAX_SEED, check_ranges, within
from v4jax.errors import ConfigError
from v4jax.files import is_remote

# Names of what a layer's backward pass may keep: the residual streams before the layer, and the
# outputs of its two sublayers.
BLOCK_TAGS = ("streams", "attention_output", "moe_output")


def require(holds: bool, field: str, rule: str, value: object) -> None:
    """Raises ConfigError for a field of a run unless its rule holds."""
    if not holds:
        raise ConfigError(f"train.{field} {rule}, got {value!r}")


_MOST_DEVICES = 1 << 20


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; `parallel/axes.py` says what each splits.

    `slices` names axes whose devices are in several slices, as pairs: (("data", 2),).
    """

    data: int = within(1, _MOST_DEVICES, 1)
    expert: int = within(1, _MOST_DEVICES, 1)
    context: int = within(1, _MOST_DEVICES, 1)
    tensor: int = within(1, _MOST_DEVICES, 1)
    slices: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        check_ranges(self, "mesh.")
        for axis, count in self.slices:
            size = getattr(self, axis, 0) if axis in _AXES else 0
            if count < 1 or size % count or not size:
                raise ConfigError(
                    f"mesh.slices must divide axes of the mesh, such as (('data', 2),); got "
                    f"{(axis, count)} for {self.sizes}"
                )

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis → size."""
        return {axis: getattr(self, axis) for axis in _AXES}


_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig) if field.type is int)


def parse_mesh(text: str) -> MeshConfig:
    """Returns the mesh that a text such as "data=2,expert=8" names; other sizes are 1.

    Raises:
      ConfigError: an unknown axis, an axis twice, or a size that is no positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if axis not in _AXES or not equals or axis in sizes:
            raise ConfigError(
                f"mesh must name each of {', '.join(_AXES)} at most once, such as "
                f"data=1,expert=16; got {text!r}"
            )
        if not (size.isascii() and size.isdigit() and 1 <= int(size[:20]) <= _MOST_DEVICES):
            raise ConfigError(f"mesh.{axis} must be between 1 and {_MOST_DEVICES}, got {size!r}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses beside cross-entropy.

    Attributes:
      mtp_weight: weight of the MTP block's cross-entropy.
      late_mtp: what is left of `mtp_weight` while the rate decays, as a fraction of it.
      balance_weight: weight of the sequence-wise balance term.
      bias_speed: how far a step moves a router's bias toward an even load (auxiliary-loss-free); 0
        leaves biases alone.
      distill_weight: weight of the indexer's loss, where the indexer is trained.

    Source: spec G.3, G.4.
    """

    mtp_weight: float = 0.3
    late_mtp: float = 1 / 3
    balance_weight: float = 1e-4
    bias_speed: float = 1e-3
    distill_weight: float = 1.0

    REPLACED: ClassVar = {"late_mtp_weight": "late_mtp, a fraction of mtp_weight"}

    def __post_init__(self):
        for field in ("mtp_weight", "late_mtp", "balance_weight", "bias_speed", "distill_weight"):
            value = getattr(self, field)
            require(value >= 0, f"loss.{field}", "must not be negative", value)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest (report), or AdamW for all; the rate's schedule.

    The rate rises linearly to `rate` in `warmup_steps`, stays, and falls as a cosine over the last
    `decay_steps`. Both are numbers of steps or, below 1, shares of the run.

    Attributes:
      decay_to: the last rate, as a fraction of `rate`.
      adamw_rate: rate of the weights under AdamW, relative to `rate`.
      undecayed: patterns (`training.patterns`) of weights without weight decay. The report decays
        indexer and router; here they are left out by default, because a router that fine-tuning
        hardly moves would only fade.
      update_rms: root mean square of a Muon update at rate 1; with the default AdamW's rates fit.
      epsilon: of AdamW; the report's is below what float32 can hold beside squares, and
        `training.optimizer.adam_epsilon` then takes the smallest that it can.
      accumulate: batches whose gradients are summed for one update.

    Source: spec G.2.
    """

    kind: Literal["muon", "adamw"] = "muon"
    rate: float = 2.7e-4
    decay_to: float = 0.1
    adamw_rate: float = 1.0
    warmup_steps: float = 0.1
    decay_steps: float = 0
    weight_decay: float = 0.1
    undecayed: tuple[str, ...] = ("indexer", "router")
    momentum: float = 0.95
    update_rms: float = 0.18
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-20
    clip_norm: float = 1.0
    accumulate: int = 1
    moments: Literal["float32", "bfloat16"] = "float32"

    REPLACED: ClassVar = {"last_rate": "decay_to, a fraction of rate"}

    def __post_init__(self):
        for field in ("rate", "adamw_rate", "update_rms", "clip_norm", "accumulate", "epsilon"):
            value = getattr(self, field)
            require(value > 0, f"optimizer.{field}", "must be positive", value)
        for field in ("warmup_steps", "decay_steps"):
            value = getattr(self, field)
            rule = "must be a whole number of steps, or a share of the run from 0 to below 1"
            require(0 <= value < 1 or value % 1 == 0 < value, f"optimizer.{field}", rule, value)
        require(
            self.weight_decay >= 0,
            "optimizer.weight_decay",
            "must not be negative",
            self.weight_decay,
        )
        rule = "must be a fraction of rate, from 0 to 1"
        require(0 <= self.decay_to <= 1, "optimizer.decay_to", rule, self.decay_to)
        for field in ("momentum", "beta1", "beta2"):
            value = getattr(self, field)
            require(0 <= value < 1, f"optimizer.{field}", "must be in [0, 1)", value)

    def spans(self, steps: int) -> tuple[int, int]:
        """Returns how many of the run's steps the rate rises, and how many it falls."""
        spans = self.warmup_steps, self.decay_steps
        rise, fall = (int(span * steps if span < 1 else span) for span in spans)
        return rise, fall


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: W + (alpha / rank) · up · down, on matrices that a target names.

    Targets are patterns (`training.patterns`). `start` is a folder of adapters in PEFT's layout to
    go on from; rank, alpha and targets must be theirs.

    The base stays as it is stored (FP4 and FP8), untouched.
    """

    rank: int = within(1, 1 << 16, 16)
    alpha: float = 32.0
    targets: tuple[str, ...] = (
        "attention.query_down",
        "attention.query_up",
        "attention.key_value",
        "attention.output_down",
        "attention.output_up",
        "moe.experts",
        "moe.shared",
    )
    start: str | None = None

    def __post_init__(self):
        check_ranges(self, "train.lora.")
        require(self.alpha > 0, "lora.alpha", "must be positive", self.alpha)
        require(bool(self.targets), "lora.targets", "must name parts of weights", self.targets)


@dataclasses.dataclass(frozen=True)
class DraftTraining:
    """Trains the draft module alone; everything else stays as it is, bit for bit.

    At each anchor the module drafts a block behind a token of the text. Row i of the block weighs
    exp(−i / decay), times the weight of its target in the data.

    Attributes:
      module: shape of a fresh module, which takes the place of the module or the MTP blocks of
        `train.model`; None trains the module that is there.
      anchors: blocks of each row of a batch at most, at places that are drawn anew every step.
      cross_entropy_weight: weight of the cross-entropy with the text.
      distance_weight: weight of Σ|P − Q|, the distance of the draft's distribution Q from the
        target's P.
      confidence_weight: weight of the binary cross-entropy of the confidence with the probability
        of being accepted, 1 − ½·Σ|P − Q|.
      decay: rows in which the weight of a row falls to 1/e.

    Source: spec dspark 2, Training. These are the numbers of DeepSpec for drafts of other models;
    those of the released modules are not published (UNVERIFIED).
    """

    module: DraftConfig | None = None
    anchors: int = 512
    cross_entropy_weight: float = 0.1
    distance_weight: float = 0.9
    confidence_weight: float = 1.0
    decay: float = 4.0

    def __post_init__(self):
        require(self.anchors >= 1, "draft.anchors", "must be at least 1", self.anchors)
        require(self.decay > 0, "draft.decay", "must be positive", self.decay)
        for field in ("cross_entropy_weight", "distance_weight", "confidence_weight"):
            value = getattr(self, field)
            require(value >= 0, f"draft.{field}", "must not be negative", value)

    def add_module(self, model: ModelConfig) -> ModelConfig:
        """Returns the model's configuration with the module that is trained.

        Raises:
          ConfigError: the model has no module and none is described, or one that does not fit it.
        """
        if self.module:
            return model.with_draft(self.module)
        if model.draft is None:
            raise ConfigError(
                "train.draft trains the draft module, and train.model has none; describe a fresh "
                "one: train.draft.module = dict(stages=3, target_layer_ids=(40, 41, 42), "
                "markov_rank=256)"
            )
        return model


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often the state of a run is kept.

    Attributes:
      every: steps between two checkpoints.
      keep: how many of the newest stay.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        for field in ("every", "keep"):
            value = getattr(self, field)
            require(value >= 1, f"checkpoint.{field}", "must be at least 1", value)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured while a run goes on, beside its training loss.

    Attributes:
      data: held-out text, whose loss by position and whose recall of the indexer are measured.
      every: steps between two evaluations.
      batches: how many batches of `data` are read, the same every time.
      samples: how many documents of the first batch the model continues, at most one of each row:
        it writes the first answer of a conversation, or the second half of a plain text, to be read
        beside the original.
      sample_tokens: length of such a text at most; each token is a forward pass over the batch.
    """

    data: DataConfig
    every: int = 500
    batches: int = 4
    samples: int = 2
    sample_tokens: int = 32

    def __post_init__(self):
        for field in ("every", "batches", "sample_tokens"):
            value = getattr(self, field)
            require(value >= 1, f"evaluation.{field}", "must be at least 1", value)
        require(self.samples >= 0, "evaluation.samples", "must not be negative", self.samples)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of `v4jax train`.

    Attributes:
      model: a checkpoint folder, whose weights are the start, or a packaged configuration: nano
        starts from its trained weights, another from random ones.
      output: folder for checkpoints, metrics and the finished model.
      steps: optimizer updates; None: as many as `data.epochs` gives.
      seed: makes the random weights of a run that starts from such.
      from_scratch: starts from random weights where `model` is a packaged configuration.
      numerics: how the computation rounds (`config.numerics`).
      lora: trains adapters only; None trains all weights. A draft module is trained by `draft`
        alone, and MTP blocks by their loss.
      draft: trains the draft module only.
      quantization_aware: routed experts and other quantized weights are rounded to their stored
        format during training; exporting them then loses nothing.
      frozen: patterns (`training.patterns`) of weights that are not trained.
      indexer: "frozen" (no gradient, no decay, no optimizer state) or "distill" (trained by its own
        loss alone).
      dense_steps: first steps in which CSA layers attend to every visible entry, before selection.
      count_gaps: where documents leave positions out (`data.gaps`), HCA entries count for these as
        well: each weighs like the many that a document of that length would have in its place.
      remat: "layers" computes every layer again in the backward pass and keeps its input; "none"
        keeps everything.
      keep, offload: names of `BLOCK_TAGS` to keep on the device, or in the host's memory, instead
        of computing them again.
      evaluation: what is measured meanwhile; None measures the training loss only.
      max_skipped: the run stops after so many steps in a row whose loss or gradient is not finite.
      log_every: steps between two lines of metrics.
      report_to: further receivers of metrics; `metrics.jsonl` is always written.
    """

    model: str
    output: str
    data: DataConfig
    steps: int | None = None
    seed: int = within(0, MAX_SEED, 0)
    from_scratch: bool = False
    numerics: Literal["float32", "bfloat16", "released"] = "bfloat16"
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig | None = None
    draft: DraftTraining | None = None
    quantization_aware: bool = False
    frozen: tuple[str, ...] = ()
    indexer: Literal["frozen", "distill"] = "frozen"
    dense_steps: int = 0
    count_gaps: bool = False
    remat: Literal["layers", "none"] = "layers"
    keep: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = None
    max_skipped: int = 10
    log_every: int = 10
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self):
        check_ranges(self, "train.")
        for field in ("steps", "max_skipped", "log_every"):
            value = getattr(self, field)
            require(value is None or value >= 1, field, "must be at least 1", value)
        if self.steps is None and self.data.epochs is None:
            raise ConfigError(
                "train.steps is missing: say how long the run is by train.steps or by data.epochs"
            )
        require(self.dense_steps >= 0, "dense_steps", "must not be negative", self.dense_steps)
        rule = "must be on a disk or in gs:// (Orbax, which writes checkpoints, has no s3://)"
        require(not self.output.startswith("s3://"), "output", rule, self.output)
        rule = "must be empty with an output in a bucket (metrics.jsonl has the same numbers)"
        require(not (self.report_to and is_remote(self.output)), "report_to", rule, self.report_to)
        for field in ("keep", "offload"):
            for name in getattr(self, field):
                rule = f"must hold names of {list(BLOCK_TAGS)}"
                require(name in BLOCK_TAGS, field, rule, name)
        if self.remat == "none" and (self.keep or self.offload):
            raise ConfigError(
                "train.keep and train.offload say what is not computed again; with train.remat = "
                "'none' nothing is: use 'layers', or leave them empty"
            )
        if self.lora and self.quantization_aware:
            raise ConfigError(
                "train.quantization_aware rounds weights that are trained; with train.lora the "
                "base is quantized already: use one of the two"
            )
        if self.draft:
            for field in ("lora", "dense_steps"):
                rule = "must be left out with train.draft, which trains the draft module only"
                require(not getattr(self, field), field, rule, getattr(self, field))
            rule = "must be 'frozen' with train.draft, which trains the draft module only"
            require(self.indexer == "frozen", "indexer", rule, self.indexer)
        if self.count_gaps and not self.data.gaps:
            raise ConfigError(
                "train.count_gaps is for documents that leave positions out; set data.gaps, or "
                "leave it out"
            )
        last = 0 if self.steps is None else sum(self.optimizer.spans(self.steps))
        if self.steps is not None and last > self.steps:
            raise ConfigError(
                f"train.optimizer.warmup_steps + decay_steps must not exceed train.steps = "
                f"{self.steps}, got {last}; below 1 they are shares of the run"
            )
