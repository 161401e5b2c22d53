"""Random weights are the same bits everywhere, and normal."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.model import draw
from v4jax.model.draw import draw_normal
from v4jax.parallel import make_mesh

KEY = jax.random.fold_in(jax.random.key(0), 3)
# The last has rows that NumPy makes in several blocks, the last of them smaller.
SHAPES = [(7,), (1, 1), (3, 5), (2, 3, 2, 5), (2 * draw.BLOCK // 100 + 1, 100)]

# Of KEY.
VALUES = [
    [-0.6534767150878906, 0.7632904052734375, -1.1173210144042969],
    [0.40598297119140625, 1.2587165832519531, -1.2244682312011719],
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_traced_or_not(shape):
    found = jax.jit(lambda key: draw_normal(key, shape, 0.02))(KEY)
    np.testing.assert_array_equal(found, draw_normal(KEY, shape, 0.02))
    assert found.dtype == np.float32 and found.shape == shape


def test_on_a_mesh():
    """Every device makes its own share, of rows and of columns."""
    sharding = NamedSharding(make_mesh(data=2, expert=4), P("expert", None, "data"))
    made = jax.jit(lambda key: draw_normal(key, (8, 3, 6), 1.0), out_shardings=sharding)
    np.testing.assert_array_equal(made(KEY), draw_normal(KEY, (8, 3, 6), 1.0))
    assert "all-gather" not in made.lower(KEY).compile().as_text()


def test_values():
    """These bits are those of every run so far: a change gives resumed runs other weights."""
    found = draw_normal(KEY, (2, 3), 1.0)
    np.testing.assert_array_equal(found, np.array(VALUES, np.float32))


def test_normal():
    """Moments and tails are those of the normal distribution; rows, columns and keys are apart."""
    rows, columns = 2048, 512
    found = draw_normal(KEY, (rows, columns), 2.0) / 2
    assert abs(found.mean()) < 4 / np.sqrt(found.size)
    assert np.mean(found**2) == pytest.approx(1, abs=0.005)
    assert np.mean(found**4) == pytest.approx(3, abs=0.03)
    assert np.mean(np.abs(found) > 3) == pytest.approx(0.0027, abs=0.0002)
    # Of independent values, 1/√n is the deviation of a correlation.
    for matrix in (found[:columns], found[:columns].T):
        apart = np.corrcoef(matrix)[np.triu_indices(columns, 1)]
        assert np.abs(apart).max() < 6 / np.sqrt(columns)
    for key in (jax.random.key(0), jax.random.key(1), jax.random.fold_in(jax.random.key(0), 4)):
        other = draw_normal(key, (rows, columns), 1.0)
        assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(found.size)
