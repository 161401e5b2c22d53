"""`v4jax convert`: from one checkpoint format to another."""

import dataclasses
from typing import Any, Literal

from v4jax.config.ranges import MAX_SEED, within
from v4jax.errors import RequestError

SUMMARY = "writes a checkpoint in another format: released, bfloat16, transformers"
USAGE = """
Reads a folder in the released or the transformers layout and writes another one. Weights that are
stored quantized are never quantized again: released to released gives the same bytes, and bfloat16
holds quantized weights exactly. The output appears complete or not at all. Memory: the whole model.
Folders may be in buckets (gs://, s3://).

  v4jax convert --model=/models/v4-flash --output=/models/v4-flash-bf16 --format=bfloat16
  v4jax convert --model=/models/v4-flash --output=/models/v4-flash-hf --format=transformers
  v4jax convert --model=nano --output=nano-random --seed=1    (random weights, to try things out)

Adapters (LoRA) are merged into their base; the log says what FP4 and FP8 lose of them:

  v4jax convert --model=/models/v4-flash --adapters=out/chat/adapters --output=/models/v4-flash-chat

With --adapters_to they stay adapters and are named anew: peft, as PEFT attaches them to
transformers' model, or released. Of --model this reads the shapes alone; with --run the adapters
are those of the run's checkpoint:

  v4jax convert --model=/models/v4-flash --adapters=old --adapters_to=peft --output=chat-adapters

The model of a training run, finished, stopped or still running; --run is its configuration:

  v4jax convert --model=out/chat --run=configs/finetune/chat.py --step=1500 --output=chat-1500
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax convert` is told.

    Attributes:
      model: Checkpoint folder, hf://org/name, or a packaged name (nano is trained; --seed asks for
        random weights); with --run the folder of a training run. Required.
      output: Folder to write; must not exist or be empty. Required.
      format: released: FP8 and FP4 as published; bfloat16: the same names, dequantized;
        transformers: what its from_pretrained reads.
      adapters: Folder of adapters to merge, in either naming; or with --adapters_to to name anew.
      adapters_to: Write the adapters alone: peft, as PEFT attaches them to transformers' model;
        released, every expert with the name of the released checkpoints.
      run: Configuration of the training run in --model.
      step: Checkpoint of the run; the newest if left out.
      shard_gib: Largest size of one file.
      seed: Random weights of a packaged configuration, from this seed. Left out: its trained
        weights where it has some (nano), else seed 0.
    """

    model: str
    output: str
    format: Literal["released", "bfloat16", "transformers"] = "released"
    adapters: str | None = None
    adapters_to: Literal["peft", "released"] | None = None
    run: str | None = None
    step: int | None = within(0, 1 << 40, None)
    shard_gib: float = within(1e-6, 1 << 20, 5.0)
    seed: int | None = within(0, MAX_SEED, None)

    def __post_init__(self):
        if self.step is not None and not self.run:
            raise RequestError("--step is a checkpoint of a training run: give its --run, too")
        if self.adapters_to and not (self.adapters or self.run):
            raise RequestError("--adapters_to names adapters anew: give --adapters, or --run")
        if self.adapters_to and (self.format != "released" or (self.adapters and self.run)):
            raise RequestError(
                "--adapters_to writes the adapters alone, of --adapters or of --run and not of "
                "both, and takes no --format"
            )


def run(flags: Flags) -> int:
    """Converts the checkpoint."""
    from v4jax.checkpoint import load, write_model
    from v4jax.checkpoint.api import check_weights
    from v4jax.checkpoint.new_folder import check_new
    from v4jax.parallel.hosts import find_hosts

    if (hosts := find_hosts()).count > 1:
        raise RequestError(
            f"{hosts}: convert runs in one process; start it on one machine, and where that is one "
            "of several set V4JAX_PROCESS_COUNT=1"
        )
    shard_bytes = int(flags.shard_gib * 2**30)
    # All of this is said before the model is read, which may take long.
    check_new(flags.output)
    trained = _read_run(flags) if flags.run else None
    if trained is None:
        check_weights(flags.model)
    if flags.adapters:
        from v4jax.checkpoint.adapters import check_adapters

        check_adapters(flags.adapters)
    if flags.adapters_to:
        from v4jax.checkpoint.adapters import write_adapters

        model = _load_trained(trained, flags) if trained else _read_alone(flags)
        write_adapters(model, flags.output, flags.adapters_to)
        return 0
    if not (flags.run or flags.adapters):
        model = load(flags.model, seed=flags.seed)
        write_model(model, flags.output, flags.format, shard_bytes=shard_bytes)
        return 0
    from v4jax.checkpoint.adapters import read_adapters
    from v4jax.training.export import export

    model = _load_trained(trained, flags) if trained else load(flags.model, seed=flags.seed)
    if flags.adapters:
        model = read_adapters(model, flags.adapters)
    export(model, flags.output, flags.format, shard_bytes=shard_bytes)
    return 0


def _read_run(flags: Flags) -> Any:
    from v4jax.config import TrainConfig
    from v4jax.config.loading import load_run
    from v4jax.files import to_path

    trained = load_run(TrainConfig, flags.run, {"output": flags.model})
    if not (to_path(flags.model) / "checkpoints").is_dir():
        raise RequestError(
            f"--model must be the folder of a training run where --run is given, but {flags.model} "
            "has no checkpoints/"
        )
    return trained


def _load_trained(trained: Any, flags: Flags) -> Any:
    from v4jax.training.trainer import load_trained

    return load_trained(trained, flags.step)


def _read_alone(flags: Flags) -> Any:
    """Returns the model of --adapters with shapes in place of its own weights."""
    from v4jax.checkpoint import read_abstract
    from v4jax.checkpoint.adapters import read_adapters
    from v4jax.config import get_numerics
    from v4jax.config.loading import load_model_config
    from v4jax.files import find_model, is_folder, to_path
    from v4jax.model import abstract_transformer

    name = find_model(flags.model)
    if is_folder(to_path(name)):
        model = read_abstract(name)
        model.folder = name
    else:
        model = abstract_transformer(load_model_config(name), get_numerics("float32"))
    return read_adapters(model, flags.adapters)
