"""Hyper-connections around each sublayer, and the collapse of the streams after the last layer."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from v4jax.config import ModelConfig
from v4jax.kernels import Target
from v4jax.kernels import hyper_connections as kernel
from v4jax.kernels.hyper_connections import Mix
from v4jax.model.parameters import Declare

INITIAL_SCALE = (
    0.01  # gating factors start small (report: "initialised to small values"; the number is ours)
)


class HyperConnection(nnx.Module):
    """One site: collapses the streams to a sublayer's input and merges its output back.

    Source: spec B.2.
    """

    def __init__(self, declare: Declare, config: ModelConfig):
        n = config.hc_mult
        self.config = config
        outputs = (2 + n) * n
        self.fn = declare.matrix("float32", (outputs, n * config.hidden_size), ("mix", "streams"))
        self.base = declare.constant("float32", 0.0, (outputs,), ("mix",))
        self.scale = declare.constant("float32", INITIAL_SCALE, (3,), ("mix_kind",))

    def __call__(
        self, streams: Float[Array, "b t n d"], target: Target
    ) -> tuple[Float[Array, "b t d"], Mix]:
        """Returns the sublayer's input and the mix that `expand` needs."""
        with jax.named_scope("hyper_connections"):
            return kernel.mix(streams, *self._weights(), **self._options(), target=target)

    def expand_mix(
        self,
        output: Float[Array, "b t d"],
        streams: Float[Array, "b t n d"],
        mix: Mix,
        target: Target,
    ) -> tuple[Float[Array, "b t n d"], Float[Array, "b t d"], Mix]:
        """Returns the streams after the sublayer before this site, and what `__call__` gives."""
        with jax.named_scope("hyper_connections"):
            weights, options = self._weights(), self._options()
            return kernel.expand_mix(output, streams, mix, *weights, **options, target=target)

    def _weights(self) -> tuple[Array, Array, Array]:
        return self.fn[...], self.base[...], self.scale[...]

    def _options(self) -> dict:
        config = self.config
        return {
            "norm_eps": config.rms_norm_eps,
            "eps": config.hc_eps,
            "iterations": config.hc_sinkhorn_iters,
        }

    @staticmethod
    def expand(output, streams, mix: Mix) -> Float[Array, "b t n d"]:
        """Returns the streams after the sublayer."""
        with jax.named_scope("hyper_connections"):
            return kernel.expand(output, streams, mix)


class HyperHead(nnx.Module):
    """Collapses the streams to one vector before the final norm (spec B.3)."""

    def __init__(self, declare: Declare, config: ModelConfig):
        n = config.hc_mult
        self.config = config
        self.fn = declare.matrix("float32", (n, n * config.hidden_size), ("mix", "streams"))
        self.base = declare.constant("float32", 0.0, (n,), ("mix",))
        self.scale = declare.constant("float32", INITIAL_SCALE, (1,), ("mix_kind",))

    def __call__(self, streams: Float[Array, "b t n d"], target: Target) -> Float[Array, "b t d"]:
        return kernel.collapse(
            streams,
            self.fn[...],
            self.base[...],
            self.scale[...],
            norm_eps=self.config.rms_norm_eps,
            eps=self.config.hc_eps,
            target=target,
        )
