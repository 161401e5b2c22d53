"""Pooling as the formula says it: a softmax over the slots of a window. The specification."""

import jax
import jax.numpy as jnp


def pool(values, gates, position_bias, first_window, *, overlaps, begin=None):
    """See `v4jax.kernels.compressor.pool`."""
    tokens, width = position_bias.shape
    values, gates = (  # [b, s, z] → [b, w, m, z]
        rows.astype(jnp.float32).reshape(len(rows), -1, tokens, width) for rows in (values, gates)
    )
    gates += position_bias
    if overlaps:
        values, gates = _join_previous(values), _join_previous(gates)
        index_bw = first_window[:, None] + jnp.arange(gates.shape[1])
        has_previous = index_bw > (0 if begin is None else begin)
        is_own = jnp.arange(2 * tokens) >= tokens
        exists = (is_own | has_previous[..., None])[..., None]
        values, gates = jnp.where(exists, values, 0.0), jnp.where(exists, gates, -jnp.inf)
    return (jax.nn.softmax(gates, axis=2) * values).sum(axis=2)


def _join_previous(windows):
    """Returns [b, w, 2m, c] of [b, 1 + w, m, 2c]: the window before, then the window itself."""
    channels = windows.shape[-1] // 2
    return jnp.concatenate([windows[:, :-1, :, :channels], windows[:, 1:, :, channels:]], axis=2)
