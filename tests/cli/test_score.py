"""`v4jax score`, with the fake model."""

import json

import pytest

from v4jax.cli import main


@pytest.fixture
def command(tmp_path, fake_model):
    (tmp_path / "texts.jsonl").write_text('{"text": "A text."}\n{broken\n')
    files = [f"--{name}={tmp_path}/{name}" for name in ("output", "summary")]
    return ["score", "--model=nano", f"--input={tmp_path}/texts.jsonl", *files]


def test_scores_and_summary(command, tmp_path, capsys):
    assert main.run([*command, "--logprobs"]) == 0
    out = capsys.readouterr().out
    assert "texts      2, of them failed 1\nscored     7 tokens" in out and "bits per byte" in out
    first, _ = map(json.loads, (tmp_path / "output").read_text().splitlines())
    assert len(first["logprobs"]) == first["tokens"] == 7
    summary = json.loads((tmp_path / "summary").read_text())
    assert summary["logprob"] == pytest.approx(first["logprob"])
    assert main.run(command) == 2, "without --logprobs it is another job"
    assert main.run([*command, "--overwrite"]) == 0


def test_every_text_failed(command, tmp_path):
    (tmp_path / "texts.jsonl").write_text("{broken\n")
    assert main.run(command) == 1


BAD = {
    "contradiction": (["--overwrite", "--retry_failed"], "--overwrite answers everything anew"),
    "no folder": (["--documents_under=/none"], "--documents_under must be a folder"),
    "flag of batch": (["--temperature=1"], "unknown flag --temperature"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD.keys())
def test_bad_flags(command, capsys, flags, message):
    assert main.run([*command, *flags]) == 2
    assert message in capsys.readouterr().err
