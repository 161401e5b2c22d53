"""Sequences and caches split over devices: neighbours' rows, gathering, exact merging.

A sequence is split contiguously in shares of whole windows. A device sees the rows just before its
own (`rows_before`): the window's history and the last compression windows. Compressed entries and
index keys are gathered. A cache is split by entries; a step of decoding reads each share where it
lies, and partial results are merged here.

Source: report, context parallelism for compression (spec G.8).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.config import ModelConfig
from v4jax.parallel.axes import Regime
from v4jax.parallel.layout import Layout, split_axes
from v4jax.parallel.shard import check_batch, share_index, shares


def token_unit(config: ModelConfig) -> int:
    """Returns the tokens that a share is a multiple of: whole windows of every kind (128)."""
    ratios = (layer.ratio for layer in config.layers if layer.ratio)
    return math.lcm(config.sliding_window, *ratios)


@dataclasses.dataclass(frozen=True)
class Call:
    """How the tokens of one call are laid on the devices of their sequence.

    tokens: as given. padding: tokens added on the right, so that shares are whole windows.
    """

    regime: Regime
    tokens: int
    padding: int

    def pad(self, x: Array) -> Array:
        """Returns [b, t, …] with the padding."""
        widths = [(0, 0), (0, self.padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths) if self.padding else x

    def cut(self, x: Array) -> Array:
        """Returns [b, t, …] without the padding."""
        return x[:, : self.tokens] if self.padding else x


def plan_call(
    layout: Layout | None, config: ModelConfig, batch: int, tokens: int, *, decodes: bool
) -> Call:
    """Returns how a call is laid out.

    Args:
      decodes: whether the call extends a cache. If it then has too few tokens to give every device
        a share, each has them all, and reads its own share of the entries.

    Raises:
      ConfigError: the devices along `data` do not divide the batch.
    """
    if layout is None:
        return Call("prefill", tokens, 0)
    check_batch(layout, batch)
    split = layout.size(layout.array_axes("prefill", "tokens"))
    unit = 1 if split == 1 else split * token_unit(config)
    if decodes and tokens < unit:
        return Call("decode", tokens, 0)
    regime = "train" if layout.trains and not decodes else "prefill"
    return Call(regime, tokens, -tokens % unit)


def divide_tokens(layout: Layout | None, tokens: int) -> Regime:
    """Returns the regime of a call that works token by token: "decode" leaves them whole."""
    split = 1 if layout is None else layout.size(layout.array_axes("prefill", "tokens"))
    return "decode" if tokens % split else "prefill"


def own_start(start: Int[Array, "b"], tokens: int) -> Int[Array, "b"]:
    """Returns the position of this device's first token, where it has `tokens` of each sequence."""
    return start if shares("tokens") == 1 else start + share_index("tokens") * tokens


def call_start(start: Int[Array, "b"], tokens: int) -> Int[Array, "b"]:
    """Undoes `own_start`: returns the position of the call's first token."""
    return start if shares("tokens") == 1 else start - share_index("tokens") * tokens


def rows_before(rows: jax.Array, history: jax.Array) -> jax.Array:
    """Returns the rows that stand before `rows` [b, t, …]: the left neighbour's last, as many as
    `history` has; before the first share, `history` itself.
    """
    if shares("tokens") == 1:
        return history
    left = _from_left(rows[:, -history.shape[1] :])
    return jnp.where(share_index("tokens") == 0, history, left)


def prepend(rows: jax.Array, size: int) -> jax.Array:
    """Returns `size` rows that stand before `rows` [b, t, …], and `rows`; zeros before a start."""
    if shares("tokens") == 1 or not size:
        return jnp.pad(rows, [(0, 0), (size, 0)] + [(0, 0)] * (rows.ndim - 2))
    return jnp.concatenate([_from_left(rows[:, -size:]), rows], axis=1)


def _from_left(rows):
    neighbours = [(i, i + 1) for i in range(shares("tokens") - 1)]
    return jax.lax.ppermute(rows, split_axes("tokens"), neighbours)  # the first one gets zeros


def take_owned(rows: jax.Array, owned: jax.Array) -> jax.Array:
    """Returns `rows` from the one device that owns each; equal everywhere afterwards.

    Args:
      rows: [b, s, …]; what is not owned is arbitrary.
      owned: bool [b, s], true on at most one device of the sequence.
    """
    owned = owned.reshape(*owned.shape, *(1,) * (rows.ndim - owned.ndim))
    as_bits = rows.dtype.itemsize == 1  # float8 and bytes travel as integers, exactly
    values = jax.lax.bitcast_convert_type(rows, jnp.uint8).astype(jnp.int32) if as_bits else rows
    # In its own dtype: all but one of the summands are zero.
    values = jax.lax.psum(jnp.where(owned, values, 0), split_axes("tokens"))
    if as_bits:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint8), rows.dtype)
    return values


def take_token(x: jax.Array, index: Int[Array, "b"]) -> jax.Array:
    """Returns x[b, index[b]] of [b, t, …] whose tokens are split."""
    if shares("tokens") == 1:
        return x[jnp.arange(x.shape[0]), index]
    local = (index - share_index("tokens") * x.shape[1])[:, None]
    owned = (local >= 0) & (local < x.shape[1])
    rows = x[jnp.arange(x.shape[0])[:, None], jnp.clip(local, 0, x.shape[1] - 1)]
    return take_owned(rows, owned)[:, 0]


def merge_partials(
    attended: Float[Array, "b t h c"], log_mass: Float[Array, "b t h"]
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """Returns attention over the entries of all devices from attention over each one's own.

    With log masses ℓ_i, the union's is ℓ = log Σ exp ℓ_i and its output Σ exp(ℓ_i − ℓ) · o_i.
    """
    axes = split_axes("read_entries")
    if not axes:
        return attended.astype(jnp.float32), log_mass
    largest = jax.lax.pmax(log_mass, axes)
    scale = jnp.exp(log_mass - largest)
    mass = jax.lax.psum(scale, axes)
    weighted = jax.lax.psum(attended.astype(jnp.float32) * scale[..., None], axes)
    return weighted / mass[..., None], jnp.log(mass) + largest
