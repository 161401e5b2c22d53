"""A flat model's `extend` is the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import WINDOWS, make_model

from v4jax.errors import ShapeError
from v4jax.model import flat

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9), np.int32)


@pytest.fixture(scope="module")
def models():
    """Two models of one structure, with different weights."""
    model = make_model(WINDOWS)
    return [model, jax.tree.map(lambda x: x * 2 if x.dtype == jnp.float32 else x, model)]


def read(extend, cache, **options):
    """Returns the logits of a chunk and of a token after it."""
    logits = []
    for part in (TOKENS[:, :8], TOKENS[:, 8:]):
        found, cache = extend(part, cache, logits="last", **options)
        logits.append(found)
    return np.stack(logits)


def test_equals_the_model(models):
    compiled = []
    for model in models:
        expected = read(model.extend, model.init_cache(2, 16))
        kept, donated = model.init_cache(2, 16), model.init_cache(2, 16)
        found = read(model.flatten().extend, kept)
        np.testing.assert_allclose(found, expected, 0, 1e-5)
        again = read(model.flatten().extend, donated, donate=True)
        np.testing.assert_array_equal(again, found)
        assert donated.lengths.is_deleted() and not kept.lengths.is_deleted()
        compiled.append(flat.COMPILED["extend", False]._cache_size())
    assert compiled[0] == compiled[1], "models of one structure share what is compiled"


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
