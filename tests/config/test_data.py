"""Training data as configured: what is refused, and with which words."""

import re

import pytest

from v4jax.config import DataConfig, SourceConfig
from v4jax.errors import ConfigError

TEXT, NEEDLES = SourceConfig("text", ("a.txt",)), SourceConfig("needles")
GOOD = {"sources": (TEXT,), "length": 1024, "batch": 2}


def test_text_is_split_and_others_are_not():
    assert TEXT.splits and not NEEDLES.splits
    assert not SourceConfig("text", ("a.txt",), too_long="error").splits
    assert SourceConfig("chat", ("a.jsonl",), too_long="split").splits


# {what is wrong: (fields, what the message must say)}
BAD_SOURCES = {
    "weight": ({"kind": "text", "paths": ("a",), "weight": 0.0}, "weight must be positive, got 0"),
    "no paths": ({"kind": "chat"}, "data.sources.paths must name a file or folder of chat"),
    "paths of needles": (
        {"kind": "needles", "paths": ("a",)},
        "data.sources.paths must be empty for needles, got ('a',)",
    ),
    "another kind's field": (
        {"kind": "text", "paths": ("a",), "mode": "chat"},
        "data.sources.mode is for kind 'chat', got 'chat' with kind 'text'; remove it",
    ),
    "settings": (
        {"kind": "chat", "paths": ("a",), "settings": {}},
        "data.sources.settings is for kind 'needles', got {} with kind 'chat'; remove it",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
def test_bad_sources(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SourceConfig(**fields)


# {what is wrong: (changes to GOOD, what the message must say)}
BAD_DATA = {
    "no source": ({"sources": ()}, "data.sources must name at least one source, got none"),
    "length": ({"length": 1000}, "multiple of 128, got 1000; try 896 or 1024"),
    "short": ({"length": 5}, "multiple of 128, got 5; try 128 or 256"),
    "batch": ({"batch": 0}, "data.batch must be between 1 and 1048576, got 0"),
    "prefetch": ({"prefetch": -1}, "data.prefetch must be between 0 and 1024, got -1"),
    "epochs": ({"epochs": 0}, "data.epochs must be between 1 and"),
    "seed": ({"seed": -1}, "data.seed must be between 0 and 4294967295, got -1"),
    "epochs and weights": (
        {"epochs": 1, "sources": (TEXT, SourceConfig("text", ("b",), weight=2))},
        "data.sources.weight must be the same for all where data.epochs is given",
    ),
    "epochs and needles": (
        {"epochs": 1, "sources": (NEEDLES,)},
        "data.epochs must be None with needles, which never end",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DataConfig(**GOOD | changes)
