"""A stored weight expanded to bfloat16 in a TPU's memory, for products that read it often.

Gradients with respect to inputs, and weights with adapters, need the whole matrix. XLA could expand
it too, but needs the bytes in tiles of another shape: it would copy whole stacks of layers before
slicing them. The kernel reads them in the layout they have.

FP4 is unpacked in the orders of `unpack_tpu`. Products with permutations, which are exact, restore
the order.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.dispatch import Target
from v4jax.kernels.scaled_matmul import unpack_tpu
from v4jax.kernels.scaled_matmul.unpack_tpu import GROUP, UNPACK_ROWS
from v4jax.kernels.tpu import LANES, chip_of
from v4jax.quant import formats

_LARGEST_BLOCK = 2 * 2**20  # weights of one step: 4 MiB expanded, twice, and once in the scratch


def supported(weight) -> str | None:
    """Returns why the kernel cannot expand this weight, or None."""
    return unpack_tpu.why_not("weight", weight)


def expand(weight, *, target: Target):
    """Returns a `ScaledArray` [..., out, in] in bfloat16."""
    kind, (*lead, out, width) = unpack_tpu.kind_of(weight), weight.shape
    matrices = math.prod(lead)
    values = weight.values.reshape(matrices, *weight.values.shape[-2:])
    scales = weight.scales.reshape(matrices, *weight.scales.shape[-2:])
    rows = _choose_rows(out, width)
    own = pl.BlockSpec((None, rows, scales.shape[-1]), lambda matrix, block: (matrix, block, 0))
    if kind == "fp8":
        if scales.dtype == jnp.uint8:
            scales = formats.decode_e8m0(scales)
        own = pl.BlockSpec((None, *scales.shape[1:]), lambda matrix, block: (matrix, 0, 0))
    call = pl.pallas_call(
        functools.partial(_body, chip_of(target), kind),
        grid=(matrices, out // rows),
        in_specs=[
            pl.BlockSpec((None, rows, values.shape[-1]), lambda matrix, block: (matrix, block, 0)),
            own,
        ],
        out_specs=pl.BlockSpec((None, rows, width), lambda matrix, block: (matrix, block, 0)),
        scratch_shapes=[pltpu.VMEM(unpack_tpu.scratch_shape(rows, width), jnp.int32)],
        out_shape=jax.ShapeDtypeStruct((matrices, out, width), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=target.interpret,
        name=f"expand_{kind}",
    )
    return call(values, scales).reshape(weight.shape)


def _choose_rows(out: int, width: int) -> int:
    """Returns the rows of a block."""
    for rows in (1024, 512, 256):
        if out % rows == 0 and rows * width <= _LARGEST_BLOCK:
            return rows
    return LANES


def _body(chip, kind, values_ref, scales_ref, out_ref, scratch_ref):
    """One block of rows of one matrix.

    input: values [rows, in] as stored, scales. output: [rows, in]. scratch: the expanded block.
    """
    first_tile = pl.program_id(1) * (out_ref.shape[0] // LANES)
    unpack_tpu.unpack(chip, kind, values_ref, scales_ref, scratch_ref, first_tile)
    rows, columns = unpack_tpu.row_matrix(jnp.bfloat16), unpack_tpu.split_matrix(jnp.bfloat16)

    @pl.loop(0, out_ref.shape[0] // UNPACK_ROWS)
    def _(step):
        place = pl.ds(pl.multiple_of(step * UNPACK_ROWS, UNPACK_ROWS), UNPACK_ROWS)
        expanded = unpack_tpu.read(scratch_ref, step, UNPACK_ROWS)
        if kind == "fp8":
            out_ref[place, :] = expanded
            return
        for first in range(0, expanded.shape[1], GROUP):
            group = slice(first, first + GROUP)
            mixed = expanded[:, group]
            if unpack_tpu.mixes_rows(chip):
                mixed = _product(rows, mixed, 0)
            out_ref[place, group] = _product(mixed, columns, 1)


def _product(left, right, axis: int):
    """Returns left · right, contracted over that axis of `right`, in bfloat16."""
    dimensions = (((1,), (axis,)), ((), ()))
    product = jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
    return product.astype(jnp.bfloat16)
