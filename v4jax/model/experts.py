"""The experts' weights: routed ones, stacked, and the shared one that every token passes."""

from flax import nnx
from jaxtyping import Array, Float, Int

from v4jax.config import ModelConfig, Numerics
from v4jax.kernels import grouped_matmul
from v4jax.model.context import Context
from v4jax.model.parameters import Declare
from v4jax.parallel.expert_parallel import route


class Experts(nnx.Module):
    """The routed experts (spec B.13)."""

    def __init__(self, declare: Declare, config: ModelConfig, numerics: Numerics):
        e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.config, self.numerics = config, numerics
        self.gate_up = declare.matrix(
            config.expert_dtype, (e, 2, f, d), ("experts", "pair", "expert_width", "embed")
        )
        self.down = declare.matrix(
            config.expert_dtype, (e, d, f), ("experts", "embed", "expert_width")
        )

    def __call__(
        self,
        x: Float[Array, "t d"],
        ids: Int[Array, "t k"],
        weights: Float[Array, "t k"],
        context: Context,
    ) -> Float[Array, "t d"]:
        """Returns the weighted sum of the chosen experts' outputs, float32.

        Tokens that are padding do not travel to other devices.
        """

        def compute(parameters, x, ids, weights):
            return grouped_matmul.apply_experts(
                x,
                ids,
                weights,
                *parameters,
                limit=self.config.swiglu_limit,
                quantize_activations=self.numerics.quantize_activations,
                target=context.target,
            )

        parameters = self.gate_up.get_value(), self.down.get_value()
        real, experts = context.real.reshape(-1), self.config.n_routed_experts
        return route(context.axes, compute, parameters, x, ids, weights, real, experts)


class SharedExpert(nnx.Module):
    """The expert every token passes, with the same clamp as the routed ones."""

    def __init__(self, declare: Declare, config: ModelConfig, numerics: Numerics):
        f, d = config.moe_intermediate_size, config.hidden_size
        self.config, self.numerics = config, numerics
        self.gate_up = declare.matrix("fp8", (2, f, d), ("pair", "expert_width", "embed"))
        self.down = declare.matrix("fp8", (d, f), ("embed", "expert_width"))

    def __call__(self, x: Float[Array, "t d"], context: Context) -> Float[Array, "t d"]:
        """Returns the expert's output, float32."""
        return grouped_matmul.apply_shared_expert(
            x,
            self.gate_up.get_value(),
            self.down.get_value(),
            limit=self.config.swiglu_limit,
            quantize_activations=self.numerics.quantize_activations,
            target=context.target,
        )
