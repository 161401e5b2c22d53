"""The candidates of a selection on TPU, sifted while the scores are made: see `pallas_tpu`.

Candidates are rows of 8 × 128 int32 keys, each with the row of entries that it comes from. Every
place of a row is a stream of its own: entries ≡ place modulo the number of streams, in order. Many
queries: one lane each, whose 8 sublanes are its streams. One query: all 1,024 places are its.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.indexer.keys import NOTHING, order_keys, order_values
from v4jax.kernels.tpu import LANES, SUBLANES

STEP = 32  # rows that one iteration of a loop over candidates touches
UNROLLED = 8  # the same where one row depends on the one before
LARGEST = 2**31 - 1  # above every key and every id
GAP_SHIFT = 20  # a candidate packs its row of entries below this bit, gaps before it above
MAX_ROWS = 2 ** (31 - GAP_SHIFT)


def stream_index(shape, wide: bool):
    """Returns the stream of every place of [..., 8, 128]: its sublane, or its place if `wide`."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    if not wide:
        return sublane
    return sublane * LANES + jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


class Sieve:
    """The candidates: keys and ids [rows, 8, 128], and the floor [8, 128] a key must exceed.

    Rows from `used` on hold NOTHING and no gap bits; a row's id is its entry // streams. `state`
    has the rows used and the rows at which to refresh. `wide`: one query has all the places.
    """

    def __init__(self, keys, ids, floor, state, count: int, blocks, wide: bool):
        self.keys, self.ids, self.floor, self.state = keys, ids, floor, state
        self.count, self.blocks, self.wide = count, blocks, wide
        self.shape = (SUBLANES, LANES)
        self.streams = SUBLANES * LANES if wide else SUBLANES
        self.block_rows = blocks.entries // self.streams

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
        return self.state[0] + self.block_rows > self.state[1]

    def open(self):
        """Starts a program: empties all rows, whatever the one before has left."""
        self._clear()
        self.floor[...] = jnp.full(self.shape, NOTHING, jnp.int32)
        self.state[0] = 0
        self.state[1] = max(self.blocks.growth, self.block_rows)

    def _clear(self):
        def empty(index, _):
            at = pl.ds(index * STEP, STEP)
            self.keys[at] = jnp.full((STEP, *self.shape), NOTHING, jnp.int32)
            self.ids[at] = jnp.zeros((STEP, *self.shape), jnp.int32)
            return 0

        jax.lax.fori_loop(0, self.rows // STEP, empty, 0)

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
        self.state[1] = self.used + max(self.blocks.growth, self.block_rows)

    def _reduce(self, value, combine):
        """Returns `combine` of value(keys, entry ids) over each query's rows and streams."""
        stream = stream_index((STEP, *self.shape), self.wide)

        def read(index):
            at = pl.ds(index * STEP, STEP)
            found = value(self.keys[at], self.ids[at] * self.streams + stream)
            half = STEP // 2
            while half:
                found = combine(found[:half], found[half:])
                half //= 2
            return found[0]

        # Rows past the end hold NOTHING, so that reading the first ones is always right.
        total = jax.lax.fori_loop(
            1, _steps(self.used), lambda index, total: combine(total, read(index)), read(0)
        )
        return self._over_streams(combine, total)

    def _count(self, condition):
        """Returns how many candidates of each query fulfil it, on every sublane."""
        return self._reduce(lambda keys, ids: condition(keys, ids).astype(jnp.int32), jnp.add)

    def _compact(self, keep):
        """Keeps what fulfils `keep`; every stream closes its gaps."""
        used = self.used
        stream = stream_index(self.shape, self.wide)

        def mark(index, gaps):
            for row in range(UNROLLED):
                at = index * UNROLLED + row
                keys, ids = self.keys[at], self.ids[at]
                kept = keep(keys, ids * self.streams + stream) & (keys > NOTHING)
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

    def _over_streams(self, combine, x):
        """Returns `combine` over the streams of each query in [8, 128], at every one of them."""
        if self.wide:
            x = _over_lanes(combine, x)
        for shift in (4, 2, 1):
            x = combine(x, pltpu.roll(x, shift, 0))
        return x

    def _running_sum(self, x):
        """Returns the sum of [8, 128] over the streams up to each one."""
        sublane = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)
        earlier = jnp.zeros(self.shape, jnp.int32)
        if self.wide:
            lane = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
            total = _over_lanes(jnp.add, x)
            for bit in range(LANES.bit_length() - 1):
                x = x + jnp.where(lane >= 1 << bit, pltpu.roll(x, 1 << bit, 1), 0)
            earlier, x = x - total, total
        for shift in (1, 2, 4):
            x = x + jnp.where(sublane >= shift, pltpu.roll(x, shift, 0), 0)
        return earlier + x

    def write(self, chosen, scores=None, order=None):
        """Writes the ids of all candidates, −1 in the places left; the sieve is used up.

        Args:
          scores: where their scores go, in the same places; −∞ in those left.
          order: room for as many keys as there are candidates; goes with `scores`.
        """
        rows = self.used
        stream = stream_index(self.shape, self.wide)

        def mark(at, gaps):
            keys = self.keys[at]
            if order is not None:
                order[at] = keys
            empty = (keys == NOTHING).astype(jnp.int32)
            # The gaps take the keys' place: the order has done its work.
            before = gaps + self._running_sum(empty)
            self.keys[at] = jnp.where(empty == 1, NOTHING, before)
            self.ids[at] = self.ids[at] * self.streams + stream
            return gaps + self._over_streams(jnp.add, empty)

        jax.lax.fori_loop(0, rows, mark, jnp.zeros(self.shape, jnp.int32))
        carried = [self.ids] if order is None else [self.ids, order]

        def close(distance, ahead):
            def move(at, _):
                gaps, moving = self.keys[at], ahead(self.keys, at)
                arrives = (moving >= 0) & ((moving & distance) != 0)
                leaves = (gaps >= 0) & ((gaps & distance) != 0)
                self.keys[at] = jnp.where(arrives, moving, jnp.where(leaves, NOTHING, gaps))
                for array in carried:
                    array[at] = jnp.where(arrives, ahead(array, at), array[at])
                return 0

            jax.lax.fori_loop(0, rows, move, 0)

        for bit in range(self.streams.bit_length() - 1):
            close(1 << bit, lambda array, at, shift=1 << bit: self._ahead(array, at, shift))

        def close_rows(distance):
            # Past the end there is nothing: the last row always stays empty.
            close(
                distance * self.streams,
                lambda array, at: array[jnp.minimum(at + distance, self.rows - 1)],
            )
            return distance * 2

        jax.lax.while_loop(lambda distance: distance < rows, close_rows, jnp.int32(1))
        size = chosen.shape[0]
        found = self.keys[:size] >= 0
        chosen[...] = jnp.where(found, self.ids[:size], -1)
        if scores is not None:
            scores[...] = jnp.where(found, order_values(order[:size]), -jnp.inf)

    def _ahead(self, array, at, shift: int):
        """Returns row `at` of what stands `shift` streams further on, a power of two."""
        here, following = array[at], array[at + 1]
        sublane = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)
        if not self.wide or shift >= LANES:
            shift = shift // LANES if self.wide else shift
            here, following = (pltpu.roll(x, SUBLANES - shift, 0) for x in (here, following))
            return jnp.where(sublane + shift < SUBLANES, here, following)
        lane = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        here, following = (pltpu.roll(x, LANES - shift, 1) for x in (here, following))
        below, first = (pltpu.roll(x, SUBLANES - 1, 0) for x in (here, following))
        below = jnp.where(sublane + 1 < SUBLANES, below, first)
        return jnp.where(lane + shift < LANES, here, below)


def _over_lanes(combine, x):
    """Returns `combine` over the lanes of [8, 128], on every lane."""
    for bit in range(LANES.bit_length() - 1):
        x = combine(x, pltpu.roll(x, 1 << bit, 1))
    return x


def _steps(rows):
    """Returns ⌈rows / STEP⌉."""
    return (rows + (STEP - 1)) >> (STEP.bit_length() - 1)


def _bit(index: int) -> int:
    """Returns 1 << index as a signed 32-bit integer."""
    return int(np.array(1 << index, np.uint32).astype(np.int32))
