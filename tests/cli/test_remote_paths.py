"""What would write to a bucket is refused by name, before anything is read or made."""

import pytest

from v4jax.cli import main

BATCH = {"model": "nano", "input": "docs.jsonl", "output": "answers.jsonl", "summary": "s.json"}
CONVERT = {"input": "nano", "output": "folder"}
COMMANDS = [
    ("batch", BATCH, "output"),
    ("batch", BATCH, "summary"),
    ("convert", CONVERT, "output"),
]


@pytest.mark.parametrize("path", ["gs://bucket/a", "s3://bucket/a"])
@pytest.mark.parametrize("verb, flags, name", COMMANDS)
def test_remote_path_is_refused(tmp_path, monkeypatch, capsys, verb, flags, name, path):
    monkeypatch.chdir(tmp_path)
    given = [f"--{flag}={value}" for flag, value in (flags | {name: path}).items()]
    assert main.run([verb, *given]) == 2
    expected = f"--{name}={path}: writing to {path[:5]} is not supported; write to a disk and "
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
