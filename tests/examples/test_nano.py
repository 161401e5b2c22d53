"""nano's curriculum: every stage's run as golden text, resuming, and what a stage hands on."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest

import v4jax
from v4jax.config.loading import load_model_config
from v4jax.model.weights import read_weights
from v4jax.training import trainer

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "nano_stages.jsonl"


@pytest.fixture
def curriculum(tmp_path, monkeypatch):
    """Returns the example as a module; the working folder is empty."""
    spec = importlib.util.spec_from_file_location("nano_train", ROOT / "examples/nano/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_stages_are_as_they_were_when_nano_was_trained(curriculum):
    for number, line in enumerate(GOLDEN.read_text().splitlines(), 1):
        run = json.loads(json.dumps(dataclasses.asdict(curriculum.build_run(number))))
        run["model"] = run["model"].removeprefix(f"{ROOT}/")
        assert run == json.loads(line), f"stage {number}"
    assert number == len(curriculum.STAGES)
    windows = [stage.window for stage in curriculum.STAGES]
    assert windows == [32, 128, 128, 32, *(128,) * 7]


def test_stage_1_makes_nano_with_a_narrow_window(curriculum):
    narrow = load_model_config(curriculum.build_run(1).model)
    assert narrow.sliding_window == 32 and narrow.num_nextn_predict_layers == 1
    nano = dataclasses.replace(load_model_config("nano"), sliding_window=32)
    assert narrow.with_draft(curriculum.build_run(11).draft.module) == nano


def test_it_goes_on_where_it_stood(curriculum, monkeypatch, capsys):
    trained, stopping = [], {3}

    class Trainer:
        """A run that a signal stops in stage 3, the first time."""

        def __init__(self, config):
            self.number = int(config.output.removeprefix("out/nano_"))

        def run(self):
            trained.append(self.number)
            ended = "stopped" if self.number in stopping else "finished"
            stopping.discard(self.number)
            return ended

        def finished_model(self):
            return None

        def close(self):
            pass

    def export(model, number):
        folder = curriculum._result(number)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(trainer, "Trainer", Trainer)
    monkeypatch.setattr(curriculum, "_export", export)
    assert curriculum.main([]) == 143 and trained == [1, 2, 3]
    assert curriculum.main([]) == 0 and trained == [1, 2, 3, *range(3, 12)]
    assert capsys.readouterr().out == "out/nano_11/model\n"
    assert curriculum.main(["9"]) == 0 and len(trained) == 12  # nothing left to do


@pytest.mark.parametrize("number, window, scale", [(3, 32, 1.0), (9, 128, 1.5)])
def test_what_the_next_stage_starts_from(curriculum, number, window, scale):
    """Of random weights all norms are 1: those of CSA entries alone are scaled."""
    curriculum._export(v4jax.load("tiny"), number)
    model = v4jax.load(f"out/nano_{number}/start")
    assert model.config == dataclasses.replace(load_model_config("tiny"), sliding_window=window)
    norms = {
        name: np.asarray(value, np.float32)
        for name, value in read_weights(model).items()
        if name.endswith("norm.weight")
    }
    scaled = [name for name, value in norms.items() if (value == scale).all()]
    assert scale == 1.0 or scaled == [
        "stack.period.0.attention.compressor.norm.weight",
        "stack.suffix.0.attention.compressor.norm.weight",
    ]
    assert all((norms[name] == 1.0).all() for name in norms.keys() - set(scaled))


def test_the_module_is_trained_for_stored_weights(curriculum):
    curriculum._export(v4jax.load("tiny"), 10)
    weights = read_weights(v4jax.load("out/nano_10/start"))
    assert weights["stack.period.0.moe.experts.down"].is_fp4


def test_help_says_what_it_takes(curriculum, capsys):
    with pytest.raises(SystemExit, match="0"):
        curriculum.main(["--help"])
    said = capsys.readouterr().out
    assert "four hours" in said and "out/nano_11/model" in said
    assert "  8     60 steps of 1 × 16,384 tokens: " in said
