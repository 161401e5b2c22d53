"""Mixture of experts: router, routed experts, shared expert."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from v4jax.config import ModelConfig, Numerics, RouterKind
from v4jax.model.context import Context
from v4jax.model.experts import Experts, SharedExpert
from v4jax.model.parameters import Declare
from v4jax.model.router import Router
from v4jax.quant.formats import round_to


class MoE(nnx.Module):
    """Adds the shared expert to the routed ones (spec B.13)."""

    def __init__(self, declare: Declare, config: ModelConfig, kind: RouterKind, numerics: Numerics):
        self.router = Router(declare, config, kind)
        self.experts = Experts(declare, config, numerics)
        self.shared = SharedExpert(declare, config, numerics)

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t d"]:
        """Returns the experts' sum."""
        flat_td = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            tokens_t = context.tokens.reshape(-1)
            ids_tk, weights_tk, scores_te = self.router(flat_td, tokens_t, context.target)
            context.show(router_ids=ids_tk, router_scores=scores_te)
        with jax.named_scope("experts"):
            output_td = self.experts(flat_td, ids_tk, weights_tk, context)
            output_td += self.shared(flat_td, context)
            output_td = context.axes.psum(output_td, "expert_width")
        return round_to(output_td, x.dtype).reshape(x.shape)
