"""Sorting columns on TPU: a bitonic network whose comparators are whole registers.

Each lane sorts its own sequence. Values move only at the last three distances of a merge, inside a
register of eight rows. The loops over stages and distances stay loops: XLA's sort unrolls its
network, which costs the compiler most of a minute.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.tpu import LANES, SUBLANES, VMEM_BYTES
from v4jax.shapes import round_up

UNROLLED = 8


def sort_columns(values, largest: int, *, interpret: bool):
    """Returns int32 [n, m] with every column sorted.

    Args:
      values: int32 [n, m].
      largest: at least as large as all of them; stands where there is no value.
    """
    length, columns = values.shape
    rows = padded_rows(length)
    padding = [(0, rows - length), (0, round_up(columns, LANES) - columns)]
    values = jnp.pad(values, padding, constant_values=largest)
    spec = pl.BlockSpec((rows, LANES), lambda i: (0, i))
    values = pl.pallas_call(
        functools.partial(_body, rows.bit_length() - 1),
        grid=(values.shape[1] // LANES,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(values.shape, jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="sparse_attention_sort",
    )(values)
    return values[:length, :columns]


def padded_rows(length: int) -> int:
    """Returns the rows that are sorted: a power of two, and enough for the unrolled loops."""
    return max(1 << (length - 1).bit_length(), SUBLANES * UNROLLED * 2)


def _body(stages, values_ref, sorted_ref):
    """128 columns. input: values [n, 128]. output: sorted [n, 128]; n = 2^stages.

    Stage s merges runs of 2^(s−1) rows to runs of 2^s, every other one falling, by comparing rows
    that are 2^(s−1), …, 1 apart.
    """
    registers = sorted_ref.shape[0] // SUBLANES
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)

    def at(first):
        return pl.ds(pl.multiple_of(first, SUBLANES), SUBLANES)

    def sort_registers(source_ref, distances):
        """Compares rows inside every register; distances: (distance, falling(first row))."""

        @pl.loop(0, registers // UNROLLED)
        def _(index):
            for offset in range(UNROLLED):
                first = (index * UNROLLED + offset) * SUBLANES
                values = source_ref[at(first), :]
                for distance, falling in distances:
                    values = _exchange(values, row, distance, falling(first))
                sorted_ref[at(first), :] = values

    def falling_at(stage):
        return lambda first: (((first + row) >> stage) & 1) == 1

    first_stages = [(1 << d, falling_at(s)) for s in range(1, 4) for d in reversed(range(s))]
    sort_registers(values_ref, first_stages)

    @pl.loop(4, stages + 1)
    def _(stage):
        @pl.loop(0, stage - 3)
        def _(step):
            exponent = stage - 1 - step  # of the distance in rows
            inner = exponent - 3  # and in registers

            @pl.loop(0, registers // 2 // UNROLLED)
            def _(index):
                for offset in range(UNROLLED):
                    pair = index * UNROLLED + offset
                    upper, lower = pair >> inner, pair & ((1 << inner) - 1)
                    first = (upper << (exponent + 1)) + (lower << 3)
                    one, other = at(first), at(first + (1 << exponent))
                    a, b = sorted_ref[one, :], sorted_ref[other, :]
                    small, large = jnp.minimum(a, b), jnp.maximum(a, b)
                    falling = ((first >> stage) & 1) == 1
                    sorted_ref[one, :] = jnp.where(falling, large, small)
                    sorted_ref[other, :] = jnp.where(falling, small, large)

        sort_registers(sorted_ref, [(1 << d, falling_at(stage)) for d in (2, 1, 0)])


def _exchange(values, row, distance, falling):
    """Returns a register whose rows r and r + distance are in order."""
    lower = (row & distance) != 0
    partner = jnp.where(
        lower, pltpu.roll(values, distance, 0), pltpu.roll(values, SUBLANES - distance, 0)
    )
    takes_larger = lower != falling
    return jnp.where(takes_larger, jnp.maximum(values, partner), jnp.minimum(values, partner))
