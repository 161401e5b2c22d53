"""What neighbouring queries gather together: the union of their ids.

Successive queries select much the same entries. A group of them fetches the union of their
selections once and attends to it with one product per block, in which each query masks what only
its neighbours selected. A product with the heads of one query fills a quarter of a 256-wide unit,
one with the heads of four or more fills it, so the masked part is free: at worst, without a common
entry, a group does the work of its queries one by one.
"""

import jax
import jax.numpy as jnp

NOTHING = jnp.iinfo(jnp.int32).max


def unite(selected_bgk, members: int):
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
    shift = members.bit_length() - 1
    places = selected_bgk.shape[-1]
    member = jnp.arange(places, dtype=jnp.int32) // (places // members)
    keys = jnp.where(selected_bgk >= 0, (selected_bgk << shift) | member, NOTHING)
    keys = jax.lax.sort(keys, is_stable=False)
    ids, bits = keys >> shift, 1 << (keys & (members - 1))
    step = 1
    while step < members:
        same = ids == _moved(ids, step)
        bits |= jnp.where(same, _moved(bits, step), 0)
        step *= 2
    first = (ids != _moved(ids, -1)) & (keys != NOTHING)
    keys = jax.lax.sort(jnp.where(first, (ids << members) | bits, NOTHING), is_stable=False)
    counts = first.sum(-1, dtype=jnp.int32)
    ids, bits = keys >> members, keys & ((1 << members) - 1)
    place = jnp.arange(places, dtype=jnp.int32)
    last = jnp.where(place < counts[..., None], ids, -1).max(-1, keepdims=True)
    inside = place < counts[..., None]
    beyond = last + 1 + place - counts[..., None]
    return jnp.where(inside, ids, beyond), jnp.where(inside, bits, 0), counts


def _moved(values, step: int):
    """Returns values[…, i + step], and −1 where there is none."""
    if step > 0:
        return jnp.pad(
            values[..., step:], [(0, 0)] * (values.ndim - 1) + [(0, step)], constant_values=-1
        )
    return jnp.pad(
        values[..., :step], [(0, 0)] * (values.ndim - 1) + [(-step, 0)], constant_values=-1
    )
