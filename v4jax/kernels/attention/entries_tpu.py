"""Stored entries inside a TPU kernel: blocks are read from HBM and decoded into VMEM.

Where the last axis of an array [l, b, w, c] does not fill registers, XLA puts the entries along
lanes: FP8 values (448 channels), rotated channels (64) and scales (8) are [l, b, c, w] in memory.
Asking for rows would copy the whole stack on every call. Such arrays are therefore passed
transposed, which moves nothing, and stay so: channels × entries. Both products of attention can use
this layout, and a scale spreads over its 64 channels by repeating a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat
from v4jax.quant.entry_format import ENTRY_BLOCK
from v4jax.shapes import round_up

# Entries of one block; a multiple of the lanes, along which turned blocks are cut.
BLOCK, ALIGNMENT = 512, 128


def why_not(entries: EntryTable, dtype) -> str | None:
    """Returns why a kernel that computes in `dtype` cannot read these entries, or None."""
    stored_as = entries.format
    if stored_as.kind == "fp4":
        return "entries in FP4 are index keys"
    if jnp.dtype(stored_as.dtype) != dtype:
        return f"entries decode to {stored_as.dtype}, queries are {dtype}"
    plain = stored_as.channels - stored_as.rope_channels
    if stored_as.kind == "fp8" and plain % ENTRY_BLOCK:
        return f"plain channels must divide by {ENTRY_BLOCK}, got {plain}"
    return None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the kernel reads: `blocks` blocks of `block` entries, as `format` stores them."""

    format: EntryFormat
    capacity: int
    blocks: int
    block: int
    shapes: tuple[tuple[int, int], ...]  # of one block of each stored array
    dtypes: tuple[str, ...]

    @property
    def turned(self) -> bool:
        """Whether blocks are channels × entries."""
        return self.format.kind == "fp8"

    @property
    def block_shape(self) -> tuple[int, int]:
        """Shape of a decoded block."""
        shape = (self.block, self.format.channels)
        return shape[::-1] if self.turned else shape

    @property
    def count(self) -> int:
        """Number of stored arrays."""
        return len(self.shapes)

    def visible(self, tokens, ratio: int):
        """Returns how many of these entries have all their tokens among the first `tokens`."""
        return jnp.clip(jax.lax.div(tokens, jnp.int32(ratio)), 0, self.capacity)


def prepare(call: Call, inputs: Inputs) -> tuple[Layout | None, tuple[jax.Array, ...], jax.Array]:
    """Returns (layout, arrays, the layer's index in them); (None, (), 0) without entries.

    A capacity that is no multiple of a block costs a padded copy.
    """
    stored, layer, stored_as = inputs.stored, inputs.layer, call.format
    if stored is None:
        return None, (), jnp.int32(0)
    names = ("values", "rope", "scales") if stored_as.kind == "fp8" else ("values",)
    arrays = tuple(stored[name] for name in names)
    capacity = arrays[0].shape[2]
    block = min(BLOCK, round_up(capacity, ALIGNMENT))
    padding = round_up(capacity, block) - capacity
    if padding:
        widths = [(0, 0), (0, 0), (0, padding), (0, 0)]
        arrays = tuple(
            jnp.pad(jax.lax.dynamic_index_in_dim(x, layer, keepdims=True), widths) for x in arrays
        )
    shapes = tuple((block, x.shape[-1]) for x in arrays)
    dtypes = tuple(str(x.dtype) for x in arrays)
    if stored_as.kind == "fp8":
        arrays = tuple(jnp.swapaxes(x, 2, 3) for x in arrays)
        shapes = tuple(shape[::-1] for shape in shapes)
    layout = Layout(stored_as, capacity, (capacity + padding) // block, block, shapes, dtypes)
    return layout, arrays, jnp.int32(0) if padding else jnp.asarray(layer)


def scratch(layout: Layout, dtype) -> list:
    """Returns the scratch of a `Loader`: decoded blocks, two buffers per array, semaphores."""
    return [
        pltpu.VMEM((layout.blocks, *layout.block_shape), dtype),
        *(
            pltpu.VMEM((2, *shape), jnp.dtype(kind))
            for shape, kind in zip(layout.shapes, layout.dtypes, strict=True)
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
        slot, dtype = jax.lax.rem(index, 2), self.decoded_ref.dtype
        if self.layout.format.kind == "fp8":
            values_ref, rope_ref, scales_ref = (buffer.at[slot] for buffer in self.buffers)
            plain = values_ref.shape[0]
            # A power of two from its exponent; the padding rows are not read.
            scales = scales_ref[...].astype(jnp.int32) << 23
            scales = jax.lax.bitcast_convert_type(scales, jnp.float32)
            for i in range(plain // ENTRY_BLOCK):
                rows = slice(i * ENTRY_BLOCK, (i + 1) * ENTRY_BLOCK)
                values = values_ref[rows, :].astype(jnp.float32) * scales[i : i + 1, :]
                self.decoded_ref[index, rows, :] = values.astype(dtype)
            self.decoded_ref[index, plain:, :] = rope_ref[...].astype(dtype)
        else:
            self.decoded_ref[index] = self.buffers[0][slot].astype(dtype)

    def load_all(self, available):
        """Decodes all blocks that hold `available` entries."""
        pl.loop(0, self.blocks(available))(lambda index: self.load(index, available))

    def blocks(self, entries):
        """Returns how many blocks hold the first `entries`."""
        return jax.lax.div(entries + (self.layout.block - 1), jnp.int32(self.layout.block))

    def block(self, index):
        """Returns a decoded block: `layout.block_shape`."""
        return self.decoded_ref[index]

    def _copies(self, index):
        slot = jax.lax.rem(index, 2)
        first = index * self.layout.block
        if not isinstance(index, int):
            first = pl.multiple_of(first, ALIGNMENT)
        entries = pl.ds(first, self.layout.block)
        place = (slice(None), entries) if self.layout.turned else (entries,)
        return [
            pltpu.make_async_copy(
                source.at[self.layer, self.sequence, *place],
                buffer.at[slot],
                self.semaphores.at[slot, i],
            )
            for i, (source, buffer) in enumerate(zip(self.stored, self.buffers, strict=True))
        ]
