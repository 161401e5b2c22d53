"""`Batch`: rows of tokens as a training step takes them, and where they are on a mesh."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from v4jax.parallel import Layout

PADDING = -1  # `Batch.begin` of a token that belongs to no document


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of documents; packing fills every field.

    tokens [b, t]: documents one after the other. Each begins at a multiple of 128 tokens, the least
      common multiple of the compression ratios. Compression windows are then on the row's grid.
    weights [b, t]: how much a token counts as a target; 0 for prompts, padding and the first token
      of a document. Logits at i predict token i+1, and weights[:, i+1] is their weight.
    begin [b, t]: row index of the first token of a token's document; `PADDING` for padding. None:
      every row is one document.
    skipped [b, t]: how many positions of its document are left out before a token. Its position is
      row index − begin + skipped. It changes at multiples of 128 tokens of the row, where windows
      end. Short rows can thereby show the distances of a long document. Needs `begin`; None: none
      are left out.
    """

    tokens: Int[Array, "b t"]
    weights: Float[Array, "b t"]
    begin: Int[Array, "b t"] | None = None
    skipped: Int[Array, "b t"] | None = None


def batch_sharding(layout: Layout, rank: int) -> NamedSharding:
    """Returns how the arrays [..., b, t] of batches are split: rows and tokens."""
    axes = (layout.array_axes(name) or None for name in ("batch", "tokens"))
    return NamedSharding(layout.mesh, P(*(None,) * (rank - 2), *axes))


def row_shares(layout: Layout | None) -> tuple[int, int]:
    """Returns which share of a batch's rows this process needs, and the number of shares.

    Processes whose devices hold other tokens of the same rows need the same share.
    """
    count = jax.process_count()
    if layout is None or count == 1:
        return 0, 1
    shares = min(layout.mesh.shape["data"], count)
    return jax.process_index() * shares // count, shares


def put_batch(batch: Batch, layout: Layout | None) -> Batch:
    """Returns the whole batch on its devices, given the rows [..., b, t] of this process."""
    if layout is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    index, shares = row_shares(layout)

    def put(array: np.ndarray):
        *lead, rows, tokens = array.shape
        first = index * rows

        def read(where):
            *lead, rows_here, tokens_here = where
            start, stop, _ = rows_here.indices(rows * shares)
            return array[(*lead, slice(start - first, stop - first), tokens_here)]

        shape, sharding = (*lead, rows * shares, tokens), batch_sharding(layout, array.ndim)
        return jax.make_array_from_callback(shape, sharding, read)

    return jax.tree.map(put, batch)
