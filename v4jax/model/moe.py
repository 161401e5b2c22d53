"""Mixture of experts: router, routed experts, shared expert."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from v4jax.config import ModelConfig, Numerics, RouterKind
from v4jax.model.experts import Experts, SharedExpert
from v4jax.model.parameters import Declare
from v4jax.model.router import Router
from v4jax.parallel.shard import sum_over
from v4jax.quant.formats import round_to


class MoE(nnx.Module):
    """Adds the shared expert to the routed ones (spec B.13)."""

    def __init__(self, declare: Declare, config: ModelConfig, kind: RouterKind, numerics: Numerics):
        self.router = Router(declare, config, kind)
        self.experts = Experts(declare, config, numerics)
        self.shared = SharedExpert(declare, config, numerics)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Int[Array, "b t"],
        real: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns the experts' sum; tokens that are not `real` do not travel to other devices."""
        flat_td = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            ids_tk, weights_tk = self.router(flat_td, tokens.reshape(-1))
        with jax.named_scope("experts"):
            real = None if real is None else real.reshape(-1)
            output_td = self.experts(flat_td, ids_tk, weights_tk, real) + self.shared(flat_td)
            output_td = sum_over(output_td, "expert_width")
        return round_to(output_td, x.dtype).reshape(x.shape)
