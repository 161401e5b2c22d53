"""Rotation of the trailing channels of queries, key-values and entries by position."""

from jaxtyping import Array, Float

from v4jax.kernels import dispatch
from v4jax.kernels.dispatch import Target
from v4jax.shapes import check_shape


def rotate(
    x: Float[Array, "b t ... c"],
    cosine: Float[Array, "b t r"],
    sine: Float[Array, "b t r"],
    *,
    inverse: bool = False,
    target: Target,
) -> Float[Array, "b t ... c"]:
    """Rotates the last r channels in interleaved pairs, in float32; rounds to x's dtype.

    Channels 2i and 2i+1 of them are one complex number, multiplied by cosine + i · sine.

    Args:
      x: [b, t, c], or [b, t, h, c] where heads share an angle.
      cosine, sine: of the angle of each channel's pair, so that neighbours are equal.
      inverse: rotates back (the output of attention, by the query's position).
      target: the devices the program is made for.

    Source: spec B.5.
    """
    check_shape("cosine", cosine, (*x.shape[:2], None))
    check_shape("sine", sine, cosine.shape)
    run = dispatch.pick(target, "rotation", __name__, x, cosine).rotate
    return run(x, cosine, sine, inverse=inverse, target=target)
