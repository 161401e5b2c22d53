"""The entry point: lists, explains, and answers mistakes in one line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from v4jax.cli import main
from v4jax.config import NUMERICS, model
from v4jax.config.inference import FrameConfig, InferenceConfig
from v4jax.tokenizer import PROFILES

ROOT = Path(__file__).parents[2]


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    """Returns status, stdout and stderr of a command."""
    status = main.run(arguments)
    return (status, *capsys.readouterr())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",), ("help", "--help")])
def test_the_list_of_verbs(arguments, capsys):
    status, out, err = run(*arguments, capsys=capsys)
    assert (status, err) == (0, "")
    assert "  generate   answers one prompt" in out
    assert "  batch      reads documents" in out


@pytest.mark.parametrize("arguments", [("batch", "--help"), ("help", "batch"), ("--help", "batch")])
def test_help_of_a_verb(arguments, capsys):
    status, out, _ = run(*arguments, capsys=capsys)
    assert status == 0
    assert "v4jax batch --model=nano --input=docs.jsonl --output=answers.jsonl" in out
    assert "--max_new_tokens=INT (default: 256)\n      Ends an answer" in out
    assert "--overwrite (default: off; --nooverwrite switches off)" in out
    assert "--numerics=float32|bfloat16|released (default: none)\n      How the" in out


@pytest.mark.parametrize("name", main.VERBS)
def test_every_verb_explains_itself(name, capsys):
    status, out, err = run(name, "--help", capsys=capsys)
    assert (status, err) == (0, "")
    assert f"  v4jax {name}" in out, "an example"
    assert max(map(len, out.splitlines())) <= 110
    for explained in re.split(r"\n  --", out)[1:]:
        flag, _, text = explained.partition("\n")
        assert len(text.split()) >= 2, flag


MISTAKES = {
    "unknown verb, near": (("bacth",), "unknown verb 'bacth'; did you mean batch?"),
    "unknown verb": (("xyzzy",), "unknown verb 'xyzzy'; known: generate, batch"),
    "flag before a verb": (("--model=nano",), "unknown verb '--model=nano'"),
    "unknown flag, near": (
        ("batch", "--modle=nano"),
        "unknown flag --modle; did you mean --model?",
    ),
    "unknown flag": (("batch", "--xyzzy"), "unknown flag --xyzzy; see v4jax batch --help"),
    "wrong type": (("batch", "--top_k=few"), "flag --top_k=few: invalid literal"),
    "not a choice": (("batch", "--numerics=int4"), "flag --numerics=int4: value should be one of"),
    "no value": (("batch", "--model"), "Missing value for flag --model"),
    "required flag": (("batch", "--model=nano"), "--input is required; --help shows examples"),
    "required prompt": (("generate", "--model=nano"), "--prompt is required"),
    "stray word": (
        ("generate", "--model=nano", "--prompt=why", "not"),
        "unexpected argument 'not'; quote a prompt with spaces",
    ),
    "bad sampling": (
        ("generate", "--model=nano", "--prompt=a", "--top_p=2"),
        "--top_p must be between 0 and 1, got 2.0",
    ),
    "blank prompt": (
        ("generate", "--model=nano", "--prompt= "),
        "--prompt must not be empty, got ' '",
    ),
    "missing input": (
        ("batch", "--model=nano", "--input=none.jsonl", "--output=out.jsonl"),
        "cannot read none.jsonl: No such file or directory",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments, capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith(f"v4jax: error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_choices_are_those_of_the_packages():
    choices = get_type_hints(InferenceConfig) | get_type_hints(FrameConfig)
    for name, known in (("numerics", NUMERICS), ("profile", PROFILES)):
        named, none = get_args(choices[name])
        assert set(get_args(named)) == set(known) and none is type(None)
    assert set(model.PROFILES) == set(PROFILES)


def test_help_does_not_load_jax():
    code = (
        "import sys; from v4jax.cli import main; main.run(['batch', '--help']); main.run([]);"
        "sys.exit('jax' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )
