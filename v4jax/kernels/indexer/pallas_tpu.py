"""Exact selection on TPU: scores are made block by block and sifted at once; none reaches HBM.

A program holds 128 queries, one per lane, and walks over the blocks of entries they may see. The
eight sublanes of a register are eight streams per query: stream s has the entries ≡ s (mod 8), so
all that follows is elementwise, and a query's sums are sums over its streams.

  score   a block's products with one head at a time on the MXU, then ReLU, weight, sum in float32.
          Scores become int32 keys of the same order (−0 = +0), NOTHING where a query does not see.
  sift    a query's floor is a key that at least `count` earlier entries reach. Only larger keys are
          appended to the candidates: of the rest, `count` earlier ones are at least as good. Where
          few streams of a chunk hold survivors, the first ones of all streams make the first
          appended row, the second ones the next; a chunk with many is copied whole.
  refresh when the candidates have grown by `growth` rows, bisection over the keys finds a new
          floor that `count` to `count`·5/4 candidates reach; ties beyond that are cut by a second
          bisection over the ids. The others are dropped, and each stream closes its gaps in
          log2(rows) steps: a survivor moves up by the bits of the number of gaps before it.
  write   a last refresh with no slack leaves exactly the true best: larger keys, then smaller ids.
          The gaps between streams close the same way, across sublanes.

It is exact because an entry leaves only when `count` others rank before it by (score, smaller id),
and it costs what is seen: every appended row is sifted twice at worst, and the more entries have
passed, the fewer survive.

Source: spec B.9.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import dispatch
from v4jax.kernels.table import EntryTable, visible_entries
from v4jax.quant.entry_format import INDEX_BLOCK
from v4jax.shapes import ceil_div, round_up

QUERIES = 128  # lanes
STREAMS = 8  # sublanes
STEP = 32  # rows that one iteration of a loop over candidates touches
UNROLLED = 8  # the same where one row depends on the one before
NOTHING = -(2**31)  # key of no entry: below the key of every number
LARGEST = 2**31 - 1  # above every key and every id
GAP_SHIFT = 20  # a candidate packs its row of entries below this bit, gaps before it above
MAX_ROWS = 2 ** (31 - GAP_SHIFT)
VMEM_BYTES = 48 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """entries: of one grid step. heads: unrolled together. chunk: rows sifted together, at most 32
    (bits of a mask).

    growth: rows of candidates added before a refresh. dense: survivors of one stream in a chunk
    from which the chunk is copied whole.
    """

    entries: int = 512
    heads: int = 32
    chunk: int = 32
    growth: int = 384
    dense: int = 12

    @property
    def rows(self) -> int:
        """Rows of one block."""
        return self.entries // STREAMS

    def slack(self, count: int) -> int:
        """Candidates beyond `count` that a refresh may leave to a query."""
        return count // 4

    def capacity(self, count: int) -> int:
        """Rows of candidates: one stream may hold all that a refresh leaves."""
        kept = count + self.slack(count)
        return round_up(kept + max(self.growth, self.rows), STEP) + STEP


def supported(queries, keys: EntryTable, count: int, blocks: Blocks = Blocks()) -> str | None:
    """Returns why these kernels cannot run, or None."""
    channels = queries.shape[3]
    if channels % 128:
        return f"index_head_dim must be a multiple of 128 lanes, got {channels}"
    if keys.format.kind not in ("fp4", "bfloat16"):
        return f"index keys must be fp4 or bfloat16, got {keys.format.kind}"
    if queries.dtype != jnp.bfloat16:
        return f"index queries must be bfloat16, got {queries.dtype}"
    if keys.capacity < blocks.entries:
        return f"a block has {blocks.entries} entries, there is room for {keys.capacity}"
    if blocks.capacity(count) >= MAX_ROWS:
        return f"{count} selected entries need {blocks.capacity(count)} rows of candidates"
    if keys.capacity >= STREAMS << GAP_SHIFT:
        return f"{keys.capacity} entries do not fit in {GAP_SHIFT} bits"
    return dispatch.needs_platform("tpu")


def select(
    queries, head_weights, keys, start, end, *, ratio, count, blocks=Blocks(), interpret=False
):
    """See `v4jax.kernels.indexer.select`."""
    batch, tokens, heads, channels = queries.shape
    count_kept = min(count, keys.capacity)
    tiles = ceil_div(tokens, QUERIES)
    positions_bt = start[:, None] + jnp.arange(tiles * QUERIES, dtype=jnp.int32)
    # Padding behind the last token sees nothing, so that it never makes a block needed.
    positions_bt = jnp.where(positions_bt < end[:, None], positions_bt, -1)
    seen_bt = jnp.minimum(visible_entries(positions_bt, ratio), keys.capacity)
    seen = seen_bt.reshape(batch, tiles, QUERIES)
    needed = seen.max(axis=-1)

    padding = [(0, 0), (0, tiles * QUERIES - tokens), (0, 0)]
    queries = jnp.pad(queries, [*padding, (0, 0)])
    if keys.format.kind == "fp4":
        # Bytes hold channels 2p and 2p+1; the kernel unpacks all low halves, then all high halves.
        queries = queries.reshape(*queries.shape[:3], channels // 2, 2).swapaxes(-1, -2)
    queries = queries.reshape(batch, tiles, QUERIES, heads, channels)
    queries = jnp.transpose(queries, (0, 1, 3, 4, 2))
    weights = jnp.pad(head_weights.astype(jnp.float32), padding)
    weights = weights.reshape(batch, tiles, QUERIES, heads).swapaxes(-1, -2)

    steps = jnp.maximum(ceil_div(jnp.max(needed), blocks.entries), 1)
    rows = ceil_div(count_kept, STREAMS)
    capacity = blocks.capacity(count_kept)
    names = sorted(keys.stored)
    # XLA on TPU lays out an array whose rows are narrower than 128 lanes with its entries last.
    # Told so, the kernel reads the stack in place; otherwise all of it would be copied.
    entries_last = keys.format.kind == "fp4"
    stored = [
        keys.stored[name].swapaxes(2, 3) if entries_last else keys.stored[name] for name in names
    ]
    body = functools.partial(_body, names=names, count=count_kept, blocks=blocks)

    def of_tile(*shape):
        return pl.BlockSpec((None, None, *shape), lambda b, t, e, *_: (b, t, *(0,) * len(shape)))

    def of_entries(array):
        def index(b, t, e, layer, needed):
            # Steps past the last needed block name that block again: nothing is fetched for them.
            last = jax.lax.div(jnp.maximum(needed[b, t] - 1, 0), blocks.entries)
            e = jnp.minimum(e, last)
            return (layer[0], b, 0, e) if entries_last else (layer[0], b, e, 0)

        other = array.shape[2] if entries_last else array.shape[3]
        block = (other, blocks.entries) if entries_last else (blocks.entries, other)
        return pl.BlockSpec((None, None, *block), index)

    chosen = pl.pallas_call(
        body,
        name="indexer_select",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,  # layer [1], needed [batch, tiles]
            grid=(batch, tiles, steps),
            in_specs=[
                of_tile(heads, channels, QUERIES),
                of_tile(heads, QUERIES),
                of_tile(1, QUERIES),
                *(of_entries(array) for array in stored),
            ],
            out_specs=of_tile(rows, STREAMS, QUERIES),
            scratch_shapes=[
                pltpu.VMEM((blocks.rows, STREAMS, QUERIES), jnp.int32),  # keys of a block
                pltpu.VMEM((capacity, STREAMS, QUERIES), jnp.int32),  # candidates: keys
                pltpu.VMEM((capacity, STREAMS, QUERIES), jnp.int32),  # candidates: rows of entries
                pltpu.VMEM((STREAMS, QUERIES), jnp.int32),  # floor of each query
                pltpu.SMEM((2,), jnp.int32),  # rows used, rows at which to refresh
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, tiles, rows, STREAMS, QUERIES), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(
        jnp.asarray(keys.layer, jnp.int32).reshape(1),
        needed,
        queries,
        weights,
        seen[:, :, None],
        *stored,
    )
    chosen = chosen.reshape(batch, tiles, rows * STREAMS, QUERIES)[:, :, :count_kept]
    return chosen.swapaxes(-1, -2).reshape(batch, tiles * QUERIES, count_kept)[:, :tokens]


def _body(layer, needed, queries, weights, seen, *refs, names, count, blocks):
    """One block of entries for one tile of queries.

    Prefetch: layer [1], needed [b, tiles]. Input: queries [i, x, q] bf16, weights [i, q] f32, seen
    [1, q] int32, stored keys of the block [entries, x] or, in fp4, [bytes, entries]. Output: chosen
    [⌈count/8⌉, 8, q] int32. Scratch: as listed in `select`.
    """
    *stored, chosen, block_keys, candidates, ids, floor, state = refs
    stored = dict(zip(names, stored, strict=True))
    b, t, step = (pl.program_id(axis) for axis in range(3))
    first = step * blocks.entries
    sieve = Sieve(candidates, ids, floor, state, count, blocks)

    @pl.when((b == 0) & (t == 0) & (step == 0))
    def _():
        sieve.clear(sieve.rows)

    @pl.when(step == 0)
    def _():
        sieve.open()

    sifted = needed[b, t] > count

    @pl.when(sifted & (first < needed[b, t]))
    def _():
        keys = decode_keys(stored)
        scores = score(keys, queries, weights, blocks.heads)
        entry = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        ordered = jnp.where(entry < seen[...], order_keys(scores), NOTHING)
        block_keys[...] = ordered.reshape(block_keys.shape)
        sieve.add(block_keys, step * blocks.rows)

    last = step == pl.num_programs(2) - 1

    @pl.when(sifted & (last | sieve.full))
    def _():
        sieve.refresh(jnp.where(last, 0, blocks.slack(count)))

    @pl.when(sifted & last)
    def _():
        sieve.write(chosen)

    @pl.when(jnp.logical_not(sifted) & last)
    def _():
        entry = _flat_index(chosen.shape)
        chosen[...] = jnp.where(entry < seen[...][None], entry, -1)


def decode_keys(stored):
    """Returns a block's keys [entries, x] in bfloat16, exactly; fp4: even channels, then odd."""
    if "values" in stored:
        return stored["values"][...]
    packed = stored["packed"][...].astype(jnp.int32)
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=0)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    half = mantissa * 0x3F000000  # 0.5 is the only subnormal of e2m1
    bits = jnp.where(exponent == 0, half, ((exponent + 126) << 23) | (mantissa << 22))
    values = jax.lax.bitcast_convert_type(bits | ((codes & 8) << 28), jnp.float32)
    scales = stored["scales"][...].astype(jnp.int32) << 23
    scales = jax.lax.bitcast_convert_type(scales, jnp.float32)
    # Bytes that share a scale: [half of the nibbles · scale, bytes of a scale, entries].
    values = values.reshape(2, scales.shape[0], INDEX_BLOCK // 2, -1) * scales[None, :, None]
    return values.reshape(codes.shape).astype(jnp.bfloat16).T


def score(keys, queries, weights, unrolled):
    """Returns Σ_i weight · ReLU(product) in float32 [entries, q]."""
    heads = queries.shape[0]
    unrolled = unrolled if heads % unrolled == 0 else heads

    def add_heads(group, total):
        for head in range(unrolled):
            index = group * unrolled + head
            products = jnp.dot(keys, queries[index], preferred_element_type=jnp.float32)
            total = total + jnp.maximum(products, 0.0) * weights[pl.ds(index, 1), :]
        return total

    total = jnp.zeros((keys.shape[0], QUERIES), jnp.float32)
    if unrolled == heads:
        return add_heads(0, total)
    return jax.lax.fori_loop(0, heads // unrolled, add_heads, total)


def order_keys(scores):
    """Returns int32 keys in the order of the float32 scores; −0 and +0 are equal."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, NOTHING - bits, bits)


def order_values(keys):
    """Undoes `order_keys`."""
    bits = jnp.where(keys < 0, NOTHING - keys, keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _flat_index(shape):
    """Returns row · 8 + sublane for [rows, 8, lanes]."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row * STREAMS + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _over_streams(combine, x):
    """Returns `combine` over the sublanes of [8, q], on every sublane."""
    for shift in (4, 2, 1):
        x = combine(x, pltpu.roll(x, shift, 0))
    return x


class Sieve:
    """The candidates of 128 queries: keys and ids [rows, 8, q], and what a key must exceed.

    Rows from `used` on hold NOTHING and no gap bits; a row's id is its entry // 8.
    """

    def __init__(self, keys, ids, floor, state, count: int, blocks: Blocks):
        self.keys, self.ids, self.floor, self.state = keys, ids, floor, state
        self.count, self.blocks = count, blocks
        self.shape = (STREAMS, QUERIES)

    @property
    def rows(self) -> int:
        """Rows that fit."""
        return self.keys.shape[0]

    @property
    def used(self):
        """Rows in use."""
        return self.state[0]

    @property
    def full(self):
        """Whether another block may not fit before the next refresh."""
        return self.state[0] + self.blocks.rows > self.state[1]

    def clear(self, rows):
        """Empties the first `rows` rows."""

        def empty(index, _):
            at = pl.ds(index * STEP, STEP)
            self.keys[at] = jnp.full((STEP, *self.shape), NOTHING, jnp.int32)
            self.ids[at] = jnp.zeros((STEP, *self.shape), jnp.int32)
            return 0

        jax.lax.fori_loop(0, _steps(rows), empty, 0)

    def open(self):
        """Starts a tile; the previous one has left no rows."""
        self.floor[...] = jnp.full(self.shape, NOTHING, jnp.int32)
        self.state[0] = 0
        self.state[1] = max(self.blocks.growth, self.blocks.rows)

    def add(self, block_keys, first_row):
        """Appends the keys of a block that exceed the floor; its rows start at `first_row`."""
        size = min(self.blocks.chunk, block_keys.shape[0])
        chunks = []
        for start in range(0, block_keys.shape[0], size):
            mask, survivors = jnp.zeros(self.shape, jnp.int32), jnp.zeros(self.shape, jnp.int32)
            for row in range(size):
                passes = block_keys[start + row] > self.floor[...]
                mask = mask | jnp.where(passes, _bit(row), 0)
                survivors = survivors + passes.astype(jnp.int32)
            chunks.append((start, mask, jnp.max(survivors)))
        for start, mask, most in chunks:
            self._add_chunk(block_keys, start, size, first_row + start, mask, most)

    def _add_chunk(self, block_keys, start, size, first_row, mask, most):
        used = self.used
        dense = most > self.blocks.dense

        @pl.when(dense)
        def _():
            self.keys[pl.ds(used, size)] = block_keys[start : start + size]
            row = jax.lax.broadcasted_iota(jnp.int32, (size, *self.shape), 0)
            self.ids[pl.ds(used, size)] = first_row + row

        def extract(index, mask):
            lowest = mask & -mask
            key = jnp.full(self.shape, NOTHING, jnp.int32)
            row_id = jnp.zeros(self.shape, jnp.int32)
            for row in range(size):
                here = lowest == _bit(row)
                key = jnp.where(here, block_keys[start + row], key)
                row_id = jnp.where(here, row, row_id)
            # An empty mask has the lowest bit 0, which is no row's.
            self.keys[used + index] = key
            self.ids[used + index] = first_row + row_id
            return mask ^ lowest

        taken = jnp.where(dense, 0, most)
        jax.lax.fori_loop(0, taken, extract, mask)
        self.state[0] = used + jnp.where(dense, size, most)

    def refresh(self, slack):
        """Drops what is not among the best `count` + `slack` of each query and raises the floor."""
        wanted = self.count
        highest = self._reduce(lambda keys, ids: keys, jnp.maximum)
        lowest = self._reduce(
            lambda keys, ids: jnp.where(keys > NOTHING, keys, LARGEST), jnp.minimum
        )
        held = self._count(lambda keys, ids: keys > NOTHING)
        searched = held > wanted + slack
        # A query that holds no more keeps all: its bounds meet at once.
        lowest = jnp.where(searched, lowest, highest)

        def unfinished(search):
            low, high, _ = search
            return jnp.max((low < high).astype(jnp.int32)) > 0

        def halve(search):
            low, high, turn = search
            by_value = (turn & 1) == 0
            # Halving values is quick where scores spread evenly, halving keys where they do not;
            # in turns the number of passes is bounded by twice the bits.
            middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
            mean = order_keys(order_values(low) * 0.5 + order_values(high) * 0.5)
            middle = jnp.where(by_value & (mean > low) & (mean <= high), mean, middle)
            reached = self._count(lambda keys, ids: keys >= middle)
            enough = reached >= wanted
            within = enough & (reached <= wanted + slack)
            low_next = jnp.where(enough, middle, low)
            high_next = jnp.where(within, middle, jnp.where(enough, high, middle - 1))
            return low_next, jnp.maximum(high_next, low_next), turn + 1

        floor, _, _ = jax.lax.while_loop(unfinished, halve, (lowest, highest, jnp.int32(0)))
        reached = self._count(lambda keys, ids: keys >= floor)
        above = self._count(lambda keys, ids: keys > floor)

        def halve_ids(search):
            low, high, turn = search
            middle = low + ((high - low) >> 1)
            kept = above + self._count(lambda keys, ids: (keys == floor) & (ids <= middle))
            enough = (kept >= wanted) | (low == high)
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high), turn

        # Where ties at the floor do not crowd out others both bounds are equal at once.
        crowded = searched & (reached > wanted + slack)
        limit = jnp.full(self.shape, LARGEST, jnp.int32)
        search = (jnp.where(crowded, 0, limit), limit, jnp.int32(0))
        last, _, _ = jax.lax.while_loop(unfinished, halve_ids, search)
        self.floor[...] = jnp.where(searched, floor, self.floor[...])
        floor = jnp.where(searched, floor, NOTHING)
        self._compact(lambda keys, ids: (keys > floor) | ((keys == floor) & (ids <= last)))
        self.state[1] = self.used + max(self.blocks.growth, self.blocks.rows)

    def _reduce(self, value, combine):
        """Returns `combine` of value(keys, entry ids) over each query's rows and streams."""
        stream = jax.lax.broadcasted_iota(jnp.int32, (STEP, *self.shape), 1)

        def read(index):
            at = pl.ds(index * STEP, STEP)
            found = value(self.keys[at], self.ids[at] * STREAMS + stream)
            half = STEP // 2
            while half:
                found = combine(found[:half], found[half:])
                half //= 2
            return found[0]

        # Rows past the end hold NOTHING, so that reading the first ones is always right.
        total = jax.lax.fori_loop(
            1, _steps(self.used), lambda index, total: combine(total, read(index)), read(0)
        )
        return _over_streams(combine, total)

    def _count(self, condition):
        """Returns how many candidates of each query fulfil it, on every sublane."""
        return self._reduce(lambda keys, ids: condition(keys, ids).astype(jnp.int32), jnp.add)

    def _compact(self, keep):
        """Keeps what fulfils `keep`; every stream closes its gaps."""
        used = self.used
        stream = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)

        def mark(index, gaps):
            for row in range(UNROLLED):
                at = index * UNROLLED + row
                keys, ids = self.keys[at], self.ids[at]
                kept = keep(keys, ids * STREAMS + stream) & (keys > NOTHING)
                self.keys[at] = jnp.where(kept, keys, NOTHING)
                self.ids[at] = jnp.where(kept, ids | (gaps << GAP_SHIFT), 0)
                gaps = gaps + jnp.where(kept, 0, 1)
            return gaps

        steps = _steps(used)
        gaps = jax.lax.fori_loop(
            0, steps * (STEP // UNROLLED), mark, jnp.zeros(self.shape, jnp.int32)
        )

        def close(distance):
            flag = distance << GAP_SHIFT

            def move(index, _):
                # Past the end there is nothing: the last rows always stay empty.
                here = index * UNROLLED
                there = jnp.minimum(here + distance, self.rows - UNROLLED)
                here, there = pl.ds(here, UNROLLED), pl.ds(there, UNROLLED)
                ids, moving = self.ids[here], self.ids[there]
                keys, moving_keys = self.keys[here], self.keys[there]
                arrives, leaves = (moving & flag) != 0, (ids & flag) != 0
                self.keys[here] = jnp.where(arrives, moving_keys, jnp.where(leaves, NOTHING, keys))
                self.ids[here] = jnp.where(arrives, moving & ~flag, jnp.where(leaves, 0, ids))
                return 0

            jax.lax.fori_loop(0, steps * (STEP // UNROLLED), move, 0)
            return distance * 2

        jax.lax.while_loop(lambda distance: distance < used, close, jnp.int32(1))
        self.state[0] = jnp.max(steps * STEP - gaps)

    def write(self, chosen):
        """Writes the ids of all candidates, −1 in the places left; empties itself."""
        rows = self.used
        stream = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)

        def mark(index, gaps):
            for row in range(UNROLLED):
                at = index * UNROLLED + row
                empty = (self.keys[at] == NOTHING).astype(jnp.int32)
                before = empty
                for shift in (1, 2, 4):
                    moved = pltpu.roll(before, shift, 0)
                    before = before + jnp.where(stream >= shift, moved, 0)
                # The gaps take the keys' place: the order has done its work.
                self.keys[at] = jnp.where(empty == 1, NOTHING, gaps + before)
                self.ids[at] = self.ids[at] * STREAMS + stream
                gaps = gaps + _over_streams(jnp.add, empty)
            return gaps

        steps = _steps(rows)
        rounds = steps * (STEP // UNROLLED)
        jax.lax.fori_loop(0, rounds, mark, jnp.zeros(self.shape, jnp.int32))

        def close(distance, ahead):
            def move(at, _):
                gaps, ids = self.keys[at], self.ids[at]
                moving, moving_ids = ahead(self.keys, at), ahead(self.ids, at)
                arrives = (moving >= 0) & ((moving & distance) != 0)
                leaves = (gaps >= 0) & ((gaps & distance) != 0)
                self.keys[at] = jnp.where(arrives, moving, jnp.where(leaves, NOTHING, gaps))
                self.ids[at] = jnp.where(arrives, moving_ids, ids)
                return 0

            jax.lax.fori_loop(0, rows, move, 0)

        for shift in (1, 2, 4):
            same_row = stream + shift < STREAMS

            def next_streams(array, at, shift=shift, same_row=same_row):
                here, following = (
                    pltpu.roll(array[row], STREAMS - shift, 0) for row in (at, at + 1)
                )
                return jnp.where(same_row, here, following)

            close(shift, next_streams)

        def close_rows(distance):
            # Past the end there is nothing: the last row always stays empty.
            close(
                distance * STREAMS,
                lambda array, at: array[jnp.minimum(at + distance, self.rows - 1)],
            )
            return distance * 2

        jax.lax.while_loop(lambda distance: distance < rows, close_rows, jnp.int32(1))
        size = chosen.shape[0]
        chosen[...] = jnp.where(self.keys[:size] >= 0, self.ids[:size], -1)
        self.clear(jnp.maximum(rows, size))


def _steps(rows):
    """Returns ⌈rows / STEP⌉."""
    return (rows + (STEP - 1)) >> (STEP.bit_length() - 1)


def _bit(index: int) -> int:
    """Returns 1 << index as a signed 32-bit integer."""
    return int(np.array(1 << index, np.uint32).astype(np.int32))
