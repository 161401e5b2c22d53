"""Entries written into turned tables: against a loop in NumPy, and in place for real chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import table, table_tpu
from v4jax.quant import EntryFormat

LAYERS, SLOTS, ROOM = 2, 3, 384
FP8, FP4 = (EntryFormat(kind, 256, 64, "bfloat16") for kind in ("fp8", "fp4"))

# name: format, rows given, place of the first of each slot, how many are real.
CASES = {
    "one row, none real, behind the end": (FP8, 1, [5, 130, 384], [1, 0, 1]),
    "index keys": (FP4, 1, [0, 383, 128], [1, 1, 1]),
    "across tiles, up to the end, nothing": (FP8, 130, [100, 254, 7], [130, 130, 0]),
    "partly before the start, partly behind the end": (FP8, 130, [-2, 300, 126], [130, 130, 2]),
    "on another share, before and behind": (FP4, 130, [-4000, 4000, -129], [130, 130, 130]),
}


@functools.partial(jax.jit, static_argnames="pallas")
def write(stored, rows, first, count, *, pallas):
    if pallas:
        return table_tpu.write(stored, jnp.int32(1), rows, first, count, interpret=True)
    return table.write(stored, jnp.int32(1), rows, first, count)


@pytest.mark.parametrize("pallas", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_write(name, pallas):
    stored_as, given, first, count = CASES[name]
    random = np.random.RandomState(0)

    def draw(*lead):
        """Returns stored arrays of arbitrary bits, but no infinity or NaN."""
        wanted = jax.eval_shape(lambda: stored_as.zeros(*lead))
        return {
            array: random.randint(0, 64, (*x.shape, x.dtype.itemsize))
            .astype(np.uint8)
            .view(x.dtype)[..., 0]
            for array, x in wanted.items()
        }

    stored, rows = draw(LAYERS, SLOTS, ROOM), draw(SLOTS, given)
    first, count = (np.array(x, np.int32) for x in (first, count))
    found = write(stored, rows, first, count, pallas=pallas)
    for array, before in stored.items():
        expected, new = before.copy(), rows[array]
        for slot, row in np.ndindex(SLOTS, given):
            if row < count[slot] and 0 <= first[slot] + row < ROOM:
                expected[1, slot, first[slot] + row] = new[slot, row]
        np.testing.assert_array_equal(np.asarray(found[array]), expected)


def test_rows_that_are_no_words():
    """One scale byte an entry (index keys of 32 channels) is left to the scatter."""
    stored = {
        "packed": jnp.zeros((1, 1, 128, 16), jnp.uint8),
        "scales": jnp.zeros((1, 1, 128, 1), jnp.uint8),
    }
    assert "scales: a row must be whole words of 4 bytes, it has 1" in table_tpu.why_not(stored)
