"""What every layer of one call needs to know besides its input."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v4jax.config import Rope
from v4jax.model.rope import rotation


@dataclasses.dataclass(frozen=True)
class Context:
    """One call: its tokens, where they stand, and the rotations of these positions.

    tokens [b, t]: hash routing needs the ids.
    start [b]: position of the first token (where a sequence lies on several devices, of this
      device's first).
    end [b]: position after the last real one of the call.
    rotations: rope → (cosine, sine) [b, t, channels], computed once for all layers.
    begin [b, t]: where rows hold several documents, the row index of the first token of each
      token's document, negative for padding; start and end then count from the row's first token,
      rotations from the document's.
    stretch [b, t]: where positions are left out inside documents, the row index of the first token
      after the last such gap; windows begin there. None: where documents do.
    skipped [b, t]: positions left out before each token; goes with `stretch`.
    dense: CSA layers attend to every visible entry, as in training before selection is introduced.
    repeats [b, t]: how often each HCA entry counts for a query; goes with `stretch`; None: once.
    """

    tokens: Int[Array, "b t"]
    start: Int[Array, "b"]
    end: Int[Array, "b"]
    rotations: dict[Rope, tuple[jax.Array, jax.Array]]
    begin: Int[Array, "b t"] | None = None
    stretch: Int[Array, "b t"] | None = None
    skipped: Int[Array, "b t"] | None = None
    dense: bool = False
    repeats: Float[Array, "b t"] | None = None

    @property
    def real(self) -> Bool[Array, "b t"]:
        """Which tokens are no padding."""
        inside = self.start[:, None] + jnp.arange(self.tokens.shape[1]) < self.end[:, None]
        return inside if self.begin is None else inside & (self.begin >= 0)


def make_context(
    tokens: Array,
    start: Array,
    end: Array,
    ropes: set[Rope],
    *,
    begin: Array | None = None,
    stretch: Array | None = None,
    skipped: Array | None = None,
    dense: bool = False,
    count_gaps: bool = False,
) -> Context:
    """Returns the context of a call on tokens at positions start, start+1, …

    Args:
      count_gaps: HCA entries count for the skipped positions too.
    """
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    if begin is not None:
        positions = positions - jnp.maximum(begin, 0)
    repeats = None
    if skipped is not None:
        if count_gaps:
            repeats = 1 + skipped / (positions + 1)
        positions = positions + skipped
    rotations = {rope: rotation(rope, positions) for rope in ropes}
    return Context(tokens, start, end, rotations, begin, stretch, skipped, dense, repeats)
