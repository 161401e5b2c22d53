"""The dimension letters: shape suffixes and jaxtyping strings use these, and no others.

b  sequences of a batch         t  tokens of one call
s  rows of successive tokens    q  queries of one tile
d  hidden_size                  n  residual streams (hc_mult); j source, k destination
h  attention heads              c  head_dim (plain channels, then rotated ones)
r  low rank; rows of a draft    g  output groups
w  compressed entries           m  tokens of one compression window
z  channels of a compressor's projection (one series or two)
i  index heads                  x  index_head_dim
e  experts                      f  expert width
k  selected entries, chosen experts (beside j: a stream)
v  vocabulary                   l  layers of one kind
a  anchors: drafts of a row in training
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.errors import ShapeError


def ceil_div(numerator, denominator: int):
    """Returns ⌈numerator / denominator⌉ for non-negative integers, traced or not."""
    return -(-numerator // denominator)


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `size`."""
    return ceil_div(size, multiple) * multiple


def check_shape(name: str, array: jax.Array, shape: Sequence[int | None]) -> None:
    """Raises unless `array` has `shape`; None stands for any size.

    Raises:
      ShapeError: rank or a size differs; the message names the argument and both shapes.
    """
    fits = len(array.shape) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ShapeError(f"{name} must have shape {wanted}, got {list(array.shape)}")


def as_integers(name: str, values) -> np.ndarray | jax.Array:
    """Returns `values` as an array of integers; lists and scalars become NumPy arrays.

    Raises:
      ShapeError: they are no integers, or rows of different lengths.
    """
    if not isinstance(values, np.ndarray | jax.Array):
        try:
            values = np.asarray(values)
        except ValueError as error:
            raise ShapeError(
                f"{name} must be an array, got rows of different lengths; pad them on the right "
                "and say how long they are with lengths="
            ) from error
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ShapeError(f"{name} must be integers, got dtype {values.dtype}; use int32")
    return values
