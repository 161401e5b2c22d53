"""A run of one layer on `text.txt` in the working folder; its output is `run` there."""

import pathlib

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = str(pathlib.Path(__file__).with_name("one_layer.py"))
    config.output = "run"
    config.steps = 10
    config.numerics = "float32"
    config.remat = "none"
    config.data = dict(sources=(dict(kind="text", paths=("text.txt",)),), length=128, batch=2)
    config.optimizer = dict(kind="adamw", rate=1e-2, warmup_steps=2)
    config.checkpoint = dict(every=3)
    config.log_every = 1
    config.max_skipped = 2
    return config


def write_text(folder: pathlib.Path) -> None:
    """Writes a text of 160 rows, no two lines the same."""
    lines = (f"line {i} of the text, {i * 7919 % 1009} and no more\n" for i in range(600))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
