"""The packaged trained weights: what `load("nano")` returns, and that it does its task."""

import numpy as np
import pytest

import v4jax
from v4jax.config import numerics
from v4jax.config.loading import PRETRAINED, load_model_config, pretrained_names
from v4jax.config.numerics import FLOAT32, RELEASED
from v4jax.errors import ConfigError
from v4jax.inference import Document, Engine, EngineOptions, Question, SamplingOptions
from v4jax.training.data import needles

LARGEST = 20 << 20  # bytes of a packaged folder


@pytest.mark.parametrize("name", pretrained_names())
def test_folder(name):
    files = list((PRETRAINED / name).iterdir())
    assert sum(file.stat().st_size for file in files) < LARGEST
    assert (PRETRAINED / name / "README.md").is_file()  # the model card
    assert load_model_config(PRETRAINED / name) == load_model_config(name)


def test_names():
    assert "nano" in pretrained_names()
    assert v4jax.load("nano").folder == PRETRAINED / "nano"
    random = v4jax.load("nano", seed=1)
    assert random.folder is None
    with pytest.raises(ConfigError, match="seed must be an integer from 0 to 4294967295 or None"):
        v4jax.load("nano", seed="a")


def test_numerics_follow_from_the_size(monkeypatch):
    assert v4jax.load("nano").numerics is FLOAT32
    monkeypatch.setattr(numerics, "SMALL_PARAMETERS", 1 << 20)  # nano has four of them
    assert v4jax.load("nano").numerics is RELEASED
    assert v4jax.load("nano", seed=1).numerics is RELEASED
    assert v4jax.load("nano", numerics="float32").numerics is FLOAT32


def test_nano_finds_codes():
    """Twelve questions about a text of 2,048 bytes with names that training never showed."""
    settings = needles.Needles(
        tokens=(2048, 2048), needles=(8, 8), distractors=(4, 4), split="test"
    )
    engine = Engine(v4jax.load("nano"), EngineOptions(chunk_tokens=512, max_tokens=2304))
    right = asked = 0
    for seed in range(2):
        haystack = needles.hide(np.random.default_rng(seed), settings)
        names = list(haystack.codes)[:6]
        sampling = SamplingOptions(max_new_tokens=8)
        questions = tuple(Question(needles.ask(name), sampling) for name in names)
        encoded = engine.encode(Document(haystack.text, questions))
        state = engine.read(encoded)
        for group in encoded.groups(engine.options):
            for answer in engine.answer(encoded, state, group):
                right += answer.text.strip() == haystack.codes[names[asked % len(names)]]
                asked += 1
    assert asked == 12 and right >= 9
