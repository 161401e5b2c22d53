"""Manifold-constrained hyper-connections (mHC): several residual streams around every sublayer."""

from v4jax.kernels.hyper_connections.reference import Mix, collapse, expand, mix, weigh_streams

__all__ = ["Mix", "collapse", "expand", "mix", "weigh_streams"]
