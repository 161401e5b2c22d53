"""Exact selection on TPU: scores are made block by block and sifted at once; none reaches HBM.

A program walks over the blocks of entries that its queries may see. Prefill: 128 queries, one per
lane; the eight sublanes of a register are eight streams per query, stream s has the entries ≡ s
(mod 8), so all that follows is elementwise, and a query's sums are sums over its streams. Few
queries (decode): one query a program, and all 1,024 places of a register are its streams.

  score   a block's products, one head after the other, on the MXU; ReLU, weight, sum in float32.
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
          The gaps between streams close the same way.

It is exact because an entry leaves only when `count` others rank before it by (score, smaller id):
when it is not appended these are earlier entries, which win ties; when it is dropped, candidates.
Nothing depends on the order of entries but the cost: each is scored and compared once, and the
floor only rises, so that of n entries in random order about count · (1 + ln(n / count)) are ever
candidates of a query. Where each is better than all before, each is appended; then a refresh of at
most `capacity` rows is due for every `growth` rows of entries.

Scores are finite. Should one be infinite or no number, the ids are still visible and distinct.

Source: spec B.9.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.indexer.keys import NOTHING, order_keys
from v4jax.kernels.indexer.sieve_tpu import (
    GAP_SHIFT,
    MAX_ROWS,
    STEP,
    Sieve,
    stream_index,
)
from v4jax.kernels.scaled_matmul.unpack_tpu import decode_codes
from v4jax.kernels.table import EntryTable, visible_entries
from v4jax.kernels.tpu import LANES, SUBLANES, chip_of
from v4jax.quant.entry_format import INDEX_BLOCK
from v4jax.shapes import ceil_div, round_up

# Up to here each token is a program of its own. A tile of 128 costs as much as about ten of them
# where 4,096 entries are seen, as twenty-five where 262,144 are.
FEW_TOKENS = 8
VMEM_BYTES = 48 * 2**20  # the smallest chip has 64 MiB
ROOM_BYTES = 16 * 2**20  # of it for blocks of keys, results and registers spilled
SCALAR_BYTES = 2**19  # half of what a core has
CODES = 8  # FP4 codes in a word of 32 bits


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the walk over entries.

    entries: of one grid step. heads: unrolled together, or their largest divisor in common. chunk:
    rows sifted together, at most 32 (bits of a mask). growth: rows of candidates added before a
    refresh. dense: survivors of one stream in a chunk beyond which the chunk is copied whole.
    """

    entries: int = 512
    heads: int = 64
    chunk: int = 32
    growth: int = 640
    dense: int = 12

    def slack(self, count: int) -> int:
        """Candidates beyond `count` that a refresh may leave to a query."""
        return count // 4

    def capacity(self, count: int, streams: int) -> int:
        """Rows of candidates: one stream may hold all that a refresh leaves."""
        kept = count + self.slack(count)
        return round_up(kept + max(self.growth, self.entries // streams), STEP) + STEP


MANY = Blocks()
FEW = Blocks(entries=4096, dense=2)


def choose_blocks(tokens: int, keys: EntryTable) -> Blocks:
    """Returns the sizes for a call of so many tokens."""
    return FEW if tokens <= FEW_TOKENS else MANY


def supported(
    queries, keys: EntryTable, count: int, begin=None, scored: bool = False
) -> str | None:
    """Returns why these kernels cannot run, or None."""
    batch, tokens, heads, channels = queries.shape
    few = tokens <= FEW_TOKENS
    blocks = choose_blocks(tokens, keys)
    if channels % LANES:
        return f"index_head_dim must be a multiple of {LANES} lanes, got {channels}"
    if keys.format.kind not in ("fp4", "bfloat16"):
        return f"index keys must be fp4 or bfloat16, got {keys.format.kind}"
    if queries.dtype != jnp.bfloat16:
        return f"index queries must be bfloat16, got {queries.dtype}"
    if keys.capacity < blocks.entries:
        return f"a block has {blocks.entries} entries, there is room for {keys.capacity}"
    if blocks.capacity(count, SUBLANES) >= MAX_ROWS:
        return f"{count} selected entries need {blocks.capacity(count, SUBLANES)} rows"
    if keys.capacity >= SUBLANES << GAP_SHIFT:
        return f"{keys.capacity} entries do not fit in {GAP_SHIFT} bits"
    programs = batch * (tokens if few else ceil_div(tokens, LANES))
    if 4 * programs * (1 if begin is None else 2) > SCALAR_BYTES:
        return f"{programs} programs have more sizes than fit in {SCALAR_BYTES} bytes"
    rows = (3 if scored else 2) * blocks.capacity(count, SUBLANES)  # keys and ids; order
    values = heads * channels * (1 if few else LANES)  # queries, fetched ahead
    products = heads * blocks.entries if few else 0
    needed = 4 * (rows * SUBLANES * LANES + values + products) + ROOM_BYTES
    if needed > VMEM_BYTES:
        return (
            f"{heads} heads of {channels} channels and {count} selected entries need "
            f"{needed} bytes of VMEM, there are {VMEM_BYTES}"
        )
    return None


def select(queries, head_weights, keys, start, end, **options):
    """See `v4jax.kernels.indexer.select`."""
    return _select(queries, head_weights, keys, start, end, scored=False, **options)[0]


def select_with_scores(queries, head_weights, keys, start, end, **options):
    """See `v4jax.kernels.indexer.select_with_scores`."""
    ids, scores = _select(queries, head_weights, keys, start, end, scored=True, **options)
    return ids, scores * 0.5 if keys.format.kind == "fp4" else scores  # of doubled keys


def _select(
    queries,
    head_weights,
    keys,
    start,
    end,
    *,
    ratio,
    count,
    scored,
    begin=None,
    target,
):
    """Returns the ids, and if `scored` their scores."""
    batch, tokens, heads, channels = queries.shape
    few = tokens <= FEW_TOKENS
    blocks = choose_blocks(tokens, keys)
    count = min(count, keys.capacity)
    tile = 1 if few else LANES
    tiles = ceil_div(tokens, tile)
    positions_bt = start[:, None] + jnp.arange(tiles * tile, dtype=jnp.int32)
    # Padding behind the last token sees nothing, so that it never makes a block needed.
    positions_bt = jnp.where(positions_bt < end[:, None], positions_bt, -1)
    seen_bt = jnp.minimum(visible_entries(positions_bt, ratio), keys.capacity)
    seen = seen_bt.reshape(batch, tiles, tile)
    needed = seen.max(axis=-1).reshape(-1)
    seen = jnp.broadcast_to(seen, (batch, tiles, LANES))[:, :, None]
    # Documents begin with a tile, which so has one first entry.
    firsts = () if begin is None else ((begin[:, ::tile] // ratio).reshape(-1),)

    if keys.format.kind == "fp4":
        queries = queries[..., decoded_order(channels)]
    weights = head_weights.astype(jnp.float32)
    if few:
        weights = weights[..., None]  # [b, t, i, 1] beside queries [b, t, i, x]
    else:
        padding = [(0, 0), (0, tiles * tile - tokens), (0, 0)]
        queries = jnp.pad(queries, [*padding, (0, 0)])
        queries = queries.reshape(batch, tiles, tile, heads, channels)
        queries = jnp.transpose(queries, (0, 1, 3, 4, 2))  # [b, tile, i, x, q]
        weights = jnp.pad(weights, padding).reshape(batch, tiles, tile, heads).swapaxes(-1, -2)

    names = sorted(keys.stored)
    # XLA on TPU lays out an array whose rows are narrower than 128 lanes with its entries last.
    # Told so, the kernel reads the stack in place; otherwise all of it would be copied.
    entries_last = keys.format.kind == "fp4"
    stored = [keys.stored[n].swapaxes(2, 3) if entries_last else keys.stored[n] for n in names]
    steps = jnp.maximum(ceil_div(jnp.max(needed), blocks.entries), 1)

    def of_tile(array):
        shape = array.shape[2:]
        return pl.BlockSpec((None, None, *shape), lambda b, t, e, *_: (b, t, *(0,) * len(shape)))

    def of_entries(array):
        def index(b, t, e, layer, needed, *firsts):
            # Steps past the last needed block name that block again, those before the first needed
            # one that one already: nothing is fetched for them.
            last = jax.lax.div(jnp.maximum(needed[b * tiles + t] - 1, 0), blocks.entries)
            for first in firsts:
                e = jnp.maximum(e, jax.lax.div(first[b * tiles + t], blocks.entries))
            e = jnp.minimum(e, last)
            return (layer[0], b, 0, e) if entries_last else (layer[0], b, e, 0)

        other = array.shape[2] if entries_last else array.shape[3]
        block = (other, blocks.entries) if entries_last else (blocks.entries, other)
        return pl.BlockSpec((None, None, *block), index)

    streams = SUBLANES * LANES if few else SUBLANES
    places = (SUBLANES, LANES)
    candidates = pltpu.VMEM((blocks.capacity(count, streams), *places), jnp.int32)
    shape = (batch, tiles, ceil_div(count, streams), *places)
    out_shape = [jax.ShapeDtypeStruct(shape, jnp.int32)]
    if scored:
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    options = dict(count=count, blocks=blocks, few=few, packed=begin is not None, scored=scored)
    found = pl.pallas_call(
        functools.partial(_body, names=names, chip=chip_of(target), **options),
        name="indexer_select",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            # layer [1], needed [b · tiles], with documents firsts [b · tiles]
            num_scalar_prefetch=2 + len(firsts),
            grid=(batch, tiles, steps),
            in_specs=[*map(of_tile, (queries, weights, seen)), *map(of_entries, stored)],
            out_specs=[*map(of_tile, out_shape)],
            scratch_shapes=[
                pltpu.VMEM((blocks.entries // streams, *places), jnp.int32),  # keys of a block
                candidates,  # keys
                candidates,  # rows of entries
                pltpu.VMEM(places, jnp.int32),  # floor of each query
                pltpu.SMEM((2,), jnp.int32),  # rows used, rows at which to refresh
                *([candidates] if scored else []),  # the keys again, in order of the ids
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            # A chip of two cores divides the programs between them.
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=target.interpret,
    )(
        jnp.asarray(keys.layer, jnp.int32).reshape(1),
        *(needed, *firsts),
        *(queries, weights, seen, *stored),
    )
    if few:
        return [x.reshape(batch, tokens, -1)[..., :count] for x in found]
    found = [x.reshape(batch, tiles, -1, LANES)[:, :, :count] for x in found]  # [b, tile, k, q]
    return [x.swapaxes(-1, -2).reshape(batch, tiles * LANES, count)[:, :tokens] for x in found]


def _body(layer, needed, *refs, names, chip, count, blocks, few, packed, scored):
    """One block of entries for one tile of queries, or for one query if `few`.

    Prefetch: layer [1], needed [b · tiles], if `packed` firsts [b · tiles]. Input: queries
    [i, x, q] bf16 and weights [i, q] f32 (few: [i, x], [i, 1]), seen [1, q] int32, stored keys of
    the block [entries, x] or, in fp4, [bytes, entries]. Output: chosen [⌈count/streams⌉, 8, 128]
    int32, if `scored` their scores, float32. Scratch: as in `_select`.
    """
    firsts, queries, weights, seen, *refs = refs if packed else (None, *refs)
    refs, order = (refs[:-1], refs[-1]) if scored else (refs, None)
    *refs, block_keys, candidates, ids, floor, state = refs
    *stored, chosen, scores = refs if scored else (*refs, None)
    stored = dict(zip(names, stored, strict=True))
    b, t, step = (pl.program_id(axis) for axis in range(3))
    sieve = Sieve(candidates, ids, floor, state, count, blocks, wide=few)

    def entry_index(first_row, shape):
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first_row
        return row * sieve.streams + stream_index(shape, wide=few)

    @pl.when(step == 0)
    def _():
        sieve.open()

    program = b * pl.num_programs(1) + t
    needed, first = needed[program], firsts[program] if packed else 0
    # All of so few entries are selected, whatever their scores.
    enough = 0 if scored else count
    sifted, seen_here = needed - first > enough, step * blocks.entries < needed
    if packed:
        seen_here &= (step + 1) * blocks.entries > first

    @pl.when(sifted & seen_here)
    def _():
        if few:
            score_one(chip, stored, queries, weights, block_keys)
        else:
            score_many(chip, stored, queries, weights, block_keys, blocks.heads)
        entry = entry_index(step * sieve.block_rows, block_keys.shape)
        visible = entry < seen[...][None]
        if packed:
            visible &= entry >= first
        block_keys[...] = jnp.where(visible, block_keys[...], NOTHING)
        sieve.add(block_keys, step * sieve.block_rows)

    last = step == pl.num_programs(2) - 1

    @pl.when(sifted & (last | sieve.full))
    def _():
        sieve.refresh(jnp.where(last, 0, blocks.slack(count)))

    @pl.when(sifted & last)
    def _():
        sieve.write(chosen, scores, order)

    @pl.when(jnp.logical_not(sifted) & last)
    def _():
        entry = entry_index(0, chosen.shape) + first
        chosen[...] = jnp.where(entry < seen[...][None], entry, -1)
        if scored:  # there are none
            scores[...] = jnp.full(scores.shape, -jnp.inf, jnp.float32)


def score_many(chip, stored, queries, weights, block_keys, unrolled: int):
    """Writes the keys of Σ_i weight · ReLU(product), float32 [entries, q], as [rows, 8, q]."""
    keys = stored["values"][...] if "values" in stored else decode_fp4(chip, stored).T
    heads = queries.shape[0]
    unrolled = math.gcd(heads, unrolled)

    def add_heads(group, total):
        for head in range(unrolled):
            index = group * unrolled + head
            products = jnp.dot(keys, queries[index], preferred_element_type=jnp.float32)
            total = total + jnp.maximum(products, 0.0) * weights[pl.ds(index, 1), :]
        return total

    total = jnp.zeros((keys.shape[0], LANES), jnp.float32)
    if unrolled == heads:
        total = add_heads(0, total)
    else:
        total = jax.lax.fori_loop(0, heads // unrolled, add_heads, total)
    block_keys[...] = order_keys(total).reshape(block_keys.shape)


def score_one(chip, stored, queries, weights, block_keys):
    """Writes the keys of one query's scores; 1,024 successive entries fill a row."""
    if "values" in stored:
        keys, over = stored["values"][...], (((1,), (1,)), ((), ()))
    else:
        keys, over = decode_fp4(chip, stored), (((1,), (0,)), ((), ()))
    products = jax.lax.dot_general(
        queries[...], keys, over, preferred_element_type=jnp.float32
    )  # [i, entries]
    scores = jnp.sum(jnp.maximum(products, 0.0) * weights[...], axis=0, keepdims=True)
    ordered = order_keys(scores)
    for part in range(ordered.shape[1] // LANES):
        row, sublane = divmod(part, SUBLANES)
        lanes = slice(part * LANES, (part + 1) * LANES)
        block_keys[row, sublane : sublane + 1, :] = ordered[:, lanes]


def decode_fp4(chip, stored):
    """Returns twice a block's keys [x, entries] in bfloat16, exactly, in `decoded_order`.

    Four bytes of an entry make a word, and so do two bfloat16 of it: codes are decoded in place,
    those 16 bits apart together. The factor two is every key's: it changes no order.
    """
    words = pltpu.bitcast(stored["packed"][...], jnp.int32)  # [x/8, entries]
    scales = stored["scales"][...].astype(jnp.int32) << 7
    scales = scales | (scales << 16)
    exponents = jnp.concatenate(
        [_repeat_pair(scales[first : first + 2]) for first in range(0, scales.shape[0], 2)]
    )
    parts = decode_codes(chip, words, (exponents, exponents))
    return jnp.concatenate([pltpu.bitcast(part, jnp.bfloat16) for part in parts])


def decoded_order(channels: int) -> np.ndarray:
    """Returns the channels in the order in which `decode_fp4` leaves them."""
    return np.arange(channels).reshape(-1, 2, 4).transpose(2, 0, 1).reshape(-1)


def _repeat_pair(scales):
    """Returns scales [2, entries] for their words [8, entries]."""
    words = INDEX_BLOCK // CODES
    row = jax.lax.broadcasted_iota(jnp.int32, (2 * words, scales.shape[1]), 0)
    return jnp.where(row < words, scales[:1], scales[1:])
