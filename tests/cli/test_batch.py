"""`v4jax batch`, with the fake model."""

import json

import pytest

from v4jax.cli import main


@pytest.fixture
def command(tmp_path, fake_model):
    (tmp_path / "docs.jsonl").write_text(
        '{"text": "A text.", "questions": ["Who?", "When?"]}\n{broken\n'
    )
    return [
        "batch",
        "--model=nano",
        "--chunk_tokens=64",
        "--max_new_tokens=5",
        f"--input={tmp_path}/docs.jsonl",
        f"--output={tmp_path}/answers.jsonl",
        f"--summary={tmp_path}/summary.json",
    ]


def test_answers_and_summary(command, tmp_path, capsys):
    assert main.run(command) == 0
    out, err = capsys.readouterr()
    assert "documents  2, of them failed 1\nquestions  2 answered\n" in out
    assert "warning: batch: line 2: the line is not JSON" in err
    assert "nano has random weights" in err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["documents"], summary["failed"], summary["questions"]) == (2, 1, 2)
    lines = (tmp_path / "answers.jsonl").read_text()
    assert main.run(command) == 0  # nothing left to do
    assert (tmp_path / "answers.jsonl").read_text() == lines


def test_other_flags_need_overwrite(command, capsys):
    assert main.run(command) == 0
    other = [*command, "--temperature=1"]
    assert main.run(other) == 2
    assert "another model or other settings" in capsys.readouterr().err
    assert main.run([*other, "--overwrite"]) == 0


def test_status_when_every_document_failed(command, tmp_path):
    (tmp_path / "docs.jsonl").write_text("{broken\n")
    assert main.run(command) == 1


def test_summary_that_cannot_be_written(command, tmp_path, capsys):
    assert main.run([*command, f"--summary={tmp_path}/none/summary.json"]) == 2
    assert "No such file or directory" in capsys.readouterr().err
