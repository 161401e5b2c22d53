"""The router: which experts a token uses, and with which weights."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from v4jax.config import ModelConfig, RouterKind
from v4jax.kernels import Target
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.model.parameters import Declare

SOFTPLUS_LINEAR = 20.0  # above, softplus(x) is x (the published code's threshold)
SMALLEST_LOGIT = -80.0  # below, softplus underflows and the gradient of its root would be 0/0


class Router(nnx.Module):
    """Scores experts by √softplus; chooses by score plus bias, or by a table of token ids.

    The bias takes part in the choice only. Chosen scores are normalized to sum to
    `routed_scaling_factor`; they come from the learned gate on hash layers too.

    Source: spec B.13.
    """

    def __init__(self, declare: Declare, config: ModelConfig, kind: RouterKind):
        experts, chosen = config.n_routed_experts, config.num_experts_per_tok
        self.config, self.kind = config, kind
        self.weight = declare.matrix(
            "bfloat16", (experts, config.hidden_size), ("choices", "embed")
        )
        if kind is RouterKind.HASH:
            # Neighbouring ids start at neighbouring experts; the released tables replace this.
            table = (np.arange(config.vocab_size)[:, None] + np.arange(chosen)) % experts
            self.table = declare.buffer(table.astype(np.int32), ("token_id", "chosen"))
            self.bias = None
        else:
            self.table = None
            self.bias = declare.buffer(np.zeros(experts, np.float32), ("choices",))

    def __call__(
        self, x: Float[Array, "t d"], tokens: Int[Array, "t"], target: Target
    ) -> tuple[Int[Array, "t k"], Float[Array, "t k"], Float[Array, "t e"]]:
        """Returns the ids of the chosen experts, their weights, and the scores of all experts."""
        logits_te = matmul_float32(x, self.weight[...], target=target)
        scores_te = jnp.sqrt(softplus(logits_te))
        if self.kind is RouterKind.HASH:
            ids_tk = self.table[...][tokens]
        else:
            biased_te = scores_te + self.bias[...]
            ids_tk = jax.lax.top_k(biased_te, self.config.num_experts_per_tok)[1]
            # A choice among scores that are no numbers looks like any other: it must show.
            finite_t1 = jnp.all(jnp.isfinite(biased_te), axis=-1, keepdims=True)
            scores_te = jnp.where(finite_t1, scores_te, jnp.nan)
        chosen_tk = jnp.take_along_axis(scores_te, ids_tk, axis=-1)
        total = chosen_tk.sum(axis=-1, keepdims=True)
        weights_tk = chosen_tk / total * self.config.routed_scaling_factor
        return ids_tk, weights_tk, scores_te


def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns log(1 + eˣ), linear above 20."""
    x = jnp.maximum(x, SMALLEST_LOGIT)
    return jnp.where(x > SOFTPLUS_LINEAR, x, jnp.log1p(jnp.exp(jnp.minimum(x, SOFTPLUS_LINEAR))))
