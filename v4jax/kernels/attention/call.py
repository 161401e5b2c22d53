"""What the implementations of attention are given: `attend(call, inputs)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.kernels.dispatch import Target
from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat


class Call(NamedTuple):
    """Static values; hashable, as `custom_vjp` requires.

    ratio: tokens per entry, for dense attention. format: of the entries, None where there are none.
    """

    window: int
    ratio: int
    format: EntryFormat | None
    target: Target


class Inputs(NamedTuple):
    """Traced arrays, and the structure of their cotangents; see the arguments in `__init__.py`.

    Dense attention has `end`, and `stored` and `layer` of its entries or None; sparse attention has
    `selected`. `begin` is None where a row is one document, else `table.NEVER` for padding.
    """

    queries: Float[Array, "b t h c"]
    recent: Float[Array, "b s c"]
    sink: Float[Array, "h"]
    start: Int[Array, "b"]
    end: Int[Array, "b"] | None
    begin: Int[Array, "b t"] | None
    selected: Int[Array, "b t k"] | None
    stored: dict[str, jax.Array] | None
    layer: Int[Array, ""] | None

    def entries(self, call: Call) -> EntryTable | None:
        """Returns the table of entries."""
        if self.stored is None:
            return None
        return EntryTable(self.stored, jnp.asarray(self.layer), call.format)
