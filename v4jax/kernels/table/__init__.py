"""`EntryTable`: cached entries of one layer, read in place from the stack of its kind."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.dispatch import Target
from v4jax.quant import EntryFormat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryTable:
    """Entries [b, w, c] of layer `layer` inside stored arrays [l, b, w, …].

    Reading a block or gathered rows touches only these rows, so a table is never copied out of its
    stack.
    """

    stored: dict[str, jax.Array]
    layer: Int[Array, ""]
    format: EntryFormat = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Entries that fit, a static bound of the entries that exist."""
        return next(iter(self.stored.values())).shape[2]

    def block(self, first: Int[Array, ""], size: int) -> Float[Array, "b size c"]:
        """Returns entries first … first+size−1, which must not exceed the capacity."""

        def read(array):
            start = (self.layer, 0, first, *(0,) * (array.ndim - 3))
            sizes = (1, array.shape[1], size, *array.shape[3:])
            return jax.lax.dynamic_slice(array, start, sizes)[0]

        return self.format.decode(jax.tree.map(read, self.stored))

    def take(self, ids: Int[Array, "b q k"]) -> Float[Array, "b q k c"]:
        """Returns the entries with these ids; ids out of range read the nearest row."""
        batch = jnp.arange(ids.shape[0])[:, None, None]
        ids = jnp.clip(ids, 0, self.capacity - 1)
        rows = jax.tree.map(
            lambda array: array.at[self.layer, batch, ids].get(mode="promise_in_bounds"),
            self.stored,
        )
        return self.format.decode(rows)


def write(
    stored: dict[str, jax.Array],
    layer: Int[Array, ""],
    rows: dict[str, jax.Array],
    first: Int[Array, "b"],
    count: Int[Array, "b"],
    *,
    target: Target,
) -> dict[str, jax.Array]:
    """Returns stored arrays [l, b, w, …] with rows [b, n, …] written in one layer, in place.

    Args:
      rows: encoded entries, whose places follow each other.
      first: place of row 0; rows whose place is outside 0 … w−1 are dropped.
      count: how many rows are real, 0 … n.
      target: the devices the program is made for.
    """
    run = dispatch.pick(target, "table_write", __name__, stored).write
    return run(stored, layer, rows, first, count, target=target)


# Documents of a packed row begin at multiples of this many tokens: whole windows of every kind.
DOCUMENT_UNIT = 128
# Where the document of a padding token begins: after every row, so that it sees nothing.
NEVER = jnp.iinfo(jnp.int32).max


def hide_padding(begin: Int[Array, "b t"] | None) -> Int[Array, "b t"] | None:
    """Returns `begin` with `NEVER` where a token belongs to no document (negative)."""
    return None if begin is None else jnp.where(begin < 0, NEVER, begin)


def visible_entries(positions: Int[Array, "..."], ratio: int) -> Int[Array, "..."]:
    """Returns how many compressed entries a query at these positions may see.

    Entry w covers tokens up to (w+1)·ratio − 1, so it is visible iff w < (p+1) // ratio: a query
    sees the entry that its own token completes, and never an unfinished window.

    Source: spec B.9, causality; the report writes it with t counted from 1.
    """
    return (positions + 1) // ratio
