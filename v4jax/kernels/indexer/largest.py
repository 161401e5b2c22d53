"""The positions of a row's largest values, exactly.

`jax.lax.top_k` sorts on one core. Counting is elementwise and uses all cores: bisection finds the
smallest value to choose (the floor), and the positions at or above it are packed together. This
takes many small steps. A few rows are therefore sorted instead, and so is everything on a GPU,
which sorts with all its cores and would wait for the host between the steps.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.dispatch import Target
from v4jax.kernels.indexer.keys import NOTHING, order_keys

COUNTERS = 64  # of a row: each counts a part of it, in a small integer
CELL = 32  # positions that are ranked together
FEW_ROWS = 8  # up to here the steps cost more than sorting


def find_largest(target: Target, values: jax.Array, count: int) -> jax.Array:
    """Returns the positions [r, count] of the largest of values [r, n], in ascending order.

    Ties go to the smaller position; −∞ is never chosen, −1 stands where fewer are left; −0 equals
    +0. NaN is not allowed.
    """
    if values.shape[0] <= FEW_ROWS or target.sorts_in_parallel:
        return sort_largest(values, count)
    return count_largest(values, count)


def sort_largest(values, count: int):
    """`find_largest` by sorting."""
    width = values.shape[1]
    best, positions = jax.lax.top_k(jnp.where(values == 0, 0.0, values), count)  # −0 is less there
    positions = jnp.sort(jnp.where(best > -jnp.inf, positions, width), axis=-1)
    return jnp.where(positions < width, positions, -1)


def count_largest(values, count: int):
    """`find_largest` by counting."""
    return pack_positions(_mark_largest(_pad(values), count), count)


def mark_largest(values: jax.Array, count: int) -> jax.Array:
    """Returns which of values [r, n] `find_largest` finds."""
    return _mark_largest(_pad(values), count)[:, : values.shape[1]]


def _pad(values):
    """Returns the rows, as long as counting wants them."""
    missing = -values.shape[1] % COUNTERS
    return jnp.pad(values, [(0, 0), (0, missing)], constant_values=-jnp.inf)


def _mark_largest(values, count: int):
    keys = order_keys(values.astype(jnp.float32))
    keys = jnp.where(values == -jnp.inf, NOTHING, keys)
    floor = find_floor(keys, count)
    chosen = (keys >= floor[:, None]) & (keys > NOTHING)
    ties = keys == floor[:, None]
    allowed = count - count_true(chosen & ~ties)
    return jax.lax.cond(
        jnp.any(count_true(chosen) > count),
        lambda: (
            chosen & (~ties | (find_position(ties, allowed)[:, None] > jnp.arange(keys.shape[1])))
        ),
        lambda: chosen,
    )


def count_true(mask):
    """Returns how many of each row [r, n] are True."""
    parts = mask.reshape(mask.shape[0], -1, COUNTERS)
    return parts.sum(axis=1, dtype=smallest_integer(parts.shape[1])).sum(axis=1, dtype=jnp.int32)


def smallest_integer(largest: int):
    """Returns the smallest integer type that holds 0 … largest: the more of them in a register."""
    return jnp.int8 if largest < 2**7 else jnp.int16 if largest < 2**15 else jnp.int32


def find_floor(keys, count: int):
    """Returns for each row a key that `count` keys reach, or a few more if the largest such ties.

    Where fewer than `count` keys exist it is NOTHING.
    """
    width = keys.shape[1]
    lowest = jnp.full(keys.shape[:1], NOTHING, jnp.int32)
    if count <= width // 2:
        # Each of `count` groups has one that reaches the smallest of their maxima.
        groups = keys[:, : width - width % count].reshape(keys.shape[0], -1, count)
        lowest = groups.max(axis=1).min(axis=-1)

    def is_open(bounds):
        reached, missed = bounds
        return jnp.any(missed - reached != 1)

    def halve(bounds):
        reached, missed = bounds
        middle = (reached & missed) + ((reached ^ missed) >> 1)  # of a sum that may not fit
        found = count_true(keys >= middle[:, None])
        # A key that exactly `count` reach is as good as the count-th one itself.
        missed = jnp.where(found == count, middle + 1, jnp.where(found < count, middle, missed))
        return jnp.where(found >= count, middle, reached), missed

    # The largest key is at most that of +∞, so one more still is an int32.
    return jax.lax.while_loop(is_open, halve, (lowest, keys.max(axis=1) + 1))[0]


def find_position(mask, count):
    """Returns the position of each row before which the first `count` [r] True ones stand."""
    width = mask.shape[1]
    places = jnp.arange(width)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        enough = count_true(mask & (places < middle[:, None])) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.zeros_like(count), jnp.full_like(count, width)
    return jax.lax.fori_loop(0, width.bit_length(), halve, bounds)[1]


def pack_positions(chosen, count: int):
    """Returns the positions of the True ones [r, count] in order, −1 behind the last."""
    rows, width = chosen.shape
    cells = chosen.reshape(rows, width // CELL, CELL)
    load = cells.sum(axis=-1, dtype=jnp.int8)
    before = sum_before(load)
    slots = jnp.arange(count)
    # The cell of slot s is the last that begins at or before s; one past all is in the last cell.
    begun = before[:, None, :] <= slots[:, None]
    cell = begun.sum(axis=-1, dtype=smallest_integer(width // CELL)).astype(jnp.int32) - 1
    rank = slots - jnp.take_along_axis(before, cell, axis=1)
    inside = jnp.take_along_axis(cells, cell[..., None], axis=1)
    hit = inside & (sum_before(inside) == rank[..., None])
    place = (hit * jnp.arange(CELL, dtype=jnp.int8)).sum(axis=-1, dtype=jnp.int8)
    return jnp.where(hit.any(axis=-1), cell * CELL + place.astype(jnp.int32), -1)


def sum_before(counts):
    """Returns the exclusive running sums of the last axis: a product with a triangle of ones."""
    triangle = jnp.triu(jnp.ones((counts.shape[-1],) * 2, jnp.float32), 1)
    return jnp.dot(counts.astype(jnp.float32), triangle, precision="highest").astype(jnp.int32)
