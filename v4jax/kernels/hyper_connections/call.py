"""What the implementations of hyper-connections are given, and what they return."""

from typing import NamedTuple

from jaxtyping import Array, Float

from v4jax.kernels.dispatch import Target


class Call(NamedTuple):
    """What is static: hashable, as `custom_vjp` wants it; see the arguments of `mix`."""

    norm_eps: float
    eps: float
    iterations: int
    target: Target


class Mix(NamedTuple):
    """What one site does to the streams of a token.

    post [b, t, n]: weight of the sublayer's output in each stream.
    residual [b, t, j, k]: doubly stochastic; destination stream k receives Σ_j residual[j, k] ·
      X_j.
    """

    post: Float[Array, "b t n"]
    residual: Float[Array, "b t j k"]
