"""The kernel of a prefill: groups of queries attend to the union of their selections.

A tile is several groups. Their blocks of gathered entries form one queue, group after group. While
one block is computed, `DEPTH` others are being copied. Each row is a copy of its own, unless the
ids of a block are consecutive (as when every visible entry is selected): then the block is one.
Softmax runs in base 2 and starts with the sink, a key of value zero.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.attention import rows_tpu
from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.attention.dense_tpu import along_lanes, columns_to_rows, fold_lanes
from v4jax.kernels.attention.tiles_tpu import (
    LOG2_E,
    dot,
    tile_begin,
    unit_begins,
)
from v4jax.kernels.attention.union_tpu import unite
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import DOCUMENT_UNIT
from v4jax.kernels.tpu import LANES, PACKED_ROWS, VMEM_BYTES
from v4jax.shapes import ceil_div, round_up

# Rows of one product: tokens × heads.
GROUP_ROWS = 256
LARGEST_GROUP = 8  # queries; ids and a bit of each share 31 bits
TILE_GROUPS = 8
# Entries of one block, and blocks under way.
BLOCK, DEPTH = 256, 4
# Rows requested by one pass of the loop that starts a block.
UNROLLED_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call. Row r of a group is token r // heads, head r % heads."""

    members: int  # tokens of a group
    groups: int  # of a tile
    tiles: int  # of a sequence
    heads: int
    channels: int
    window: int
    places: int  # ids of a group
    units: int = 0  # of `DOCUMENT_UNIT` tokens, in rows that hold several documents

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return self.members * self.heads

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.members * self.groups

    @property
    def recent_rows(self) -> int:
        """Raw key-values that a group reads; those that none of its queries see are masked."""
        return self.window + PACKED_ROWS


def make_plan(shape, window: int, count: int, *, packed: bool = False) -> Plan:
    """Returns how the tokens of queries of that shape are grouped; each selects `count` entries.

    packed: whether a row holds several documents.
    """
    _, tokens, heads, channels = shape
    members = min(LARGEST_GROUP, GROUP_ROWS // heads)
    groups = min(TILE_GROUPS, ceil_div(tokens, members))
    tiles = ceil_div(tokens, members * groups)
    places = round_up(members * count, BLOCK)
    # Members and groups are powers of two unless there is one tile: it belongs to one document.
    units = ceil_div(tokens, DOCUMENT_UNIT) if packed else 0
    return Plan(members, groups, tiles, heads, channels, window, places, units)


def attend(call: Call, inputs: Inputs):
    """Returns (attended [b, t, h, c], log_mass [b, t, h])."""
    queries, recent, sink, start, _, begin, selected, *_ = inputs
    entries, window, interpret = inputs.entries(call), call.window, call.target.interpret
    batch, tokens, heads, channels = queries.shape
    count = selected.shape[-1]
    plan = make_plan(queries.shape, window, count, packed=begin is not None)
    begins = unit_begins(begin)
    padding = plan.tiles * plan.tokens - tokens
    queries = jnp.pad(queries, [(0, 0), (0, padding), (0, 0), (0, 0)])
    recent = jnp.pad(recent, [(0, 0), (0, padding + PACKED_ROWS), (0, 0)])
    selected = jnp.pad(selected, [(0, 0), (0, padding), (0, 0)], constant_values=-1)
    selected = jnp.minimum(selected, entries.capacity - 1)
    words, known = rows_tpu.pack(entries, selected.max() + 1, interpret=interpret)
    groups = plan.tiles * plan.groups
    united = selected.reshape(batch, groups, plan.members * count)
    ids, bits, counts = unite(united, plan.members, interpret=interpret)
    lengthened = [(0, 0), (0, 0), (0, plan.places - plan.members * count)]
    ids, bits = (jnp.pad(x, lengthened) for x in (jnp.clip(ids, 0, known - 1), bits))
    blocks = jnp.maximum(ceil_div(counts, BLOCK), 1)
    rows = plan.tiles * plan.groups * plan.rows

    def place(b, tile, *_):
        return (b, tile, 0)

    run = pl.pallas_call(
        functools.partial(_body, plan, interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(begins),
            grid=(batch, plan.tiles),
            in_specs=[
                pl.BlockSpec((1, plan.groups * plan.rows, channels), place),
                pl.BlockSpec(
                    tuple(map(pl.Element, (1, plan.tokens + window + PACKED_ROWS, channels))),
                    # A single tile may have fewer tokens than a register has rows.
                    lambda b, tile, *_: (b, tile * plan.tokens if plan.tiles > 1 else 0, 0),
                ),
                pl.BlockSpec((plan.rows, LANES), lambda *_: (0, 0)),
                pl.BlockSpec((1, plan.groups, 1, plan.places), lambda b, i, *_: (b, i, 0, 0)),
                pl.BlockSpec(
                    (1, 1, plan.groups * plan.places),
                    lambda b, i, *_: (b * plan.tiles + i, 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((1, plan.groups * plan.rows, channels), place),
                pl.BlockSpec((1, plan.groups * plan.rows // LANES, LANES), place),
            ],
            scratch_shapes=[
                pltpu.VMEM((DEPTH, BLOCK, channels // rows_tpu.WORD_CHANNELS, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((DEPTH,)),
                pltpu.VMEM((plan.rows, LANES), jnp.float32),
                pltpu.VMEM((plan.rows, LANES), jnp.float32),
                pltpu.VMEM((plan.rows, channels), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, channels), queries.dtype),
            jax.ShapeDtypeStruct((batch, rows // LANES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # they double the cost of starting a copy
        ),
        interpret=interpret,
        name="sparse_attention",
    )
    sink = jnp.tile(sink.astype(jnp.float32), plan.members)[:, None]
    attended, log_mass = run(
        start.astype(jnp.int32),
        blocks,
        *begins,
        queries.reshape(batch, rows, channels),
        recent,
        jnp.broadcast_to(sink, (plan.rows, LANES)),
        bits[:, :, None],
        ids.reshape(batch * plan.tiles, 1, -1),
        words,
    )
    attended = attended.reshape(batch, -1, heads, channels)[:, :tokens]
    return attended, log_mass.reshape(batch, -1, heads)[:, :tokens]


def _body(plan, interpret, start_ref, blocks_ref, *rest):
    """One tile of queries of one sequence.

    prefetch: start [b], blocks [b, groups of a sequence]; with documents their begins [b · units].
    input: queries [1, rows, c], recent [1, window + tokens + 16, c], sink [rows of a group, 128]
    (a column, repeated), bits [1, groups, 1, places], ids [1, 1, groups · places] in SMEM, words
    [b, w, planes, 128] in HBM. output: attended [1, rows, c], log_mass [1, rows / 128, 128].
    scratch: blocks [depth, block, planes, 128] and their semaphores, maximum and mass [rows of a
    group, 128] (the maximum repeated along lanes, the mass to be summed over them), weighted sum
    [rows of a group, c].
    """
    begin_ref, *rest = rest if plan.units else (None, *rest)
    queries_ref, recent_ref, sink_ref, bits_ref, *rest = rest
    ids_ref, words_ref, attended_ref, log_mass_ref, buffer_ref, semaphores, *state = rest
    sequence, tile = pl.program_id(0), pl.program_id(1)
    first_token = start_ref[sequence] + tile * plan.tokens
    begin = tile_begin(plan, begin_ref, sequence, tile)

    def blocks_of(group):
        return blocks_ref[sequence, tile * plan.groups + group]

    def advance(cursor):
        number, group, block = cursor
        last = block + 1 >= blocks_of(jnp.minimum(group, plan.groups - 1))
        return number + 1, jnp.where(last, group + 1, group), jnp.where(last, 0, block + 1)

    def copies(cursor):
        """Returns the copies of the next block of the queue."""
        number, group, block = cursor
        place = jnp.minimum(group, plan.groups - 1) * plan.places + block * BLOCK
        slot = number & (DEPTH - 1)
        return _Copies(sequence, place, slot, ids_ref, words_ref, buffer_ref, semaphores)

    cursor = (jnp.int32(0), jnp.int32(0), jnp.int32(0))
    for _ in range(DEPTH - 1):
        pl.when(cursor[1] < plan.groups)(copies(cursor).start)
        cursor = advance(cursor)

    def attend_group(group, carry):
        number, cursor = carry
        rows = pl.ds(pl.multiple_of(group * plan.rows, LANES), plan.rows)
        queries_at = queries_ref.at[0, rows]
        _begin(sink_ref, state)
        if plan.window:
            _attend_window(plan, queries_at, recent_ref, first_token, begin, group, state)

        def attend_block(block, carry):
            number, cursor = carry
            slot = number & (DEPTH - 1)
            # One wait for as many bytes as the rows have together.
            whole = words_ref.at[sequence, pl.ds(0, BLOCK)]
            pltpu.make_async_copy(whole, buffer_ref.at[slot], semaphores.at[slot]).wait()
            bits = bits_ref[0, group, :, pl.ds(pl.multiple_of(block * BLOCK, LANES), BLOCK)]

            def attend_and(start):
                keys = _unpack(buffer_ref.at[slot])
                start()
                _attend_keys(
                    plan, queries_at, keys, lambda member: (bits >> member) & 1 == 1, state
                )

            following = copies(cursor)
            exists = cursor[1] < plan.groups
            one_by_one = exists & jnp.logical_not(following.consecutive)

            @pl.when(one_by_one)
            def _():
                # Nothing schedules an interpreted kernel.
                rows = following.start_rows_in_a_loop if interpret else following.start_rows
                attend_and(rows)

            @pl.when(jnp.logical_not(one_by_one))
            def _():
                pl.when(exists)(following.start_whole)
                attend_and(lambda: None)

            return number + 1, advance(cursor)

        carry = jax.lax.fori_loop(0, blocks_of(group), attend_block, (number, cursor))
        maximum_ref, mass_ref, sum_ref = state
        mass = mass_ref[...].sum(-1, keepdims=True)
        attended_ref[0, rows, :] = (sum_ref[...] / mass).astype(attended_ref.dtype)
        log_mass = (maximum_ref[...] + jnp.log2(mass)) / LOG2_E
        lines = pl.ds(group * (plan.rows // LANES), plan.rows // LANES)
        log_mass_ref[0, lines, :] = columns_to_rows(log_mass)
        return carry

    jax.lax.fori_loop(0, plan.groups, attend_group, (jnp.int32(0), cursor))


class _Copies:
    """The copies of the entries of ids place … place + BLOCK − 1 to a slot of the buffer."""

    def __init__(self, sequence, place, slot, ids_ref, words_ref, buffer_ref, semaphores):
        self.sequence, self.place, self.ids_ref, self.words_ref = (
            sequence,
            place,
            ids_ref,
            words_ref,
        )
        self.target_ref, self.semaphore = buffer_ref.at[slot], semaphores.at[slot]
        self.first = ids_ref[0, 0, place]
        self.consecutive = ids_ref[0, 0, place + BLOCK - 1] - self.first == BLOCK - 1

    def start(self):
        """Starts them one way or the other."""
        pl.when(self.consecutive)(self.start_whole)
        pl.when(jnp.logical_not(self.consecutive))(self.start_rows_in_a_loop)

    def start_whole(self):
        """Starts them as one copy: the ids are consecutive."""
        source = self.words_ref.at[self.sequence, pl.ds(self.first, BLOCK)]
        pltpu.make_async_copy(source, self.target_ref, self.semaphore).start()

    def start_rows(self):
        """Starts a copy for each, in straight code that the scheduler puts beside the products."""
        for row in range(BLOCK):
            self._start_row(row)

    def start_rows_in_a_loop(self):
        """Starts a copy for each."""

        @pl.loop(0, BLOCK // UNROLLED_ROWS)
        def _(index):
            for offset in range(UNROLLED_ROWS):
                self._start_row(index * UNROLLED_ROWS + offset)

    def _start_row(self, row):
        source = self.words_ref.at[self.sequence, self.ids_ref[0, 0, self.place + row]]
        pltpu.make_async_copy(source, self.target_ref.at[row], self.semaphore).start()


def _unpack(words_ref):
    """Returns bfloat16 [k, c] of words [k, planes, 128]."""
    count, planes, _ = words_ref.shape
    flat = words_ref.reshape(count * planes, LANES)
    pieces = []
    for plane in range(planes):
        words = flat[pl.ds(plane, count, stride=planes), :]
        for half in (words << 16, words & jnp.int32(-0x10000)):
            value = jax.lax.bitcast_convert_type(half, jnp.float32)
            pieces.append(value.astype(jnp.bfloat16))
    return jnp.concatenate(pieces, axis=1)


def _begin(sink_ref, state):
    maximum_ref, mass_ref, sum_ref = state
    maximum_ref[...] = jnp.maximum(sink_ref[...] * LOG2_E, MASKED)
    lane = jax.lax.broadcasted_iota(jnp.int32, mass_ref.shape, 1)
    mass_ref[...] = jnp.where(lane == 0, 1.0, 0.0)
    sum_ref[...] = jnp.zeros_like(sum_ref)


def _attend_window(plan, queries_ref, recent_ref, first_token, begin, group, state):
    """Adds the raw rows around a group: row s is `window` before the first token, plus s."""
    token = group * plan.members
    # Whole registers: up to 12 rows before those that the group sees.
    offset = pl.multiple_of(token & -PACKED_ROWS, PACKED_ROWS)
    recent = recent_ref[0, pl.ds(offset, plan.recent_rows), :]
    shape = (1, plan.recent_rows)
    key = first_token + offset - plan.window + jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def seen(member):
        distance = first_token + token + member - key
        return (distance >= 0) & (distance < plan.window) & (key >= begin)

    _attend_keys(plan, queries_ref, recent, seen, state)


def _attend_keys(plan, queries_ref, keys, seen, state):
    """Adds keys [s, c] to the softmax of a group; seen(member) is the mask [1, s] of a token."""
    maximum_ref, mass_ref, sum_ref = state
    scale = jnp.float32(plan.channels**-0.5 * LOG2_E)
    scores = dot(queries_ref[...], keys, transpose=True)
    parts = []
    for member in range(plan.members):
        part = scores[member * plan.heads : (member + 1) * plan.heads] * scale
        parts.append(part + jnp.where(seen(member), 0.0, MASKED))
    scores = jnp.concatenate(parts, axis=0)
    old = maximum_ref[...]
    new = jnp.maximum(old, scores.max(-1, keepdims=True))
    fade = jnp.exp2(old - new)
    weights = jnp.exp2(scores - along_lanes(new, scores.shape[1]))
    maximum_ref[...] = new
    mass_ref[...] = mass_ref[...] * fade + fold_lanes(weights)
    more = dot(weights.astype(keys.dtype), keys)
    sum_ref[...] = sum_ref[...] * along_lanes(fade, plan.channels) + more
