"""Pooling in plain jnp."""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.softmax import MASKED


def pool_single(values, gates, position_bias):
    """Returns the pooled windows [b, w, c] of rows [b, w·m, c]."""
    tokens = position_bias.shape[0]

    def windows(rows):  # [b, s, c] → [b, w, m, c]
        return rows.reshape(rows.shape[0], -1, tokens, rows.shape[-1]).astype(jnp.float32)

    weights_bwmc = jax.nn.softmax(windows(gates) + position_bias.astype(jnp.float32), axis=2)
    return jnp.sum(weights_bwmc * windows(values), axis=2)


def pool_overlapping(values, gates, position_bias, first_window, document_begin):
    """Returns the pooled windows [b, w, c] of rows [b, (1 + w)·m, 2c].

    A window has few slots: one array each. As an axis they would fill half a register on TPU, at
    five times the cost.

    Args:
      document_begin: index of the first window of each window's document, [b, w] or 0.
    """
    tokens, half = position_bias.shape[0], position_bias.shape[1] // 2
    bias = position_bias.astype(jnp.float32)
    index_bw = first_window[:, None] + jnp.arange(values.shape[1] // tokens - 1)
    exists = (index_bw > document_begin)[..., None]
    slots = []
    for j in range(tokens):
        value, gate = (rows[:, j::tokens].astype(jnp.float32) for rows in (values, gates))
        gate += bias[j]
        before = jnp.where(exists, gate[:, :-1, :half], MASKED)
        slots.append((before, jnp.where(exists, value[:, :-1, :half], 0.0)))
        slots.append((gate[:, 1:, half:], value[:, 1:, half:]))
    highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, (gate for gate, _ in slots)))
    masses = [jnp.exp(gate - highest) for gate, _ in slots]
    return sum(mass * value for mass, (_, value) in zip(masses, slots, strict=True)) / sum(masses)
