"""Pooling the tokens of a window into one compressed entry.

`compress` goes from tokens to pooled entries in one pass, for whole windows (prefill, training);
`pool` takes rows that are projected already: unfinished windows and single tokens of decoding.
"""

import jax
from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.compressor import reference
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
      values, gates: rows of successive tokens from a window's first token on, cut or padded to
        whole windows; with overlap, m rows of the previous window stand before them.
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
    options = {"overlaps": overlaps, "begin": begin}
    return reference.pool(values, gates, position_bias, first_window, **options)


def compress(
    x: Float[Array, "b t d"],
    key_value: Float[Array, "z d"],
    gate: Float[Array, "z d"],
    position_bias: Float[Array, "m z"],
    before: Float[Array, "2 b m z"],
    first_window: Int[Array, "b"],
    *,
    overlaps: bool,
) -> Float[Array, "b w c"]:
    """Returns `pool` of the projections x · key_valueᵀ and x · gateᵀ, all in float32.

    Args:
      x: tokens from a window's first one on; t is a multiple of the window.
      before: with overlap, values and gates of the window before the first; read where
        `first_window` is not 0. Without overlap it is not read.
      first_window: index of the first window of each sequence.

    Source: spec B.7, B.8.
    """
    tokens, width = position_bias.shape
    batch, length, hidden = x.shape
    check_shape("key_value", key_value, (width, hidden))
    check_shape("gate", gate, (width, hidden))
    check_shape("before", before, (2, batch, tokens, width))
    assert length % tokens == 0, (length, tokens)
    run = choose(x, key_value, position_bias, overlaps).compress
    return run(x, key_value, gate, position_bias, before, first_window, overlaps=overlaps)


def choose(x: jax.Array, key_value: jax.Array, position_bias: jax.Array, overlaps: bool):
    """Returns the module whose `compress` runs on these arguments."""

    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.compressor import pallas_tpu

        return pallas_tpu.supported(x, key_value, position_bias, overlaps)

    checks = {"pallas_tpu": check_tpu, "reference": lambda: None}
    if dispatch.choose("compressor", checks) == "reference":
        return reference
    from v4jax.kernels.compressor import pallas_tpu

    return pallas_tpu
