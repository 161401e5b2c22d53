"""Runs from files: changed by dotted paths, and refused with the field that is wrong."""

import pathlib

import pytest

from v4jax.config import InferenceConfig, TrainConfig
from v4jax.config.loading import load_model_config, load_run
from v4jax.errors import ConfigError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("*/[a-z]*.py"))
CHAT = CONFIGS / "finetune" / "chat.py"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_are_valid(path):
    kind = InferenceConfig if path.parent.name == "inference" else TrainConfig
    config = load_run(kind, path)
    assert load_model_config(path) == load_model_config(config.model)


def test_changes_by_path():
    changes = {
        "steps": 70,
        "optimizer.rate": 1,
        "loss.mtp_weight": 0.0,
        "data.sources": [{"kind": "chat", "paths": ["talks.jsonl"]}],
    }
    config = load_run(TrainConfig, CHAT, changes)
    assert (config.steps, config.optimizer.rate, config.loss.mtp_weight) == (70, 1.0, 0.0)
    assert config.data.sources[0].paths == ("talks.jsonl",)
    assert config.optimizer.spans(70) == (7, 35)  # as in the file


BAD = {
    "unknown": ({"optimiser.rate": 1.0}, "optimiser is no field of TrainConfig"),
    "below a value": ({"steps.more": 1}, "steps.more cannot be set: steps holds a value"),
    "type": ({"steps": "many"}, "steps must be int, got 'many'"),
    "rule": ({"optimizer.beta1": 1.0}, "train.optimizer.beta1 must be in [0, 1), got 1.0"),
    "count_gaps": ({"count_gaps": True}, "set data.gaps"),
    "kept": ({"keep": ["all"]}, "train.keep must hold names of ['streams', 'attention_output', "
             "'moe_output'], got 'all'"),
    "kept of all": ({"remat": "none", "offload": ["streams"]}, "'none' nothing is: use 'layers'"),
    "schedule": (
        {"optimizer.warmup_steps": 51}, "warmup_steps + decay_steps must not exceed train.steps = ",
    ),
    "no length": ({"steps": None}, "say how long the run is by train.steps or by data.epochs"),
    "a rate of its own": (
        {"optimizer.last_rate": 3e-4},
        "optimizer.last_rate is no field of OptimizerConfig; give decay_to, a fraction of rate",
    ),
    "a weight of its own": ({"loss.late_mtp_weight": 0.1}, "give late_mtp, a fraction of mtp_weig"),
    "both": (
        {"lora": {}, "quantization_aware": True}, "the base is quantized already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_changes(case):
    changes, message = BAD[case]
    with pytest.raises(ConfigError) as error:
        load_run(TrainConfig, CHAT, changes)
    assert message in str(error.value)


def test_no_such_file():
    with pytest.raises(ConfigError, match="must be a Python file with get_config"):
        load_run(TrainConfig, "configs/finetune/talk.py")
