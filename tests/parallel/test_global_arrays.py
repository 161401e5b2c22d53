"""Pieces of split parameters come to the host as they are, whatever splits them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.parallel import global_arrays, make_mesh

# shape, split, index
CASES = {
    "whole": ((4, 6), P(), ()),
    "rows": ((8, 6), P("data"), ()),
    "columns": ((3, 8), P(None, "tensor"), ()),
    "rows and columns": ((8, 8), P("data", "tensor"), ()),
    "one row of each": ((3, 8, 4), P(None, "data"), (2,)),
    "experts": ((2, 8, 4, 6), P(None, ("data", "expert")), (1, 5)),
    "experts and columns": ((2, 4, 5, 8), P(None, "expert", None, ("data", "tensor")), (0, 3)),
    "experts and rows": ((4, 8, 2), P("expert", ("tensor", "data")), (3,)),
    "numbers": ((2, 8), P(None, "data"), (1, 6)),
    "a vector": ((3, 8), P(None, ("data", "expert", "tensor")), (1,)),
}
FORMATS = {  # dtype, bytes of a block
    "float32": (np.float32, 1 << 20),
    "float32, a row at a time": (np.float32, 1),
    "bfloat16": (ml_dtypes.bfloat16, 1 << 20),
    "float8": (ml_dtypes.float8_e4m3fn, 1 << 20),
    "uint8, some rows at a time": (np.uint8, 20),
    "int32": (np.int32, 1 << 20),
}


@pytest.mark.parametrize("dtype, block_bytes", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_take(monkeypatch, case, block_bytes, dtype):
    """Bit for bit: of floats also what is no number, and the sign of zero."""
    monkeypatch.setattr(global_arrays, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(global_arrays, "_is_here", lambda array: False)
    shape, spec, index = case
    size = np.prod(shape) * np.dtype(dtype).itemsize
    values = np.random.RandomState(0).randint(0, 256, size, np.uint8).view(dtype).reshape(shape)
    mesh = make_mesh(data=2, expert=2, tensor=2)
    array = jax.device_put(jnp.asarray(values), NamedSharding(mesh, spec))
    found = global_arrays.take(array, index)
    assert (found.shape, found.dtype) == (shape[len(index) :], values.dtype)
    assert found.tobytes() == values[index].tobytes()
    assert global_arrays.take(array, index, needed=False) is None


def test_take_of_one_device(monkeypatch):
    values = np.arange(24.0).reshape(2, 3, 4)
    for here in (True, False):
        monkeypatch.setattr(global_arrays, "_is_here", lambda array, here=here: here)
        assert np.array_equal(global_arrays.take(jnp.asarray(values), (1, 2)), values[1, 2])
        assert np.array_equal(global_arrays.take(jnp.asarray(values), ()), values)
        assert global_arrays.take(jnp.asarray(values), (), needed=False) is None
    assert np.array_equal(global_arrays.take(values, (1,)), values[1])
