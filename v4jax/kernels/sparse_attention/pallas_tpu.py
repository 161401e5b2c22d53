"""Sparse attention on TPU: every token gathers its own entries and attends in one pass.

The rows of a product are the heads of one token; its keys are the window and the selected entries,
all in VMEM at once, so the softmax needs no merging. Entries come row by row from HBM while the
token before is computed. A row can be fetched alone only where the entry axis is not tiled, so the
table is first rewritten as decoded rows of 32-bit words, two bfloat16 a word, which costs one pass
over it: less than the gather itself in a prefill. In a decode step the selected rows are fewer than
the table's, and XLA gathers them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import dispatch
from v4jax.kernels.dense_attention import gradient
from v4jax.kernels.dense_attention.tiles_tpu import (
    LANES,
    LOG2_E,
    VMEM_BYTES,
    Plan,
    dot,
    why_not,
    window_seen,
)
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.sparse_attention import reference
from v4jax.shapes import ceil_div

# Tokens of one step: the first of them waits for its gather, the others find it done.
TILE_TOKENS = 32
# Rows requested by one pass of the loop that starts a gather.
UNROLLED_ROWS = 16
# Channels of a row of 32-bit words.
WORD_CHANNELS = 2 * LANES
LARGEST_COUNT = 2048  # gathered rows of one token that VMEM holds twice


def supported(queries, recent, window, entries, selected) -> str | None:
    """Returns why the kernel cannot run on these arguments, or None."""
    reason = why_not(queries, recent, window)
    if reason is not None:
        return reason
    if queries.dtype != jnp.bfloat16 or entries.format.dtype != "bfloat16":
        return f"queries and entries must be bfloat16, got {queries.dtype}"
    if queries.shape[-1] % WORD_CHANNELS:
        return f"channels must divide by {WORD_CHANNELS}, got {queries.shape[-1]}"
    count = selected.shape[-1]
    if count % LANES or count > LARGEST_COUNT:
        return f"selected entries must divide by {LANES} and be at most {LARGEST_COUNT}: {count}"
    return None


def attend_with_mass(queries, recent, sink, start, *, window, entries, selected):
    """See `v4jax.kernels.sparse_attention.attend_with_mass`."""
    stored, layer, stored_as = gradient.open_table(entries)
    return _attend(window, stored_as, queries, recent, sink, start, stored, layer, selected)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, stored_as, queries, recent, sink, start, stored, layer, selected):
    batch, tokens, heads, channels = queries.shape
    count = selected.shape[-1]
    entries = gradient.close_table(stored, layer, stored_as)
    gathers = gathers_in_kernel(tokens, count, entries.capacity)
    tile = min(TILE_TOKENS, tokens)
    plan = Plan(tile, ceil_div(tokens, tile), heads, channels, window, 0)
    queries, recent = plan.pad(queries, recent)
    padding = queries.shape[1] - tokens
    selected = jnp.pad(selected, [(0, 0), (0, padding), (0, 0)], constant_values=-1)
    rows = plan.tiles * plan.rows

    def place(b, tile, *_):
        return (b, tile, 0)

    def recent_place(b, tile, *_):
        return (b, 0 if plan.tiles == 1 else tile * plan.tokens, 0)

    specs = [
        pl.BlockSpec((1, plan.rows, channels), place),
        pl.BlockSpec(tuple(map(pl.Element, (1, plan.recent_rows, channels))), recent_place),
        pl.BlockSpec((heads, LANES), lambda *_: (0, 0)),
        pl.BlockSpec((1, plan.tokens, 1, count), lambda b, tile, *_: (b, tile, 0, 0)),
    ]
    operands = [
        queries.reshape(batch, rows, channels),
        recent,
        jnp.broadcast_to(sink.astype(jnp.float32)[:, None], (heads, LANES)),
        selected[:, :, None],
    ]
    if gathers:
        specs += [
            pl.BlockSpec(
                (1, 1, plan.tokens * count),
                lambda b, tile, *_: (b * plan.tiles + tile, 0, 0),
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec(memory_space=pl.ANY),
        ]
        ids = jnp.clip(selected, 0, entries.capacity - 1)
        operands += [ids.reshape(batch * plan.tiles, 1, -1), pack_rows(entries)]
        planes = channels // WORD_CHANNELS
        scratch = [
            pltpu.VMEM((2, count, planes, LANES), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
        ]
    else:
        specs.append(
            pl.BlockSpec((1, plan.tokens, count, channels), lambda b, tile, *_: (b, tile, 0, 0))
        )
        operands.append(entries.take(selected))
        scratch = []
    call = pl.pallas_call(
        functools.partial(_body, plan, count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.tiles),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((1, plan.rows, channels), place),
                pl.BlockSpec((1, plan.tokens, heads), place),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, channels), queries.dtype),
            jax.ShapeDtypeStruct((batch, plan.tiles * plan.tokens, heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # they double the cost of starting a copy
        ),
        interpret=dispatch.platform() != "tpu",
        name="sparse_attention",
    )
    attended, log_mass = call(start.astype(jnp.int32), *operands)
    attended = attended.reshape(batch, -1, heads, channels)[:, :tokens]
    return attended, log_mass[:, :tokens]


def _attend_forward(window, stored_as, *arguments):
    results = _attend(window, stored_as, *arguments)
    return results, (*arguments, *results)


_attend.defvjp(_attend_forward, reference.attend_backward)


def gathers_in_kernel(tokens: int, count: int, capacity: int) -> bool:
    """Returns whether rewriting the table is cheaper than staging the gathered rows in HBM."""
    return tokens * count > capacity


def pack_rows(entries):
    """Returns the entries as words [b, w, planes, 128]: channels 256i + j and 256i + 128 + j."""

    def read(array):
        return jax.lax.dynamic_index_in_dim(array, entries.layer, keepdims=False)

    decoded = entries.format.decode(jax.tree.map(read, entries.stored))
    halves = jax.lax.bitcast_convert_type(decoded, jnp.uint16).astype(jnp.uint32)
    halves = halves.reshape(*decoded.shape[:2], -1, 2, LANES)
    words = halves[..., 0, :] | (halves[..., 1, :] << 16)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _body(plan, count, start_ref, queries_ref, recent_ref, sink_ref, selected_ref, *rest):
    """The tokens of one tile, one after another.

    prefetch: start [b]. input: queries [1, rows, c], recent [1, window + tokens, c], sink
    [heads, 128] (a column, repeated), selected [1, tokens, 1, k]; then either ids [1, 1, tokens·k]
    in SMEM and words [b, w, planes, 128] in HBM, or gathered entries [1, tokens, k, c]. output:
    attended [1, rows, c], log_mass [1, tokens, heads]. scratch: two buffers [2, k, planes, 128] and
    two semaphores.
    """
    sequence, tile = pl.program_id(0), pl.program_id(1)
    first = start_ref[sequence] + tile * plan.tokens
    if len(rest) == 3:
        gathered_ref, attended_ref, log_mass_ref = rest
        gather = None
    else:
        ids_ref, words_ref, attended_ref, log_mass_ref, buffer_ref, semaphores = rest
        gather = functools.partial(_gather, count, sequence, ids_ref, words_ref, buffer_ref)
        gather(semaphores, 0)

    @pl.loop(0, plan.tokens)
    def _(token):
        if gather is None:
            keys = gathered_ref[0, token]
        else:

            @pl.when(token + 1 < plan.tokens)
            def _():
                gather(semaphores, token + 1)

            slot = token % 2
            # One wait for as many bytes as the rows have together.
            whole = words_ref.at[sequence, pl.ds(0, count)]
            pltpu.make_async_copy(whole, buffer_ref.at[slot], semaphores.at[slot]).wait()
            keys = _unpack(buffer_ref.at[slot])
        rows = pl.ds(pl.multiple_of(token * plan.heads, 8), plan.heads)
        queries, recent = queries_ref[0, rows, :], recent_ref[0]
        attended, log_mass = _attend_token(
            plan, queries, keys, recent, sink_ref[...], selected_ref[0, token], first, token
        )
        attended_ref[0, rows, :] = attended.astype(attended_ref.dtype)
        log_mass_ref[0, pl.ds(token, 1), :] = log_mass


def _gather(count, sequence, ids_ref, words_ref, buffer_ref, semaphores, token):
    """Starts the copies of a token's entries."""
    slot = token % 2

    @pl.loop(0, count // UNROLLED_ROWS)
    def _(index):
        for offset in range(UNROLLED_ROWS):
            row = index * UNROLLED_ROWS + offset
            source = words_ref.at[sequence, ids_ref[0, 0, token * count + row]]
            pltpu.make_async_copy(source, buffer_ref.at[slot, row], semaphores.at[slot]).start()


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


def _attend_token(plan, queries, keys, recent, sink, selected, first, token):
    """Returns attended [heads, c] and log_mass [1, heads] of one token."""
    scale = jnp.float32(plan.channels**-0.5 * LOG2_E)
    entry_scores = dot(queries, keys, transpose=True) * scale
    entry_scores = jnp.where(selected >= 0, entry_scores, MASKED)
    recent_scores = dot(queries, recent, transpose=True) * scale
    shape = (1, plan.recent_rows)
    key = first - plan.window + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = window_seen(plan, jnp.full(shape, first + token, jnp.int32), key)
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
    attended = dot(entry_weights.astype(keys.dtype), keys)
    attended += dot(recent_weights.astype(recent.dtype), recent)
    log_mass = (maximum + jnp.log2(mass)) / LOG2_E
    row, lane = (
        jax.lax.broadcasted_iota(jnp.int32, (plan.heads, plan.heads), axis) for axis in (0, 1)
    )
    return attended / mass, jnp.where(row == lane, log_mass, 0.0).sum(0, keepdims=True)
