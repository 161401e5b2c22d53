"""Dense attention on TPU: a flash kernel whose rows are tokens × heads.

All heads share one stream of key-values. The queries of several tokens and all heads can therefore
be the rows of one matrix product. The existing entries of a sequence (8,192 at a million tokens)
are fetched and decoded into VMEM once, and stay there for all tiles of queries: the inner loop is
two products and a softmax. A call with one tile (decode) attends to a block as soon as it is
decoded. Softmax runs in base 2 and starts with the sink, a key of value zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.attention import dense_backward_tpu, entries_tpu
from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.attention.gradient import keep
from v4jax.kernels.attention.tiles_tpu import (
    LOG2_E,
    divide,
    dot,
    entries_seen,
    make_plan,
    tile_begin,
    unit_begins,
    why_not,
    window_seen,
)
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.tpu import LANES, VMEM_BYTES
from v4jax.shapes import ceil_div

# Rows of one tile: enough that loading keys into the MXU is hidden.
TILE_ROWS = 2048
# Rows of one product: independent groups that the compiler overlaps.
GROUP_ROWS = 1024
# Decoded entries of one sequence.
RESIDENT_BYTES = 16 * 2**20


def supported(call: Call, inputs: Inputs) -> str | None:
    """Returns why the kernel cannot run on these arguments, or None."""
    queries, entries = inputs.queries, inputs.entries(call)
    reason = why_not(queries, inputs.recent, call.window)
    if reason is not None or entries is None:
        return reason
    size = entries.capacity * queries.shape[-1] * queries.dtype.itemsize
    if size > RESIDENT_BYTES:
        return f"{entries.capacity} entries do not fit into VMEM"
    return entries_tpu.why_not(entries, queries.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, inputs: Inputs):
    """Returns (attended [b, t, h, c], log-sum-exp [b, t, h])."""
    queries, recent, sink, start, end, begin, *_ = inputs
    batch, tokens, heads, channels = queries.shape
    # Two halves of a sequence, for chips whose device is two cores.
    plan = make_plan(call, inputs, TILE_ROWS, multiple=2)
    halves = 1 if plan.tiles == 1 else 2
    queries, recent = plan.pad(queries, recent)
    rows = plan.tiles * plan.rows
    layout, operands, layer = entries_tpu.prepare(call, inputs)
    begins = unit_begins(begin)
    sink_rows = jnp.broadcast_to(jnp.tile(sink, plan.tokens)[:, None], (plan.rows, LANES))

    def rows_place(b, half, tile, *_):
        return (b, half * (plan.tiles // halves) + tile, 0)

    def recent_place(b, half, tile, *_):
        tile = half * (plan.tiles // halves) + tile
        return (b, 0 if plan.tiles == 1 else tile * plan.tokens, 0)

    scratch = [
        pltpu.VMEM((plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.rows, channels), jnp.float32),
    ]
    if layout is not None:
        scratch += entries_tpu.scratch(layout, queries.dtype)
    run = pl.pallas_call(
        functools.partial(_body, plan, layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + len(begins),
            grid=(batch, halves, plan.tiles // halves),
            in_specs=[
                pl.BlockSpec((1, plan.rows, channels), rows_place),
                pl.BlockSpec(tuple(map(pl.Element, (1, plan.recent_rows, channels))), recent_place),
                pl.BlockSpec((plan.rows, LANES), lambda *_: (0, 0)),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in operands),
            ],
            out_specs=[
                pl.BlockSpec((1, plan.rows, channels), rows_place),
                pl.BlockSpec((1, plan.rows // LANES, LANES), rows_place),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, channels), queries.dtype),
            jax.ShapeDtypeStruct((batch, rows // LANES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=call.target.interpret,
        name="dense_attention",
    )
    attended, log_mass = run(
        jnp.asarray(layer, jnp.int32)[None],
        start.astype(jnp.int32),
        end.astype(jnp.int32),
        *begins,
        queries.reshape(batch, rows, channels),
        recent,
        sink_rows.astype(jnp.float32),
        *operands,
    )
    attended = attended.reshape(batch, -1, heads, channels)[:, :tokens]
    return attended, log_mass.reshape(batch, -1, heads)[:, :tokens]


attend.defvjp(functools.partial(keep, attend), dense_backward_tpu.attend_backward)


def _body(plan, layout, layer_ref, start_ref, end_ref, *rest):
    """One tile of queries of one sequence.

    prefetch: layer [1], start [b], end [b]; with documents their begins [b · units]. input: queries
    [1, rows, c], recent [1, window + tokens, c], sink [rows, 128] (a column, repeated), stored
    arrays [l, b, w, …] in HBM. output: attended [1, rows, c], log_mass [1, rows/128, 128]. scratch:
    maximum and mass [rows, 128] (the maximum repeated along lanes, the mass to be summed over
    them), weighted sum [rows, c]; with entries those of `entries_tpu.scratch`.
    """
    begin_ref, queries_ref, recent_ref, sink_ref, *rest = rest if plan.units else (None, *rest)
    count = 0 if layout is None else layout.count
    stored, rest = rest[:count], rest[count:]
    attended_ref, log_mass_ref, maximum_ref, mass_ref, sum_ref, *entry_scratch = rest
    sequence, half, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    per_half = pl.num_programs(2)
    start, end = start_ref[sequence], end_ref[sequence]
    first = start + (half * per_half + tile) * plan.tokens
    begin = tile_begin(plan, begin_ref, sequence, half * per_half + tile)
    state = (maximum_ref, mass_ref, sum_ref)
    single, group_rows = plan.tiles == 1, min(GROUP_ROWS, plan.rows)

    if layout is not None:
        loader = entries_tpu.Loader(layout, layer_ref[0], sequence, stored, entry_scratch)
        available = layout.visible(end, plan.ratio)
        if single:
            loader.start(available)
        else:

            @pl.when(tile == 0)
            def _():
                # The first tile of a half fetches what the last of it may see.
                last = jnp.minimum(end, start + (half + 1) * per_half * plan.tokens)
                loader.start(layout.visible(last, plan.ratio))
                loader.load_all(layout.visible(last, plan.ratio))

    @pl.when(first < end)
    def _():
        maximum_ref[...] = jnp.maximum(sink_ref[...] * LOG2_E, MASKED)
        lane = jax.lax.broadcasted_iota(jnp.int32, mass_ref.shape, 1)
        mass_ref[...] = jnp.where(lane == 0, 1.0, 0.0)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        recent = recent_ref[0]
        _attend_keys(plan, queries_ref, recent, False, state, _window_mask(plan, first, begin))

        if layout is not None:
            last = jnp.minimum(first + plan.tokens, end)
            blocks = loader.blocks(layout.visible(last, plan.ratio))

            def attend_block(index, masked):
                mask = _entry_mask(plan, layout, first, begin, index) if masked else None
                keys = loader.block(index)
                _attend_keys(plan, queries_ref, keys, layout.turned, state, mask)

            if single:

                @pl.loop(0, blocks)
                def _(index):
                    loader.load(index, available)
                    attend_block(index, True)
            else:
                masked = functools.partial(attend_block, masked=True)
                whole, inner = divide(layout.visible(first + 1, plan.ratio), layout.block), 0
                if plan.units:
                    # The document's first block may hold entries before it.
                    lowest = divide(begin, plan.ratio)
                    inner = jnp.minimum(divide(lowest + layout.block - 1, layout.block), blocks)
                    pl.loop(jnp.minimum(divide(lowest, layout.block), inner), inner)(masked)
                    whole = jnp.maximum(whole, inner)
                pl.loop(inner, whole)(functools.partial(attend_block, masked=False))
                pl.loop(whole, blocks)(masked)

        for group in range(plan.rows // group_rows):
            rows = pl.ds(group * group_rows, group_rows)
            mass = mass_ref[rows, :].sum(-1, keepdims=True)
            attended_ref[0, rows, :] = (sum_ref[rows, :] / mass).astype(attended_ref.dtype)
            log_mass = (maximum_ref[rows, :] + jnp.log2(mass)) / LOG2_E
            log_mass_ref[0, pl.ds(group * group_rows // LANES, group_rows // LANES), :] = (
                columns_to_rows(log_mass)
            )

    @pl.when(first >= end)
    def _():
        if single and layout is not None:
            # Every copy that was started must be awaited.
            pl.loop(0, loader.blocks(available))(lambda index: loader.load(index, available))
        attended_ref[...] = jnp.zeros_like(attended_ref)
        log_mass_ref[...] = jnp.zeros_like(log_mass_ref)


def columns_to_rows(column):
    """Returns [n/128, 128] of a column [n, 128] that is repeated along lanes: its diagonals."""
    shape = (LANES, LANES)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    pieces = [
        jnp.where(row == lane, column[i : i + LANES], 0.0).sum(0, keepdims=True)
        for i in range(0, column.shape[0], LANES)
    ]
    return jnp.concatenate(pieces, axis=0)


def _positions(plan, first, group, shape):
    """Returns the position of each row's token."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + group * shape[0]
    return plan.positions(first, row)


def _window_mask(plan, first, begin):
    """Returns the mask of a group over the raw rows of its tile; the first is `window` before."""

    def mask(group, shape):
        key = first - plan.window + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return window_seen(plan, _positions(plan, first, group, shape), key, begin)

    return mask


def _entry_mask(plan, layout, first, begin, index):
    """Returns the mask of a group over a block of entries."""

    def mask(group, shape):
        entry = index * layout.block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        positions = _positions(plan, first, group, shape)
        return entries_seen(plan, layout, positions, entry, begin)

    return mask


def _attend_keys(plan, queries_ref, keys, turned, state, mask):
    """Adds keys, [s, c] or turned [c, s], to the softmax of all rows."""
    maximum_ref, mass_ref, sum_ref = state
    scale = jnp.float32(plan.channels**-0.5 * LOG2_E)
    group_rows = min(GROUP_ROWS, plan.rows)
    for group in range(plan.rows // group_rows):
        rows = pl.ds(group * group_rows, group_rows)
        scores = dot(queries_ref[0, rows, :], keys, transpose=not turned) * scale
        if mask is not None:
            scores = jnp.where(mask(group, scores.shape), scores, MASKED)
        old = maximum_ref[rows, :]
        new = jnp.maximum(old, scores.max(-1, keepdims=True))
        fade = jnp.exp2(old - new)
        weights = jnp.exp2(scores - along_lanes(new, scores.shape[1]))
        maximum_ref[rows, :] = new
        mass_ref[rows, :] = mass_ref[rows, :] * fade + fold_lanes(weights)
        more = dot(weights.astype(keys.dtype), keys, transpose=turned)
        sum_ref[rows, :] = sum_ref[rows, :] * along_lanes(fade, plan.channels) + more


def along_lanes(column, width: int):
    """Returns a column [n, 128], repeated along lanes, at another width."""
    return jnp.tile(column, (1, ceil_div(width, LANES)))[:, :width]


def fold_lanes(values):
    """Returns [n, 128] with the same sum over lanes."""
    width = values.shape[1]
    whole = width // LANES * LANES
    pieces = [values[:, i : i + LANES] for i in range(0, whole, LANES)]
    if whole < width:
        pieces.append(jnp.pad(values[:, whole:], [(0, 0), (0, whole + LANES - width)]))
    return functools.reduce(jnp.add, pieces)
