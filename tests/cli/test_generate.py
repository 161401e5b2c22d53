"""`v4jax generate`, with the fake model."""

import io
import sys

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


def test_stdin_that_is_no_text(capsys, fake_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert main.run(["generate", *FLAGS, "--prompt=-"]) == 2
    assert "stdin is not UTF-8: byte 0xff at position 1" in capsys.readouterr().err
