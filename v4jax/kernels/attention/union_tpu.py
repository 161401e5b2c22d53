"""The union of the entries that neighbouring queries select.

Successive queries select much the same entries. A group fetches the union of its selections once
and attends to it with one product per block, in which each query masks what only its neighbours
selected. The heads of one query fill a quarter of a 256-wide unit, those of four queries all of it:
the masked part is free. At worst, without a common entry, a group does the work of its queries one
by one.
"""

import jax.numpy as jnp

from v4jax.kernels.attention.sort_tpu import sort_columns

ABSENT = jnp.iinfo(jnp.int32).max  # sorts behind every id


def unite(selected_bgk, members: int, *, interpret: bool):
    """Returns (ids, bits, counts): the sorted union of each group's selections.

    Sorted by (id, member), equal ids are neighbours; the bits of a run, at most `members` long, are
    collected at its first place in log2(members) steps, and a second sort closes the gaps.

    Args:
      selected_bgk: ids of group g, [b, g, members · k]: those of its first member first; −1 for
        none. The ids of one member are distinct.
      members: queries of a group, a power of two.

    Returns:
      ids, bits: int32 [b, g, members · k]. Bit m of an id says that member m selected it. Places
        beyond the count go on with the numbers after the last id, without bits.
      counts: int32 [b, g].
    """
    batch, groups, places = selected_bgk.shape
    shift = members.bit_length() - 1
    selected = selected_bgk.reshape(batch * groups, places).T  # a column for each group
    place = jnp.arange(places, dtype=jnp.int32)[:, None]
    keys = (selected << shift) | (place // (places // members))
    keys = sort_columns(jnp.where(selected >= 0, keys, ABSENT), ABSENT, interpret=interpret)
    ids, bits = keys >> shift, 1 << (keys & (members - 1))
    step = 1
    while step < members:
        bits |= jnp.where(ids == _moved(ids, step), _moved(bits, step), 0)
        step *= 2
    first = (ids != _moved(ids, -1)) & (keys != ABSENT)
    keys = jnp.where(first, (ids << members) | bits, ABSENT)
    keys = sort_columns(keys, ABSENT, interpret=interpret)
    counts = first.sum(0, dtype=jnp.int32)
    ids, bits = keys >> members, keys & ((1 << members) - 1)
    inside = place < counts
    last = jnp.where(inside, ids, -1).max(0)
    ids = jnp.where(inside, ids, last + 1 + place - counts)
    bits = jnp.where(inside, bits, 0)
    shape = (batch, groups, places)
    return ids.T.reshape(shape), bits.T.reshape(shape), counts.reshape(batch, groups)


def _moved(values, step: int):
    """Returns row i + step of each place, and −1 where there is none."""
    if step > 0:
        return jnp.pad(values[step:], [(0, step), (0, 0)], constant_values=-1)
    return jnp.pad(values[:step], [(-step, 0), (0, 0)], constant_values=-1)
