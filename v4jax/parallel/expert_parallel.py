"""Tokens travel to the devices of their experts and back; none is ever dropped.

Two ways, by where tokens are. Where devices have different tokens (training, prefill), each sends
rows to the owners of the chosen experts in buffers of a bounded size, one buffer per pair of
devices. A load that does not fit goes in further rounds, as many as the fullest buffer needs, so
there is nothing to overflow: even loads take `even_rounds`, one unless a device has very many
tokens, and all tokens on one expert take the most.
Where devices have the same few tokens (decoding), nothing travels: each computes what its own
experts add, and the results are summed.

The experts themselves are `compute(parameters, rows, ids, weights)` on local ids; the id one past
the last names no expert, costs nothing, and its result is never read.

Source: report, expert parallelism (spec G.8): dispatch may be FP8, combine is not.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from v4jax.errors import ConfigError
from v4jax.parallel.layout import Axes, ExpertExchange, Layout
from v4jax.quant import formats
from v4jax.ranks import rank
from v4jax.shapes import ceil_div, round_up

Compute = Callable[[Any, Array, Array, Array], Array]
FP8_BLOCK = 128
SMALLEST_BUFFER = 8
# Assignments of a device in one round. A round holds some ten arrays of them, and reads the weights
# of the experts again: beside so many, those are a small part of its work.
MOST_ROWS = 16384


def route(
    axes: Axes,
    compute: Compute,
    parameters: Any,
    x: Float[Array, "t d"],
    ids: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    real: Bool[Array, "t"] | None,
    experts: int,
) -> Float[Array, "t d"]:
    """Returns Σ_k of what the chosen experts give for each token, wherever they are, float32.

    Args:
      compute: (parameters, rows [r, d], local ids [r, j], weights [r, j]) → [r, d], float32, by the
        experts of this device; without a layout these are all.
      parameters: of these experts, any pytree; `compute` takes traced arrays from nowhere else.
      real: false marks padding, which goes nowhere; None: all are real.
      experts: of all devices together.
    """
    owners = axes.mesh_axes("experts")
    if not owners:
        return compute(parameters, x, ids, weights)
    own_tokens = {*axes.mesh_axes("batch"), *axes.mesh_axes("tokens")}
    distinct = tuple(axis for axis in owners if axis in own_tokens)
    repeated = tuple(axis for axis in owners if axis not in own_tokens)
    if real is not None:
        ids = jnp.where(real[:, None], ids, experts)
    local = experts // axes.size("experts")
    exchange = axes.layout.exchange
    if exchange.transport == "gather" or (repeated and exchange.transport == "auto"):
        first = axes.offset("experts", local)
        compute = functools.partial(compute, parameters)
        return _gather(compute, x, ids, weights, first, local, distinct, repeated)
    if repeated:
        raise ConfigError(
            f"exchange.transport = {exchange.transport!r} needs devices with different "
            f"tokens, but here those along {repeated} have the same; use 'auto'"
        )
    return _exchange(compute, (parameters, x, weights), ids, local, axes.layout, owners)


def _gather(compute, x, ids, weights, first, local, distinct, repeated):
    """Every device computes what its own experts add to all tokens of the group."""
    if distinct:
        x, ids, weights = (
            jax.lax.all_gather(array, distinct, axis=0, tiled=True) for array in (x, ids, weights)
        )
    tokens, chosen = ids.shape
    ids_a = (ids - first).reshape(-1)
    here_a = (ids_a >= 0) & (ids_a < local)
    ids_a = jnp.where(here_a, ids_a, local)
    output_ad = compute(jnp.repeat(x, chosen, axis=0), ids_a[:, None], weights.reshape(-1)[:, None])
    output_ad = jnp.where(here_a[:, None], output_ad, 0.0)
    output_td = output_ad.reshape(tokens, chosen, -1).sum(axis=1)
    if repeated:
        output_td = jax.lax.psum(output_td, repeated)
    if distinct:
        output_td = jax.lax.psum_scatter(output_td, distinct, scatter_dimension=0, tiled=True)
    return output_td


class _Destinations(NamedTuple):
    """Where each assignment (token, choice) of this device goes.

    owner [a]: device, `devices` for none. rank [a]: its place among those of the same owner;
    meaningless without an owner. load: assignments for the fullest pair of devices, the same number
    everywhere.
    """

    owner: jax.Array
    rank: jax.Array
    load: jax.Array


def _exchange(compute, operands, ids, local, layout: Layout, axes):
    """Sends rows to the owners of their experts, in rounds of bounded buffers, and back.

    Args:
      operands: parameters, x [t, d], weights [t, k]: all that gets gradients.
      axes: mesh axes of the experts.
    """
    devices, exchange = layout.size(axes), layout.exchange
    bound = buffer_rows(*ids.shape, devices, exchange.slack)
    destinations = _find_destinations(ids.reshape(-1) // local, devices, layout)
    run = functools.partial(_run_round, compute, local, axes, devices, exchange, bound)
    if bound >= ids.size:
        return run(operands, ids, destinations, jnp.int32(0))
    return _run_rounds(run, operands, ids, destinations, ceil_div(destinations.load, bound))


def _run_round(
    compute,
    local,
    axes,
    devices,
    exchange: ExpertExchange,
    bound,
    operands,
    ids,
    destinations,
    number,
):
    """Returns what the assignments of one round add."""
    (parameters, x, weights), chosen = operands, ids.shape[1]
    place_a = destinations.rank - number * bound
    sent_a = (place_a >= 0) & (place_a < bound) & (destinations.owner < devices)
    every_a = jnp.arange(ids.size, dtype=jnp.int32)
    slots = devices * bound
    # What is not sent has a slot of its own behind the last one.
    slot_a = jnp.where(sent_a, destinations.owner * bound + place_a, slots + every_a)
    source_s = jnp.full(slots, -1, jnp.int32)
    source_s = source_s.at[slot_a].set(every_a, mode="drop", unique_indices=True)
    used_s = source_s >= 0
    ids_s = jnp.where(used_s, ids.reshape(-1)[jnp.maximum(source_s, 0)] % local, local)
    weights_s1 = _fill_slots(1, weights.reshape(-1, 1), source_s, slot_a)
    rows_sd = _fill_slots(chosen, x, source_s, slot_a)
    # A buffer is filled from its front, so counts say which rows are real.
    counts = used_s.reshape(devices, bound).sum(axis=1, dtype=jnp.int32)
    arriving = jax.lax.all_to_all(counts, axes, 0, 0, tiled=True)
    send = functools.partial(_send, axes, exchange.transport, bound)
    ids_s, weights_s1 = (
        jax.lax.all_to_all(array, axes, 0, 0, tiled=True) for array in (ids_s, weights_s1)
    )
    if exchange.payload == "fp8":
        rows_sd = _send_fp8(axes, exchange.transport, bound, rows_sd, counts, arriving)
    else:
        rows_sd = send(rows_sd, counts, arriving)
    output_sd = compute(parameters, rows_sd, ids_s[:, None], weights_s1)
    output_sd = jnp.where((ids_s < local)[:, None], output_sd, 0.0).astype(x.dtype)
    output_sd = send(output_sd, arriving, counts)
    return _sum_slots(chosen, output_sd, source_s, slot_a)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fill_slots(chosen, x_td, source_s, slot_a):
    """Returns in every slot the token of its assignment, zeros in empty ones.

    Here and in `_sum_slots` both directions are told, the assignment of a slot and the slot of an
    assignment, so that the gradients gather as well: an addition at given places would sort them.

    Args:
      chosen: assignments of a token.
      source_s: assignment in each slot, −1 for none.
      slot_a: slot of each assignment; past the last one for none.
    """
    del slot_a
    rows_sd = x_td[jnp.maximum(source_s, 0) // chosen]
    return jnp.where((source_s >= 0)[:, None], rows_sd, jnp.zeros((), x_td.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_slots(chosen, rows_sd, source_s, slot_a):
    """Returns the sum over each token's assignments of what stands in their slots, float32."""
    del source_s
    slots = rows_sd.shape[0]
    slot_kt = slot_a.reshape(-1, chosen).T

    def add(sum_td, slot_t):  # one choice after the other: together they fill a gigabyte
        rows_td = rows_sd[jnp.minimum(slot_t, slots - 1)].astype(jnp.float32)
        return sum_td + jnp.where((slot_t < slots)[:, None], rows_td, 0.0), None

    start = jnp.zeros((slot_kt.shape[1], rows_sd.shape[1]), jnp.float32)
    return jax.lax.scan(add, start, slot_kt)[0]


def _keep_places(function):
    """Returns the forward rule of a function of rows: it keeps their type and the places."""

    def forward(chosen, x, source_s, slot_a):
        like = jnp.zeros((), x.dtype)
        return function(chosen, x, source_s, slot_a), (like, source_s, slot_a)

    return forward


def _gradient_by(function):
    """Returns the backward rule whose gradient is what `function` gives for the cotangent."""

    def backward(chosen, kept, gradient):
        like, source_s, slot_a = kept
        return function(chosen, gradient, source_s, slot_a).astype(like.dtype), None, None

    return backward


_fill_slots.defvjp(_keep_places(_fill_slots), _gradient_by(_sum_slots))
_sum_slots.defvjp(_keep_places(_sum_slots), _gradient_by(_fill_slots))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_rounds(run, operands, ids, destinations, rounds):
    """Returns the sum of run(operands, ids, destinations, n) for n = 0 … rounds−1.

    A loop, so that kernels are compiled once, whichever rounds there are. Rounds keep nothing for
    the backward pass, which computes them again one by one.
    """
    _, x, _ = operands
    start = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(
        0, rounds, lambda number, sums: sums + run(operands, ids, destinations, number), start
    )


def _run_rounds_forward(run, *arguments):
    return _run_rounds(run, *arguments), arguments


def _run_rounds_backward(run, kept, gradient):
    operands, ids, destinations, rounds = kept
    leaves, structure = jax.tree.flatten(operands)
    trains = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def add(number, sums):
        _, pull = jax.vjp(lambda operands: run(operands, ids, destinations, number), operands)
        grads = itertools.compress(jax.tree.leaves(pull(gradient)[0]), trains)
        return [total + grad for total, grad in zip(sums, grads, strict=True)]

    start = [jnp.zeros_like(leaf) for leaf in itertools.compress(leaves, trains)]
    sums = iter(jax.lax.fori_loop(0, rounds, add, start))
    grads = [
        next(sums) if trained else np.zeros(leaf.shape, jax.dtypes.float0)
        for leaf, trained in zip(leaves, trains, strict=True)
    ]
    return jax.tree.unflatten(structure, grads), None, None, None


_run_rounds.defvjp(_run_rounds_forward, _run_rounds_backward)


def buffer_rows(tokens: int, chosen: int, devices: int, slack: float) -> int:
    """Returns the rows of one buffer: `slack` times an even load, and at most all assignments.

    Of a load that takes `even_rounds`, each takes an even share.
    """
    even = ceil_div(tokens * chosen, devices * even_rounds(tokens * chosen))
    return min(max(round_up(int(slack * even), 8), SMALLEST_BUFFER), round_up(tokens * chosen, 8))


def even_rounds(assignments: int) -> int:
    """Returns how many rounds the assignments of a device take, spread evenly over the experts."""
    return ceil_div(assignments, MOST_ROWS)


def _find_destinations(owner_a, devices: int, layout: Layout) -> _Destinations:
    owner_a = jnp.minimum(owner_a, devices).astype(jnp.int32)
    rank_a, load_o = rank(owner_a, devices)
    # Every device of the mesh must agree on the rounds, as they all take part in them.
    load = jax.lax.pmax(load_o.max(), layout.mesh.axis_names)
    return _Destinations(owner_a, rank_a, load)


def _send(axes, transport, bound, rows, counts, arriving):
    """Sends buffer j of `rows` [devices·bound, …] to device j; returns those received, in order.

    Args:
      counts, arriving: real rows of each buffer sent and received; the others are arbitrary, and
        received as zeros by the ragged transport.
    """
    if transport != "ragged":
        return jax.lax.all_to_all(rows, axes, 0, 0, tiled=True)
    own = jnp.arange(counts.shape[0], dtype=jnp.int32) * bound
    there = jnp.full_like(own, jax.lax.axis_index(axes) * bound)
    return jax.lax.ragged_all_to_all(
        rows, jnp.zeros_like(rows), own, counts, there, arriving, axis_name=axes
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _send_fp8(axes, transport, bound, rows, counts, arriving):
    """As `_send`, the rows rounded to e4m3 with a power-of-two scale per 128 channels."""
    values, scales = formats.quantize_fp8(rows, FP8_BLOCK)
    values = jax.lax.bitcast_convert_type(values, jnp.uint8)
    values = _send(axes, transport, bound, values, counts, arriving)
    scales = _send(axes, transport, bound, scales, counts, arriving)
    values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    return formats.dequantize_fp8(values, scales, FP8_BLOCK).astype(rows.dtype)


def _send_fp8_forward(axes, transport, bound, rows, counts, arriving):
    received = _send_fp8(axes, transport, bound, rows, counts, arriving)
    return received, (counts, arriving)


def _send_fp8_backward(axes, transport, bound, kept, gradient):
    """The gradient travels back unrounded, as if the rows had not been rounded."""
    counts, arriving = kept
    back = _send(axes, transport, bound, gradient, arriving, counts)
    return back, None, None


_send_fp8.defvjp(_send_fp8_forward, _send_fp8_backward)
