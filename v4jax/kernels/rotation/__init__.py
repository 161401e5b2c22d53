"""Rotating the trailing channels of queries, key-values and entries by their positions."""

import jax
from jaxtyping import Array, Float

from v4jax.kernels import dispatch
from v4jax.kernels.rotation import reference
from v4jax.shapes import check_shape


def rotate(
    x: Float[Array, "b t ... c"],
    cosine: Float[Array, "b t r"],
    sine: Float[Array, "b t r"],
    *,
    inverse: bool = False,
) -> Float[Array, "b t ... c"]:
    """Rotates the last r channels in interleaved pairs, in float32; rounds to x's dtype.

    Channels 2i and 2i+1 of them are one complex number, multiplied by cosine + i · sine.

    Args:
      x: [b, t, c], or [b, t, h, c] where heads share an angle.
      cosine, sine: of the angle of each channel's pair, so that neighbours are equal.
      inverse: rotates back (the output of attention, by the query's position).

    Source: spec B.5.
    """
    check_shape("cosine", cosine, (*x.shape[:2], None))
    check_shape("sine", sine, cosine.shape)
    implementation = reference
    if choose(x, cosine) == "pallas_tpu":
        from v4jax.kernels.rotation import pallas_tpu as implementation
    return implementation.rotate(x, cosine, sine, inverse=inverse)


def choose(x: jax.Array, cosine: jax.Array) -> str:
    """Returns the name of the implementation that runs on these arguments."""

    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.rotation import pallas_tpu

        return pallas_tpu.supported(x, cosine)

    return dispatch.choose("rotation", {"pallas_tpu": check_tpu, "reference": lambda: None})
