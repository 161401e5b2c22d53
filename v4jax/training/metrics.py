"""Metrics of a run: a line of JSON per logged step, and TensorBoard or W&B on request.

Objects in a bucket cannot be appended to. There `metrics.jsonl` is written again with each
checkpoint and about once a minute. A killed run resumes at its newest checkpoint, and all lines up
to that step are in the file.

`metrics.jsonl` has the fields of `compute_losses`, `grad_norm`, `rate`, `tokens_per_second`,
`model_flops_per_second` (the model's own operations), `executed_flops_per_second` (recomputation
included), `mfu` where the chip's peak is known, and `imbalance`: for each router the load of its
fullest expert over the mean, one number per layer. Speeds exclude compilation and evaluation. With
sparse attention `recall` is 1 by construction; `eval_recall` compares with full attention. The line
of an evaluation also has the `samples` that it wrote.
"""

import contextlib
import importlib.util
import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from v4jax import log
from v4jax.config import ModelConfig, TrainConfig
from v4jax.costs import flops
from v4jax.costs.chips import peak_flops
from v4jax.costs.inventory import Inventory
from v4jax.errors import ConfigError, TrainingError
from v4jax.files import Path, PathLike, is_remote, to_path
from v4jax.model import take_inventory

SECONDS_BETWEEN_OBJECTS = 60.0  # between two writes to a bucket; each writes all lines


class Metrics:
    """Writes metrics by step; on process 0 only."""

    def __init__(self, folder: Path, receivers: Sequence[str], *, first_step: int):
        """Opens `metrics.jsonl` in the folder.

        Lines at or after `first_step` come from steps that were lost; they are removed.

        Raises:
          TrainingError: the file cannot be read or written.
        """
        self.path = folder / "metrics.jsonl"
        self._writers = [_open_receiver(name, folder) for name in receivers] if log.speaks() else []
        self._lines: list[str] = []  # in a bucket: all of them
        self._written = 0  # of these lines, how many are in the bucket
        self._since = time.monotonic()
        if not log.speaks():
            return
        with self._writing():
            if is_remote(self.path):
                kept = _read_before(self.path, first_step)
                self._lines = [json.dumps(line) + "\n" for line in kept]
                self._written = len(self._lines)
            else:
                _cut(self.path, first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line, null for numbers that are not finite, and feeds the receivers.

        Raises:
          TrainingError: the line cannot be written, for example because the disk is full.
        """
        if not log.speaks():
            return
        line = json.dumps(_finite_or_none({"step": step, **values}), allow_nan=False) + "\n"
        if is_remote(self.path):
            self._lines.append(line)
            if time.monotonic() - self._since > SECONDS_BETWEEN_OBJECTS:
                self.flush()
        else:
            with self._writing(), self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        numbers = name_numbers(values)
        for writer in self._writers:
            writer(step, numbers)

    def flush(self) -> None:
        """Writes the lines that are not in the bucket yet."""
        if self._written == len(self._lines):
            return
        with self._writing():
            self.path.write_text("".join(self._lines))
        self._written, self._since = len(self._lines), time.monotonic()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "repair that" if is_remote(self.path) else "make room"
            raise TrainingError(
                f"{self.path} cannot be written: {error.strerror or error}; {remedy}, and the "
                "same command goes on from the newest checkpoint"
            ) from error


def check_receivers(names: Sequence[str]) -> None:
    """Raises ConfigError unless the packages of all receivers are installed."""
    packages = {"tensorboard": "tensorboardX", "wandb": "wandb"}
    for name in names:
        if importlib.util.find_spec(packages[name]) is None:
            raise ConfigError(
                f"train.report_to has {name!r}, which is not installed; pip install "
                f'"v4jax[{name}]", or leave it out: metrics.jsonl is written anyway'
            )


def read_metrics(path: PathLike) -> list[dict]:
    """Returns the lines of a `metrics.jsonl`, except unfinished ones."""
    lines = []
    for line in to_path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def name_numbers(values: Any, name: str = "") -> dict[str, float]:
    """Returns every number of nested metrics by its path: `imbalance/stack.period.1/0`."""
    if isinstance(values, int | float):
        return {name: values}
    if isinstance(values, Mapping):
        pairs = values.items()
    else:
        pairs = enumerate(values) if isinstance(values, list | tuple) else ()
    found: dict[str, float] = {}
    for key, value in pairs:
        found |= name_numbers(value, f"{name}/{key}" if name else str(key))
    return found


def _finite_or_none(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _finite_or_none(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite_or_none(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _read_before(path: Path, step: int) -> list[dict]:
    if not path.exists():
        return []
    return [line for line in read_metrics(path) if line["step"] < step]


def _cut(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    part = path.with_suffix(".part")
    kept = _read_before(path, first_step)
    part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    part.replace(path)


def _open_receiver(name: str, folder: Path):
    if name == "wandb":
        import wandb

        # The run's id is kept in its folder: a run that is started again continues its curves.
        kept = folder / "wandb_id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex, encoding="utf-8")
        run = wandb.init(
            dir=str(folder),
            project="v4jax",
            name=folder.name,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
        )
        return lambda step, numbers: run.log(numbers, step=step)
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step, numbers):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


class Speed:
    """Tokens and operations per second since the last reading."""

    def __init__(self, config: TrainConfig, model: ModelConfig):
        """Counts the work of one row as one document, which is an upper bound for packed rows."""
        inventory = take_inventory(model)
        self._model = count_step(inventory, config, again=False)
        self._executed = count_step(inventory, config, again=config.remat == "layers")
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._rate = log.Rate()

    def add(self, tokens: int) -> None:
        """Counts tokens of rows; padding counts, because it is computed like other tokens."""
        self._rate.add(tokens)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leaves out the time inside: that of compilation or evaluation."""
        return self._rate.paused()

    def read(self) -> dict[str, float]:
        """Returns the speed since the last reading."""
        rate, self._rate = self._rate.per_second or 0.0, log.Rate()
        found = {
            "tokens_per_second": rate,
            "model_flops_per_second": rate * self._model,
            "executed_flops_per_second": rate * self._executed,
        }
        if self._peak:
            found["mfu"] = rate * self._model / (self._peak * jax.device_count())
        return found


def count_step(inventory: Inventory, config: TrainConfig, *, again: bool) -> float:
    """Returns the operations of a step for each token of its rows.

    Args:
      again: whether what is computed again in the backward pass counts.
    """
    length = config.data.length
    if config.draft is None:
        return flops.total(flops.count_training(inventory, length, remat=again)) / length
    blocks = min(config.draft.anchors, length)
    return flops.total(flops.count_draft_training(inventory, length, blocks, remat=again)) / length


def flatten(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metrics of a step as JSON-able values."""
    values: dict[str, Any] = {}
    for name, value in metrics.items():
        if name == "load":
            values["imbalance"] = {path: _imbalance(load) for path, load in value.items()}
        elif name == "finite":
            values[name] = bool(value)
        else:  # a number, or one for each row of a draft
            values[name] = np.asarray(value, np.float64).tolist()
    return values


def _imbalance(load) -> list[float]:
    load_le = np.atleast_2d(np.asarray(load, np.float64))
    mean = np.maximum(load_le.mean(axis=-1), 1e-9)
    return [round(float(x), 3) for x in load_le.max(axis=-1) / mean]
