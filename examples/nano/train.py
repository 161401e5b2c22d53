"""Trains nano from random weights, in eleven stages: the model of `v4jax.load("nano")`.

    python examples/nano/train.py        # every stage; started again, it goes on where it stood
    python examples/nano/train.py 9      # from stage 9 on, with out/nano_8/start as it is

Hardware: two CPU cores, about four hours by the speed of the stages one by one. Result: the model
in out/nano_11/model. `v4jax/pretrained/nano/README.md` says what it finds and how stages 9 and 10
came about.

A stage is a run that starts from the weights of the one before. A window of 32 tokens (stages 1
and 4) leaves CSA entries as the only way to what is further back. Short rows with many questions
then teach that way: names and codes were learned several times faster than in rows that leave
positions out. Rates are far above the report's because the model is small.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
from typing import Any

from v4jax import compile_cache
from v4jax.config import DataConfig, LayerKind, ModelConfig, SourceConfig, TrainConfig
from v4jax.config.loading import load_model_config
from v4jax.config.model import DraftConfig
from v4jax.config.run import CheckpointConfig, DraftTraining, LossConfig, OptimizerConfig

WINDOW = load_model_config("nano").sliding_window
NARROW = 32
STOPPED = 143  # exit status: a signal ended a stage, which left a checkpoint


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of the curriculum.

    Attributes:
      teaches: what is new in it.
      length: tokens of a row.
      batch: rows of a batch.
      steps: optimizer updates.
      dense: first steps in which CSA layers attend to every visible entry and the indexer learns
        from all of them.
      rate: of the optimizer.
      needles: settings of the sources, each a `training.data.needles.Needles`.
      window: `sliding_window` of the model meanwhile.
      indexer: "frozen" where it has nothing to choose.
      count_gaps: HCA entries count for the positions left out as well.
      mtp_weight: of the MTP block's loss; in stages 8 to 10, nano itself had it while the rate
        fell only.
      optimizer: further fields of the optimizer.
      entry_scale: factor on the norms of CSA entries before the stage.
      draft: trains the draft module only.
    """

    teaches: str
    length: int
    batch: int
    steps: int
    dense: int
    rate: float
    needles: tuple[dict[str, Any], ...]
    window: int = WINDOW
    indexer: str = "distill"
    count_gaps: bool = False
    mtp_weight: float = 0.0
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    entry_scale: float = 1.0
    draft: DraftTraining | None = None


SIX = dict(tokens=(160, 228), needles=(3, 6), distractors=(0, 0), questions=(6, 6))
FOURTEEN = dict(tokens=(400, 640), needles=(4, 14), distractors=(0, 6), questions=(8, 8))
MANY = dict(tokens=(900, 1280), needles=(4, 24), distractors=(0, 20), questions=(14, 16))
FULL = dict(tokens=(2048, 2816), needles=(8, 40), distractors=(8, 60), questions=(14, 16))
LONG = dict(tokens=(9000, 13000), needles=(30, 60), distractors=(30, 80), questions=(40, 60))
# Rows of 4,096 tokens that stand for up to a million: three of four leave positions out.
NEAR = dict(tokens=(2048, 2560), needles=(16, 40), distractors=(16, 60), questions=(24, 32))
FAR = NEAR | dict(gaps=0.06, gap_tokens=(2048, 1 << 20))

# Every fourth document teaches to foresee what is written around the answers.
ANSWERS, ALL = SIX | dict(text_weight=0.0), SIX | dict(text_weight=1.0)
MODULE = DraftConfig(stages=3, target_layer_ids=(3, 4, 5), markov_rank=16, noise_token_id=319)

STAGES = (
    Stage(
        "one code in 128 tokens, and one question for it",
        *(128, 32, 284),
        dense=0,
        rate=0.01,
        needles=(dict(tokens=(64, 76), needles=(1, 1), distractors=(0, 0), questions=(1, 1)),),
        window=NARROW,
        indexer="frozen",
        optimizer=dict(warmup_steps=50),
    ),
    Stage(
        "up to three codes, and distances of up to a million positions",
        *(256, 16, 260),
        dense=0,
        rate=0.01,
        needles=(
            dict(tokens=(128, 128), needles=(1, 3), distractors=(0, 0), questions=(1, 2), gaps=0.8),
        ),
        indexer="frozen",
    ),
    Stage(
        "up to six codes with distractors; the indexer begins to learn",
        *(512, 8, 160),
        dense=150,
        rate=0.01,
        needles=(
            dict(tokens=(256, 256), needles=(1, 6), distractors=(0, 4), questions=(2, 4), gaps=0.6),
        ),
    ),
    Stage(
        "six codes, all asked for: names are told apart",
        *(512, 8, 210),
        dense=210,
        rate=0.006,
        needles=(SIX,),
        window=NARROW,
    ),
    Stage(
        "up to 14 codes in 1,024 tokens; selection truncates",
        *(1024, 4, 200),
        dense=40,
        rate=0.006,
        needles=(FOURTEEN, FOURTEEN | dict(gaps=0.7)),
    ),
    Stage(
        "up to 24 codes in 2,048 tokens, every entry attended to",
        *(2048, 2, 1830),
        dense=1830,
        rate=0.006,
        needles=(MANY, MANY | dict(gaps=0.7)),
    ),
    Stage(
        "4,096 tokens, dense, then sparse; the rate falls",
        *(4096, 1, 110),
        dense=60,
        rate=0.003,
        needles=(MANY, FULL, FULL | dict(gaps=0.4)),
        mtp_weight=0.1,
        optimizer=dict(warmup_steps=2, decay_steps=90, decay_to=1 / 15),
    ),
    Stage(
        "16,384 tokens, dense; the rate falls",
        *(16384, 1, 60),
        dense=60,
        rate=0.003,
        needles=(LONG, LONG | dict(gaps=0.1)),
        mtp_weight=0.1,
        optimizer=dict(warmup_steps=2, decay_steps=40, decay_to=1 / 15),
    ),
    # A long text has many HCA entries, and their share of the attention grows with their number:
    # what the window says fades. After stage 8 that cost half of the codes at 256 K. Here each
    # entry in view counts for the positions left out as well.
    Stage(
        "4,096 tokens that stand for up to a million; the rate falls",
        *(4096, 1, 300),
        dense=300,
        rate=0.003,
        needles=(NEAR, FAR, FAR, FAR),
        count_gaps=True,
        mtp_weight=0.1,
        optimizer=dict(warmup_steps=5, decay_steps=200, decay_to=1 / 15),
    ),
    # The 64 entries selected of 131,072 are likelier rivals than those of a training row: after
    # stage 9 they cost a quarter of the codes at 512 K. Two thirds of these came back when scores
    # of CSA entries were made 1.5 times as large. Queries are normalized, and the size of scores
    # is in the norm of the entries.
    Stage(
        "CSA entries weigh 1.5 times as much; the rest gets used to it",
        *(4096, 1, 100),
        dense=100,
        rate=0.001,
        needles=(NEAR, FAR, FAR, FAR),
        count_gaps=True,
        mtp_weight=0.1,
        optimizer=dict(warmup_steps=5, decay_steps=95, decay_to=0.1),
        entry_scale=1.5,
    ),
    Stage(
        "a draft module in place of the MTP block; nothing else changes any more",
        *(512, 4, 1000),
        dense=0,
        rate=0.006,
        needles=(ANSWERS, ANSWERS, ANSWERS, ALL),
        indexer="frozen",
        optimizer=dict(decay_steps=600, decay_to=1 / 30),
        draft=DraftTraining(module=MODULE, anchors=40),
    ),
)


def get_config() -> ModelConfig:
    """Returns the model that stage 1 makes of random weights: this file is its `train.model`.

    It has an MTP block, whose place the draft module takes later.
    """
    nano = load_model_config("nano")
    layers = nano.num_hidden_layers
    return dataclasses.replace(
        nano,
        sliding_window=STAGES[0].window,
        draft=None,
        num_nextn_predict_layers=1,
        compress_ratios=(*nano.compress_ratios[:layers], 0),
        layer_types=(*nano.layer_types[:layers], LayerKind.WINDOW),
    )


def build_run(number: int) -> TrainConfig:
    """Returns the run of a stage, counted from 1."""
    stage = STAGES[number - 1]
    settings = [dict(text_weight=0.01) | needles for needles in stage.needles]
    return TrainConfig(
        model=__file__ if number == 1 else str(_result(number - 1)),
        output=f"out/nano_{number}",
        numerics="float32",
        steps=stage.steps,
        data=DataConfig(
            sources=tuple(SourceConfig("needles", settings=each) for each in settings),
            length=stage.length,
            batch=stage.batch,
            gaps=any(each.get("gaps") for each in settings),
            packing=False,
            seed=number,
        ),
        optimizer=OptimizerConfig(
            **dict(rate=stage.rate, adamw_rate=0.4, warmup_steps=10) | stage.optimizer
        ),
        loss=LossConfig(mtp_weight=stage.mtp_weight, late_mtp=1.0, bias_speed=0.003),
        draft=stage.draft,
        quantization_aware=stage.draft is not None,
        indexer=stage.indexer,
        dense_steps=stage.dense,
        count_gaps=stage.count_gaps,
        remat="none",
        checkpoint=CheckpointConfig(every=50),
    )


def train(number: int) -> bool:
    """Trains a stage from where it stood, and writes its result; False if a signal stopped it."""
    import jax

    from v4jax.training.trainer import Trainer

    trainer = Trainer(build_run(number))
    try:
        if trainer.run() == "stopped":
            return False
        _export(trainer.finished_model(), number)
    finally:
        trainer.close()
        jax.clear_caches()  # the next stage compiles its own programs
    return True


def _result(number: int) -> pathlib.Path:
    """Returns the folder that the next stage starts from, or of the finished model."""
    return pathlib.Path(f"out/nano_{number}", "model" if number == len(STAGES) else "start")


def _export(model: Any, number: int) -> None:
    """Writes a trained model: the last one as released, another as the next stage wants it.

    A draft module is trained for weights in the formats that they have in the end.
    """
    from v4jax.model.weights import read_weights, write_weights
    from v4jax.training.export import export

    folder = _result(number)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that ended in between
    following = STAGES[number] if number < len(STAGES) else None
    if following is None or following.draft:
        export(model, folder, "released")
        return
    weights = read_weights(model)
    norms = [
        name.replace("indexer.", "")  # layers with an indexer are CSA
        for name in weights
        if name.endswith("attention.indexer.compressor.norm.weight")
    ]
    model = write_weights(model, {name: following.entry_scale * weights[name] for name in norms})
    export(model.override(sliding_window=following.window), folder, "bfloat16")


def main(arguments: list[str] | None = None) -> int:
    """Trains the stages that have no result yet; returns the exit status."""
    stages = "\n".join(
        f"  {number:>2}  {stage.steps:>5,} steps of {stage.batch} × {stage.length:>6,} tokens: "
        f"{stage.teaches}"
        for number, stage in enumerate(STAGES, 1)
    )
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nstages:\n{stages}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = range(1, len(STAGES) + 1)
    parser.add_argument(
        "first", nargs="?", type=int, choices=numbers, default=1, help="stage to begin at"
    )
    first = parser.parse_args(arguments).first
    compile_cache.use()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nano gains nothing from an accelerator
    for number in numbers[first - 1 :]:
        if not (_result(number) / "config.json").exists() and not train(number):
            return STOPPED
    print(_result(len(STAGES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
