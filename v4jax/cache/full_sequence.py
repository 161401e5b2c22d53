"""`FullSequence`: the memory of a call that starts at position 0 and keeps nothing."""

import dataclasses

import jax
import jax.numpy as jnp

from v4jax.cache.entries import CompressorRows
from v4jax.config import Layer
from v4jax.kernels.table import EntryTable
from v4jax.parallel import ONE_DEVICE, Axes
from v4jax.parallel.context_parallel import prepend
from v4jax.quant import EntryFormat


@dataclasses.dataclass(frozen=True)
class FullSequence:
    """Implements `LayerMemory` for sequences of equal length without history.

    Where a sequence lies on several devices, in shards of whole windows, `start` is that of this
    device's shard, and the rows before it are the left neighbour's last. Fields from `start` on
    are those of `model.Context`.
    """

    layer: Layer
    window: int
    entry_format: EntryFormat
    index_format: EntryFormat
    start: jax.Array
    end: jax.Array
    positions: jax.Array
    document_begin: jax.Array | None = None
    window_begin: jax.Array | None = None
    axes: Axes = ONE_DEVICE

    def append_window(self, key_values):
        """See `LayerMemory.append_window`; rows before position 0 are masked."""
        return prepend(self.axes, self.entry_format.round(key_values), self.window), self

    def append_rows(self, which, values, gates):
        """See `LayerMemory.append_rows`; tokens after the last whole window have no entry."""
        del which
        ratio, tokens = self.layer.ratio, values.shape[1]
        whole = max(tokens // ratio, 1) * ratio
        before = ratio if self.layer.overlaps else 0

        def cut(rows):
            rows = prepend(self.axes, rows[:, :whole], before)
            return jnp.pad(rows, [(0, 0), (0, before + whole - rows.shape[1]), (0, 0)])

        # Documents and gaps begin with a window; its first token therefore decides.
        begin = self.document_begin if self.window_begin is None else self.window_begin
        rows = CompressorRows(
            cut(values),
            cut(gates),
            first_window=self.start // ratio,
            completed=self.end // ratio,
            positions=self.positions[:, :whole:ratio],
            begin=None if begin is None else jnp.maximum(begin[:, :whole:ratio], 0) // ratio,
        )
        return rows, self

    def append_entries(self, which, vectors, rows):
        """See `LayerMemory.append_entries`; rounded, but not packed: gradients pass."""
        del rows
        stored_as = self.index_format if which == "index" else self.entry_format
        rounded = self.axes.all_gather(stored_as.round(vectors), "tokens", 1)
        stored = stored_as.unpacked.encode(rounded[None])
        return EntryTable(stored, jnp.int32(0), stored_as.unpacked), self
