"""Products with stored weights on TPU: each block is expanded in VMEM once, for all tiles.

`multiply_tiles` serves linear layers (one weight) and the experts' down projection (every tile of
rows has its own). The grid loops over blocks of outputs and, inside, over tiles of rows. Successive
tiles of one expert find its block in VMEM, fetched and expanded once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.dispatch import Target
from v4jax.kernels.scaled_matmul import expand_tpu, unpack_tpu
from v4jax.kernels.stacked import Stacked
from v4jax.kernels.tpu import LANES, VMEM_BYTES, Chip, chip_of
from v4jax.quant import ScaledArray, formats
from v4jax.shapes import ceil_div, round_up

# Rows of one step: 512 hide the loading of weights into the MXU, 16 are one bfloat16 register.
LARGEST_TILE, SMALLEST_TILE = 512, 16
# Wide matrix units compute as many rows of a tile as it uses, in steps of so many.
ROW_STEP = 128
# Columns produced by one pass of the inner loop: two widths of the newer chips' MXU.
PASS = 512


def supported(x, weight) -> str | None:
    """Returns why `matmul` cannot run on these arguments, or None."""
    if not isinstance(weight, ScaledArray):
        return "the weight is not quantized; XLA's product is as good"
    if x.dtype != jnp.bfloat16:
        return f"activations must be bfloat16, got {x.dtype}"
    return unpack_tpu.why_not("weight", weight)


def matmul(x, weight, *, target: Target):
    """Returns x · weightᵀ, rounded to bfloat16; x is rounded to FP8 already where that is asked."""
    return _matmul(target, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(target, x, weight):
    *lead, width = x.shape
    rows = x.reshape(-1, width)
    tile = min(LARGEST_TILE, round_up(rows.shape[0], SMALLEST_TILE))
    tiles = ceil_div(rows.shape[0], tile)
    rows = jnp.pad(rows, [(0, tiles * tile - rows.shape[0]), (0, 0)])
    if unpack_tpu.kind_of(weight) == "fp4":
        rows = unpack_tpu.split(rows)
    experts = jnp.zeros(tiles, jnp.int32)
    one = jax.tree.map(lambda array: array[None], weight)
    out = multiply_tiles(target, rows, one, experts, jnp.int32(tiles), tile=tile)
    return out[: math.prod(lead)].reshape(*lead, out.shape[-1])


def _matmul_forward(target, x, weight):
    return _matmul(target, x, weight), weight


def _matmul_backward(target, weight, gradient):
    """Only x has a gradient: a quantized weight is a constant."""
    dense = expand_tpu.expand(weight, target=target)
    gradient_x = jnp.einsum("...o,oi->...i", gradient, dense, preferred_element_type=jnp.float32)
    return formats.round_to(gradient_x, gradient.dtype), jax.tree.map(zero_gradient, weight)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def zero_gradient(array):
    """Returns the gradient of an array that has none."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        return np.zeros(array.shape, jax.dtypes.float0)
    return jnp.zeros(array.shape, array.dtype)


def is_stacked(node) -> bool:
    """Returns whether a node of a weight's tree stands for one layer of a stack."""
    return isinstance(node, Stacked)


def layer_of(weight):
    """Returns (weight with arrays [l, e, …], layer [1]): a stack as it is, or one layer made so."""
    first = jax.tree.leaves(weight, is_leaf=is_stacked)[0]
    if is_stacked(first):
        arrays = jax.tree.map(lambda stack: stack.array, weight, is_leaf=is_stacked)
        return arrays, first.layer.astype(jnp.int32)[None]
    return jax.tree.map(lambda array: array[None], weight), jnp.zeros(1, jnp.int32)


def weight_operands(weight, layer):
    """Returns the arrays a kernel reads of a weight [l, e, …, out, in].

    FP8 scales, a 16,384th of the weight, are sliced and decoded to float32 outside the kernel.
    """
    kind = unpack_tpu.kind_of(weight)
    if kind == "bfloat16":
        return (weight,)
    scales = weight.scales
    if kind == "fp8":
        scales = jax.lax.dynamic_index_in_dim(scales, layer[0], keepdims=True)
        if scales.dtype == jnp.uint8:
            scales = formats.decode_e8m0(scales)
    return (weight.values, scales)


def weight_specs(weight, rows: int):
    """Returns block specs of `weight_operands`: `rows` of every matrix of the tile's expert.

    The grid is (block, tile); layer, experts and loads are prefetched.
    """
    kind = unpack_tpu.kind_of(weight)
    pairs = weight.shape[2:-2]  # () or (2,): gate and up
    width = weight.shape[-1]

    def place(block, tile, layer, experts, loads):
        del loads
        return (layer[0], experts[tile], *(0,) * len(pairs), block, 0)

    def scales_place(block, tile, layer, experts, loads):
        del block, layer, loads
        return (0, experts[tile], *(0,) * (len(pairs) + 2))

    if kind == "bfloat16":
        return [pl.BlockSpec((None, None, *pairs, rows, width), place)]
    values = pl.BlockSpec((None, None, *pairs, rows, weight.values.shape[-1]), place)
    if kind == "fp8":
        shape = weight.scales.shape[2:]
        return [values, pl.BlockSpec((None, None, *shape), scales_place)]
    return [values, pl.BlockSpec((None, None, *pairs, rows, weight.scales.shape[-1]), place)]


def expansion(kind, *sizes: int):
    """Returns the scratch for an expanded block [..., rows, columns]: none if it is bfloat16."""
    if kind == "bfloat16":
        return ()
    *pairs, rows, columns = sizes
    return (pltpu.VMEM((*pairs, *unpack_tpu.scratch_shape(rows, columns)), jnp.int32),)


def for_load(loads_ref, tile: int, partial: bool, run) -> None:
    """Calls `run` with the number of rows to compute: those of the tile, or as many as it uses."""
    if not partial:
        run(tile)
        return
    steps = jax.lax.div(loads_ref[pl.program_id(1)] + (ROW_STEP - 1), ROW_STEP)
    for number in range(1, tile // ROW_STEP + 1):
        pl.when(steps == number)(functools.partial(run, number * ROW_STEP))


def is_new(experts_ref):
    """Returns whether this tile's weights differ from the previous tile's."""
    tile = pl.program_id(1)
    previous = experts_ref[jnp.maximum(tile - 1, 0)]
    return (tile == 0) | (experts_ref[tile] != previous)


def choose_rows(out: int, width: int, kind, pairs: int, tile: int) -> int:
    """Returns how many output rows of a weight one block holds: the most that VMEM has room for."""
    stored = {"bfloat16": 2, "fp8": 1, "fp4": 0.5 + 1 / 32}[kind]
    per_weight = 2 * stored + (0 if kind == "bfloat16" else 2)  # two buffers, one expansion
    for rows in (1024, 512, 256, 128):
        activations = 2 * 2 * tile * (width + rows)
        if out % rows == 0 and pairs * rows * width * per_weight + activations < 0.75 * VMEM_BYTES:
            return rows
    return min(out, 128)


def multiply_tiles(target: Target, rows_ai, weight, experts, used, *, tile: int, loads=None):
    """Returns rows · weight[expert of their tile]ᵀ, rounded to bfloat16; unused tiles hold garbage.

    Args:
      rows_ai: bfloat16 [tiles·tile, in]; in split order for FP4.
      weight: [e, out, in], possibly `Stacked`.
      experts: [tiles], equal ones in a row.
      used: how many of the tiles count; the others cost nothing.
      loads: [tiles], rows of a tile that count, the first ones; None: all of them.
    """
    weight, layer = layer_of(weight)
    kind, (out, width) = unpack_tpu.kind_of(weight), weight.shape[-2:]
    block = choose_rows(out, width, kind, 1, tile)
    chip = chip_of(target)
    partial, loads = plan_loads(chip, experts, tile, loads)
    call = pl.pallas_call(
        functools.partial(_multiply_body, chip, kind, block, partial),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(out // block, used),
            in_specs=[
                pl.BlockSpec((tile, width), lambda block, tile, *prefetched: (tile, 0)),
                *weight_specs(weight, block),
            ],
            out_specs=pl.BlockSpec((tile, block), lambda block, tile, *prefetched: (tile, block)),
            scratch_shapes=expansion(kind, block, width),
        ),
        out_shape=jax.ShapeDtypeStruct((rows_ai.shape[0], out), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=target.interpret,
        name=f"scaled_matmul_{kind}",
    )
    return call(layer, experts, loads, rows_ai, *weight_operands(weight, layer))


def plan_loads(chip: Chip, experts, tile: int, loads):
    """Returns (whether tiles compute only the rows they use, loads [tiles] for the kernel)."""
    if loads is None:
        return False, jnp.full_like(experts, tile)
    return varies(chip, tile), loads


def varies(chip: Chip, tile: int) -> bool:
    """Returns whether only the rows that a tile uses are computed, given its load."""
    return tile > 2 * ROW_STEP and tile % ROW_STEP == 0 and chip.modern


def _multiply_body(
    chip, kind, block, partial, layer_ref, experts_ref, loads_ref, rows_ref, values_ref, *rest
):
    """One block of outputs of one tile.

    prefetch: layer [1], experts [tiles], loads [tiles]. input: rows [tile, in], values [block, in]
    as stored, scales unless bfloat16. output: [tile, block]. scratch: the expanded block, unless
    bfloat16.
    """
    del layer_ref
    if kind == "bfloat16":
        (out_ref,) = rest
    else:
        scales_ref, out_ref, scratch_ref = rest
        first_tile = pl.program_id(0) * (block // LANES)

        @pl.when(is_new(experts_ref))
        def _():
            unpack_tpu.unpack(chip, kind, values_ref, scales_ref, scratch_ref, first_tile)

    step = min(PASS, block)

    def run(rows):
        @pl.loop(0, block // step)
        def _(i):
            columns = pl.ds(pl.multiple_of(i * step, step), step)
            if kind == "bfloat16":
                weight = values_ref[columns, :]
            else:
                weight = unpack_tpu.read(scratch_ref, i, step)
            outputs = unpack_tpu.restore(chip, kind, multiply(rows_ref[:rows, :], weight))
            out_ref[:rows, columns] = outputs.astype(jnp.bfloat16)

    for_load(loads_ref, rows_ref.shape[0], partial, run)


def multiply(rows, weight):
    """Returns rows · weightᵀ in float32."""
    return jax.lax.dot_general(
        rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
