"""Scores as integers in the same order, which can be counted and halved exactly."""

import jax
import jax.numpy as jnp

NOTHING = -(2**31)  # key of no entry: below the key of every number


def order_keys(scores):
    """Returns int32 keys in the order of the float32 scores; −0 and +0 are equal."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, NOTHING - bits, bits)


def order_values(keys):
    """Undoes `order_keys`."""
    bits = jnp.where(keys < 0, NOTHING - keys, keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
