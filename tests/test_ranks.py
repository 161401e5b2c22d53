"""Places within groups, against counting one by one."""

import numpy as np
import pytest

from v4jax.ranks import rank

RANDOM = np.random.RandomState(0)
CASES = {
    "one element": ([0], 1),
    "in no group": ([3, -1, 0, 3, 0], 3),
    "one group, more than a block": ([0] * 300, 2),
    "random, many blocks": (RANDOM.randint(0, 9, 5000), 8),
    "more groups than elements": (RANDOM.randint(0, 256, 100), 256),
}


@pytest.mark.parametrize("groups, count", CASES.values(), ids=CASES.keys())
def test_rank(groups, count):
    groups, seen, wanted = np.array(groups), {}, []
    for group in groups.tolist():
        wanted.append(seen.get(group, 0))
        seen[group] = wanted[-1] + 1
    ranks, sizes = rank(groups, count)
    member = (groups >= 0) & (groups < count)
    np.testing.assert_array_equal(np.array(ranks)[member], np.array(wanted)[member])
    assert sizes.tolist() == [seen.get(group, 0) for group in range(count)]
