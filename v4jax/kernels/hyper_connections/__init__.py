"""Manifold-constrained hyper-connections (mHC): several residual streams around every sublayer.

Around a sublayer: `mix` collapses the streams to its input, `expand` merges its output back;
`expand_mix` is one site's `expand` and the next site's `mix` in one pass over the streams.
`collapse` follows the last layer. Read `reference.py` first.
"""

from jaxtyping import Array, Float

from v4jax.kernels import dispatch
from v4jax.kernels.dispatch import Target
from v4jax.kernels.hyper_connections import portable
from v4jax.kernels.hyper_connections.call import Call, Mix
from v4jax.shapes import check_shape


def mix(
    streams: Float[Array, "b t n d"],
    fn: Float[Array, "o nd"],
    base: Float[Array, "o"],
    scale: Float[Array, "3"],
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
    target: Target,
) -> tuple[Float[Array, "b t d"], Mix]:
    """Returns the sublayer's input Σ_j pre_j · X_j, and how to merge its output back.

    pre = σ(·)+eps, post = 2σ(·), residual = Sinkhorn(softmax(·)) of three slices of one projection
    of the RMS-normalized, flattened streams.

    Args:
      fn: projection; rows: n for pre, n for post, n·n for the residual matrix, source stream major.
      base: static biases, in the same order.
      scale: gating factors of pre, post and residual.
      norm_eps: inside the root mean square (rms_norm_eps).
      eps: floor of pre and of every Sinkhorn denominator (hc_eps).
      iterations: Sinkhorn iterations (hc_sinkhorn_iters); the last operation normalizes columns.
      target: the devices the program is made for.

    Source: spec B.2.
    """
    _check(streams, fn)
    call = Call(norm_eps, eps, iterations, target)
    return _pick(call, streams).mix(call, streams, fn, base, scale)


def expand(
    output: Float[Array, "b t d"], streams: Float[Array, "b t n d"], mixing: Mix
) -> Float[Array, "b t n d"]:
    """Returns the next streams X'_k = post_k · output + Σ_j residual[j, k] · X_j, rounded once."""
    return portable.expand(output, streams, mixing)


def expand_mix(
    output: Float[Array, "b t d"],
    streams: Float[Array, "b t n d"],
    mixing: Mix,
    fn: Float[Array, "o nd"],
    base: Float[Array, "o"],
    scale: Float[Array, "3"],
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
    target: Target,
) -> tuple[Float[Array, "b t n d"], Float[Array, "b t d"], Mix]:
    """Returns the streams after a sublayer, the next sublayer's input, and the next `Mix`.

    Equal to `mix(expand(output, streams, mixing), fn, …)`: the projection sees the rounded streams.

    Args:
      output, mixing: of the sublayer just computed.
      fn, base, scale: of the site that follows.
    """
    _check(streams, fn)
    check_shape("output", output, (*streams.shape[:2], streams.shape[3]))
    call = Call(norm_eps, eps, iterations, target)
    return _pick(call, streams).expand_mix(call, output, streams, mixing, fn, base, scale)


def collapse(
    streams: Float[Array, "b t n d"],
    fn: Float[Array, "n nd"],
    base: Float[Array, "n"],
    scale: Float[Array, "1"],
    *,
    norm_eps: float,
    eps: float,
    target: Target,
) -> Float[Array, "b t d"]:
    """Returns Σ_j pre_j · X_j after the last layer; pre = σ(projection · scale + base) + eps.

    Source: spec B.3.
    """
    call = Call(norm_eps, eps, 0, target)
    return portable.collapse(call, streams, fn, base, scale)


def _pick(call: Call, streams):
    return dispatch.pick(call.target, "hyper_connections", __name__, streams)


def _check(streams, fn):
    n, width = streams.shape[2:]
    check_shape("fn", fn, ((2 + n) * n, n * width))


__all__ = ["Mix", "collapse", "expand", "expand_mix", "mix"]
