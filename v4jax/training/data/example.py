"""`Example`: one document as training data. Every source makes them, and packing takes them."""

from dataclasses import dataclass

import numpy as np

from v4jax.config.data import ALIGN
from v4jax.errors import DataError


@dataclass(frozen=True, eq=False)
class Example:
    """Tokens that see only each other, and how much each counts as a target.

    Attributes:
      tokens: int32 [n], n ≥ 1; any sequence of ids becomes that.
      weights: float32 [n], finite and ≥ 0; the first is 0, because nothing predicts it.
      skipped: int32 [n], how many positions are left out before each token (`Batch.skipped`). It
        begins with 0 and grows only at multiples of 128 tokens. None: no position is left out.

    Raises:
      DataError: a shape, an id or a weight breaks these rules.
    """

    tokens: np.ndarray
    weights: np.ndarray
    skipped: np.ndarray | None = None

    def __post_init__(self):
        tokens, weights = np.asarray(self.tokens), np.asarray(self.weights, np.float32)
        if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                "example.tokens must be a row of at least one token id, got shape "
                f"{list(tokens.shape)} of {tokens.dtype}; leave out empty documents"
            )
        if weights.shape != tokens.shape:
            raise DataError(
                f"example.weights must have one weight for each of the {tokens.size} tokens, got "
                f"shape {list(weights.shape)}; prompts and the first token have weight 0"
            )
        if tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max:
            bad = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise DataError(f"example.tokens must be ids from 0 to 2³¹ − 1, got {bad}")
        if not np.isfinite(weights).all() or weights.min() < 0:
            bad = weights[~(np.isfinite(weights) & (weights >= 0))][0]
            raise DataError(f"example.weights must be finite and not negative, got {bad}")
        if weights[0]:
            raise DataError(
                "example.weights[0] must be 0, because no token predicts the first, got "
                f"{weights[0]}"
            )
        object.__setattr__(self, "tokens", tokens.astype(np.int32, copy=False))
        object.__setattr__(self, "weights", weights)
        if self.skipped is not None:
            object.__setattr__(self, "skipped", _check_skipped(self.skipped, tokens.size))

    def __len__(self) -> int:
        return len(self.tokens)


def _check_skipped(skipped, tokens: int) -> np.ndarray:
    skipped = np.asarray(skipped, np.int32)
    steps = np.diff(skipped, prepend=0)
    if skipped.shape != (tokens,) or steps.min() < 0 or skipped[0]:
        raise DataError(f"example.skipped must begin with 0 and never fall, over {tokens} tokens")
    if steps[np.arange(tokens) % ALIGN != 0].any():
        raise DataError(
            f"example.skipped may change at multiples of {ALIGN} tokens only, because compression "
            "windows must stay whole"
        )
    return skipped


def weigh_all(tokens: int) -> np.ndarray:
    """Returns the weights of a document whose tokens all count but the first."""
    weights = np.ones(tokens, np.float32)
    weights[:1] = 0
    return weights
