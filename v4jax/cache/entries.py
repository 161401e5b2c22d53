"""The contract between attention and its memory.

Attention hands over what it computed for the tokens of this call and gets back everything its
queries may see. Every method returns the memory after the call as well, so that all state is
explicit.
"""

from typing import NamedTuple, Protocol, Self, runtime_checkable

from jaxtyping import Array, Float, Int

from v4jax.kernels.table import EntryTable


class CompressorRows(NamedTuple):
    """Raw rows of successive tokens, cut into whole windows.

    values, gates [b, s, z]: from the first token of window `first_window` on (with overlap, from
      the window before).
    first_window [b]: index of the first own window.
    completed [b]: how many of the windows are complete; the rest pool padding and must not become
      entries.
    positions [b, w]: of each own window's first token, in its document.
    begin [b, w]: where rows hold several documents or leave positions out, the index of the first
      window that may be pooled with each own window.
    """

    values: Float[Array, "b s z"]
    gates: Float[Array, "b s z"]
    first_window: Int[Array, "b"]
    completed: Int[Array, "b"]
    positions: Int[Array, "b w"]
    begin: Int[Array, "b w"] | None = None


@runtime_checkable
class LayerMemory(Protocol):
    """The memory of one layer during one call.

    start [b]: position of the call's first token; end [b]: position after its last real token.
    `which` names a compressor of the layer: "entries" (key-values) or "index" (index keys).
    """

    start: Int[Array, "b"]
    end: Int[Array, "b"]

    def append_window(
        self, key_values: Float[Array, "b t c"]
    ) -> tuple[Float[Array, "b s c"], Self]:
        """Returns `window` rows of history and then the call's tokens, in order, as stored."""

    def append_rows(
        self, which: str, values: Float[Array, "b t z"], gates: Float[Array, "b t z"]
    ) -> tuple[CompressorRows, Self]:
        """Returns all rows of the windows that the call's tokens touch."""

    def append_entries(
        self, which: str, vectors: Float[Array, "b w c"], rows: CompressorRows
    ) -> tuple[EntryTable, Self]:
        """Stores the completed windows' vectors; returns the table of all entries so far."""
