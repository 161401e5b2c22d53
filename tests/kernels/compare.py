"""How implementations are held against `reference.py`: the targets, and what counts as equal."""

import functools
import itertools

import jax
import numpy as np
import pytest

from v4jax.kernels import Target

CPU, GPU = Target("cpu"), Target("gpu", interpret=True)
# Chips whose kernels differ: by integers, by the cast of e4m3b11fnuz, by the cast of e4m3fn.
TPU, V6, V7 = (Target("tpu", kind, interpret=True) for kind in ("TPU v5", "TPU v6 lite", "TPU7x"))

# Sums of some hundred products of size 1 in another order.
FLOAT32 = 1e-5
# A value on either side of a rounding to the eight bits of bfloat16.
BFLOAT16 = 2**-7
# What nobody may see holds this: a mask that leaks shows.
GARBAGE = 1e4


@functools.partial(jax.jit, static_argnums=0)
def encode(stored_as, entries):
    """Returns stored entries."""
    return stored_as.encode(entries)


def check(found, expected, error: float, name: str = "") -> None:
    """Compares trees of arrays; the error is relative to an array's largest value, if above 1."""
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for value, wanted in leaves:
        assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype), name
        value, wanted = (np.asarray(x, np.float32) for x in (value, wanted))
        assert np.isfinite(wanted).all(), name
        limit = error * max(np.abs(wanted).max(initial=0), 1)
        np.testing.assert_allclose(value, wanted, 0, limit, err_msg=name)


def on_chips(shapes: dict):
    """Parametrizes `topology` and `shape`: each shape for tpu7x and for one older chip in turn.

    tpu7x has the smallest VMEM and the newest units; v5p has as little VMEM.
    """
    older = itertools.cycle(["v5p:2x2x1", "v6e:2x2", "v5e:2x2"])
    pairs = [
        pytest.param(topology, shape, id=f"{topology.split(':')[0]}, {name}")
        for name, shape in shapes.items()
        for topology in ("tpu7x:2x2x1", next(older))
    ]
    return pytest.mark.parametrize(("topology", "shape"), pairs)
