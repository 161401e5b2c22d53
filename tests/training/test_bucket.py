"""A run whose output is in a bucket: metrics, picture, model. Checkpoints are on a disk here."""

import pathlib

import folder_bucket
import jax
import pytest

import v4jax
from v4jax.checkpoint.orbax_store import Store
from v4jax.cli import main
from v4jax.training import trainer
from v4jax.training.metrics import read_metrics

from . import small_run

RUN = "gs://bucket/run"


@pytest.mark.slow
def test_run_and_what_it_leaves(bucket, tmp_path, monkeypatch, capsys):
    """Orbax does not know this bucket: another folder stands in for checkpoints/."""

    def open_store(folder, **options):
        assert str(folder) == f"{RUN}/checkpoints"
        return Store(tmp_path / "checkpoints", **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "Store", open_store)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    small_run.write_text(tmp_path)
    command = ["train", f"--config={pathlib.Path(small_run.__file__)}", f"--output={RUN}"]
    steps = ["--set=steps=4", "--set=optimizer.warmup_steps=1"]
    assert main.run([*command, *steps]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{RUN}/model\n"
    assert [line["step"] for line in read_metrics(f"{RUN}/metrics.jsonl")] == [1, 2, 3, 4]
    names = set(folder_bucket.names(RUN))
    files = ("config.json", "generation_config.json", "model.safetensors.index.json")
    model = {f"model/{name}" for name in (*files, "model-00001-of-00001.safetensors")}
    assert names == {"metrics.jsonl", "run.png", *model}
    assert v4jax.load(f"{RUN}/model").config == v4jax.load(small_run.get_config().model).config
    # It is finished, and the model of fewer steps is in the way of more.
    assert main.run([*command, *steps]) == 0 and capsys.readouterr().out == f"{RUN}/model\n"
    assert main.run([*command, *steps, "--set=steps=5"]) == 2
    assert f"{RUN}/model exists, and the run goes on from step 4 to 5" in capsys.readouterr().err
