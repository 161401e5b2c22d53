"""Experts in plain jnp: tokens sorted by expert, in tiles of one expert each.

`jax.lax.ragged_dot` is not used: on CPU its work grows with the number of experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.scaled_matmul import product, round_activations
from v4jax.quant import ScaledArray
from v4jax.quant.formats import round_to
from v4jax.shapes import ceil_div

LARGEST_TILE = 256
SMALLEST_TILE = 8
# Tiles of one step are one batched product, as many as have expanded weights within these bytes:
# on two CPU cores four tiles of 128 rows run 1.4 times as fast together as one after the other.
TOGETHER = 4
TOGETHER_BYTES = 16 * 2**20


def apply_experts(x, expert_ids, weights, gate_up, down, *, limit, quantize_activations):
    """See `v4jax.kernels.grouped_matmul.apply_experts`."""
    tokens, chosen = expert_ids.shape
    quantized = quantize_activations and isinstance(gate_up, ScaledArray)
    if quantized:
        x = round_activations(x)
    flat_ids, flat_weights = expert_ids.reshape(-1), weights.reshape(-1)

    def run(expert, rows_qd, weights_q):
        return apply_expert(
            rows_qd, weights_q, take(gate_up, expert), take(down, expert), limit, quantized
        )

    if tokens <= SMALLEST_TILE:
        # Few tokens: one assignment at a time, no sorting.
        rows = jnp.repeat(x, chosen, axis=0)[:, None]
        outputs = jax.lax.map(lambda args: run(*args), (flat_ids, rows, flat_weights[:, None]))
        return outputs.reshape(tokens, chosen, -1).sum(axis=1)

    experts = gate_up.shape[0]
    tile = choose_tile(tokens * chosen, experts)
    plan = plan_tiles(flat_ids, experts, tile)
    together = choose_together(gate_up, down)
    steps = ceil_div(plan.experts.shape[0], together)
    plan = TilePlan(*(fill_steps(array, steps * together) for array in plan[:3]), plan.places)
    rows_nqd = x[plan.assignments // chosen]
    weights_nq = jnp.where(plan.valid, flat_weights[plan.assignments], 0.0)

    def step(args):
        experts_g, rows_gqd, weights_gq, used = args
        return jax.lax.cond(
            used,
            jax.vmap(run),
            lambda e, r, w: jnp.zeros((together, tile, down.shape[1]), jnp.float32),
            experts_g,
            rows_gqd,
            weights_gq,
        )

    # Used tiles come first: a step whose first tile is empty is empty.
    used_n = plan.valid[::together, 0]
    parts = (plan.experts, rows_nqd, weights_nq)
    parts = (part.reshape(steps, together, *part.shape[1:]) for part in parts)
    outputs_nqd = jax.lax.map(step, (*parts, used_n))
    outputs_ad = outputs_nqd.reshape(-1, outputs_nqd.shape[-1])[plan.places]
    return outputs_ad.reshape(tokens, chosen, -1).sum(axis=1)


def apply_shared_expert(x, gate_up, down, *, limit, quantize_activations):
    """See `v4jax.kernels.grouped_matmul.apply_shared_expert`."""
    quantized = quantize_activations and isinstance(gate_up, ScaledArray)
    if quantized:
        x = round_activations(x)
    return apply_expert(x, None, take(gate_up, ...), take(down, ...), limit, quantized)


def apply_expert(x_qd, weights_q, gate_up_2fd, down_df, limit, quantized):
    """Returns weight · expert(x) in float32 for rows of one expert; weights_q None stands for 1."""
    dtype = x_qd.dtype
    both = product(x_qd, gate_up_2fd.reshape(-1, gate_up_2fd.shape[-1]).astype(dtype))
    gate, up = jnp.split(both, 2, axis=-1)
    hidden = swiglu(round_to(gate, dtype), round_to(up, dtype), limit)
    if weights_q is not None:
        hidden = hidden * weights_q[..., None]
    hidden = round_to(hidden, dtype)
    if quantized:
        hidden = round_activations(hidden)
    # Each expert's output is rounded to the activation dtype, as a linear layer's is; the sum is
    # float32.
    return round_to(product(hidden, down_df.astype(dtype)), dtype).astype(jnp.float32)


def swiglu(gate, up, limit):
    """Returns silu(min(gate, limit)) · clip(up, −limit, limit) in float32 (spec B.13)."""
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return jax.nn.silu(gate) * up


def take(weight, expert):
    """Returns one expert's weights, expanded to float32 if they are quantized."""
    if isinstance(weight, ScaledArray):
        return weight[expert].dequantize()
    return weight[expert]


class TilePlan(NamedTuple):
    """Where each assignment (token, choice) goes: n tiles of one expert and q rows each.

    experts [n]; assignments [n, q] (0 where the row is empty); valid [n, q]; places [t·k]: row of
    each assignment in the flattened tiles.
    """

    experts: jax.Array
    assignments: jax.Array
    valid: jax.Array
    places: jax.Array


def choose_tile(assignments: int, experts: int) -> int:
    """Returns rows per tile: a power of two near half the mean load, so padding stays small."""
    mean = max(assignments // (2 * experts), 1)
    return min(max(1 << (mean.bit_length() - 1), SMALLEST_TILE), LARGEST_TILE)


def choose_together(gate_up, down) -> int:
    """Returns how many tiles one step takes: by the bytes of their weights in float32."""
    weight_bytes = 4 * (math.prod(gate_up.shape[1:]) + math.prod(down.shape[1:]))
    return max(1, min(TOGETHER, TOGETHER_BYTES // weight_bytes))


def fill_steps(array, tiles: int):
    """Returns the array [n, …] with empty tiles at the end."""
    return jnp.pad(array, [(0, tiles - array.shape[0])] + [(0, 0)] * (array.ndim - 1))


def plan_tiles(flat_ids, experts: int, tile: int) -> TilePlan:
    """Sorts assignments by expert and gives every expert as many tiles as its load needs.

    ⌊assignments / tile⌋ + experts tiles always suffice, since each expert wastes less than one.
    """
    count = flat_ids.shape[0]
    order = jnp.argsort(flat_ids, stable=True)
    load_e = jnp.bincount(flat_ids, length=experts)
    tiles_e = ceil_div(load_e, tile)
    first_tile_e = jnp.cumsum(tiles_e) - tiles_e
    first_row_e = jnp.cumsum(load_e) - load_e
    tiles = min(count // tile + experts, count)
    tile_ids = jnp.arange(tiles)
    expert_n = jnp.searchsorted(jnp.cumsum(tiles_e), tile_ids, side="right")
    used_n = expert_n < experts
    expert_n = jnp.minimum(expert_n, experts - 1)
    row_nq = (tile_ids - first_tile_e[expert_n])[:, None] * tile + jnp.arange(tile)
    valid_nq = used_n[:, None] & (row_nq < load_e[expert_n][:, None])
    source_nq = jnp.clip(first_row_e[expert_n][:, None] + row_nq, 0, count - 1)
    assignments_nq = jnp.where(valid_nq, order[source_nq], 0)
    # The s-th assignment in sorted order is row (s − first_row) of its expert, whose tiles are
    # contiguous.
    sorted_ids = flat_ids[order]
    place = first_tile_e[sorted_ids] * tile + jnp.arange(count) - first_row_e[sorted_ids]
    places = jnp.zeros(count, jnp.int32).at[order].set(place.astype(jnp.int32))
    return TilePlan(expert_n, assignments_nq, valid_nq, places)
