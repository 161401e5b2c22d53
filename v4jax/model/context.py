"""What every layer of one call needs to know besides its input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v4jax.config import Rope
from v4jax.errors import ConfigError
from v4jax.kernels import Target
from v4jax.model.rope import rotation
from v4jax.parallel import ONE_DEVICE, Axes


@dataclasses.dataclass(frozen=True)
class Context:
    """One call: its tokens, their positions, the devices that share it, and who observes it.

    A row of the call is one sequence, or several documents one after the other.

    tokens [b, t]: hash routing needs the ids.
    start [b]: index of the first token in its row (of this device's first token, where a row is
      split over devices).
    end [b]: index after the last real token of the call.
    positions [b, t]: of each token in its document.
    rotations: rope → (cosine, sine) [b, t, channels] of the positions, computed once for all
      layers.
    target: the devices that the program is made for; every operation asks.
    document_begin [b, t]: index in the row of the first token of each token's document, negative
      for padding. None: each row is one document.
    window_begin [b, t]: index in the row of the first token that each token's window may hold,
      where positions are left out inside documents. None: windows begin with the document.
    entry_weight [b, t]: how often each HCA entry counts for a query; goes with `window_begin`.
      None: once.
    dense: CSA layers attend to every visible entry, as in training before selection is introduced.
    axes: the logical axes that are split over devices.
    seen: where a caller observes, the dictionary that `show` fills.
    """

    tokens: Int[Array, "b t"]
    start: Int[Array, "b"]
    end: Int[Array, "b"]
    positions: Int[Array, "b t"]
    rotations: dict[Rope, tuple[jax.Array, jax.Array]]
    target: Target
    document_begin: Int[Array, "b t"] | None = None
    window_begin: Int[Array, "b t"] | None = None
    entry_weight: Float[Array, "b t"] | None = None
    dense: bool = False
    axes: Axes = ONE_DEVICE
    seen: dict[str, Any] | None = None

    @property
    def real(self) -> Bool[Array, "b t"]:
        """Which tokens are no padding."""
        inside = self.start[:, None] + jnp.arange(self.tokens.shape[1]) < self.end[:, None]
        return inside if self.document_begin is None else inside & (self.document_begin >= 0)

    def observe(self) -> tuple["Context", dict[str, Any]]:
        """Returns a context for one layer, and the dictionary in which the layer shows its values.

        >>> observed, seen = context.observe()
        >>> streams, memory = block(streams, observed, memory)
        >>> load = count(seen["router_ids"])
        """
        seen: dict[str, Any] = {}
        return dataclasses.replace(self, seen=seen), seen

    def show(self, **values: Any) -> None:
        """Gives values to the caller that observes; without one, nothing is kept."""
        if self.seen is not None:
            self.seen.update(values)


def make_context(
    tokens: Array,
    start: Array,
    end: Array,
    ropes: set[Rope],
    target: Target,
    *,
    positions: Array | None = None,
    document_begin: Array | None = None,
    **fields: Any,
) -> Context:
    """Returns the context of a call.

    Args:
      positions: None: consecutive ones, counted from `document_begin` or else from the row's begin.
      fields: the other fields of `Context`.

    Raises:
      ConfigError: there is no target.
    """
    if target is None:
        raise ConfigError(
            "this model of shapes has no target, the devices that its programs are made for; "
            "give abstract_transformer one, such as target=Target.here()"
        )
    if positions is None:
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        if document_begin is not None:
            positions = positions - jnp.maximum(document_begin, 0)
    rotations = {rope: rotation(rope, positions) for rope in ropes}
    return Context(
        tokens, start, end, positions, rotations, target, document_begin=document_begin, **fields
    )
