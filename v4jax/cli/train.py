"""`v4jax train`: fine-tuning, continued pre-training, and training from scratch."""

import ast
import dataclasses
from typing import Any

from v4jax.cli import host_flags

SUMMARY = "trains a model, or goes on where training stopped"
USAGE = """
Runs what a configuration file describes: a model, data, an optimizer, where the results go. Started
again with the same command it continues from its newest checkpoint, whatever ended it; SIGTERM and
ctrl-C end it in order.

  v4jax train --config=configs/train/nano.py
  v4jax train --config=configs/finetune/chat.py --set=model=/models/v4-flash --set=data.batch=16

The output folder gets checkpoints/, metrics.jsonl, and in the end model/, which every verb takes:

  v4jax generate --model=out/nano/model --prompt="What is the code of quiet-river?"

On several hosts every process runs the same command; Cloud TPU, GKE and SLURM are recognized:

  v4jax train --config=… --coordinator=10.0.0.1:8476 --process_index=0 --process_count=4

Exit status: 0 finished, 143 stopped by a signal with a checkpoint, 2 an error.
"""
STOPPED = 143


def define(flags: Any, values: Any) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "config",
        None,
        "Python file whose get_config() describes the run; see configs/train and "
        "configs/finetune. Required.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "set",
        [],
        "FIELD=VALUE puts a value in place of the file's: --set=steps=100 "
        "--set=optimizer.rate=1e-4. May be repeated.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "Folder of the run, in place of the configuration's.", flag_values=values
    )
    flags.DEFINE_boolean(
        "export", True, "Write the finished model to OUTPUT/model.", flag_values=values
    )
    flags.DEFINE_boolean(
        "dry_run", False, "Print the run as configured, and stop.", flag_values=values
    )
    host_flags.define_host_flags(flags, values)


def run(values: Any, positional: list[str]) -> int:
    """Trains."""
    from v4jax.config.loading import load_run
    from v4jax.config.run import TrainConfig
    from v4jax.errors import RequestError

    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}; see v4jax train --help")
    if not values.config:
        raise RequestError("--config is required; --help shows examples")
    changes = dict(_parse_change(text) for text in values.set)
    if values.output:
        changes["output"] = values.output
    config = load_run(TrainConfig, values.config, changes)
    if values.dry_run:
        _show(config)
        return 0
    host_flags.start_hosts(values)

    from v4jax.training.trainer import Trainer

    trainer = Trainer(config)
    try:
        ended = trainer.run()
        if ended == "stopped":
            return STOPPED
        if values.export:
            print(trainer.export())
    finally:
        trainer.close()
    return 0


def _parse_change(text: str) -> tuple[str, Any]:
    """Returns field and value of FIELD=VALUE; a value that is no Python literal is a string."""
    from v4jax.errors import RequestError

    field, equals, value = text.partition("=")
    if not (field and equals):
        raise RequestError(f"--set takes FIELD=VALUE, got {text!r}")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


def _show(config: Any, indent: str = "") -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            print(f"{indent}{field.name}:")
            _show(value, indent + "  ")
        else:
            print(f"{indent}{field.name}: {value!r}")
