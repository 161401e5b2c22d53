"""Arrays over the devices of several processes: their values on a host, whole or piece by piece."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BLOCK_BYTES = 64 << 20  # of what `take` brings together at once on every device


def values_of(array) -> np.ndarray:
    """Returns an array's values, of which this process may hold a part only; all have to call."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def take(array, index: tuple[int, ...], needed: bool = True) -> np.ndarray | None:
    """Returns array[index] in host memory, of a parameter that may lie over several processes.

    All processes have to ask for the same. Beside the parameter a device holds some rows of the
    result at a time, and the host the result, where it is needed.

    Args:
      index: of leading axes.
      needed: whether this process wants the values; None is returned if not.
    """
    if not isinstance(array, jax.Array) or _is_here(array):
        return np.asarray(array)[index] if needed else None
    place = np.asarray(index, np.int32)
    if len(array.sharding.device_set) == 1:
        return np.asarray(_pick(array, place)) if needed else None
    assert isinstance(array.sharding, NamedSharding), array.sharding
    shape = array.shape[len(index) :]
    rows = shape[0] if shape else 1
    row_bytes = array.dtype.itemsize * math.prod(shape[1:])
    count = max(1, min(rows, BLOCK_BYTES // max(row_bytes, 1)))
    bring = _build_take(array.sharding, array.shape, len(index), count)
    out = np.empty((rows, *shape[1:]), array.dtype) if needed else None
    for first in range(0, rows, count):
        first = min(first, rows - count)  # the last rows may come twice
        # Waited for where it is not needed, too: no process runs ahead of the others.
        found = jax.block_until_ready(bring(array, place, np.int32(first)))
        if needed:
            out[first : first + count] = np.asarray(found)
    return out.reshape(shape) if needed else None


def _is_here(array: jax.Array) -> bool:
    """Whether the memory of the devices is that of this host."""
    devices = array.sharding.device_set
    return array.is_fully_addressable and all(device.platform == "cpu" for device in devices)


@jax.jit
def _pick(array, place):
    return array[tuple(place)]


@functools.cache
def _build_take(sharding: NamedSharding, shape: tuple[int, ...], leading: int, count: int):
    """Returns (array, index, first) → array[index][first : first + count], whole on every device.

    Each device puts what it holds of that among zeros, unless another one with the same share does.
    The sum over all devices then has every element once; bits are what is summed, so it comes out
    as it was. (One sum over all: groups of processes that meet in several sums at the same time can
    wait for each other, as XLA on CPU does.)
    """
    mesh, spec = sharding.mesh, (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))

    def local(part, index, first):
        dtype = part.dtype
        split = {name for entry in spec for name in _names(entry)}
        held = jnp.bool_(True)
        for name in set(mesh.axis_names) - split:
            held &= jax.lax.axis_index(name) == 0
        for axis in range(leading):
            here, inside = _place_here(index[axis], part.shape[0], spec[axis])
            part = jax.lax.dynamic_index_in_dim(part, here, keepdims=False)
            held &= inside
        if len(shape) > leading:
            here, inside = _place_here(first + jnp.arange(count), part.shape[0], spec[leading])
            part = part[here]
            held = (held & inside).reshape(count, *(1,) * (part.ndim - 1))
        part = jax.lax.bitcast_convert_type(part, f"uint{8 * dtype.itemsize}")
        part = jnp.where(held, part, jnp.zeros_like(part))
        columns = shape[leading + 1 :]
        whole = jnp.zeros((*part.shape[: part.ndim - len(columns)], *columns), part.dtype)
        begin = [0] * (part.ndim - len(columns)) + [
            jax.lax.axis_index(entry) * size if entry else 0
            for entry, size in zip(spec[leading + 1 :], part.shape[1:], strict=True)
        ]
        whole = jax.lax.dynamic_update_slice(whole, part, begin)
        return jax.lax.bitcast_convert_type(jax.lax.psum(whole, mesh.axis_names), dtype)

    shards = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(sharding.spec, P(), P()),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(shards)


def _place_here(place, size: int, entry) -> tuple[jax.Array, jax.Array]:
    """Returns where places of an axis are in this device's share, and whether they are in it."""
    place = place - (jax.lax.axis_index(entry) * size if entry else 0)
    return jnp.clip(place, 0, size - 1), (place >= 0) & (place < size)


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
