"""A flat model's `extend` is the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from v4jax.errors import ShapeError
from v4jax.model import flat

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9), np.int32)


@pytest.fixture(scope="module")
def models():
    return [v4jax.load("nano", seed=seed) for seed in (1, 2)]


def read(model, donate=False):
    """Returns the logits of a chunk and of a token after it, and the first cache."""
    begun = model_cache = read.model.init_cache(2, 16)
    logits = []
    for part in (TOKENS[:, :8], TOKENS[:, 8:]):
        found, model_cache = model.extend(part, model_cache, logits="last", donate=donate)
        logits.append(found)
    return np.stack(logits), begun


def test_equals_the_model(models):
    for read.model in models:
        expected, _ = read(read.model)
        found, begun = read(read.model.flatten())
        np.testing.assert_allclose(found, expected, 0, 1e-5)
        assert not begun.lengths.is_deleted()
        donated, begun = read(read.model.flatten(), donate=True)
        np.testing.assert_array_equal(donated, found)
        assert begun.lengths.is_deleted()


def test_models_of_one_structure_share_what_is_compiled(models):
    for read.model in models:
        read(read.model.flatten())
        compiled = flat._extend._cache_size()
        if read.model is models[0]:
            first = compiled
    assert compiled == first


def test_raises_as_the_model(models):
    cache = models[0].init_cache(2, 16)
    with pytest.raises(ShapeError, match="ids 0"):
        models[0].flatten().extend(jnp.full((2, 1), 10**6), cache)
    with pytest.raises(ShapeError, match="logits"):
        models[0].flatten().extend(TOKENS, cache, logits="some")


def test_works_under_a_transformation(models):
    """There the weights may be traced."""

    def first(model, tokens):
        return model.flatten().extend(tokens, models[0].init_cache(2, 16), logits="last")[0]

    expected = models[0].extend(TOKENS, models[0].init_cache(2, 16), logits="last")[0]
    np.testing.assert_allclose(jax.jit(first)(models[0], TOKENS), expected, 0, 1e-5)
