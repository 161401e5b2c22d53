"""Reading stored entries inside a TPU kernel: blocks from HBM, decoded into VMEM."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat
from v4jax.quant.entry_format import ENTRY_BLOCK
from v4jax.shapes import round_up

# Entries of one block. Stored rows are tiled by up to 32 in HBM, so blocks start at multiples.
BLOCK, ALIGNMENT = 512, 32


def why_not(entries: EntryTable, dtype) -> str | None:
    """Returns why a kernel that computes in `dtype` cannot read these entries, or None."""
    stored_as = entries.format
    if stored_as.kind == "fp4":
        return "entries in FP4 are index keys"
    if jnp.dtype(stored_as.dtype) != dtype:
        return f"entries decode to {stored_as.dtype}, queries are {dtype}"
    if stored_as.kind == "fp8" and (stored_as.channels - stored_as.rope_channels) % ENTRY_BLOCK:
        return f"plain channels must divide by {ENTRY_BLOCK}"
    return None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the kernel reads: `capacity` entries in blocks of `block`, as `format` stores them."""

    format: EntryFormat
    capacity: int
    block: int
    widths: tuple[int, ...]
    dtypes: tuple[str, ...]
    one_layer: bool

    @property
    def count(self) -> int:
        """Number of stored arrays."""
        return len(self.widths)

    def layer(self, layer):
        """Returns the layer's index in the prepared arrays."""
        return jnp.int32(0) if self.one_layer else layer


def names(stored_as: EntryFormat) -> tuple[str, ...]:
    """Returns the stored arrays in the order in which kernels take them."""
    return ("values", "rope", "scales") if stored_as.kind == "fp8" else ("values",)


def prepare(stored, layer, stored_as: EntryFormat):
    """Returns (layout, arrays). A capacity that is no multiple of a block costs a padded copy."""
    arrays = tuple(stored[name] for name in names(stored_as))
    capacity = arrays[0].shape[2]
    block = min(BLOCK, round_up(capacity, ALIGNMENT))
    padding = round_up(capacity, block) - capacity
    if padding:
        arrays = tuple(
            jnp.pad(
                jax.lax.dynamic_index_in_dim(x, layer, keepdims=True),
                [(0, 0), (0, 0), (0, padding), (0, 0)],
            )
            for x in arrays
        )
    widths = tuple(x.shape[-1] for x in arrays)
    dtypes = tuple(str(x.dtype) for x in arrays)
    return Layout(stored_as, capacity + padding, block, widths, dtypes, bool(padding)), arrays


def scratch(layout: Layout, dtype) -> list:
    """Returns the scratch of a `Loader`: decoded entries, two buffers per array, semaphores."""
    return [
        pltpu.VMEM((layout.capacity, layout.format.channels), dtype),
        *(
            pltpu.VMEM((2, layout.block, width), jnp.dtype(kind))
            for width, kind in zip(layout.widths, layout.dtypes, strict=True)
        ),
        pltpu.SemaphoreType.DMA((2, layout.count)),
    ]


class Loader:
    """Fetches blocks of one sequence in order and decodes them; two are under way at a time."""

    def __init__(self, layout: Layout, layer, sequence, stored, scratch):
        self.layout, self.layer, self.sequence, self.stored = layout, layer, sequence, stored
        self.decoded_ref, *self.buffers, self.semaphores = scratch

    def start(self, available):
        """Starts the first of the blocks that hold `available` entries."""

        @pl.when(available > 0)
        def _():
            for copy in self._copies(0):
                copy.start()

    def load(self, index, available):
        """Decodes block `index`, the next in order, and starts the one after it."""

        @pl.when((index + 1) * self.layout.block < available)
        def _():
            for copy in self._copies(index + 1):
                copy.start()

        for copy in self._copies(index):
            copy.wait()
        slot = index % 2
        rows = self.rows(index)
        if self.layout.format.kind == "fp8":
            values, rope, scales = (buffer[slot] for buffer in self.buffers)
            plain = values.shape[1]
            expanded = values.astype(jnp.float32) * expand_scales(scales, plain)
            self.decoded_ref[rows, :plain] = expanded.astype(self.decoded_ref.dtype)
            self.decoded_ref[rows, plain:] = rope.astype(self.decoded_ref.dtype)
        else:
            self.decoded_ref[rows, :] = self.buffers[0][slot].astype(self.decoded_ref.dtype)

    def load_all(self, available):
        """Decodes all blocks that hold `available` entries."""
        pl.loop(0, self.blocks(available))(lambda index: self.load(index, available))

    def blocks(self, entries):
        """Returns how many blocks hold the first `entries`."""
        return jax.lax.div(entries + (self.layout.block - 1), jnp.int32(self.layout.block))

    def block(self, index):
        """Returns the decoded entries of a block."""
        return self.decoded_ref[self.rows(index), :]

    def rows(self, index):
        """Returns the rows of a block."""
        return pl.ds(pl.multiple_of(index * self.layout.block, ALIGNMENT), self.layout.block)

    def _copies(self, index):
        slot = index % 2
        return [
            pltpu.make_async_copy(
                source.at[self.layer, self.sequence, self.rows(index)],
                buffer.at[slot],
                self.semaphores.at[slot, i],
            )
            for i, (source, buffer) in enumerate(zip(self.stored, self.buffers, strict=True))
        ]


def expand_scales(scales, channels: int):
    """Returns the float32 scale of every channel, from e8m0 bytes [s, n]: exact.

    One product with zeros and ones moves each scale to its channels; bfloat16 holds it.
    """
    powers = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    shape = (scales.shape[1], channels)
    block, channel = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    places = (channel >= block * ENTRY_BLOCK) & (channel < (block + 1) * ENTRY_BLOCK)
    return jax.lax.dot_general(
        powers.astype(jnp.bfloat16),
        places.astype(jnp.bfloat16),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
