"""Attention as the formula says it: one softmax over all keys, with the mask of every query.

The specification: plain jnp in float32, gradients by autodiff, an array of queries × keys.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.table import hide_padding
from v4jax.quant.formats import round_to


def attend_dense(
    queries, recent, sink, start, end, *, window, entries=None, ratio=0, begin=None, target=None
):
    """See `v4jax.kernels.attention.attend_dense`."""
    del end, target
    positions, begin = _places(queries, start, begin)
    keys, seen = _window(recent, positions, window, begin)
    if entries is not None:
        ids = jnp.arange(entries.capacity)
        visible = (ids * ratio >= begin) & ((ids + 1) * ratio <= positions + 1)
        keys, seen = _join(entries, visible, keys, seen)
    return _attend(queries, keys, seen, sink)


def attend_sparse(
    queries, recent, sink, start, *, window, entries, selected, begin=None, target=None
):
    """See `v4jax.kernels.attention.attend_sparse`."""
    del target
    positions, begin = _places(queries, start, begin)
    keys, seen = _window(recent, positions, window, begin)
    chosen = (selected[..., None] == jnp.arange(entries.capacity)).any(axis=2)
    return _attend(queries, *_join(entries, chosen, keys, seen), sink)


def _places(queries, start, begin):
    """Returns the position of every query and where its document begins, [b, t, 1]."""
    positions_bt = start[:, None] + jnp.arange(queries.shape[1])
    begin_bt = jnp.zeros_like(positions_bt) if begin is None else hide_padding(begin)
    return positions_bt[..., None], begin_bt[..., None]


def _window(recent, positions, window, begin):
    """Returns the raw keys [b, s, c] and which of them every query sees [b, t, s]."""
    key_positions = positions[:, :1] - window + jnp.arange(recent.shape[1])
    distance = positions - key_positions
    return recent, (distance >= 0) & (distance < window) & (key_positions >= begin)


def _join(entries, seen_entries, keys, seen):
    decoded = entries.block(jnp.int32(0), entries.capacity)
    return jnp.concatenate([keys, decoded], 1), jnp.concatenate([seen, seen_entries], 2)


def _attend(queries, keys, seen, sink):
    """Returns softmax(q·k / √c, with sink) · k and the log-sum-exp."""
    dtype = queries.dtype
    queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
    scores = jnp.einsum("bthc,bsc->bths", queries, keys, precision="highest")
    scores = jnp.where(seen[:, :, None], scores / jnp.sqrt(queries.shape[-1]), -jnp.inf)
    log_mass = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), sink)
    weights = jnp.exp(scores - log_mass[..., None])
    attended = jnp.einsum("bths,bsc->bthc", weights, keys, precision="highest")
    return round_to(attended, dtype), log_mass
