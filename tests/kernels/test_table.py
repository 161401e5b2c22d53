"""Entries written in place: every implementation against `reference.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import table
from v4jax.kernels.table import pallas_tpu, reference
from v4jax.quant import EntryFormat

from .compare import CPU, TPU

LAYERS, SLOTS, ROOM = 2, 3, 384
FP8, FP4 = (EntryFormat(kind, 256, 64, "bfloat16") for kind in ("fp8", "fp4"))

# name: format, rows given, place of the first of each slot, how many are real.
CASES = {
    "one row, none real, behind the end": (FP8, 1, [5, 130, 384], [1, 0, 1]),
    "at the borders": (FP8, 1, [0, 383, 128], [1, 1, 1]),
    "across tiles, up to the end, nothing": (FP4, 130, [100, 254, 7], [130, 130, 0]),
    "partly before the start, partly behind the end": (FP4, 130, [-2, 300, 126], [130, 130, 2]),
    "on another share, before and behind": (FP4, 130, [-4000, 4000, -129], [130, 130, 130]),
}


@functools.partial(jax.jit, static_argnames="target")
def write(stored, rows, first, count, *, target):
    module = reference if target is None else table
    return module.write(stored, jnp.int32(1), rows, first, count, target=target)


@pytest.mark.parametrize("target", [CPU, TPU], ids=lambda target: target.platform)
@pytest.mark.parametrize("name", CASES)
def test_write(name, target):
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

    first, count = (np.array(x, np.int32) for x in (first, count))
    arguments = draw(LAYERS, SLOTS, ROOM), draw(SLOTS, given), first, count
    found, expected = write(*arguments, target=target), write(*arguments, target=None)
    for array in expected:
        np.testing.assert_array_equal(found[array], expected[array])


def test_rows_that_are_no_words():
    """One scale byte an entry (index keys of 32 channels) is left to the scatter."""
    stored = {
        "packed": jnp.zeros((1, 1, 128, 16), jnp.uint8),
        "scales": jnp.zeros((1, 1, 128, 1), jnp.uint8),
    }
    assert "scales: a row must be whole words of 4 bytes, it has 1" in pallas_tpu.supported(stored)
