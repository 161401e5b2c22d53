"""Pooling the tokens of a window into one compressed entry.

There is one implementation: plain jnp is as fast as a kernel once the rows are projected.
"""

from jaxtyping import Array, Float, Int

from v4jax.kernels.compressor import portable
from v4jax.shapes import check_shape


def pool(
    values: Float[Array, "b s z"],
    gates: Float[Array, "b s z"],
    position_bias: Float[Array, "m z"],
    first_window: Int[Array, "b"],
    *,
    overlaps: bool,
    begin: Int[Array, "b w"] | None = None,
) -> Float[Array, "b w c"]:
    """Returns U_w = Σ_j softmax_j(gate_j + bias_j) · value_j per channel, in float32.

    Without overlap (HCA) z = c and a window pools its own m tokens. With overlap (CSA) z = 2c: a
    window pools 2m slots, the previous window's tokens through their first c channels and its own
    through their last c; window 0 has no previous one.

    Args:
      values, gates: projected rows of successive tokens from a window's first token on, cut or
        padded to whole windows; with overlap, m rows of the previous window come before them.
      position_bias: learned bias of each token of a window (the checkpoint's `ape`).
      first_window: index of the first own window of each sequence.
      begin: where a row holds several documents, the index of the first window of each own window's
        document, which has no previous one.

    Source: spec B.7, B.8.
    """
    tokens, width = position_bias.shape
    check_shape("values", values, (None, None, width))
    check_shape("gates", gates, values.shape)
    assert values.shape[1] % tokens == 0, (values.shape, tokens)
    if not overlaps:
        return portable.pool_single(values, gates, position_bias)
    first = 0 if begin is None else begin
    return portable.pool_overlapping(values, gates, position_bias, first_window, first)
