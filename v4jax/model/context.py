"""What every layer of one call needs to know besides its input."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from v4jax.config import Rope
from v4jax.model.rope import rotation


@dataclasses.dataclass(frozen=True)
class Context:
    """One call: its tokens, where they stand, and the rotations of these positions.

    tokens [b, t] (hash routing needs the ids); start [b] position of the first token (where a
    sequence lies on several devices, of this device's first); end [b] position after the last real
    one of the call; rotations: rope → (cosine, sine) [b, t, pairs], computed once
    for all layers.
    """

    tokens: Int[Array, "b t"]
    start: Int[Array, "b"]
    end: Int[Array, "b"]
    rotations: dict[Rope, tuple[jax.Array, jax.Array]]

    @property
    def real(self) -> Bool[Array, "b t"]:
        """Which tokens are no padding."""
        return self.start[:, None] + jnp.arange(self.tokens.shape[1]) < self.end[:, None]


def make_context(tokens: Array, start: Array, end: Array, ropes: set[Rope]) -> Context:
    """Returns the context of a call on tokens at positions start, start+1, …"""
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    return Context(tokens, start, end, {rope: rotation(rope, positions) for rope in ropes})
