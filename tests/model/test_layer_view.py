"""What layers show: hidden states are those of the model, and a mesh shows what a device does."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import IDS, PAIRS, make_model, on_mesh

from v4jax.kernels.table import EntryTable
from v4jax.model.layer_view import view_layers
from v4jax.model.passes import read_logits

TOKENS = jnp.asarray(IDS[:2])
# Sums in another order; activations have a deviation near 1.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def seen():
    return view_layers(make_model(PAIRS), TOKENS)


def test_the_last_hidden_state_gives_the_logits(seen):
    model = make_model(PAIRS)
    assert len(seen) == 4 and all(layer["streams"].shape == (2, 128, 4, 64) for layer in seen)
    logits = read_logits(model, seen[-1]["streams"])
    np.testing.assert_allclose(logits, model(TOKENS), atol=TOLERANCE)
    assert np.abs(seen[0]["streams"] - seen[1]["streams"]).max() > 0.1


@pytest.mark.parametrize(
    "sizes",
    [dict(data=2, context=2, tensor=2), pytest.param(dict(expert=8), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_mesh_shows_the_same(seen, sizes):
    shown = view_layers(on_mesh(make_model(PAIRS), **sizes), TOKENS)
    for mine, other in zip(seen, shown, strict=True):
        assert mine.keys() == other.keys()
        for name, x in mine.items():
            y = other[name]
            if isinstance(x, EntryTable):
                count = min(x.capacity, y.capacity)
                x, y = (table.block(jnp.int32(0), count) for table in (x, y))
            elif name == "selected":  # in any order
                x, y = jnp.sort(x, -1), jnp.sort(y, -1)
            assert x.shape == y.shape, name
            np.testing.assert_allclose(x, y, atol=TOLERANCE, err_msg=name)
