"""Manifold-constrained hyper-connections (mHC): several residual streams around every sublayer.

Around a sublayer: `mix` collapses the streams to its input, `expand` merges its output back;
`expand_mix` is one site's `expand` and the next site's `mix` in one pass over the streams. Read
`reference.py` first.
"""

from jaxtyping import Array, Float

from v4jax.kernels import dispatch
from v4jax.kernels.hyper_connections import reference
from v4jax.kernels.hyper_connections.reference import Mix, collapse, expand, weigh_streams
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
) -> tuple[Float[Array, "b t d"], Mix]:
    """Returns the sublayer's input Σ_j pre_j · X_j, and how to merge its output back.

    See `reference.mix` for formula and arguments.
    """
    _check(streams, fn)
    options = {"norm_eps": norm_eps, "eps": eps, "iterations": iterations}
    return choose(streams).mix(streams, fn, base, scale, **options)


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
) -> tuple[Float[Array, "b t n d"], Float[Array, "b t d"], Mix]:
    """Returns the streams after a sublayer, the next sublayer's input, and the next `Mix`.

    Equal to `mix(expand(output, streams, mixing), fn, …)`: the projection sees the rounded streams.

    Args:
      output, mixing: of the sublayer just computed.
      fn, base, scale: of the site that follows.
    """
    _check(streams, fn)
    check_shape("output", output, (*streams.shape[:2], streams.shape[3]))
    options = {"norm_eps": norm_eps, "eps": eps, "iterations": iterations}
    run = choose(streams).expand_mix
    return run(output, streams, mixing, fn, base, scale, **options)


def choose(streams):
    """Returns the module whose `mix` and `expand_mix` run on these streams."""

    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.hyper_connections import pallas_tpu

        return pallas_tpu.supported(streams)

    checks = {"pallas_tpu": check_tpu, "reference": lambda: None}
    if dispatch.choose("hyper_connections", checks) == "reference":
        return reference
    from v4jax.kernels.hyper_connections import pallas_tpu

    return pallas_tpu


def _check(streams, fn):
    n, width = streams.shape[2:]
    check_shape("fn", fn, ((2 + n) * n, n * width))


__all__ = ["Mix", "choose", "collapse", "expand", "expand_mix", "mix", "weigh_streams"]
