"""Sequences and caches split over devices: neighbours' rows, gathering, exact merging.

A sequence is split contiguously into shards of whole windows. A device sees the rows just before
its own (`rows_before`): the window's history and the last compression windows. Compressed entries
and index keys are gathered. A cache is split by entries; a step of decoding reads each shard on its
own device, and partial results are merged here.

Source: report, context parallelism for compression (spec G.8).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.config import ModelConfig
from v4jax.parallel.axes import Tokens
from v4jax.parallel.layout import Axes, Layout
from v4jax.parallel.shard import check_batch


def token_unit(config: ModelConfig) -> int:
    """Returns the tokens that a shard is a multiple of: whole windows of every kind (128)."""
    ratios = (layer.ratio for layer in config.layers if layer.ratio)
    return math.lcm(config.sliding_window, *ratios)


@dataclasses.dataclass(frozen=True)
class Call:
    """How the tokens of one call are laid on the devices of their sequence.

    tokens: split over the devices, or whole on each. count: tokens as given. padding: tokens added
    on the right, which make the shards whole windows.
    """

    tokens: Tokens
    count: int
    padding: int

    def pad(self, x: Array) -> Array:
        """Returns [b, t, …] with the padding."""
        widths = [(0, 0), (0, self.padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths) if self.padding else x

    def cut(self, x: Array) -> Array:
        """Returns [b, t, …] without the padding."""
        return x[:, : self.count] if self.padding else x


def plan_call(
    layout: Layout | None, config: ModelConfig, batch: int, count: int, *, extends: bool
) -> Call:
    """Returns how a call on `count` tokens of each sequence is laid out.

    Args:
      extends: whether the call extends a cache. Where it then has too few tokens to give every
        device a shard, each device has them all and reads its own shard of the entries.

    Raises:
      ConfigError: the devices along `data` do not divide the batch.
    """
    if layout is None:
        return Call("split", count, 0)
    check_batch(layout, batch)
    shards = layout.size(layout.array_axes("tokens"))
    unit = 1 if shards == 1 else shards * token_unit(config)
    if extends and count < unit:
        return Call("whole", count, 0)
    return Call("split", count, -count % unit)


def divide_tokens(layout: Layout | None, count: int) -> Tokens:
    """Returns how tokens lie in code that works token by token: whole where they do not divide."""
    shards = 1 if layout is None else layout.size(layout.array_axes("tokens"))
    return "whole" if count % shards else "split"


def rows_before(axes: Axes, rows: jax.Array, history: jax.Array) -> jax.Array:
    """Returns the rows before `rows` [b, t, …], as many as `history` has.

    They are the left neighbour's last ones; before the first shard they are `history` itself.
    """
    if axes.size("tokens") == 1:
        return history
    left = _from_left(axes, rows[:, -history.shape[1] :])
    return jnp.where(axes.index("tokens") == 0, history, left)


def prepend(axes: Axes, rows: jax.Array, size: int) -> jax.Array:
    """Returns the `size` rows before `rows` [b, t, …], and `rows`; zeros before a start."""
    if axes.size("tokens") == 1 or not size:
        return jnp.pad(rows, [(0, 0), (size, 0)] + [(0, 0)] * (rows.ndim - 2))
    return jnp.concatenate([_from_left(axes, rows[:, -size:]), rows], axis=1)


def _from_left(axes, rows):
    neighbours = [(i, i + 1) for i in range(axes.size("tokens") - 1)]
    # The first device gets zeros.
    return jax.lax.ppermute(rows, axes.mesh_axes("tokens"), neighbours)


def take_owned(axes: Axes, rows: jax.Array, owned: jax.Array) -> jax.Array:
    """Returns `rows` from the one device that owns each; equal everywhere afterwards.

    Args:
      rows: [b, s, …]; what is not owned is arbitrary.
      owned: bool [b, s], true on one device of the sequence; rows of several are added up.
    """
    owned = owned.reshape(*owned.shape, *(1,) * (rows.ndim - owned.ndim))
    as_bits = rows.dtype.itemsize == 1  # float8 and bytes travel as integers, exactly
    values = jax.lax.bitcast_convert_type(rows, jnp.uint8).astype(jnp.int32) if as_bits else rows
    # In its own dtype: all but one of the summands are zero.
    values = jax.lax.psum(jnp.where(owned, values, 0), axes.mesh_axes("tokens"))
    if as_bits:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint8), rows.dtype)
    return values


def take_last(axes: Axes, x: jax.Array, lengths: Int[Array, "b"]) -> jax.Array:
    """Returns x[b, lengths[b] − 1] of [b, t, …] whose tokens are split or whole.

    It is NaN where any of the sequence's `lengths` first tokens is not finite: what a token did to
    the caches of those that follow may not show in the last one. Without tokens it is the first.
    """
    first, index = axes.offset("tokens", x.shape[1]), jnp.maximum(lengths - 1, 0)
    real_bt = first + jnp.arange(x.shape[1]) < lengths[:, None]
    finite_bt = jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim))) | ~real_bt
    finite_b1 = jnp.all(finite_bt, axis=1, keepdims=True)
    local = (index - first)[:, None]
    owned = (local >= 0) & (local < x.shape[1])
    rows = x[jnp.arange(x.shape[0])[:, None], jnp.clip(local, 0, x.shape[1] - 1)]
    rows = jnp.where(finite_b1.reshape(-1, *(1,) * (x.ndim - 1)), rows, jnp.nan)
    if axes.size("tokens") == 1:
        return rows[:, 0]
    # A device with bad tokens takes part in the sum, which is NaN whoever owns the last one.
    return take_owned(axes, rows, owned | ~finite_b1)[:, 0]


def merge_partials(
    axes: Axes, attended: Float[Array, "b t h c"], log_mass: Float[Array, "b t h"]
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """Returns attention over the entries of all devices from attention over each one's own.

    With log masses ℓ_i, the union's is ℓ = log Σ exp ℓ_i and its output Σ exp(ℓ_i − ℓ) · o_i.
    """
    shards = axes.mesh_axes("read_entries")
    if not shards:
        return attended.astype(jnp.float32), log_mass
    largest = jax.lax.pmax(log_mass, shards)
    scale = jnp.exp(log_mass - largest)
    mass = jax.lax.psum(scale, shards)
    weighted = jax.lax.psum(attended.astype(jnp.float32) * scale[..., None], shards)
    return weighted / mass[..., None], jnp.log(mass) + largest
