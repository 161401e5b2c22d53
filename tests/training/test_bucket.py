"""A run whose output is in a bucket: metrics, picture, model. Checkpoints are on a disk here."""

import json
import pathlib

import folder_bucket
import jax
import pytest

import v4jax
from v4jax.checkpoint.orbax_store import Store
from v4jax.cli import main
from v4jax.errors import TrainingError
from v4jax.files import BucketPath
from v4jax.training import metrics, trainer
from v4jax.training.metrics import Metrics, read_metrics

from . import mini_run

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
    mini_run.write_text(tmp_path)
    command = ["train", f"--config={pathlib.Path(mini_run.__file__)}", f"--output={RUN}"]
    steps = ["--set=steps=4", "--set=optimizer.warmup_steps=1"]
    assert main.run([*command, *steps]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{RUN}/model\n"
    assert [line["step"] for line in read_metrics(f"{RUN}/metrics.jsonl")] == [1, 2, 3, 4]
    names = set(folder_bucket.names(RUN))
    files = ("config.json", "generation_config.json", "model.safetensors.index.json")
    model = {f"model/{name}" for name in (*files, "model-00001-of-00001.safetensors")}
    assert names == {"metrics.jsonl", "run.png", *model}
    assert v4jax.load(f"{RUN}/model").config == v4jax.load(mini_run.get_config().model).config
    # It is finished, and the model of fewer steps is in the way of more.
    assert main.run([*command, *steps]) == 0 and capsys.readouterr().out == f"{RUN}/model\n"
    assert main.run([*command, "--set=steps=5"]) == 2
    assert f"{RUN}/model exists, and the run goes on from step 4 to 5" in capsys.readouterr().err


def test_metrics_are_kept_with_the_checkpoint(bucket, monkeypatch):
    """Lines that a killed run did not get there are of steps that are computed again."""
    written = []
    real = BucketPath.write_text
    monkeypatch.setattr(
        BucketPath, "write_text", lambda path, text: (written.append(text), real(path, text))
    )
    folder = BucketPath(RUN)
    first = Metrics(folder, (), first_step=1)
    first.write(1, {"loss": 3.0})
    first.write(2, {"loss": 2.0})
    assert not written
    first.flush()
    first.flush()
    first.write(3, {"loss": 1.0})
    assert len(written) == 1 and [line["step"] for line in read_metrics(first.path)] == [1, 2]
    again = Metrics(folder, (), first_step=2)
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_OBJECTS", -1.0)  # is over at once
    again.write(2, {"loss": 4.0})
    lines = [json.loads(line) for line in folder_bucket.read(f"{RUN}/metrics.jsonl").splitlines()]
    assert lines == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 4.0}]


def test_a_bucket_that_takes_no_metrics(bucket, monkeypatch):
    def refuse(*_arguments, **_options):
        raise RuntimeError("403 Forbidden")

    run = Metrics(BucketPath(RUN), (), first_step=1)
    monkeypatch.setattr(folder_bucket.FolderBucket, "pipe_file", refuse)
    run.write(1, {"loss": 3.0})
    with pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written: .*403 Forbidden; "):
        run.flush()
