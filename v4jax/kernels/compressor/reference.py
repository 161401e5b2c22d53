"""Projection and pooling in plain jnp."""

import jax
import jax.numpy as jnp

from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.kernels.softmax import MASKED


def compress(x, key_value, gate, position_bias, before, first_window, *, overlaps):
    """See `v4jax.kernels.compressor.compress`."""
    rows = [matmul_float32(x, key_value), matmul_float32(x, gate)]
    if overlaps:
        rows = [jnp.concatenate(pair, axis=1) for pair in zip(before, rows, strict=True)]
    return pool(*rows, position_bias, first_window, overlaps=overlaps)


def pool(values, gates, position_bias, first_window, *, overlaps, begin=None):
    """See `v4jax.kernels.compressor.pool`."""
    tokens = position_bias.shape[0]

    def windows(rows):  # [b, s, z] → [b, w, m, z]
        return rows.reshape(rows.shape[0], -1, tokens, rows.shape[-1]).astype(jnp.float32)

    values_bwmz = windows(values)
    gates_bwmz = windows(gates) + position_bias.astype(jnp.float32)
    if overlaps:
        values_bwmz = overlap(values_bwmz)
        gates_bwmz = overlap(gates_bwmz)
        own = jnp.arange(2 * tokens) >= tokens
        index_bw = first_window[:, None] + jnp.arange(gates_bwmz.shape[1])
        exists_bwm = own | (index_bw > (0 if begin is None else begin))[..., None]
        gates_bwmz = jnp.where(exists_bwm[..., None], gates_bwmz, MASKED)
        values_bwmz = jnp.where(exists_bwm[..., None], values_bwmz, 0.0)
    return jnp.sum(jax.nn.softmax(gates_bwmz, axis=2) * values_bwmz, axis=2)


def overlap(windows_bwmz):
    """Lays beside each window the one before it: [b, 1+w, m, 2c] → [b, w, 2m, c].

    First halves of the previous window's tokens, then second halves of the window's own.
    """
    channels = windows_bwmz.shape[-1] // 2
    previous, own = windows_bwmz[:, :-1, :, :channels], windows_bwmz[:, 1:, :, channels:]
    return jnp.concatenate([previous, own], axis=2)
