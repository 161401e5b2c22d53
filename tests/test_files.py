"""Buckets are used like folders: models, documents, answers."""

import importlib
import json
import os
import sys

import folder_bucket
import jax
import numpy as np
import pytest
from inference.fake_model import make_engine

import v4jax
from v4jax.checkpoint import safetensors_file
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.run import TrainConfig
from v4jax.errors import CheckpointError, ConfigError, RequestError, UnsupportedError
from v4jax.files import (
    BucketPath,
    check_writable,
    is_same_file,
    open_bytes,
    read_all,
    remove_all,
    size_of,
    to_path,
)
from v4jax.inference import BatchJob, run_batch
from v4jax.inference.documents import open_path, read_lines
from v4jax.tokenizer import load_tokenizer


def upload(folder, url):
    """Copies a local folder's files."""
    for file in folder.iterdir():
        to_path(f"{url}/{file.name}").write_bytes(file.read_bytes())


def test_checkpoint(bucket, tmp_path, monkeypatch):
    """The same model as from the disk, and only as many bytes asked for as are needed."""
    made = v4jax.load("tiny", seed=3)
    v4jax.save(made, tmp_path / "m", format="transformers")
    upload(tmp_path / "m", f"{bucket}/m")
    asked, cat_file = [], folder_bucket.FolderBucket.cat_file

    def count(self, path, **options):
        data = cat_file(self, path, **options)
        asked.append(len(data))
        return data

    monkeypatch.setattr(folder_bucket.FolderBucket, "cat_file", count)
    found = v4jax.load(f"{bucket}/m")
    files = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    needed = sum(map(len, files.values()))
    assert sum(asked) == needed
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(v4jax.load(tmp_path / "m")), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)
    assert found.folder == to_path(f"{bucket}/m")
    assert load_tokenizer(found.folder).encode("ab") == [97, 98]
    # Written where it was read: the same files, byte for byte; and nothing where that fails.
    v4jax.save(found, f"{bucket}/saved", format="transformers")
    assert {p.name: p.read_bytes() for p in to_path(f"{bucket}/saved").iterdir()} == files
    with pytest.raises(CheckpointError, match="s3://bucket/saved exists and is not empty"):
        v4jax.save(found, f"{bucket}/saved")
    real = BucketPath.write_bytes

    def refuse(path, data):
        if path.name == "config.json":
            raise OSError("RuntimeError: 503 Slow Down")
        real(path, data)

    monkeypatch.setattr(BucketPath, "write_bytes", refuse)
    message = "s3://bucket/other cannot be written: RuntimeError: 503 Slow Down; nothing was"
    with pytest.raises(CheckpointError, match=message):
        v4jax.save(found, f"{bucket}/other", format="transformers")
    assert not to_path(f"{bucket}/other").exists()


def test_part_of_a_tensor(bucket, tmp_path):
    values = np.arange(600, dtype=np.float32).reshape(20, 30)
    header, (tensor,) = safetensors_file.encode_header({"w": ("F32", values.shape)})
    path = to_path(f"{bucket}/x")
    path.write_bytes(header + safetensors_file.as_bytes(tensor, values))
    (tensor,) = safetensors_file.read_header(path)
    box = (slice(3, 9), slice(10, 20))
    assert np.array_equal(safetensors_file.read_tensor(tensor, box), values[box])


def test_documents(bucket):
    to_path(f"{bucket}/docs.jsonl").write_bytes(b'{"path": "a.txt"}\n\n{"text": "b"}\n')
    to_path(f"{bucket}/a.txt").write_bytes(b"read")
    assert [line.number for line in read_lines(f"{bucket}/docs.jsonl")] == [1, 3]
    with open_path(f"{bucket}/a.txt") as file:
        assert file.read() == b"read"
    with pytest.raises(RequestError, match=r"cannot read s3://bucket/none: "):
        open_path(f"{bucket}/none")
    with pytest.raises(CheckpointError, match="s3://bucket/none is no folder: nothing lies"):
        v4jax.load(f"{bucket}/none")


def test_batch(bucket, tmp_path):
    """A job reads its input from the bucket, and a document beside it."""
    line = json.dumps({"path": "a.txt", "question": "What?"})
    to_path(f"{bucket}/in/docs.jsonl").write_text(line)
    to_path(f"{bucket}/in/a.txt").write_bytes(b"A text that is read.")
    output = tmp_path / "answers.jsonl"
    summary = run_batch(BatchJob(f"{bucket}/in/docs.jsonl", str(output), {}), make_engine)
    assert (summary.documents, summary.failed) == (1, 0)
    answer = json.loads(output.read_text())
    assert answer["line"] == 1 and answer["tokens"]["document"] == len("A text that is read.") + 2
    # And writes its output there.
    job = BatchJob(f"{bucket}/in/docs.jsonl", f"{bucket}/out/answers.jsonl", {})
    assert run_batch(job, make_engine).documents == 1
    assert folder_bucket.read(job.output) == output.read_bytes()
    assert folder_bucket.names(f"{bucket}/out") == ["answers.jsonl"]

    def load():
        raise AssertionError("nothing is left to do")

    assert run_batch(job, load).documents == 1
    with pytest.raises(RequestError, match="input and output are the same file"):
        run_batch(BatchJob(job.input, job.input, {}), load)


@pytest.mark.parametrize("scheme, extra, module", [("gs", "gcs", "gcsfs"), ("s3", "s3", "s3fs")])
def test_missing_library(monkeypatch, scheme, extra, module):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, scheme, raising=False)
    expected = f"{scheme}://b/m: {scheme}:// needs the extra {extra}; pip install "
    with pytest.raises(UnsupportedError, match=expected):
        v4jax.load(f"{scheme}://b/m")


@pytest.mark.parametrize(
    "method", ["isdir", "ls", "isfile", "cat_file", "size", "pipe_file", "open"]
)
def test_errors_of_a_cloud(bucket, monkeypatch, method):
    """Whatever a library raises, say for want of credentials, is an OSError."""

    def refuse(*_arguments, **_options):
        raise RuntimeError("no credentials\nmore")

    path = to_path(f"{bucket}/m")
    path.write_bytes(b"data")
    monkeypatch.setattr(folder_bucket.FolderBucket, method, refuse)
    calls = {
        "isdir": path.is_dir,
        "ls": lambda: list(path.iterdir()),
        "isfile": path.is_file,
        "cat_file": path.read_text,
        "size": lambda: size_of(path),
        "pipe_file": lambda: path.create(b""),
        "open": lambda: path.write_blocks([b""]),
    }
    with pytest.raises(OSError, match=r"^RuntimeError: no credentials$"):
        calls[method]()
    if method == "isdir":
        with pytest.raises(CheckpointError, match=r"/m cannot be read: RuntimeError: no cred"):
            v4jax.load(path)


def test_file_of_a_bucket(bucket):
    path = to_path(f"{bucket}/x")
    path.write_bytes(b"0123456789")
    with open_bytes(path) as file:
        assert file.seek(0, os.SEEK_END) == 10 and file.read(0) == b""
        file.seek(4)
        assert file.read(3) == b"456" and file.read() == b"789"
    assert (path.name, path.exists(), path.is_file(), path.is_dir()) == ("x", True, True, False)
    assert to_path(bucket + "/").is_dir() and list(to_path(bucket).iterdir()) == [path]


def test_writing(bucket):
    path = to_path(f"{bucket}/x/y.txt")
    path.write_text("ä")
    assert path.read_bytes() == "ä".encode()
    assert path.with_name("z.txt") == to_path(f"{bucket}/x/z.txt")
    with pytest.raises(FileExistsError):
        path.create(b"other")
    assert path.read_text() == "ä"
    path.write_blocks(iter([b"one", memoryview(b"two")]))
    assert path.read_bytes() == b"onetwo"
    others = [to_path(f"{bucket}/x/{i}") for i in range(3)]
    for i, other in enumerate(others):
        other.create(bytes([i]))
    assert read_all(others) == [b"\0", b"\1", b"\2"] and read_all([]) == []
    remove_all(others[:2])
    path.unlink()
    assert list(to_path(f"{bucket}/x").iterdir()) == others[2:]
    check_writable(f"{bucket}/x/new")
    assert list(to_path(f"{bucket}/x").iterdir()) == others[2:]  # and nothing is left of it


def test_a_block_that_does_not_come_leaves_nothing(bucket):
    """Neither a part of the file, nor the loss of what was there."""

    def blocks():
        yield b"new"
        raise KeyboardInterrupt

    path = to_path(f"{bucket}/x")
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        with pytest.raises(KeyboardInterrupt):
            path.write_blocks(blocks())
        assert (path.read_bytes() if path.is_file() else None) == before


def test_same_file(tmp_path):
    (tmp_path / "a").write_text("")
    os.link(tmp_path / "a", tmp_path / "b")
    assert is_same_file(str(tmp_path / "a"), str(tmp_path / "b"))
    assert is_same_file("none", "./none") and not is_same_file("none", "other")
    assert is_same_file("gs://b/x", "gs://b/x") and not is_same_file("gs://b/x", "b/x")


RUNS = {
    "checkpoints that Orbax cannot write": (
        {"output": "s3://b/run"},
        r"train.output must be on a disk or in gs:// .*, got 's3://b/run'",
    ),
    "a receiver that writes to a disk": (
        {"output": "gs://b/run", "report_to": ("tensorboard",)},
        r"train.report_to must be empty with an output in a bucket .*, got \('tensorboard',\)",
    ),
}


@pytest.mark.parametrize("fields, message", RUNS.values(), ids=RUNS.keys())
def test_run_in_a_bucket(fields, message):
    data = DataConfig((SourceConfig("text", ("a.txt",)),), length=128, batch=1)
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="tiny", data=data, steps=10, **fields)
