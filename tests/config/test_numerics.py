"""The numerics that a model gets where none are named."""

import pytest

from v4jax import log
from v4jax.config import choose_numerics, get_numerics
from v4jax.config.loading import load_model_config, packaged_names
from v4jax.config.numerics import BFLOAT16, FLOAT32, RELEASED, count_most_parameters
from v4jax.errors import ConfigError

SMALL = {"nano", "tiny"}


@pytest.mark.parametrize("name", packaged_names())
def test_default(name, monkeypatch, capsys):
    config = load_model_config(name)
    monkeypatch.setattr(log, "_said", set())
    chosen = choose_numerics(None, config)
    assert chosen == (FLOAT32 if name in SMALL else RELEASED)
    assert capsys.readouterr().err == ""
    choose_numerics(chosen, config, says=True)
    size = "small" if name in SMALL else "large"
    assert f"numerics: {chosen.name}, the default of a {size} model (" in capsys.readouterr().err
    choose_numerics(BFLOAT16, config, says=True)
    assert capsys.readouterr().err == ""


def test_what_is_named_is_taken():
    config = load_model_config("v4_flash")
    assert choose_numerics("bfloat16", config) is BFLOAT16 is get_numerics("bfloat16")
    assert choose_numerics(FLOAT32, config) is FLOAT32
    with pytest.raises(ConfigError, match="numerics must be one of"):
        choose_numerics("float16", config)


def test_count():
    """Flash has 284 billion parameters; all but 5 are those that are counted."""
    assert count_most_parameters(load_model_config("v4_flash")) == pytest.approx(278e9, rel=0.01)
