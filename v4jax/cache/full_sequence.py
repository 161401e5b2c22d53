"""`FullSequence`: the memory of a call that starts at position 0 and keeps nothing."""

import dataclasses

import jax
import jax.numpy as jnp

from v4jax.cache.entries import CompressorRows
from v4jax.config import Layer
from v4jax.kernels.table import EntryTable
from v4jax.parallel.context_parallel import prepend
from v4jax.parallel.shard import gather
from v4jax.quant import EntryFormat


@dataclasses.dataclass(frozen=True)
class FullSequence:
    """Implements `LayerMemory` for sequences of equal length without history.

    Where a sequence lies on several devices, in shares of whole windows, `start` is that of this
    device's share, and the rows before it are the left neighbour's last. `begin` [b, t] is the row
    index of the first token of each token's document, negative for padding; None: rows are single
    documents. `stretch` and `skipped`: see `model.Context`.
    """

    layer: Layer
    window: int
    entry_format: EntryFormat
    index_format: EntryFormat
    start: jax.Array
    end: jax.Array
    begin: jax.Array | None = None
    stretch: jax.Array | None = None
    skipped: jax.Array | None = None

    def append_window(self, key_values):
        """See `LayerMemory.append_window`; rows before position 0 are masked."""
        return prepend(self.entry_format.round(key_values), self.window), self

    def append_rows(self, which, values, gates):
        """See `LayerMemory.append_rows`; tokens after the last whole window have no entry."""
        del which
        ratio, tokens = self.layer.ratio, values.shape[1]
        whole = max(tokens // ratio, 1) * ratio
        before = ratio if self.layer.overlaps else 0

        def cut(rows):
            rows = prepend(rows[:, :whole], before)
            return jnp.pad(rows, [(0, 0), (0, before + whole - rows.shape[1]), (0, 0)])

        first, completed = self.start // ratio, self.end // ratio

        def of_windows(array):
            # Documents and stretches begin with a window, so its first token says whose it is.
            return None if array is None else jnp.maximum(array[:, :whole:ratio], 0)

        own = self.begin if self.stretch is None else self.stretch
        rows = CompressorRows(cut(values), cut(gates), first, completed)
        if own is not None:
            moved = of_windows(self.skipped)
            place = first[:, None] + jnp.arange(whole // ratio)
            positions = place * ratio - of_windows(self.begin) + (0 if moved is None else moved)
            rows = rows._replace(begin=of_windows(own) // ratio, positions=positions)
        return rows, self

    def append_entries(self, which, vectors, rows):
        """See `LayerMemory.append_entries`; rounded, but not packed: gradients pass."""
        del rows
        stored_as = self.index_format if which == "index" else self.entry_format
        stored = stored_as.unpacked.encode(gather(stored_as.round(vectors), "tokens", 1)[None])
        return EntryTable(stored, jnp.int32(0), stored_as.unpacked), self
