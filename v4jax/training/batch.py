"""`Batch`: rows of tokens as a training step takes them."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

PADDING = -1  # `Batch.begin` of a token that belongs to no document


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of documents; packing fills every field.

    tokens [b, t]: documents one after the other, each from a multiple of 128 tokens on, which is
      the least common multiple of the compression ratios: so windows lie on the row's grid.
    weights [b, t]: how much a token counts as a target; 0 for prompts, padding and the first token
      of a document. Row i of the logits predicts token i+1, so it is weights[:, i+1] that counts.
    begin [b, t]: row index of the first token of the document a token belongs to; `PADDING` where
      it belongs to none. None: every row is one document from its first token to its last.
    skipped [b, t]: positions left out in front of a token, inside its document: it then stands at
      its row index − begin + skipped, and windows end where `skipped` changes, at multiples of 128
      tokens of the row. So a short row shows the distances of a long document. Goes with `begin`;
      None: nowhere.
    """

    tokens: Int[Array, "b t"]
    weights: Float[Array, "b t"]
    begin: Int[Array, "b t"] | None = None
    skipped: Int[Array, "b t"] | None = None
