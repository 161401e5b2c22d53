"""Metrics: valid lines, numbers by path, receivers, and files in a bucket."""

import json
import sys
import types

import folder_bucket
import pytest

from v4jax.errors import TrainingError
from v4jax.files import BucketPath
from v4jax.training import metrics
from v4jax.training.metrics import Metrics, name_numbers, read_metrics

RUN = "gs://bucket/run"


def test_names_of_nested_numbers():
    values = {"loss": 1.5, "finite": True, "imbalance": {"a.0": [1.0, 2.0]}, "eval": {"from 0": 3}}
    assert name_numbers(values) == {
        "loss": 1.5,
        "finite": True,
        "imbalance/a.0/0": 1.0,
        "imbalance/a.0/1": 2.0,
        "eval/from 0": 3,
    }


def test_lines_are_json_and_lost_ones_are_cut(tmp_path):
    first = Metrics(tmp_path, (), first_step=1)
    first.write(1, {"loss": 2.0, "finite": True})
    first.write(2, {"loss": float("nan"), "parts": [float("inf")], "finite": False})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = first.path.read_text().splitlines()
    assert json.loads(lines[1], parse_constant=refuse) == {
        "step": 2, "loss": None, "parts": [None], "finite": False,
    }  # fmt: skip
    with first.path.open("a") as file:
        file.write('{"step": 3, "lo')  # as a kill leaves it
    again = Metrics(tmp_path, (), first_step=2)
    again.write(2, {"loss": 1.0})
    assert [line["loss"] for line in read_metrics(again.path)] == [2.0, 1.0]


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
    """Given a stand-in for its package: one id for all runs of a folder; numbers by path."""
    begun, written = [], []

    class Run:
        def log(self, numbers, step):
            written.append((step, numbers))

    def init(**options):
        begun.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        made = Metrics(tmp_path, ("wandb",), first_step=step)
        made.write(step, {"loss": 2.0, "imbalance": {"a": [1.5]}, "samples": [{"written": "x"}]})
    assert begun[0] == begun[1] and begun[0]["resume"] == "allow" and len(begun[0]["id"]) == 32
    assert written == [(step, {"loss": 2.0, "imbalance/a/0": 1.5}) for step in (1, 2)]


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
