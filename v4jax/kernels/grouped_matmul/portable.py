"""Experts in plain jnp: tokens sorted by expert, in tiles of one expert each.

`jax.lax.ragged_dot` is not used: on CPU its work grows with the number of experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.dispatch import Target
from v4jax.kernels.scaled_matmul import round_activations
from v4jax.kernels.scaled_matmul.portable import product
from v4jax.quant import ScaledArray
from v4jax.quant.formats import round_to
from v4jax.ranks import rank
from v4jax.shapes import ceil_div

LARGEST_TILE = 256
GPU_TILE = 2048  # each tile copies its expert's weights
SMALLEST_TILE = 8
# Tiles of one step are one batched product, as many as have expanded weights within these bytes:
# on two CPU cores four tiles of 128 rows run 1.4 times as fast together as one after the other.
TOGETHER = 4
TOGETHER_BYTES = 16 * 2**20


def apply_experts(x, expert_ids, weights, gate_up, down, *, limit, quantize_activations, target):
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
    tile = choose_tile(target, tokens * chosen, experts)
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


def apply_shared_expert(x, gate_up, down, *, limit, quantize_activations, target):
    """See `v4jax.kernels.grouped_matmul.apply_shared_expert`."""
    del target
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
    each assignment in the flattened tiles. assignments and places are None where they would be
    successive numbers: one expert has all the rows.
    """

    experts: jax.Array
    assignments: jax.Array | None
    valid: jax.Array
    places: jax.Array | None

    def lay_out(self, values, chosen: int = 1):
        """Returns the rows of all tiles [n·q, …] with what their tokens have; empty ones, anything.

        Args:
          values: [t, …], a token's, or an assignment's with `chosen` 1.
          chosen: assignments that share a value.
        """
        if self.assignments is None:
            return jnp.pad(values, [(0, self.valid.size - len(values)), (0, 0)])
        return values[self.assignments.reshape(-1) // chosen]

    def take_back(self, rows, tokens: int):
        """Returns the rows of each token's assignments [t, k, …] out of `rows` [n·q, …]."""
        rows = rows[:tokens] if self.places is None else rows[self.places]
        return rows.reshape(tokens, -1, *rows.shape[1:])


def choose_tile(target: Target, assignments: int, experts: int) -> int:
    """Returns rows per tile: a power of two near half the mean load, so padding stays small.

    On GPUs it is near the mean load: copying weights for more tiles costs more than padding.
    """
    aim = max(assignments // (target.sized(2, gpu=1) * experts), 1)
    largest = target.sized(LARGEST_TILE, gpu=GPU_TILE)
    return min(max(1 << (aim.bit_length() - 1), SMALLEST_TILE), largest)


def choose_together(gate_up, down) -> int:
    """Returns how many tiles one step takes: by the bytes of their weights in float32."""
    weight_bytes = 4 * (math.prod(gate_up.shape[1:]) + math.prod(down.shape[1:]))
    return max(1, min(TOGETHER, TOGETHER_BYTES // weight_bytes))


def fill_steps(array, tiles: int):
    """Returns the array [n, …] with empty tiles at the end."""
    return jnp.pad(array, [(0, tiles - array.shape[0])] + [(0, 0)] * (array.ndim - 1))


def plan_single(rows: int, tile: int) -> TilePlan:
    """Returns the plan of rows that are all the same expert's."""
    tiles = ceil_div(rows, tile)
    valid_nq = jnp.arange(tiles * tile).reshape(tiles, tile) < rows
    return TilePlan(jnp.zeros(tiles, jnp.int32), None, valid_nq, None)


def plan_tiles(flat_ids, experts: int, tile: int) -> TilePlan:
    """Lays assignments out by expert and gives every expert as many tiles as its load needs.

    ⌊assignments / tile⌋ + experts tiles always suffice, since each expert wastes less than one. An
    id past the last expert's goes nowhere: its place is arbitrary.
    """
    count = flat_ids.shape[0]
    rank_a, load_e = rank(flat_ids, experts)
    tiles_e = ceil_div(load_e, tile)
    last_tile_e = jnp.cumsum(tiles_e)
    first_tile_e = last_tile_e - tiles_e
    tiles = min(count // tile + experts, count)
    # Tiles of an expert are contiguous, its rows too.
    own_a = jnp.minimum(flat_ids, experts - 1)
    place_a = jnp.where(flat_ids < experts, first_tile_e[own_a] * tile + rank_a, 0)
    every_a = jnp.arange(count, dtype=jnp.int32)
    target_a = jnp.where(flat_ids < experts, place_a, tiles * tile + every_a)
    source_nq = jnp.full(tiles * tile, -1, jnp.int32)
    source_nq = source_nq.at[target_a].set(every_a, mode="drop", unique_indices=True)
    source_nq = source_nq.reshape(tiles, tile)
    expert_n = (jnp.arange(tiles)[:, None] >= last_tile_e).sum(axis=1)
    return TilePlan(
        jnp.minimum(expert_n, experts - 1), jnp.maximum(source_nq, 0), source_nq >= 0, place_a
    )
