"""Flags that write to a bucket: what cannot be written is said before anything is read or made."""

import importlib
import json
import sys

import folder_bucket
import pytest
from inference import fake_model

from v4jax.cli import engine, main
from v4jax.files import to_path

BATCH = {"model": "nano", "input": "docs.jsonl", "output": "answers.jsonl", "summary": "s.json"}
CONVERT = {"model": "nano", "output": "folder"}
EVALUATE = {"model": "nano", "answers": "a.jsonl"}
COMMANDS = [
    ("batch", BATCH, "output"),
    ("batch", BATCH, "summary"),
    ("convert", CONVERT, "output"),
    ("evaluate", EVALUATE, "answers"),
    ("evaluate", EVALUATE, "plot"),
]


def flags_of(values: dict[str, str]) -> list[str]:
    return [f"--{flag}={value}" for flag, value in values.items()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with an input; no model can be loaded."""

    def load(*_arguments, **_options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("v4jax.load", load)
    monkeypatch.setattr("v4jax.checkpoint.load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs.jsonl").write_text('{"text": "A text.", "question": "What?"}\n')
    return tmp_path


@pytest.mark.parametrize("scheme, extra, module", [("gs", "gcs", "gcsfs"), ("s3", "s3", "s3fs")])
@pytest.mark.parametrize("verb, flags, name", COMMANDS)
def test_library_is_missing(folder, monkeypatch, capsys, verb, flags, name, scheme, extra, module):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, scheme, raising=False)
    path = f"{scheme}://bucket/a.png"
    assert main.run([verb, *flags_of(flags | {name: path})]) == 2
    said = capsys.readouterr().err
    assert f"{scheme}:// needs the extra {extra}; pip install 'v4jax[{extra}]'" in said
    left = {path.name for path in folder.iterdir()}
    assert left <= {"docs.jsonl", "answers.jsonl"} and not (folder / "s.json").exists()


@pytest.mark.parametrize("verb, flags, name", COMMANDS)
def test_bucket_cannot_be_written(folder, bucket, monkeypatch, capsys, verb, flags, name):
    def refuse(*_arguments, **_options):
        raise RuntimeError("403 Forbidden\nmore")

    monkeypatch.setattr(folder_bucket.FolderBucket, "pipe_file", refuse)
    assert main.run([verb, *flags_of(flags | {name: f"{bucket}/a.png"})]) == 2
    said = capsys.readouterr().err
    assert f"{bucket}/a.png" in said and "403 Forbidden" in said and "cannot" in said


def test_batch_and_its_summary(folder, bucket, monkeypatch, capsys):
    """All files of a job are in a bucket; its shards' names are as on a disk."""
    to_path(f"{bucket}/docs.jsonl").write_bytes((folder / "docs.jsonl").read_bytes() * 2)
    monkeypatch.setattr(engine, "load_model", lambda *_: fake_model.FakeModel())
    monkeypatch.setattr("v4jax.inference.Engine", lambda model, _: fake_model.make_engine(model))
    names = {name: f"{bucket}/{file}" for name, file in BATCH.items() if name != "model"}
    for shard in ("0/2", "1/2"):
        flags = flags_of(names | {"model": "nano", "shard": shard})
        assert main.run(["batch", *flags]) == 0, capsys.readouterr().err
    parts = ("00000-of-00002", "00001-of-00002")
    answers = [f"answers-{part}.jsonl" for part in parts]
    summaries = [f"s-{part}.json" for part in parts]
    assert folder_bucket.names(bucket) == [*answers, "docs.jsonl", *summaries]
    for i, name in enumerate(answers):
        assert json.loads(folder_bucket.read(f"{bucket}/{name}"))["line"] == i + 1
    assert json.loads(folder_bucket.read(f"{bucket}/{summaries[0]}"))["documents"] == 1
