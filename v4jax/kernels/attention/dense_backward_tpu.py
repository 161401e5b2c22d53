"""The backward pass of dense attention on TPU: one pass over tiles, scores recomputed in VMEM.

Everything is transposed: rows are keys, columns are queries (tokens × heads). Values of a query
(log-sum-exp, slope) then spread over rows at no cost, and only one of the five products needs a
transposed operand, the small block of keys. With P = exp(z − log_mass):

    Gᵀ = K·gᵀ    Dᵀ = Pᵀ · (Gᵀ + slope)    dqᵀ += Kᵀ·Dᵀ    dK += Dᵀ·q + Pᵀ·g

Cotangents of entries stay in VMEM for the whole sequence. Those of raw key-values move with the
tiles: no later tile sees the first rows of a finished one, which are written out.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.attention import entries_tpu, gradient
from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.attention.tiles_tpu import (
    LOG2_E,
    divide,
    dot,
    entries_seen,
    make_plan,
    tile_begin,
    unit_begins,
    window_seen,
)
from v4jax.kernels.tpu import VMEM_BYTES
from v4jax.shapes import ceil_div

TILE_ROWS = 1024
GROUP_ROWS = 256


def attend_backward(call: Call, kept, grads):
    """Returns the cotangents of the inputs of `dense_tpu.attend`."""
    inputs, attended, log_mass = kept
    slopes = gradient.row_slopes(attended, *grads)
    found = _run(call, inputs, grads[0], log_mass, slopes)
    return gradient.close(call, kept, slopes, *found)


def _run(call: Call, inputs: Inputs, grads, log_mass, slopes):
    """Returns the cotangents of queries, of recent [b, s, c] and of entries [b, w, c] (or None)."""
    queries, recent, _, start, end, begin, *_ = inputs
    batch, tokens, heads, channels = queries.shape
    plan = make_plan(call, inputs, TILE_ROWS)
    recent_count = recent.shape[1]
    queries, recent = plan.pad(queries, recent)
    padding = [(0, 0), (0, queries.shape[1] - tokens), (0, 0)]
    grads = jnp.pad(grads, [*padding, (0, 0)])
    log_mass, slopes = (
        jnp.pad(x, padding).reshape(batch * plan.tiles, 1, plan.rows) for x in (log_mass, slopes)
    )
    rows = plan.tiles * plan.rows
    steps = ceil_div(recent_count, plan.tokens)  # the last ones only let rows leave
    begins = unit_begins(begin)
    layout, operands, layer = entries_tpu.prepare(call, inputs)

    def tile_of(step):
        return jnp.minimum(step, plan.tiles - 1)

    def rows_place(b, step, *_):
        return (b, tile_of(step), 0)

    def recent_place(b, step, *_):
        return (b, 0 if plan.tiles == 1 else tile_of(step) * plan.tokens, 0)

    def stat_place(b, step, *_):
        return (b * plan.tiles + tile_of(step), 0, 0)

    row_spec = pl.BlockSpec((1, plan.rows, channels), rows_place)
    stat_spec = pl.BlockSpec((1, 1, plan.rows), stat_place)
    out_specs = [
        row_spec,
        pl.BlockSpec((1, plan.tokens, channels), lambda b, step, *_: (b, step, 0)),
    ]
    out_shape = [
        jax.ShapeDtypeStruct((batch, rows, channels), queries.dtype),
        jax.ShapeDtypeStruct((batch, steps * plan.tokens, channels), jnp.float32),
    ]
    scratch = [
        pltpu.VMEM((channels, plan.rows), jnp.float32),
        pltpu.VMEM((plan.recent_rows, channels), jnp.float32),
    ]
    if layout is not None:
        out_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        shape = (layout.blocks, layout.block, channels)
        out_shape.append(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
        scratch += [pltpu.VMEM(shape, jnp.float32), pltpu.SemaphoreType.DMA]
        scratch += entries_tpu.scratch(layout, queries.dtype)
    run = pl.pallas_call(
        functools.partial(_body, plan, layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + len(begins),
            grid=(batch, steps),
            in_specs=[
                row_spec,
                row_spec,
                stat_spec,
                stat_spec,
                pl.BlockSpec(tuple(map(pl.Element, (1, plan.recent_rows, channels))), recent_place),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in operands),
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=call.target.interpret,
        name="dense_attention_backward",
    )
    query_grads, recent_grads, *entry_grads = run(
        jnp.asarray(layer, jnp.int32)[None],
        start.astype(jnp.int32),
        end.astype(jnp.int32),
        *begins,
        queries.reshape(batch, rows, channels),
        grads.reshape(batch, rows, channels).astype(queries.dtype),
        log_mass * LOG2_E,
        slopes,
        recent,
        *operands,
    )
    query_grads = query_grads.reshape(batch, -1, heads, channels)[:, :tokens]
    if layout is None:
        return query_grads, recent_grads[:, :recent_count], None
    entry_grads = entry_grads[0].reshape(batch, -1, channels)[:, : layout.capacity]
    return query_grads, recent_grads[:, :recent_count], entry_grads


def _body(plan, layout, layer_ref, start_ref, end_ref, *rest):
    """One tile of queries of one sequence, or one step after the last of them.

    prefetch: layer [1], start [b], end [b]; with documents their begins [b · units]. input: queries
    and cotangents [1, rows, c], log_mass (base 2) and slopes [1, 1, rows], recent [1, window +
    tokens, c], stored arrays [l, b, w, …] in HBM. output: cotangents of queries [1, rows, c], of
    recent [1, tokens, c], and of entries [b, blocks, entries, c] in HBM. scratch: sums for queries
    [c, rows] and recent [window + tokens, c]; with entries sums for them [blocks, entries, c], a
    semaphore, and those of `entries_tpu.scratch`.
    """
    begin_ref, *rest = rest if plan.units else (None, *rest)
    queries_ref, grads_ref, log_mass_ref, slopes_ref, recent_ref, *rest = rest
    count = 0 if layout is None else layout.count
    stored, rest = rest[:count], rest[count:]
    if layout is None:
        query_out_ref, recent_out_ref, query_sum_ref, recent_sum_ref = rest
    else:
        query_out_ref, recent_out_ref, entry_out_ref, query_sum_ref, recent_sum_ref, *rest = rest
        entry_sum_ref, semaphore, *entry_scratch = rest
    sequence, step = pl.program_id(0), pl.program_id(1)
    start, end = start_ref[sequence], end_ref[sequence]
    first = start + step * plan.tokens
    begin = tile_begin(plan, begin_ref, sequence, step)

    @pl.when(step == 0)
    def _():
        recent_sum_ref[...] = jnp.zeros_like(recent_sum_ref)

    if layout is not None:
        loader = entries_tpu.Loader(layout, layer_ref[0], sequence, stored, entry_scratch)

        @pl.when(step == 0)
        def _():
            entry_sum_ref[...] = jnp.zeros_like(entry_sum_ref)
            available = layout.visible(end, plan.ratio)
            loader.start(available)
            loader.load_all(available)

    operands = (queries_ref, grads_ref, log_mass_ref, slopes_ref, query_sum_ref)

    @pl.when(step < plan.tiles)
    def _():
        query_sum_ref[...] = jnp.zeros_like(query_sum_ref)

    @pl.when((step < plan.tiles) & (first < end))
    def _():
        def recent_mask(shape, positions):
            key = first - plan.window + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            return window_seen(plan, positions, key, begin)

        recent_sum_ref[...] += _add_keys(plan, operands, recent_ref[0], first, recent_mask)
        if layout is not None:
            last = jnp.minimum(first + plan.tokens, end)
            blocks = loader.blocks(layout.visible(last, plan.ratio))

            seen_first = 0
            if plan.units:
                seen_first = divide(begin, plan.ratio * layout.block)
                seen_first = jnp.minimum(seen_first, blocks)

            @pl.loop(seen_first, blocks)
            def _(index):
                def entry_mask(shape, positions):
                    ids = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                    ids += index * layout.block
                    return entries_seen(plan, layout, positions, ids, begin)

                keys = loader.block(index)
                if layout.turned:
                    keys = keys.T
                entry_sum_ref[index] += _add_keys(plan, operands, keys, first, entry_mask)

    @pl.when(step < plan.tiles)
    def _():
        query_out_ref[0] = query_sum_ref[...].T.astype(query_out_ref.dtype)

    recent_out_ref[0] = recent_sum_ref[: plan.tokens, :]
    stay = plan.recent_rows - plan.tokens
    if stay:
        moved = recent_sum_ref[plan.tokens :, :]
        recent_sum_ref[:stay, :] = moved
    recent_sum_ref[stay:, :] = jnp.zeros((plan.tokens, plan.channels), jnp.float32)

    if layout is not None:

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            copy = pltpu.make_async_copy(entry_sum_ref, entry_out_ref.at[sequence], semaphore)
            copy.start()
            copy.wait()


def _add_keys(plan, operands, keys, first, mask):
    """Adds what keys [s, c] give to the queries' cotangents; returns their own, [s, c] float32.

    `mask` takes the shape [s, queries] and the queries' positions in that shape.
    """
    queries_ref, grads_ref, log_mass_ref, slopes_ref, query_sum_ref = operands
    scale = plan.channels**-0.5
    turned = keys.T
    group_rows = min(GROUP_ROWS, plan.rows)
    weights, score_grads = [], []
    for group in range(plan.rows // group_rows):
        rows = pl.ds(group * group_rows, group_rows)
        scores = dot(keys, queries_ref[0, rows, :], transpose=True) * jnp.float32(scale * LOG2_E)
        weight = jnp.exp2(scores - log_mass_ref[0, :, rows])
        row = jax.lax.broadcasted_iota(jnp.int32, weight.shape, 1) + group * group_rows
        weight = jnp.where(mask(weight.shape, plan.positions(first, row)), weight, 0.0)
        weight_grads = dot(keys, grads_ref[0, rows, :], transpose=True)
        score_grad = weight * (weight_grads + slopes_ref[0, :, rows]) * jnp.float32(scale)
        weights.append(weight.astype(keys.dtype))
        score_grads.append(score_grad.astype(keys.dtype))
        query_sum_ref[:, rows] += dot(turned, score_grads[-1])
    score_grad, weight = jnp.concatenate(score_grads, axis=1), jnp.concatenate(weights, axis=1)
    return dot(score_grad, queries_ref[0]) + dot(weight, grads_ref[0])
