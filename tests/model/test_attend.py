"""Selection among candidates that lie on several devices, against a stable sort."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from v4jax.model.attend import keep_best
from v4jax.parallel import Layout, make_mesh
from v4jax.parallel.shard import on_shards

DEVICES = 8
CASES = {
    "reals": lambda random, shape: random.standard_normal(shape),
    "ties across devices": lambda random, shape: random.randint(0, 3, shape),
    "all equal": lambda random, shape: np.zeros(shape),
    "one device has the best": lambda random, shape: np.arange(np.prod(shape)).reshape(shape),
    "few are there": lambda random, shape: np.where(random.rand(*shape) < 0.02, 1.0, -np.inf),
    "none is there": lambda random, shape: np.full(shape, -np.inf),
}


@pytest.mark.parametrize("own, count", [(64, 64), (30, 50), (6, 96)])
def test_the_best_of_all_devices(own, count):
    """All devices' marks side by side are those of one stable sort of all candidates."""
    layout = Layout(make_mesh(expert=4, context=2))
    spec = P("batch", None, "read_entries")
    keep = jax.jit(on_shards(lambda a, x: keep_best(a, x, count), layout, "whole", (spec,), spec))
    for name, draw in CASES.items():
        scores = draw(np.random.RandomState(count), (2, 3, DEVICES * own)).astype(np.float32)
        best = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
        expected = np.zeros(scores.shape, bool)
        np.put_along_axis(expected, best, True, axis=-1)
        expected &= scores > -np.inf
        np.testing.assert_array_equal(keep(scores), expected, err_msg=name)
