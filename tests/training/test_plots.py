"""The picture of a run: which curves it has, and what is said when it cannot be drawn."""

import json
import sys

import pytest

from v4jax.errors import TrainingError, UnsupportedError
from v4jax.training.plots import PANELS, curves, plot_run

LINES = [
    {"step": 1, "loss": 3.0, "rate": 1e-3, "finite": True, "imbalance": {"p.0": [1.2, 1.4]}},
    {"step": 2, "eval_loss": 2.8, "eval_perplexity": {"from 0": 16.0}},
    {"step": 3, "loss": 2.5, "rate": 2e-3, "finite": False, "imbalance": {"p.0": [1.1, 1.3]}},
    {"step": 4, "loss": None, "finite": False},  # a skipped step
]


def test_curves():
    found = {panel.title.split(",")[0]: curves(LINES, panel) for panel in PANELS}
    assert found["loss"] == {"loss": ([1, 3], [3.0, 2.5]), "eval_loss": ([2], [2.8])}
    assert found["fullest expert over the mean"] == {
        "p.0, 0": ([1, 3], [1.2, 1.1]),
        "p.0, 1": ([1, 3], [1.4, 1.3]),
    }
    assert found["perplexity of held-out text"] == {"from 0": ([2], [16.0])}
    assert found["tokens a second"] == {}


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason='needs the "plots" extra')
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 5, "lo')
    picture = plot_run(metrics)
    assert picture == tmp_path / "run.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and len(picture.read_bytes()) > 10_000


def test_nothing_to_draw(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason='needs the "plots" extra')
    with pytest.raises(TrainingError, match=r"metrics.jsonl cannot be read: No such file or dire"):
        plot_run(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(TrainingError, match=r"metrics.jsonl has no line of metrics yet"):
        plot_run(tmp_path / "metrics.jsonl")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r'pip install "v4jax\[plots\]"; metrics.jsonl has'):
        plot_run(tmp_path / "metrics.jsonl")
