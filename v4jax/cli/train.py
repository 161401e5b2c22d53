"""`v4jax train`: fine-tuning, continued pre-training, and training from scratch."""

import ast
import dataclasses
import os
from typing import Any

from v4jax.cli.hosts import HostFlags, start_hosts
from v4jax.errors import RequestError

SUMMARY = "trains a model, or goes on where training stopped"
USAGE = """
Runs what a configuration file describes: model, data, optimizer, output folder. The same command
continues a run from its newest checkpoint, whatever ended it. SIGTERM and ctrl-C end a run with a
checkpoint.

  v4jax train --config=configs/train/text.py
  v4jax train --config=configs/finetune/chat.py --set=model=/models/v4-flash --set=data.batch=16

The output folder, on a disk or in gs://, has checkpoints/ and metrics.jsonl, and at the end also
model/, which every verb takes, and run.png, a picture of the run (at any time: v4jax train
--plot=OUTPUT):

  v4jax generate --model=out/text/model --prompt="What is the code of quiet-river?"

On several hosts every process runs the same command. Cloud TPU, GKE, Slurm and Open MPI are
recognized; elsewhere:

  v4jax train --config=… --coordinator=10.0.0.1:8476 --process_index=0 --process_count=4

Exit status: 0 finished, 143 stopped by a signal with a checkpoint, 2 an error.
"""
STOPPED = 143


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax train` is told.

    Attributes:
      config: Python file whose get_config() describes the run; see configs/train and
        configs/finetune. Required.
      set: FIELD=VALUE puts a value in place of the file's: --set=steps=100
        --set=optimizer.rate=1e-4. May be repeated.
      output: Folder of the run, in place of the configuration's.
      export: Write the finished model to OUTPUT/model.
      dry_run: Print the run as configured, and stop.
      allow_changed: FIELD[,FIELD] of the configuration that may differ from those the run began
        with, such as optimizer.rate, optimizer, model or data. Otherwise a run goes on only as it
        began.
      plot: Output folder of a run, finished or not: only draw its metrics to run.png there (needs
        matplotlib).
    """

    config: str | None = None
    set: tuple[str, ...] = dataclasses.field(default=(), metadata={"repeated": True})
    output: str | None = None
    export: bool = True
    dry_run: bool = False
    allow_changed: str = ""
    plot: str | None = None
    hosts: HostFlags


def run(flags: Flags) -> int:
    """Trains."""
    from v4jax.config.loading import load_run
    from v4jax.config.run import TrainConfig

    if flags.plot:
        from v4jax.files import to_path
        from v4jax.training.plots import plot_run

        print(plot_run(to_path(flags.plot) / "metrics.jsonl"))
        return 0
    if not flags.config:
        raise RequestError("--config is required; --help shows examples")
    changes = dict(_parse_change(text) for text in flags.set)
    if flags.output:
        changes["output"] = flags.output
    config = load_run(TrainConfig, flags.config, changes)
    if flags.dry_run:
        _show(config)
        _show_size(config)
        return 0
    hosts = start_hosts(flags.hosts)
    if hosts.count == 1:
        _check_files(config)

    from v4jax import log
    from v4jax.training.trainer import Trainer

    trainer = Trainer(config, tuple(filter(None, flags.allow_changed.split(","))))
    try:
        if flags.export:
            _check_export(trainer)
        ended = trainer.run()
        _draw(trainer.metrics.path)
        if ended == "stopped":
            return STOPPED
        if flags.export:
            exported = trainer.folder / "model" if trainer.has_exported() else trainer.export()
            if log.speaks():
                print(exported)
    finally:
        trainer.close()
    return 0


def _check_files(config: Any) -> None:
    """Raises before a model is loaded where a file that the run names is not there."""
    from v4jax.config.loading import load_model_config

    load_model_config(config.model)
    for data in filter(None, (config.data, config.evaluation and config.evaluation.data)):
        for path in (path for source in data.sources for path in source.paths):
            if not os.path.exists(path):
                raise RequestError(f"data.sources.paths: {path} does not exist")


def _check_export(trainer: Any) -> None:
    """Refuses to train what cannot be exported at the end, as a model of fewer steps is there."""
    if trainer.step < trainer.config.steps and trainer.has_exported():
        raise RequestError(
            f"{trainer.folder / 'model'} exists, and the run goes on from step {trainer.step} to "
            f"{trainer.config.steps}: move it away, or give --noexport"
        )


def _draw(metrics: Any) -> None:
    """Draws the run; a run is no less finished without its picture."""
    from v4jax import log
    from v4jax.errors import V4JaxError
    from v4jax.training.plots import plot_run

    if not log.speaks():
        return
    try:
        log.info(f"train: drawn in {plot_run(metrics)}")
    except V4JaxError as error:
        log.info(f"train: not drawn: {error}")


def _parse_change(text: str) -> tuple[str, Any]:
    """Returns field and value of FIELD=VALUE; a value that is no Python literal is a string."""
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise RequestError(f"--set takes FIELD=VALUE, got {text!r}")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return field, value


def _show(config: Any, indent: str = "") -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            print(f"{indent}{field.name}:")
            _show(value, indent + "  ")
        else:
            print(f"{indent}{field.name}: {value!r}")


def _show_size(config: Any) -> None:
    """Prints what the run amounts to, without reading weights or data."""
    from v4jax.config.loading import load_run_model
    from v4jax.model import take_inventory
    from v4jax.training.metrics import count_step

    inventory, data = take_inventory(load_run_model(config)), config.data
    tokens = data.batch * data.length * config.optimizer.accumulate
    work = count_step(inventory, config, again=False) * tokens
    most = "FLOPs (at most: as if every row were one document)"
    if config.steps is None:
        print(f"\n{data.epochs} epochs, in steps of {tokens:,} tokens and {work:.3g} {most}")
        return
    print(
        f"\n{config.steps:,} steps of {tokens:,} tokens: {config.steps * tokens:,} tokens, "
        f"{work * config.steps:.3g} {most}"
    )
