"""Wrong arguments of the calls a user makes: each message says rule, value and remedy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from v4jax.cache import init_cache
from v4jax.config.from_hf import layer_kinds
from v4jax.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    ShapeError,
    UnsupportedError,
)
from v4jax.model import abstract_transformer

TOKENS = np.zeros((2, 4), np.int32)


@pytest.fixture(scope="module")
def model():
    return v4jax.load("tiny")


TOKEN_MISTAKES = {
    "negative": (TOKENS - 1, "tokens must be ids 0 … 319, got -1; was the text encoded"),
    "beyond the vocabulary": (TOKENS + 320, "tokens must be ids 0 … 319, got 320"),
    "beyond int32": ([[2**40]], "tokens must be ids 0 … 319, got 1099511627776"),
    "floats": (TOKENS * 1.0, "tokens must be integers, got dtype float64; use int32"),
    "booleans": (TOKENS == 0, "tokens must be integers, got dtype bool"),
    "text": ("hello", "tokens must be integers, got dtype <U5"),
    "one sequence": (TOKENS[0], "tokens must have shape [any, any], got [4]"),
    "rows of different lengths": ([[1, 2], [3]], "pad them on the right and say how long they are"),
    "no tokens": (TOKENS[:, :0], "tokens must hold at least one token, got shape [2, 0]"),
}


@pytest.mark.parametrize("tokens, message", TOKEN_MISTAKES.values(), ids=TOKEN_MISTAKES.keys())
def test_tokens(model, tokens, message):
    for call in (model, lambda tokens: model.extend(tokens, model.init_cache(2, 8))):
        with pytest.raises(ShapeError) as error:
            call(tokens)
        assert message in str(error.value)


EXTEND_MISTAKES = {
    "too long": (dict(lengths=[5, 1]), "lengths must be 0 … 4 (the tokens given), got [5, 1]"),
    "negative": (dict(lengths=[-1, 1]), "lengths must be 0 … 4 (the tokens given), got [-1, 1]"),
    "floats": (dict(lengths=[1.0, 1.0]), "lengths must be integers, got dtype float64"),
    "scalar": (dict(lengths=3), "lengths must have shape [2], got []"),
    "another batch": (dict(lengths=[1, 2, 3]), "lengths must have shape [2], got [3]"),
    "logits": (dict(logits="none"), "logits must be 'all' or 'last', got 'none'"),
}


@pytest.mark.parametrize("options, message", EXTEND_MISTAKES.values(), ids=EXTEND_MISTAKES.keys())
def test_extend(model, options, message):
    with pytest.raises(ShapeError) as error:
        model.extend(TOKENS, model.init_cache(2, 8), **options)
    assert message in str(error.value)


def without_compression(config):
    """Returns the configuration with window layers only."""
    ratios = (0,) * len(config.compress_ratios)
    return dataclasses.replace(config, compress_ratios=ratios, layer_types=layer_kinds(ratios))


def donated(model):
    """Returns a cache whose buffers are gone, as after `donate=True`."""
    cache = model.init_cache(2, 8)
    for array in jax.tree.leaves(cache):
        array.delete()
    return cache


CACHE_MISTAKES = {
    "none": (lambda model: None, "cache must be a HybridCache, got NoneType; make it with"),
    "another batch": (
        lambda model: model.init_cache(3, 8),
        "tokens have batch 2 but the cache holds 3 sequences; make it with init_cache(2, …)",
    ),
    "full": (
        lambda model: model.init_cache(2, 3),
        "sequence 0 holds 0 tokens and gets 4 more, but the cache was made for 3; make it larger",
    ),
    "of a wider model": (
        lambda model: v4jax.load("nano").init_cache(2, 8),
        "its entry format is float32 of 64, the model needs float32 of 32; make it with this",
    ),
    "of another period": (
        lambda model: init_cache(without_compression(model.config), model.numerics, 2, 8),
        "its stored.csa.values is None, the model needs float32[3, 2, 2, 32]",
    ),
    "of other numerics": (
        lambda model: v4jax.load("tiny", "released").init_cache(2, 8),
        "its entry format is fp8 of 32, the model needs float32 of 32",
    ),
    "donated": (donated, "the cache was donated to an earlier call"),
}


@pytest.mark.parametrize("make, message", CACHE_MISTAKES.values(), ids=CACHE_MISTAKES.keys())
def test_cache(model, make, message):
    with pytest.raises(CacheError) as error:
        model.extend(TOKENS, make(model))
    assert message in str(error.value)


def test_lists_are_welcome(model):
    cache = model.init_cache(np.int64(2), 8)
    logits, cache = model.extend(TOKENS.tolist(), cache, [4, 1])
    assert logits.shape == (2, 4, 320) and cache.lengths.tolist() == [4, 1]
    assert jnp.array_equal(
        logits, model.extend(TOKENS, model.init_cache(2, 8), np.array([4, 1]))[0]
    )
    assert cache.reset([True, False]).lengths.tolist() == [0, 1]
    assert cache.take([1, 1, 0]).lengths.tolist() == [1, 1, 4]


LOAD_MISTAKES = {
    "near a name": (("nanoo",), "did you mean 'nano'?"),
    "a configuration": ((object(),), "load takes a checkpoint folder or the name of"),
    "numerics": (("tiny", "int8"), "numerics must be one of"),
    "numerics of another type": (("tiny", ["float32"]), "numerics must be one of"),
    "too large for random weights": (("v4_flash",), "has 291 billion parameters, too many"),
}


@pytest.mark.parametrize("arguments, message", LOAD_MISTAKES.values(), ids=LOAD_MISTAKES.keys())
def test_load(arguments, message):
    with pytest.raises(ConfigError) as error:
        v4jax.load(*arguments)
    assert message in str(error.value)
    rule = r"seed must be an integer from 0 to 4294967295 or None, got 1\.5"
    with pytest.raises(ConfigError, match=rule):
        v4jax.load("tiny", seed=1.5)


def test_save(model, tmp_path):
    with pytest.raises(CheckpointError, match="format must be one of"):
        v4jax.save(model, tmp_path / "new", format="gguf")
    with pytest.raises(CheckpointError, match="save takes a model that load returned, got dict"):
        v4jax.save({}, tmp_path / "new")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"exists and is not empty|Not a directory"):
            v4jax.save(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_extend_inside_a_transformation():
    """The checks of values are left to the caller; the result is that of the plain call."""
    model = v4jax.load("tiny")
    tokens = np.arange(5, dtype=np.int32)[None]
    cache = model.init_cache(1, 8)
    expected, _ = model.extend(tokens, cache, logits="last")
    inside = jax.jit(lambda tokens, cache: model.extend(tokens, cache, logits="last")[0])
    np.testing.assert_allclose(inside(tokens, cache), expected, 0, 1e-5)


def test_target(model):
    """What is asked for of the model's target runs or raises, in every call; shapes have none."""
    asking = jax.tree.map(lambda leaf: leaf, model)
    asking.target = model.target.using(indexer="pallas_tpu")
    for call in (asking, lambda ids: asking.extend(ids, asking.init_cache(2, 8))):
        with pytest.raises(UnsupportedError, match="indexer=pallas_tpu cannot run: it needs a tpu"):
            call(TOKENS)
    assert model(TOKENS).shape == (2, 4, model.config.vocab_size)
    shapes = abstract_transformer(model.config, model.numerics)
    with pytest.raises(ConfigError, match=r"no target.*give abstract_transformer one"):
        jax.eval_shape(shapes, TOKENS)
