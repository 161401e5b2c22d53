"""A picture of a run, from its metrics: loss, rate, speed, load of the experts, evaluation.

plot_run("out/nano/metrics.jsonl")     # → out/nano/run.png
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from v4jax.errors import TrainingError
from v4jax.files import Path, PathLike, to_path
from v4jax.pictures import make_figure, save_figure
from v4jax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram over steps. read: a line of metrics → values by curve, those that it has."""

    title: str
    read: Callable[[dict], dict[str, float]]
    logarithmic: bool = False


def _fields(*names: str) -> Callable[[dict], dict[str, float]]:
    return lambda line: {name: line[name] for name in names if name in line}


def _fullest(line: dict) -> dict[str, float]:
    """Returns the imbalance of every layer; scanned layers are numbered."""
    found = {}
    for path, loads in line.get("imbalance", {}).items():
        for i, load in enumerate(loads):
            found[path if len(loads) == 1 else f"{path}, {i}"] = load
    return found


def _perplexities(line: dict) -> dict[str, float]:
    return line.get("eval_perplexity", {})


def _acceptance(line: dict) -> dict[str, float]:
    """Returns the acceptance of drafts by their row."""
    return {f"row {i}": share for i, share in enumerate(line.get("acceptance", ()))}


PANELS = (
    Panel("loss, nats a token", _fields("loss", "mtp_loss", "eval_loss")),
    Panel("drafts: acceptance by row", _acceptance),
    Panel("drafts: tokens a pass", _fields("accepted_length", "eval_accepted_length")),
    Panel("perplexity of held-out text, by position", _perplexities, logarithmic=True),
    Panel("fullest expert over the mean, by layer", _fullest),
    Panel("norm of the gradient", _fields("grad_norm"), logarithmic=True),
    Panel("rate", _fields("rate")),
    Panel("tokens a second", _fields("tokens_per_second")),
    Panel("indexer: recall", _fields("recall", "eval_recall")),
)
_MOST_NAMES = 8  # curves that a legend names
MISSING = (
    'the picture of a run needs matplotlib: pip install "v4jax[plots]"; metrics.jsonl has the same '
    "numbers"
)


def curves(lines: Sequence[dict], panel: Panel) -> dict[str, tuple[list[int], list[float]]]:
    """Returns steps and values of each curve of a panel."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in panel.read(line).items():
            if value is None:  # of a skipped step
                continue
            steps, values = found.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return found


def plot_run(metrics: PathLike) -> Path:
    """Writes `run.png` beside a `metrics.jsonl`, on a disk or in a bucket, and returns its path.

    Panels without values are left out; steps that were skipped are marked in the loss.

    Raises:
      UnsupportedError: matplotlib is not installed.
      TrainingError: the file is missing or has no line yet, or the picture cannot be written.
    """
    make_figure(MISSING)  # reports a missing matplotlib before the file is read
    path = to_path(metrics)
    try:
        lines = read_metrics(path)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from error
    panels = [(panel, found) for panel in PANELS if (found := curves(lines, panel))]
    if not panels:
        raise TrainingError(f"{path} has no line of metrics yet; wait for the first steps")
    rows = -(-len(panels) // 2)
    figure = make_figure(MISSING, figsize=(12, 3.2 * rows), layout="tight")
    axes = figure.subplots(rows, 2, squeeze=False)
    for place, (panel, found) in zip(axes.flat, panels, strict=False):
        _draw(place, panel, found)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    for step in (line["step"] for line in lines if line.get("finite") is False):
        axes.flat[0].axvline(step, color="red", linewidth=0.8)
    picture = path.with_name("run.png")
    try:
        save_figure(figure, picture, dpi=100)
    except OSError as error:
        raise TrainingError(
            f"{picture} cannot be written: {error.strerror or error}; make room"
        ) from error
    return picture


def _draw(place: Any, panel: Panel, found: dict) -> None:
    for name, (steps, values) in found.items():
        place.plot(steps, values, label=name, marker="." if len(steps) < 50 else None)
    if panel.logarithmic:
        place.set_yscale("log")
    place.set_title(panel.title)
    place.set_xlabel("step")
    place.grid(alpha=0.3)
    if 1 < len(found) <= _MOST_NAMES:
        place.legend(fontsize="small")
