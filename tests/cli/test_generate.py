"""`v4jax generate`, with the fake model."""

import io
import re
import sys

import jax.numpy as jnp
import pytest

import v4jax
from v4jax import log
from v4jax.cli import main

FLAGS = ("--model=nano", "--max_new_tokens=12", "--chunk_tokens=64")


def answer(capsys, *arguments: str) -> str:
    """Returns what a command prints."""
    assert main.run(["generate", *FLAGS, *arguments]) == 0
    out, err = capsys.readouterr()
    assert "nano has random weights" in err
    assert "finish reason" in err
    return out


def test_prompt_and_stdin_say_the_same(capsys, fake_model, monkeypatch):
    shown = answer(capsys, "--prompt=Grüße")
    assert shown.endswith("\n") and len(shown) > 2
    stdin = io.TextIOWrapper(io.BytesIO("Grüße".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert answer(capsys, "--prompt=-") == shown


def test_flags_reach_the_model(capsys, fake_model):
    plain = answer(capsys, "--prompt=a")
    assert answer(capsys, "--prompt=a", "--temperature=1", "--seed=1") != plain
    assert answer(capsys, "--prompt=a", "--system=s") != plain
    assert answer(capsys, "--prompt=a", "--thinking") != plain
    assert answer(capsys, "--prompt=a", "--temperature=1", "--top_k=1") == plain


def test_drafts(capsys, fake_model, monkeypatch):
    monkeypatch.setattr(log, "_said", set())
    plain = answer(capsys, "--prompt=a")
    fake_model.draft_tokens = 4
    assert main.run(["generate", *FLAGS, "--prompt=a"]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    passes = re.search(r"wrote (\d+) \((\S+) a pass in (\d+) passes\)", err)
    assert float(passes[2]) == pytest.approx((int(passes[1]) - 1) / int(passes[3]), abs=0.01)
    assert "speculate: 4 tokens are drafted and verified in each step" in err
    assert main.run(["generate", *FLAGS, "--prompt=a", "--speculate=off"]) == 0
    assert capsys.readouterr().out == plain


def test_log_probabilities_go_to_stderr(capsys, fake_model):
    plain = answer(capsys, "--prompt=a")
    for drafts in (0, 4):  # whatever wrote the answer
        fake_model.draft_tokens = drafts
        assert main.run(["generate", *FLAGS, "--prompt=a", "--logprobs"]) == 0
        out, err = capsys.readouterr()
        rows = re.findall(r"^ +(-\d+\.\d{6})  '", err, re.MULTILINE)
        assert out == plain and 1 <= len(rows) <= 12


def test_numbers_that_are_not_finite_are_an_error(capsys, fake_model, monkeypatch):
    """While the prompt is read, and in the middle of the answer; what was written is shown."""
    extend = fake_model.extend
    for shapes in ({64, 16}, {1}):

        def sick(tokens, cache, *rest, shapes=shapes, **options):
            logits, cache = extend(tokens, cache, *rest, **options)
            return jnp.where(tokens.shape[1] in shapes, jnp.nan, logits), cache

        monkeypatch.setattr(fake_model, "extend", sick)
        assert main.run(["generate", *FLAGS, "--prompt=a"]) == 2
        assert "v4jax: error: the model computed NaN or infinity" in capsys.readouterr().err


BAD_DRAFTS = {
    "99": "speculate asks for 99 drafts a step, and this model",
    "0": "inference.speculate must be auto, off or a number of tokens of at least 1, got '0'",
    "on": "must be auto, off or a number of tokens of at least 1, got 'on'",
}


@pytest.mark.parametrize(("drafts", "message"), BAD_DRAFTS.items())
def test_bad_drafts_are_said_before_loading(capsys, monkeypatch, drafts, message):
    monkeypatch.setattr(v4jax, "load", lambda *_, **__: pytest.fail("loaded"), raising=False)
    assert main.run(["generate", "--model=tiny", "--prompt=a", f"--speculate={drafts}"]) == 2
    assert message in capsys.readouterr().err


def test_stdin_that_is_no_text(capsys, fake_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert main.run(["generate", *FLAGS, "--prompt=-"]) == 2
    assert "stdin is not UTF-8: byte 0xff at position 1" in capsys.readouterr().err
