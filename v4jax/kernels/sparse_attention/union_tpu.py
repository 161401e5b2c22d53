"""What neighbouring queries gather together: a union of ids, and rows that can be fetched alone.

Successive queries select much the same entries. A group of them fetches the union of their
selections once and attends to it with one product per block, in which each query masks what only
its neighbours selected. A product with the heads of one query fills a quarter of a 256-wide unit,
one with the heads of four or more fills it, so the masked part is free: at worst, without a common
entry, a group does the work of its queries one by one.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from v4jax.kernels import dispatch
from v4jax.kernels.table import EntryTable
from v4jax.shapes import ceil_div, round_up

LANES = 128
# Channels of a row of 32-bit words.
WORD_CHANNELS = 2 * LANES
# Entries rewritten by one step.
PACKED_ENTRIES = 4096
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


def pack_rows(entries: EntryTable, needed, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Returns (words, known): the first `needed` entries as rows that a kernel can fetch alone.

    A table stores its entries along tiles, of which no single row can be copied. So the entries
    that exist are decoded, once for all that gather them, to words [b, w, planes, 128] of two
    bfloat16, channels 256i + j and 256i + 128 + j. The rest of `words` is never written: the cost
    is that of the entries in use, not of the capacity.

    Args:
      needed: number of entries, int32; at least one step of them is written.
      multiple: the rows of `words` are one of it.

    Returns:
      words: int32 [b, ≥ capacity, planes, 128].
      known: how many of its rows are written.
    """
    size = min(PACKED_ENTRIES, entries.capacity)
    batch = next(iter(entries.stored.values())).shape[1]
    planes, rows = entries.format.channels // WORD_CHANNELS, round_up(entries.capacity, multiple)
    words = _in_rows(jax.lax.empty((batch, rows, planes, LANES), jnp.int32))
    steps = jnp.maximum(ceil_div(needed, size), 1)

    def pack(step, words):
        # The last step of a capacity that `size` does not divide writes some rows twice.
        first = jnp.minimum(step * size, entries.capacity - size)
        decoded = _in_rows(entries.block(first, size))
        decoded = jax.lax.bitcast_convert_type(decoded, jnp.uint16)
        halves = decoded.astype(jnp.uint32).reshape(batch, size, -1, 2, LANES)
        rows = halves[..., 0, :] | (halves[..., 1, :] << 16)
        rows = _in_rows(jax.lax.bitcast_convert_type(rows, jnp.int32))
        return _in_rows(jax.lax.dynamic_update_slice(words, rows, (0, first, 0, 0)))

    words = jax.lax.fori_loop(0, steps, pack, words)
    return words, jnp.minimum(steps * size, entries.capacity)


def _in_rows(array):
    """Keeps entries together: XLA would turn the whole table to suit how it decodes a block."""
    if dispatch.platform() != "tpu":
        return array
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))
