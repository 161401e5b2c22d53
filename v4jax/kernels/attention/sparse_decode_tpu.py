"""The kernel of a decode step: each query gathers its own entries and attends in one pass.

The rows of a product are the heads of one query. Its keys are the window and the selected entries,
all in VMEM at once: the softmax needs no merging. FP8 entries are transposed in memory, channels ×
entries (see `entries_tpu`), and a copy takes at least the 128 entries of a register's lanes. Each
selected entry comes with its neighbours, 74 KiB together, and a rotation of the lanes brings it to
its place. A gather by XLA would transpose the table first, which is far more. bfloat16 entries are
rows, which XLA gathers.

Where devices share the entries of a sequence, each has few of the selected ones, sorted to the
front, and attends without a window: the places behind them cost nothing. A loop of unknown length
costs a tenth more per entry; other calls therefore fetch every place.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.attention.tiles_tpu import LOG2_E, dot
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.tpu import LANES, PACKED_ROWS, VMEM_BYTES
from v4jax.quant.entry_format import ENTRY_BLOCK
from v4jax.shapes import round_up

# Copies under way: enough bytes to fill the memory's latency.
DEPTH = 32
NAMES = ("values", "rope", "scales")


def attend(call: Call, inputs: Inputs):
    """Returns (attended [b, t, h, c], log_mass [b, t, h])."""
    queries, recent, sink, start, _, _, selected, *_ = inputs
    entries, window = inputs.entries(call), call.window
    batch, tokens, heads, channels = queries.shape
    count = selected.shape[-1]
    padding = round_up(window + tokens, PACKED_ROWS) - window - tokens
    recent = jnp.pad(recent, [(0, 0), (0, padding), (0, 0)])

    def place(b, t, *_):
        return (b, t, 0)

    specs = [
        pl.BlockSpec((1, heads, channels), place),
        pl.BlockSpec((1, *recent.shape[1:]), lambda b, t, *_: (b, 0, 0)),
        pl.BlockSpec((heads, LANES), lambda *_: (0, 0)),
        pl.BlockSpec((1, 1, 1, count), lambda b, t, *_: (b, t, 0, 0)),
    ]
    operands = [
        queries.reshape(batch, tokens * heads, channels),
        recent,
        jnp.broadcast_to(sink.astype(jnp.float32)[:, None], (heads, LANES)),
        selected[:, :, None],
    ]
    turned = entries.format.kind == "fp8"
    if turned:
        arrays = [jnp.swapaxes(entries.stored[name], 2, 3) for name in NAMES]
        ids = jnp.clip(selected, 0, entries.capacity - 1)
        specs += [
            pl.BlockSpec(
                (1, 1, count), lambda b, t, *_: (b * tokens + t, 0, 0), memory_space=pltpu.SMEM
            ),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in arrays),
        ]
        operands += [ids.reshape(batch * tokens, 1, count), *arrays]
        scratch = [
            pltpu.VMEM((channels, count), queries.dtype),
            *(pltpu.VMEM((DEPTH, x.shape[2], LANES), x.dtype) for x in arrays),
            pltpu.SemaphoreType.DMA((DEPTH,)),
        ]
    else:
        specs.append(pl.BlockSpec((1, 1, count, channels), lambda b, t, *_: (b, t, 0, 0)))
        operands.append(entries.take(selected))
        scratch = []
    places = jnp.where(selected >= 0, jnp.arange(1, count + 1, dtype=jnp.int32), 0)
    needed = places.max(axis=-1).reshape(-1)
    run = pl.pallas_call(
        functools.partial(_body, window, turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, tokens),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((1, heads, channels), place),
                pl.BlockSpec((1, 1, 1, heads), lambda b, t, *_: (b, t, 0, 0)),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, tokens * heads, channels), queries.dtype),
            jax.ShapeDtypeStruct((batch, tokens, 1, heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # they double the cost of starting a copy
        ),
        interpret=call.target.interpret,
        name="sparse_attention",
    )
    layer = jnp.asarray(entries.layer, jnp.int32)[None]
    attended, log_mass = run(layer, start.astype(jnp.int32), needed, *operands)
    return attended.reshape(queries.shape), log_mass[:, :, 0]


def _body(
    window,
    turned,
    layer_ref,
    start_ref,
    needed_ref,
    queries_ref,
    recent_ref,
    sink_ref,
    selected_ref,
    *rest,
):
    """One query.

    prefetch: layer [1], start [b], needed [b · t] (places to the last with an entry). input:
    queries [1, heads, c], recent [1, window + tokens, c], sink [heads, 128] (a column, repeated),
    selected [1, 1, 1, k]; then either ids [1, 1, k] in SMEM and turned stored arrays [l, b, …, w]
    in HBM, or gathered entries [1, 1, k, c]. output: attended [1, heads, c], log_mass [1, 1, 1,
    heads]. scratch, with turned arrays: decoded entries [c, k], fetched lanes [depth, …, 128] of
    each array, and their semaphores.
    """
    sequence, token = pl.program_id(0), pl.program_id(1)
    if turned:
        ids_ref, *stored, attended_ref, log_mass_ref, keys_ref = rest[:7]
        stored_at = [x.at[layer_ref[0], sequence] for x in stored]
        needed = keys_ref.shape[1]
        if window == 0:
            needed = needed_ref[sequence * pl.num_programs(1) + token]
        _gather(ids_ref, needed, stored_at, keys_ref, *rest[7:])
        keys = keys_ref[...]
    else:
        gathered_ref, attended_ref, log_mass_ref = rest
        keys = gathered_ref[0, 0]
    queries, recent, sink = queries_ref[0], recent_ref[0], sink_ref[...]
    scale = jnp.float32(queries.shape[-1] ** -0.5 * LOG2_E)
    entry_scores = dot(queries, keys, transpose=not turned) * scale
    entry_scores = jnp.where(selected_ref[0, 0] >= 0, entry_scores, MASKED)
    recent_scores = dot(queries, recent, transpose=True) * scale
    key = jax.lax.broadcasted_iota(jnp.int32, (1, recent.shape[0]), 1) - window
    seen = (key <= token) & (key > token - window) & (start_ref[sequence] + key >= 0)
    recent_scores = jnp.where(seen, recent_scores, MASKED)
    sink = jnp.maximum(sink[:, :1] * LOG2_E, MASKED)
    maximum = jnp.maximum(
        jnp.maximum(entry_scores.max(-1, keepdims=True), recent_scores.max(-1, keepdims=True)), sink
    )
    entry_weights, recent_weights = (
        jnp.exp2(scores - maximum) for scores in (entry_scores, recent_scores)
    )
    mass = entry_weights.sum(-1, keepdims=True) + recent_weights.sum(-1, keepdims=True)
    mass += jnp.exp2(sink - maximum)
    attended = dot(entry_weights.astype(keys.dtype), keys, transpose=turned)
    attended += dot(recent_weights.astype(recent.dtype), recent)
    attended_ref[0] = (attended / mass).astype(attended_ref.dtype)
    log_mass = (maximum + jnp.log2(mass)) / LOG2_E
    shape = (log_mass.shape[0],) * 2
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    log_mass_ref[0, 0] = jnp.where(row == lane, log_mass, 0.0).sum(0, keepdims=True)


def _gather(ids_ref, needed, stored, keys_ref, *scratch):
    """Decodes the first `needed` entries into the columns of `keys`; zeros stand behind them."""
    *buffers, semaphores = scratch
    count = keys_ref.shape[1]
    whole = isinstance(needed, int)

    def copies(place):
        slot = place & (DEPTH - 1)
        first = pl.multiple_of(ids_ref[0, 0, place] & -LANES, LANES)
        return [
            pltpu.make_async_copy(
                source.at[:, pl.ds(first, LANES)], buffer.at[slot], semaphores.at[slot]
            )
            for source, buffer in zip(stored, buffers, strict=True)
        ]

    @pl.loop(0, DEPTH if whole else jnp.minimum(needed, DEPTH))
    def _(place):
        for copy in copies(place):
            copy.start()

    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    words = [(x.shape[1] * x.dtype.itemsize // 4, LANES) for x in buffers]

    @pl.loop(0, count // LANES)
    def _(chunk):
        def take(index, columns):
            place = chunk * LANES + index
            for copy in copies(place):
                copy.wait()
            slot = place & (DEPTH - 1)
            # From lane id % 128 to lane `index`.
            shift = (index - ids_ref[0, 0, place]) & (LANES - 1)
            fetched = [pltpu.bitcast(buffer[slot], jnp.int32) for buffer in buffers]

            @pl.when(place + DEPTH < needed)
            def _():
                for copy in copies(place + DEPTH):
                    copy.start()

            return tuple(
                jnp.where(lane == index, pltpu.roll(words, shift, 1), old)
                for words, old in zip(fetched, columns, strict=True)
            )

        zeros = tuple(jnp.zeros(shape, jnp.int32) for shape in words)
        here = LANES if whole else jnp.clip(needed - chunk * LANES, 0, LANES)
        columns = jax.lax.fori_loop(0, here, take, zeros)
        values, rope, scales = (
            pltpu.bitcast(x, buffer.dtype) for x, buffer in zip(columns, buffers, strict=True)
        )
        lanes = pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES)
        # A power of two from its exponent; the padding rows are not read.
        scales = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
        for block in range(values.shape[0] // ENTRY_BLOCK):
            rows = slice(block * ENTRY_BLOCK, (block + 1) * ENTRY_BLOCK)
            decoded = values[rows].astype(jnp.float32) * scales[block : block + 1]
            keys_ref[rows, lanes] = decoded.astype(keys_ref.dtype)
        keys_ref[values.shape[0] :, lanes] = rope.astype(keys_ref.dtype)
