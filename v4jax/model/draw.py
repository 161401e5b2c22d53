"""Random weights that are the same everywhere: on any mesh and platform, traced or not.

An element is a function of the key, its row and its column, in integers up to one last product.
Each device can therefore make its own share, NumPy and XLA give the same bits, and a run that goes
on elsewhere has the weights it began with although no checkpoint holds them.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

BINS = 4096  # of equal probability; between their borders values are uniform
ONE = 1 << 18  # 1.0 in fixed point: the widest bin times a fraction of 12 bits fits into an int32
LARGEST = 4.0  # the outermost border, in deviations; with it the deviation is 1.000
BLOCK = 1 << 15  # elements that NumPy makes at once, because they stay in a core's cache


def draw_normal(key: jax.Array, shape: tuple[int, ...], deviation: float):
    """Returns normal values in float32: a NumPy array, or a traced one where the key is traced.

    JAX would compile a program for each shape, 80 of them for the smallest model.
    """
    *lead, columns = shape
    rows, scale = math.prod(lead), np.float32(deviation / ONE)
    words = jax.random.key_data(key)
    if isinstance(key, jax.core.Tracer):
        numbers = jnp.arange(rows, dtype=jnp.uint32).reshape(*lead, 1)
        return _draw_rows(jnp, words, numbers, columns) * scale
    words, values = np.asarray(words), np.empty((rows, columns), np.float32)
    step = max(1, BLOCK // columns)
    with np.errstate(over="ignore"):  # integers wrap around
        for first in range(0, rows, step):
            numbers = np.arange(first, min(first + step, rows), dtype=np.uint32)[:, None]
            values[first : first + step] = _draw_rows(np, words, numbers, columns)
    values *= scale
    return values.reshape(shape)


def _draw_rows(xp, words, rows, columns: int):
    """Returns normal values of deviation `ONE`, [*rows, columns], by NumPy or JAX (`xp`)."""
    first, second = mix(words + np.uint32(0x9E3779B9))
    row = mix(rows + first)
    word = mix(mix(xp.arange(columns, dtype=np.uint32) + row) ^ mix(row ^ second))
    place, part = (word >> 20).astype(np.int32), (word >> 8 & 0xFFF).astype(np.int32)
    borders = xp.asarray(_borders())
    low, high = borders[place], borders[place + 1]
    return (low + ((high - low) * part >> 12)).astype(np.float32)


def mix(x):
    """Returns well-mixed bits of uint32 (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@functools.cache
def _borders() -> np.ndarray:
    """Returns the borders of the bins in fixed point."""
    quantile = statistics.NormalDist().inv_cdf
    inner = [quantile(i / BINS) for i in range(1, BINS)]
    return np.round(np.array([-LARGEST, *inner, LARGEST]) * ONE).astype(np.int32)
