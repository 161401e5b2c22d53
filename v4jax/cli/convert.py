"""`v4jax convert`: from one checkpoint format to another."""

from typing import Any

SUMMARY = "writes a checkpoint in another format: released, bfloat16, transformers"
USAGE = """
Reads a folder in the released or the transformers layout and writes it anew. What is stored
quantized is never re-quantized: released to released gives the same bytes, and bfloat16 holds
quantized weights exactly. The output appears complete or not at all. Memory: the whole model.
Folders may be in buckets (gs://, s3://).

  v4jax convert --input=/models/v4-flash --output=/models/v4-flash-bf16 --format=bfloat16
  v4jax convert --input=/models/v4-flash --output=/models/v4-flash-hf --format=transformers
  v4jax convert --input=nano --output=nano-random --seed=1    (random weights, to try things out)

Adapters (LoRA) are merged into their base; what FP4 and FP8 lose of them is said:

  v4jax convert --input=/models/v4-flash --adapters=out/chat/adapters --output=/models/v4-flash-chat

So comes a model out of a training run that goes on, or was stopped; --run is its configuration:

  v4jax convert --input=out/chat --run=configs/finetune/chat.py --step=1500 --output=chat-1500
"""
FORMATS = ("released", "bfloat16", "transformers")


def define(flags: Any, values: Any) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "input",
        None,
        "Checkpoint folder, or a packaged name (nano is trained; --seed asks for random weights); "
        "with --run the folder of a training run. Required.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "Folder to write; must not exist or be empty. Required.", flag_values=values
    )
    flags.DEFINE_enum(
        "format",
        "released",
        FORMATS,
        "released: FP8 and FP4 as published; bfloat16: the same names, dequantized; transformers: "
        "what its from_pretrained reads.",
        flag_values=values,
    )
    flags.DEFINE_string("adapters", None, "Folder of adapters to merge.", flag_values=values)
    flags.DEFINE_string(
        "run", None, "Configuration of the training run in --input.", flag_values=values
    )
    flags.DEFINE_integer(
        "step", None, "Checkpoint of the run; the newest if left out.", flag_values=values
    )
    flags.DEFINE_float("shard_gib", 5.0, "Largest size of one file.", flag_values=values)
    flags.DEFINE_integer(
        "seed",
        None,
        "Random weights of a packaged configuration, from this seed. Left out: its trained weights "
        "where it has some (nano), else seed 0.",
        flag_values=values,
    )


def run(values: Any, positional: list[str]) -> int:
    """Converts the checkpoint."""
    from v4jax.checkpoint import load, write_model
    from v4jax.checkpoint.new_folder import check_new
    from v4jax.cli import model_flags
    from v4jax.errors import RequestError

    model_flags.require(values, "input", "output")
    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}; use --input=… and --output=…")
    if not values.shard_gib > 0:
        raise RequestError(f"--shard_gib must be positive, got {values.shard_gib}")
    if values.step is not None and not values.run:
        raise RequestError("--step is a checkpoint of a training run: give its --run, too")
    shard_bytes = int(values.shard_gib * 2**30)
    check_new(values.output)  # before the model is read, which may take long
    if not (values.run or values.adapters):
        model = load(values.input, seed=values.seed)
        write_model(model, values.output, values.format, shard_bytes=shard_bytes)
        return 0
    from v4jax.checkpoint.adapters import read_adapters
    from v4jax.training.export import export

    model = _load_run(values) if values.run else load(values.input, seed=values.seed)
    if values.adapters:
        model = read_adapters(model, values.adapters)
    export(model, values.output, values.format, shard_bytes=shard_bytes)
    return 0


def _load_run(values: Any) -> Any:
    from v4jax.config import TrainConfig
    from v4jax.config.loading import load_run
    from v4jax.training.trainer import load_trained

    return load_trained(load_run(TrainConfig, values.run, {"output": values.input}), values.step)
