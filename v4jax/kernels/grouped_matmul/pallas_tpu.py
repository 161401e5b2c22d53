"""Routed experts on TPU: two kernels over tiles of tokens sorted by expert.

The first multiplies by gate and up, clamps, applies SwiGLU and the routing weight, and rounds; only
the hidden rows leave VMEM. The second multiplies by down. Both loop over blocks of outputs and,
inside, over the tiles in use, whose number is known on device only. An expert's block is fetched
and expanded once for all its tiles, an expert without tokens costs nothing, and a stack of layers
is indexed by the fetch, never sliced.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.errors import UnsupportedError
from v4jax.kernels.dispatch import Target
from v4jax.kernels.grouped_matmul import pallas_tpu_backward, portable
from v4jax.kernels.scaled_matmul import expand_tpu, round_activations, unpack_tpu
from v4jax.kernels.scaled_matmul import pallas_tpu as linear
from v4jax.kernels.stacked import Stacked
from v4jax.kernels.tpu import LANES, VMEM_BYTES, Chip, chip_of
from v4jax.quant import ScaledArray
from v4jax.quant.formats import FP8_AMAX_FLOOR, FP8_MAX
from v4jax.shapes import ceil_div

# Most rows of a tile: in the backward pass, and where matrix units are 128 wide. Where they are 256
# wide, loads around more than the usual tile get `linear.LARGEST_TILE`.
USUAL_TILE, NARROW_TILE = pallas_tpu_backward.LARGEST_TILE, 128


def supported(x, gate_up, down) -> str | None:
    """Returns why the kernels cannot run on these arguments, or None."""
    if x.dtype != jnp.bfloat16:
        return f"activations must be bfloat16, got {x.dtype}"
    return unpack_tpu.why_not("gate_up", gate_up) or unpack_tpu.why_not("down", down)


def apply_experts(x, expert_ids, weights, gate_up, down, *, limit, quantize_activations, target):
    """See `v4jax.kernels.grouped_matmul.apply_experts`."""
    expert_ids = jnp.asarray(expert_ids)
    return _apply(limit, quantize_activations, target, x, expert_ids, weights, gate_up, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(limit, quantize_activations, target, x, expert_ids, weights, gate_up, down):
    tokens, chosen = weights.shape
    quantized = quantize_activations and isinstance(gate_up, ScaledArray)
    if quantized:
        x = round_activations(x)
    experts = gate_up.shape[0]
    tile = choose_tile(chip_of(target), tokens * chosen, experts)
    plan = _plan(expert_ids, tokens, experts, tile)
    weights_nq = jnp.where(
        plan.valid, plan.lay_out(weights.reshape(-1, 1)).reshape(plan.valid.shape), 0.0
    )
    rows_ad = plan.lay_out(ordered(x, gate_up), chosen)
    used = plan.valid[:, 0].sum().astype(jnp.int32)
    places = plan.experts.astype(jnp.int32)
    # The tiles of a single expert are full but for one.
    loads = plan.valid.sum(axis=1, dtype=jnp.int32) if experts > 1 else None
    options = {"limit": limit, "quantized": quantized, "loads": loads}
    hidden_af = multiply_gated(target, rows_ad, weights_nq, gate_up, down, places, used, **options)
    output_ad = linear.multiply_tiles(target, hidden_af, down, places, used, tile=tile, loads=loads)
    return plan.take_back(output_ad, tokens).astype(jnp.float32).sum(axis=1)


def _plan(expert_ids, tokens, experts, tile):
    if expert_ids is None:
        return portable.plan_single(tokens, tile)
    return portable.plan_tiles(expert_ids.reshape(-1), experts, tile)


def _apply_forward(limit, quantize_activations, target, *arguments):
    return _apply(limit, quantize_activations, target, *arguments), arguments


def _apply_backward(limit, quantize_activations, target, arguments, gradient):
    """Quantized weights are constants: they get no gradient, and are expanded for the products.

    Their roundings of activations count as the identity.
    """
    x, expert_ids, weights, gate_up, down = arguments
    experts = gate_up.shape[0]
    if quantize_activations and isinstance(gate_up, ScaledArray):
        x = round_activations(x)
    tile = choose_backward_tile(weights.size, experts)
    plan = _plan(expert_ids, len(x), experts, tile)
    expanded = _expand(target, gate_up), _expand(target, down)
    d_x, d_weights, *d_stored = pallas_tpu_backward.backward(
        target, plan, tile, x, weights, *expanded, gradient, limit=limit
    )
    for i, weight in enumerate((gate_up, down)):
        if isinstance(weight, ScaledArray):
            d_stored[i] = jax.tree.map(linear.zero_gradient, weight)
    d_ids = jax.tree.map(linear.zero_gradient, expert_ids)
    return d_x, d_ids, d_weights, *d_stored


def _expand(target, weight):
    """Returns a weight [e, …] in bfloat16; exact."""
    if isinstance(weight, jax.Array):
        return weight
    if any(isinstance(x, Stacked) for x in jax.tree.leaves(weight, is_leaf=linear.is_stacked)):
        raise UnsupportedError(
            "stacked layers only infer: give each layer its own experts to train"
        )
    return expand_tpu.expand(weight, target=target)


_apply.defvjp(_apply_forward, _apply_backward)


def apply_shared_expert(x, gate_up, down, *, limit, quantize_activations, target):
    """See `v4jax.kernels.grouped_matmul.apply_shared_expert`: one expert that has every token."""
    gate_up, down = jax.tree.map(lambda array: array[None], (gate_up, down))
    weights = jnp.ones((x.shape[0], 1), jnp.float32)
    return _apply(limit, quantize_activations, target, x, None, weights, gate_up, down)


def choose_tile(chip: Chip, assignments: int, experts: int) -> int:
    """Returns rows per tile: what costs least for a load some way around the mean.

    Units 256 wide take as long to load weights as for 256 rows, so an expert gets one tile, if 512
    rows suffice, of which the kernels compute 128 or more as it uses. Units 128 wide are busy with
    128 rows, whose padding is the least.
    """
    tile = choose_backward_tile(assignments, experts)
    if not chip.modern:
        return min(tile, NARROW_TILE)
    return linear.LARGEST_TILE if 5 * assignments > 4 * USUAL_TILE * experts else tile


def choose_backward_tile(assignments: int, experts: int) -> int:
    """Returns rows per tile of a kernel that computes all: the power of two above the mean load.

    A short tile costs as much as one of 128 rows. Padding is half a tile per expert.
    """
    wanted = ceil_div(5 * assignments, 4 * experts)
    return min(max(1 << (wanted - 1).bit_length(), linear.SMALLEST_TILE), USUAL_TILE)


def ordered(x, weight):
    """Returns x in the order of columns in which `weight` is contracted."""
    return unpack_tpu.split(x) if unpack_tpu.kind_of(weight) == "fp4" else x


def multiply_gated(
    target: Target,
    rows_ad,
    weights_nq,
    gate_up,
    down,
    experts,
    used,
    *,
    limit,
    quantized,
    loads=None,
):
    """Returns the rounded inner activations [tiles·tile, f] in the column order that `down` wants.

    Args:
      rows_ad: bfloat16, tiles of one expert each, in the column order that `gate_up` wants.
      weights_nq: routing weights, 0 in empty rows.
      loads: [tiles], rows of a tile that count, the first ones; None: all of them.
    """
    tile = weights_nq.shape[1]
    gate_up, layer = linear.layer_of(gate_up)
    kind = unpack_tpu.kind_of(gate_up)
    width_f, width_d = gate_up.shape[-2:]
    block = linear.choose_rows(width_f, width_d, kind, 2, tile)
    splits = unpack_tpu.kind_of(down) == "fp4"
    chip = chip_of(target)
    partial, loads = linear.plan_loads(chip, experts, tile, loads)
    call = pl.pallas_call(
        functools.partial(_gated_body, chip, kind, block, partial, splits, quantized, limit),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(width_f // block, used),
            in_specs=[
                pl.BlockSpec((tile, width_d), lambda block, tile, *prefetched: (tile, 0)),
                pl.BlockSpec((tile, 1), lambda block, tile, *prefetched: (tile, 0)),
                *linear.weight_specs(gate_up, block),
            ],
            out_specs=pl.BlockSpec((tile, block), lambda block, tile, *prefetched: (tile, block)),
            scratch_shapes=linear.expansion(kind, 2, block, width_d),
        ),
        out_shape=jax.ShapeDtypeStruct((rows_ad.shape[0], width_f), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=target.interpret,
        name=f"grouped_matmul_gated_{kind}",
    )
    weights_a1 = weights_nq.astype(jnp.float32).reshape(-1, 1)
    return call(layer, experts, loads, rows_ad, weights_a1, *linear.weight_operands(gate_up, layer))


def _gated_body(
    chip,
    kind,
    block,
    partial,
    splits,
    quantized,
    limit,
    layer_ref,
    experts_ref,
    loads_ref,
    rows_ref,
    weights_ref,
    values_ref,
    *rest,
):
    """One block of inner activations of one tile.

    prefetch: layer [1], experts [tiles], loads [tiles]. input: rows [tile, d], weights [tile, 1],
    values [2, block, d] as stored, scales unless bfloat16. output: hidden [tile, block]. scratch:
    the expanded block, unless bfloat16.
    """
    del layer_ref
    if kind == "bfloat16":
        (out_ref,) = rest
    else:
        scales_ref, out_ref, scratch_ref = rest
        first_tile = pl.program_id(0) * (block // LANES)

        @pl.when(linear.is_new(experts_ref))
        def _():
            for which in range(2):
                unpack_tpu.unpack(
                    chip,
                    kind,
                    values_ref.at[which],
                    scales_ref.at[which],
                    scratch_ref.at[which],
                    first_tile,
                    splits=splits,
                )

    step = min(linear.PASS // 2, block)  # of gate and of up
    mixed = kind == "fp4" and unpack_tpu.mixes_rows(chip)

    def product(which, i, rows):
        if kind == "bfloat16":
            weight = values_ref[which, pl.ds(pl.multiple_of(i * step, step), step), :]
        else:
            weight = unpack_tpu.read(scratch_ref.at[which], i, step)
        return linear.multiply(rows_ref[:rows, :], weight).astype(jnp.bfloat16)

    def run(rows):
        @pl.loop(0, block // step)
        def _(i):
            gate, up = product(0, i, rows), product(1, i, rows)
            hidden = portable.swiglu(gate, up, limit) * weights_ref[:rows, :]
            hidden = hidden.astype(jnp.bfloat16)
            if quantized:
                hidden = round_fp8(hidden.astype(jnp.float32), splits=splits and mixed)
                hidden = hidden.astype(jnp.bfloat16)
            if splits and not mixed:
                # A product with a permutation is exact.
                matrix = unpack_tpu.split_matrix(jnp.bfloat16)
                hidden = jnp.dot(hidden, matrix, preferred_element_type=jnp.float32)
            elif not splits:
                hidden = unpack_tpu.restore(chip, kind, hidden.astype(jnp.float32))
            columns = pl.ds(pl.multiple_of(i * step, step), step)
            out_ref[:rows, columns] = hidden.astype(jnp.bfloat16)

    linear.for_load(loads_ref, rows_ref.shape[0], partial, run)


def round_fp8(x, *, splits=False):
    """Rounds float32 [rows, c] to e4m3 with a power-of-two scale per row and 128 columns.

    With `splits` the columns lie in split order, and are 256 at least.

    The same numbers as `formats.quantize_fp8` gives, without a cast that few chips have: adding and
    subtracting 1.5·2^23 units in the last place rounds to the nearest, ties to even.
    """
    lanes = LANES
    blocks = [x[:, first : first + lanes] for first in range(0, x.shape[1], lanes)]
    if not splits:
        largest = [jnp.max(jnp.abs(x), axis=1, keepdims=True) for x in blocks]
        rounded = [_round_blocks(*pair)[0] for pair in zip(largest, blocks, strict=True)]
        return jnp.concatenate(rounded, axis=1)
    is_first = jax.lax.broadcasted_iota(jnp.int32, blocks[0].shape, 1) < lanes // 2
    rounded = []
    for even, odd in zip(blocks[0::2], blocks[1::2], strict=True):
        # Each half of the lanes holds columns of one block of 128.
        sizes = jnp.maximum(jnp.abs(even), jnp.abs(odd))
        first, second = (
            jnp.max(jnp.where(is_first == wanted, sizes, 0.0), axis=1, keepdims=True)
            for wanted in (True, False)
        )
        rounded += _round_blocks(jnp.where(is_first, first, second), even, odd)
    return jnp.concatenate(rounded, axis=1)


def _round_blocks(largest, *blocks):
    """Returns the blocks, rounded by the scale of their largest magnitudes."""
    amax = jnp.maximum(largest, FP8_AMAX_FLOOR)
    bits = jax.lax.bitcast_convert_type(amax * jnp.float32(1.0 / FP8_MAX), jnp.int32)
    # amax has a floor, so the scale's exponent is 97 at least and its inverse is normal as well.
    exponent = (bits >> 23) + jnp.where((bits & 0x7FFFFF) != 0, 1, 0)
    scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    inverse = jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    return [_round_scaled(x * inverse) * scale for x in blocks]


def _round_scaled(x):
    scaled = jnp.clip(x, -FP8_MAX, FP8_MAX)
    # Three bits of mantissa; below 2^−6 the step stays 2^−9.
    power = jax.lax.bitcast_convert_type(scaled, jnp.int32) & 0x7F800000
    power = jnp.maximum(jax.lax.bitcast_convert_type(power, jnp.float32), 2.0**-6)
    shift = power * (1.5 * 2.0**20)
    return (scaled + shift) - shift
